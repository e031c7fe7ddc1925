"""The tasks of the study: a model, data in an order given by the seed, an optimizer, a number of epochs.

Models are small and the tasks those of the literature on 16-bit training, as far as their data can be had
without an account: MNIST, Fashion-MNIST, scikit-learn's digits, and the text of Python's own language reference.
"""

from __future__ import annotations

import pydoc_data.topics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ane_trainer import build_model, load_dataset
from ane_trainer.training.datasets.batches import Batches

#: Tokens in a window of the character transformer, and windows in a batch.
CONTEXT, WINDOWS = 64, 32


@dataclass(frozen=True)
class Task:
    """One row of the study. `metric`: what is compared, accuracy in percent or nats a token; `bound` in its unit.

    `warm` epochs of fp32 come before what is compared, in both arms from the same weights. `schedule`: how the
    learning rate goes.
    """

    name: str
    data: Callable[[int], tuple[Batches, Batches]]
    model: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    epochs: int
    metric: Literal["accuracy", "loss"]
    bound: float
    warm: int = 0
    schedule: str = "constant"


def _images(
    name: str, batch: int = 128, limit: int | None = None
) -> Callable[[int], tuple[Batches, Batches]]:
    return lambda seed: load_dataset(name, batch, seed, limit=(limit, None), drop_last=True)


def _text(seed: int) -> tuple[Batches, Batches]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.txt"
        path.write_text("\n\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
        return load_dataset(str(path), WINDOWS, seed, context=CONTEXT, drop_last=True)


def characters() -> int:
    """Size of the text's alphabet."""
    return len(set("\n\n".join(pydoc_data.topics.topics.values())))


def _built(
    name: str, shape: tuple[int, ...] = (1, 28, 28), classes: int = 10, **options: object
) -> Callable[[int], nn.Module]:
    return lambda seed: build_model(name, shape, classes, seed=seed, **options)  # type: ignore[arg-type]


def _batch_norm_cnn(seed: int) -> nn.Module:
    """Conv, batch norm and relu three times, pooled to 10 scores: 24,000 parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip


def _adam(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.Adam(model.parameters(), lr=rate)


def _sgd(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)


#: By name. Bounds: accuracy in points, loss in nats; for the long run relative to fp32's loss.
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("digits-mlp", _images("digits", 32), _built("mlp", (1, 8, 8)), _adam(1e-3), 20, "accuracy", 0.3),
        Task("mnist-mlp", _images("mnist"), _built("mlp"), _adam(1e-3), 3, "accuracy", 0.10),
        Task("mnist-cnn", _images("mnist"), _built("cnn"), _adam(1e-3), 1, "accuracy", 0.10),
        Task("fashion-mlp", _images("fashion-mnist"), _built("mlp"), _sgd(0.05), 3, "accuracy", 0.20),
        Task("fashion-cnn", _images("fashion-mnist"), _built("cnn"), _adam(1e-3), 1, "accuracy", 0.20),
        Task("fashion-bn-cnn", _images("fashion-mnist", 64, 19200), _batch_norm_cnn, _adam(2e-3), 1, "accuracy", 0.3,
             schedule="linear"),
        Task("fashion-vit", _images("fashion-mnist", 64, 32000), _built("transformer"), _adam(1e-3), 1, "accuracy", .3),
        Task("text-gpt", _text, _built("gpt", (CONTEXT,), characters()), _adam(1e-3), 10, "loss", 0.01),
        Task("mnist-long", _images("mnist"), _built("mlp"), _adam(1e-5), 43, "loss", 0.01, warm=2),
    )
}  # fmt: skip
