"""`finetune`: rows of tokens with their labels, and a tiny model that learns pairs, interrupted and resumed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ane_trainer.ane.dispatch.frozen import quantize_frozen
from ane_trainer.ane.errors import DataError
from ane_trainer.cli import run_command
from ane_trainer.training.config import load_config, make_config
from ane_trainer.training.language.defaults import DEFAULTS, complete
from ane_trainer.training.language.models import (
    Record,
    RowOptions,
    answers_of,
    load_language_model,
    open_rows,
    read_records,
    record_of,
    rows_of,
    tokens_of,
)
from ane_trainer.training.language.own_loss import IGNORED

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ane_trainer.NumericsWarning")

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def tokenizer(chat: str | None = None) -> Any:
    """A token for each character."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = {c: n for n, c in enumerate(["<unk>", "<eos>", *"abcdefghijklmnopqrstuvwxyz \n:?0123456789"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )
    found.chat_template = chat
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model with its tokenizer, and pairs whose answer is the first letter twice."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    draw = random.Random(0)
    words = ["".join(draw.choice("abc") for _ in range(3)) for _ in range(40)]
    lines = [json.dumps({"prompt": f"{word}?", "completion": word[0] * 2}) for word in words]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path


def decoded(coder: Any, ids: list[int], labels: list[int]) -> str:
    return str(coder.decode([i for i, label in zip(ids, labels, strict=True) if label != IGNORED]))


def test_only_answers_are_learned() -> None:
    record = record_of({"question": "ab?", "answer": "cd"}, "here")
    for coder, learned in ((tokenizer(), "cd<eos>"), (tokenizer(CHAT), "cd\n")):
        ids, labels = tokens_of(record, coder, chat=True)
        assert decoded(coder, ids, labels) == learned
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    turns = [
        {"role": r, "content": c}
        for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    ids, labels = tokens_of(record_of({"messages": turns}, "here"), tokenizer(CHAT), chat=True)
    assert decoded(tokenizer(CHAT), ids, labels) == "b\nd\n"
    ids, labels = tokens_of(Record(text="abc"), tokenizer(), chat=True)
    assert ids == labels
    assert len(ids) == 4


def test_rows_are_packed_or_one_a_record() -> None:
    coder = tokenizer()
    parts = [tokens_of(Record(text=text), coder, chat=True) for text in ("abc", "de", "f")]
    x, y = rows_of(parts, 4, True, coder)
    assert [coder.decode(row) for row in x] == ["abc<eos>", "de<eos>f", "<eos><eos><eos><eos>"][: len(x)]
    assert (y[:2] == x[:2]).all()
    x, y = rows_of(parts, 4, False, coder)
    assert [decoded(coder, list(a), list(b)) for a, b in zip(x, y, strict=True)] == [
        "abc<eos>",
        "de<eos>",
        "f<eos>",
    ]


def test_a_text_is_held_out_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("abcdefgh " * 40)
    splits, held_out = open_rows(
        str(tmp_path / "notes.txt"), tokenizer(), RowOptions(length=16, batch_size=2)
    )
    assert not held_out
    assert splits.val is not None
    assert splits.description.in_shape == (16,)
    x, y = next(iter(splits.val))
    assert torch.equal(x[0], y[0])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2"),
        ('{"a": 1}', "keys a"),
        ("[1]", "got list"),
        ('{"messages": [{"role": "user"}]}', "keys messages"),
    ],
)
def test_records_of_another_form_are_told_with_their_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(DataError, match=said) as raised:
        read_records(str(path))
    assert raised.value.code == "DATA120"
    assert "line 2" in str(raised.value)


def test_what_is_no_language_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a folder with config\.json") as raised:
        load_language_model(str(tmp_path))
    assert raised.value.code == "DATA119"


