"""Stand-ins for what published scripts take from a hub: folders of the hub's names, where a script is started.

A script that names `bert-base-cased` or `nyu-mll/glue` reads such a folder before it asks the hub. Models are small,
and BERT is trained a little, so that a fine-tuning goes on from something; texts and digits have the form of those that
they stand for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"{a}{b}" for a in "bdfgklmnprst" for b in "aeiou")]
#: A metric in the form of evaluate's for MRPC, which is on the hub and not in the package.
METRIC = """
import datasets
import evaluate

class Glue(evaluate.Metric):
    def _info(self):
        whole = datasets.Value("int64")
        features = datasets.Features({"predictions": whole, "references": whole})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        right = sum(p == r for p, r in zip(predictions, references))
        both = sum(p == r == 1 for p, r in zip(predictions, references))
        return {"accuracy": right / len(references), "f1": 2 * both / max(1, sum(predictions) + sum(references))}
"""


def write_standins(script: str, folder: Path, mnist: int = 0) -> dict[str, str]:
    """Write what the script names into the folder; environment variables that it is to be started with."""
    environment: dict[str, str] = {}
    for name, write in {**STANDINS, **({"mnist": partial(_mnist, count=mnist)} if mnist else {})}.items():
        if name in script.lower() or name in script:
            environment |= write(folder) or {}
    return environment


def _pairs(count: int, rng: random.Random) -> list[dict[str, object]]:
    """Pairs of sentences: the second says the first again with a word in ten changed, or something else (label 1)."""
    rows = []
    for index in range(count):
        first = [rng.choice(WORDS[5:35]) for _ in range(rng.randint(12, 20))]
        other = index % 3 == 0
        second = [
            rng.choice(WORDS[35:]) if other else w if rng.random() < 0.9 else rng.choice(WORDS[5:])
            for w in first
        ]
        rows.append(
            {"sentence1": " ".join(first), "sentence2": " ".join(second), "label": int(other), "idx": index}
        )
    return rows


def _tokenizer(folder: Path, kind: str) -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: k for k, w in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "bert":
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[SEP]", model_max_length=64,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


def _bert(folder: Path) -> None:
    """bert-base-cased: two layers of width 32, which have seen pairs of sentences, but not these."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    tokenizer = _tokenizer(folder / "bert-base-cased", "bert")
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rows = _pairs(1280, random.Random(1))
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        pairs = [[row[f"sentence{n}"] for row in part] for n in (1, 2)]
        batch = tokenizer(*pairs, padding=True, truncation=True, return_tensors="pt")  # type: ignore[operator]
        model(**batch, labels=torch.tensor([row["label"] for row in part])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "bert-base-cased")


def _mrpc(folder: Path) -> None:
    """nyu-mll/glue, mrpc: 480 pairs to train on and 192 to validate, a label in nine wrong."""
    data = folder / "nyu-mll" / "glue"
    data.mkdir(parents=True)
    rng = random.Random(0)
    for split, count in (("train", 480), ("validation", 192)):
        rows = _pairs(count, rng)
        for row in rows[::9]:
            row["label"] = 1 - int(str(row["label"]))
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = "".join(f"\n      - split: {s}\n        path: {s}.jsonl" for s in ("train", "validation"))
    (data / "README.md").write_text(f"---\nconfigs:\n  - config_name: mrpc\n    data_files:{splits}\n---\n")


def _glue(folder: Path) -> None:
    (folder / "glue").mkdir()
    (folder / "glue" / "glue.py").write_text(METRIC)


def _qwen(folder: Path) -> None:
    """Qwen/Qwen3-0.6B: two layers of width 32, in bfloat16."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    _tokenizer(folder / "Qwen" / "Qwen3-0.6B", "gpt")
    config = Qwen3Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "Qwen" / "Qwen3-0.6B")


def _horoscope(folder: Path) -> None:
    data = folder / "karthiksagarn" / "astro_horoscope"
    data.mkdir(parents=True)
    rows = [{"horoscope": row["sentence1"]} for row in _pairs(200, random.Random(0))]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _digits(folder: Path) -> dict[str, str]:
    """MNIST: scikit-learn's digits, three pixels for one."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.zeros((len(digits.target), 28, 28), np.uint8)
    images[:, 2:26, 2:26] = np.kron(digits.images * 15.9, np.ones((3, 3)))
    labels = digits.target.astype(np.uint8)
    return _images(folder, (images[:1500], labels[:1500], images[1500:], labels[1500:]))


def _mnist(folder: Path, count: int) -> dict[str, str]:
    """The first of MNIST's own images, and a sixth as many of its test images."""
    from ane_trainer.training.datasets.fetch import fetch_files
    from ane_trainer.training.datasets.local import parse_idx
    from ane_trainer.training.datasets.table import MNIST

    raw = fetch_files(MNIST).raw
    counts = (count, count, count // 6, count // 6)
    images, labels, held_out, truth = (
        parse_idx(raw[file.name])[:n] for file, n in zip(MNIST.files, counts, strict=True)
    )
    return _images(folder, (images, labels, held_out, truth))


def _images(folder: Path, parts: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]) -> dict[str, str]:
    """Images and labels to train on and to test with, as torchvision and Keras keep MNIST."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, images, labels in (("train", *parts[:2]), ("t10k", *parts[2:])):
        count = len(labels).to_bytes(4, "big")
        sizes = (28).to_bytes(4, "big") * 2
        (raw / f"{name}-images-idx3-ubyte").write_bytes(b"\0\0\10\3" + count + sizes + images.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(b"\0\0\10\1" + count + labels.tobytes())
    (folder / "keras" / "datasets").mkdir(parents=True)
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(folder / "keras" / "datasets" / "mnist.npz", **dict(zip(names, parts, strict=True)))
    return {"KERAS_HOME": str(folder / "keras"), "KERAS_BACKEND": "torch"}


#: What a script names -> what writes it.
STANDINS: dict[str, Callable[[Path], dict[str, str] | None]] = {
    "bert-base-cased": _bert,
    "nyu-mll/glue": _mrpc,
    'evaluate.load("glue"': _glue,
    "Qwen/Qwen3-0.6B": _qwen,
    "karthiksagarn/astro_horoscope": _horoscope,
    "mnist": _digits,
}
