"""Hugging Face's models as they are, and adapters by PEFT, against plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ane_trainer as at
from ane_trainer.training.checkpoint import CHECKPOINT, read_tensors
from ane_trainer.training.language.own_loss import LossOnly, filled, ignores_labels, labels_that_count, padded

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOKENS, LENGTH = 61, 10
CAUSAL = "CAUSAL_LM"


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls transformers by an older name


def tiny(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=TOKENS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batch(rows: int = 4, length: int = LENGTH, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tokens that follow a rule, so that something can be learned, with two rows padded."""
    start = torch.randint(0, TOKENS, (rows, 1), generator=torch.Generator().manual_seed(seed))
    ids = (start + 7 * torch.arange(length)) % TOKENS
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def fit(device: str, data: list[Any], epochs: int = 3, **options: Any) -> tuple[at.Trainer, at.Result]:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    trainer = at.Trainer(model, "model", optimizer, device=device, report=at.Reporter(), **options)
    return trainer, trainer.fit(data, epochs, val=data)


def test_a_causal_model_trains_on_dictionaries_of_any_length_as_in_pytorch() -> None:
    data = [batch(), batch(seed=1), batch(length=LENGTH - 2, seed=2), batch(rows=3, seed=3)]
    data[1] = transformers.BatchEncoding(data[1])
    trainer, result = fit("sim", data)
    _, expected = fit("cpu", data)
    assert result.steps == expected.steps == 12
    for ours, theirs in zip(result.history, expected.history, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=5e-3)
        assert ours.val_loss == pytest.approx(theirs.val_loss, rel=5e-3)
    assert expected.history[-1].val_loss < 0.9 * expected.history[0].train_loss
    assert result.agreement is not None
    assert result.agreement["agrees"]
    own = sum(float((trainer.model.eval()(**b).loss).detach()) * labels_that_count(dict(b)) for b in data)
    count = sum(labels_that_count(dict(b)) for b in data)
    assert result.test_loss == pytest.approx(own / count, rel=2e-3)


def test_padding_and_filling_up_leave_the_loss_as_it_is() -> None:
    model = LossOnly(tiny().eval())
    short = batch(rows=3, length=7)
    with torch.no_grad():
        assert float(model(**padded(short, 10))) == pytest.approx(float(model(**short)), rel=1e-5)
        assert float(model(**filled(short, 5))) == pytest.approx(float(model(**short)), rel=1e-5)
    without = {name: value for name, value in short.items() if name != "attention_mask"}
    assert padded(without, 10) is without
    assert ignores_labels(model.model, short)