def test_a_tiny_model_learns_pairs_and_leaves_an_adapter(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    common = ["finetune", "model", "--data", "pairs.jsonl", "--lora", "8", "--lora-targets", "all-linear", "--lr",
              "0.01", "--answers", "2", "--frozen", "int8", "--out"]  # fmt: skip
    assert run_command([*common, "run", "--epochs", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["perplexity"] < 0.8 * result["perplexity_before"]
    assert len(result["answers"]) == 2
    assert {*result["answers"][0]} == {"prompt", "expected", "answer", "after"}
    base = load_language_model("model")[0].requires_grad_(False)
    quantize_frozen(base, "int8")
    model = peft.PeftModel.from_pretrained(base, "run/adapter").eval()
    splits, _ = open_rows("pairs.jsonl", load_language_model("model")[1], RowOptions())
    assert splits.val is not None
    x, y = next(iter(splits.val))
    with torch.no_grad():
        loss = float(model(input_ids=x, labels=y).loss)
    assert loss == pytest.approx(result["history"][-1]["val_loss"], abs=0.01)
    size = (folder / "run" / "checkpoint.safetensors").stat().st_size
    assert size < 20 * sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) + 100_000
    assert run_command(["finetune", "--resume", "run", "--epochs", "5", "--json"]) == 0
    longer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert longer["epochs"] == 5
    assert longer["history"][:4] == result["history"]
    assert longer["perplexity_before"] == result["perplexity_before"]
    assert run_command(["evaluate", "run", "--json"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["test_loss"] == pytest.approx(longer["history"][-1]["val_loss"], rel=1e-3)
    assert again["perplexity"] == pytest.approx(longer["perplexity"], rel=1e-3)
    assert run_command(["predict", "run", "--index", "0:2", "--tokens", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["predictions"]
    assert [(each["input"], each["truth"]) for each in told] == [
        (each["prompt"], each["expected"]) for each in longer["answers"]
    ]
    for wrong in (["--index", "99"], ["--index", "x"]):
        assert run_command(["predict", "run", *wrong]) == 1
    assert "held-out records" in capsys.readouterr().err
    assert run_command(["predict", "run", "pairs.jsonl"]) == 1
    assert "needs --text or --index" in capsys.readouterr().err
    assert run_command(["finetune", "--resume", "run", "--lr", "1"]) == 1
    assert "--resume keeps the run's options" in capsys.readouterr().err


def test_data_and_files_that_are_not_there_are_told_before_the_model_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A minute of tries to reach the hub came first; a damaged GGUF file ended in a traceback."""
    (tmp_path / "pairs.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\0\0")
    for model, data, said in (
        ("no/such-model", "none.jsonl", "DATA101 "),
        ("none.gguf", "pairs.jsonl", "DATA119 "),
        ("cut.gguf", "pairs.jsonl", "DATA119 "),
    ):
        place = str(tmp_path / model) if model.endswith(".gguf") else model
        words = ["finetune", place, "--data", str(tmp_path / data), "--out", str(tmp_path / "run")]
        assert run_command(words) == 1
        assert capsys.readouterr().err.startswith(said)


def test_few_pairs_get_the_updates_that_teach_a_form(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch at 2e-4 taught 60 pairs nothing; what is chosen instead is said, and stays when the run goes on."""
    monkeypatch.chdir(folder)
    words = ["finetune", "model", "--data", "pairs.jsonl", "--answers", "0", "--batch-size", "2"]
    assert run_command([*words, "--out", "run", "--fidelity", "fast"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "6 epochs of 18 updates: at least 100 are wanted (--epochs)" in told
    assert "lr 0.001, usual for an adapter of" in told
    config = load_config("run/config.toml")
    assert (config.epochs, config.lr) == (6, 1e-3)
    assert run_command(["finetune", "--resume", "run", "--epochs", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["epochs"] == 7


def test_questions_of_one_length_are_answered_together_as_each_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, coder = load_language_model(str(folder / "model"))
    torch.manual_seed(1)
    for parameter in model.parameters():  # so that answers differ, and end after some tokens
        parameter.data = torch.randn_like(parameter) * 0.5
    asked: list[Any] = ["abc?", "bca?", "ab?", "cab?", "cc?", "b c?"]
    alone = [answers_of(model, coder, [each], tokens=40)[0] for each in asked]
    made: list[int] = []
    whole = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **given: (made.append(len(given["input_ids"])), whole(**given))[1]
    )
    assert answers_of(model, coder, asked, tokens=40) == alone
    assert len({*map(len, alone)}) > 1
    assert made == [2, 4]


def test_options_that_were_not_given_are_chosen_by_rows_and_parameters() -> None:
    def chosen(batches: int, parameters: int = 10**8, adapter: bool = True, **given: Any) -> Any:
        config = make_config({**DEFAULTS, "dataset": "pairs.jsonl", "model": "m", **given})
        completed, lines = complete(config, batches, parameters, adapter)
        return completed.epochs, completed.lr, len(lines)

    assert chosen(45) == (3, 1e-3, 2)
    assert chosen(100) == (1, 1e-3, 2)
    assert chosen(99) == (2, 1e-3, 2)
    assert chosen(1) == (10, 1e-3, 2)
    assert chosen(45, accumulate=4) == (10, 1e-3, 2)
    assert chosen(45, adapter=False) == (3, pytest.approx(1e-4), 2)
    assert chosen(45, parameters=8 * 10**9) == (3, 3e-4, 2)
    assert chosen(45, epochs=1, lr=2e-4) == (1, 2e-4, 0)
    assert chosen(45, optimizer="sgd") == (3, None, 1)


@pytest.mark.parametrize("option", ["--lr", "--batch-size"])
def test_what_finetune_does_not_find_by_trying_is_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were taken without a word: a rate of 0.001, batches of 128."""
    assert run_command(["finetune", "m", "--data", "pairs.jsonl", option, "auto"]) == 1
    assert f"finetune: {option[2:]} needs a number; got 'auto'" in " ".join(capsys.readouterr().err.split())