class SummedLoss(torch.nn.Module):
    """Returns a loss that counts all rows, whatever their labels are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layer(input_ids.float()).squeeze(1) - labels.float()).square().mean()}


def test_a_smaller_batch_is_left_out_and_said_where_labels_of_minus_100_count() -> None:
    notes: list[str] = []

    class Notes(at.Reporter):
        def note(self, label: str, text: str) -> None:
            notes.append(text)

    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(0, 9, (n, 3)), "labels": torch.randint(0, 5, (n,))} for n in (4, 3)]
    trainer = at.Trainer(SummedLoss(), "model", device="sim", report=Notes())
    result = trainer.fit(rows, 1)
    assert result.steps == 1
    assert any("labels of -100" in text for text in notes)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type=CAUSAL),
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type=CAUSAL),
        lambda: peft.IA3Config(task_type=CAUSAL),
    ],
    ids=["prefix", "dora", "ia3"],
)
def test_adapters_of_peft_train_as_they_are(config: Any) -> None:
    model = peft.get_peft_model(tiny(), config())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = at.Trainer(model, "model", device="sim", report=at.Reporter())
    result = trainer.fit([batch()], 1)
    assert result.agreement is not None
    assert result.agreement["agrees"]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert changed <= {n for n, p in model.named_parameters() if p.requires_grad}


def adapter_trainer(model: Any = None, frozen: str = "fp16", **options: Any) -> at.Trainer:
    return at.Trainer(
        model if model is not None else tiny(), "model", lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        lora=at.LoraOptions(rank=2, frozen=frozen), device="sim", report=at.Reporter(), **options,
    )  # fmt: skip


def test_an_adapter_leaves_as_peft_writes_it_and_merged(tmp_path: Path) -> None:
    data = [batch(), batch(seed=1)]
    trainer = adapter_trainer()
    trainer.fit(data, 4)
    loss = trainer.evaluate(data).loss
    start = float(tiny().eval()(**data[0]).loss.detach())
    assert loss < start - 0.02

    def loss_of(model: Any) -> float:
        with torch.no_grad():
            return sum(float(model.eval()(**b).loss) for b in data) / 2

    trainer.save_adapter(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").glob("adapter_*")) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert loss_of(peft.PeftModel.from_pretrained(tiny(), tmp_path / "adapter")) == pytest.approx(
        loss, abs=0.01
    )
    trainer.merged_model().save_pretrained(tmp_path / "whole")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert loss_of(whole) == pytest.approx(loss, abs=0.01)


@pytest.mark.parametrize("frozen", ["fp16", "int4"])
def test_an_adapters_checkpoint_holds_no_base_and_goes_on_bit_for_bit(tmp_path: Path, frozen: str) -> None:
    data = [batch(), batch(seed=1)]
    straight = adapter_trainer(frozen=frozen, seed=3)
    straight.fit(data, 2)
    first = adapter_trainer(frozen=frozen, seed=3)
    first.fit(data, 1)
    first.save(tmp_path)
    stored = read_tensors(tmp_path / CHECKPOINT, scalars=True).tensors
    assert stored
    calibration = {"step/calibration/names", "step/calibration/sizes"}
    assert all(
        "lora_" in name or "/step/" in name or name.count("/") == 1 for name in stored.keys() - calibration
    )
    assert all(stored[name].dim() == 1 + name.endswith("sizes") for name in calibration)
    assert not any("embed_tokens" in name for name in stored)
    resumed = at.Trainer.resume(tmp_path, model=tiny(), report=at.Reporter())
    resumed.fit(data, 1)
    for (name, ours), theirs in zip(
        resumed.model.named_parameters(), straight.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    with pytest.raises(at.AneTrainerError, match="other frozen weights"):
        at.Trainer.resume(tmp_path, model=tiny(seed=1), report=at.Reporter())


def test_lora_goes_on_any_module_and_refuses_what_it_cannot_do() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
    with pytest.raises(at.AneTrainerError, match="optimizer of the adapter"):
        at.Trainer(tiny(), "model", torch.optim.Adam(tiny().parameters()), lora=at.LoraOptions())
    with pytest.raises(at.AneTrainerError, match=r"targets that the model has, e.g. 0, 2"):
        at.Trainer(net, lora=at.LoraOptions())
    with pytest.raises(at.AneTrainerError, match="rank of at least 1"):
        at.Trainer(net, lora=at.LoraOptions(rank=0))
    with pytest.raises(at.AneTrainerError, match="needs a model with an adapter"):
        at.Trainer(net).save_adapter("nowhere")
    trainer = at.Trainer(
        net, lora=at.LoraOptions(rank=1, targets="all-linear"), device="sim", report=at.Reporter()
    )
    result = trainer.fit([(x, y)], 1)
    assert result.agreement is not None
    assert result.agreement["agrees"]


def test_a_model_without_a_loss_of_its_own_is_told() -> None:
    unlabelled = {name: value for name, value in batch().items() if name != "labels"}
    trainer = at.Trainer(tiny(), "model", device="sim", report=at.Reporter())
    with pytest.raises(at.AneTrainerError, match='Let the batches hold "labels"'):
        trainer.fit([unlabelled], 1)


def test_the_model_answers_dictionaries() -> None:
    trainer = at.Trainer(tiny(), "model", device="sim", report=at.Reporter())
    asked = {name: value for name, value in batch().items() if name != "labels"}
    logits = trainer.predict(asked).logits
    with torch.no_grad():
        expected = trainer.model.eval()(**asked).logits
    assert float((logits - expected).abs().max()) < 5e-3
