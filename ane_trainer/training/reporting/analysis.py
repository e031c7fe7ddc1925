"""Looks closely at a trained model's outputs on held-out data: confusion, per-class scores, calibration, samples.

Everything is computed in float64 from the outputs and targets; `analyse` gathers them batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.ane.mil.weights import Array

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Bins of confidence for the calibration, and samples of each kind that are kept.
BINS, SAMPLES = 10, 16


@dataclass(frozen=True)
class ClassScores:
    """One class: its examples, the share of its predictions that are right, of its examples found, and their F1."""

    name: str
    examples: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Bin:
    """Predictions of about one confidence: their number, mean confidence, and share that is right."""

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Sample:
    """One example with what the model says of it; `x` is what the model was fed, `probability` that of `predicted`."""

    index: int
    truth: str
    predicted: str
    probability: float
    loss: float
    x: NDArray[np.float32]


@dataclass(frozen=True)
class ClassAnalysis:
    """A classifier on held-out data. `confusion_TP` counts examples by true class and predicted class."""

    examples: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    top5_accuracy: float | None
    calibration_error: float
    confusion_TP: Integers
    classes: tuple[ClassScores, ...]
    calibration: tuple[Bin, ...]
    worst: tuple[Sample, ...]
    random: tuple[Sample, ...]

    def to_json(self) -> dict[str, object]:
        """Without the samples' inputs."""
        plain = {**asdict(self), "confusion_TP": self.confusion_TP.tolist()}
        for kind in ("worst", "random"):
            plain[kind] = [{k: v for k, v in sample.items() if k != "x"} for sample in plain[kind]]
        return plain


@dataclass(frozen=True)
class NumberScores:
    """One predicted number: mean absolute and root mean square error, and the share of variance explained."""

    name: str
    mae: float
    rmse: float
    r2: float


@dataclass(frozen=True)
class NumberAnalysis:
    """A regression on held-out data; `pairs_NK2` holds some (truth, prediction) of each of K numbers."""

    examples: int
    numbers: tuple[NumberScores, ...]
    pairs_NK2: Floats

    def to_json(self) -> dict[str, object]:
        """Without the pairs."""
        return {"examples": self.examples, "numbers": [asdict(row) for row in self.numbers]}


@dataclass(frozen=True)
class LabelAnalysis:
    """Labels of which several may hold for an example; one is given where its probability is above a half."""

    examples: int
    macro_f1: float
    classes: tuple[ClassScores, ...]

    def to_json(self) -> dict[str, object]:
        """As plain values."""
        return asdict(self)


Analysis = ClassAnalysis | LabelAnalysis | NumberAnalysis


def analyse(
    predict: Callable[[torch.Tensor], torch.Tensor], data: Iterable[tuple[torch.Tensor, torch.Tensor]],
    names: Sequence[str] = (), *, scale: tuple[Sequence[float], Sequence[float]] = ((0.0,), (1.0,)), seed: int = 0,
) -> ClassAnalysis | NumberAnalysis | None:  # fmt: skip
    """The analysis of a classifier (outputs [N, C], targets [N] of class numbers) or a regression ([N, K] both).

    None for anything else, such as a language model, and for data without examples. `scale` is (mean, std) by
    which regression targets were normalised; errors are told in the numbers' own unit.
    """
    seen = Seen()
    for x, y in data:
        if not seen.add(x, predict(x), y):
            return None
    return seen.analysis(names, scale=scale, seed=seed)


class Seen:
    """Inputs, outputs and targets of held-out data, gathered batch by batch."""

    def __init__(self) -> None:
        self._batches: list[tuple[NDArray[np.float32], Floats, Array]] = []

    def add(self, x: object, output: object, y: object) -> bool:
        """Keep a batch; False, and it is not kept, if it is of no kind that can be analysed."""
        if not (_is_table(output, y) and isinstance(x, torch.Tensor)):
            return False
        assert isinstance(output, torch.Tensor)
        assert isinstance(y, torch.Tensor)
        self._batches.append((x.float().numpy(), output.detach().double().numpy(), y.numpy()))
        return True

    def analysis(
        self, names: Sequence[str] = (), *, scale: tuple[Sequence[float], Sequence[float]] = ((0.0,), (1.0,)),
        seed: int = 0,
    ) -> ClassAnalysis | NumberAnalysis | None:  # fmt: skip
        """The analysis, as of `analyse`; None if nothing was kept."""
        if not self._batches:
            return None
        x_NX, output_NC, target = self._together()
        if target.ndim == 1 and target.dtype.kind == "i":
            return classes_of(output_NC, target, names, x_NX, seed)
        mean, std = (np.asarray(part, np.float64) for part in scale)
        return numbers_of(output_NC * std + mean, target.reshape(output_NC.shape) * std + mean, names)

    def label_analysis(self, names: Sequence[str] = ()) -> LabelAnalysis | None:
        """The analysis of outputs of which each is a label of its own; None if nothing was kept."""
        return labels_of(*self._together()[1:], names) if self._batches else None

    def _together(self) -> tuple[NDArray[np.float32], Floats, Array]:
        x, output, target = (np.concatenate(parts) for parts in zip(*self._batches, strict=True))
        return x, output, target


def _is_table(output: object, y: object) -> bool:
    if not (isinstance(output, torch.Tensor) and isinstance(y, torch.Tensor)) or output.ndim != 2:
        return False
    return (y.ndim == 1 and not y.is_floating_point()) or (
        y.is_floating_point() and y.numel() == output.numel()
    )


def classes_of(
    output_NC: Floats, target_N: Integers, names: Sequence[str], x_NX: NDArray[np.float32], seed: int = 0
) -> ClassAnalysis:
    """The analysis of class scores (logits) against class numbers."""
    count, width = output_NC.shape
    named = tuple(names) if len(names) == width else tuple(map(str, range(width)))
    shifted_NC = output_NC - output_NC.max(axis=1, keepdims=True)
    log_NC = shifted_NC - np.log(np.exp(shifted_NC).sum(axis=1, keepdims=True))
    predicted_N, rows = output_NC.argmax(axis=1), np.arange(count)
    confidence_N, loss_N = np.exp(log_NC[rows, predicted_N]), -log_NC[rows, target_N]
    confusion_TP = np.zeros((width, width), np.int64)
    np.add.at(confusion_TP, (target_N, predicted_N), 1)
    right = np.diagonal(confusion_TP)
    true_T, found_P = confusion_TP.sum(axis=1), confusion_TP.sum(axis=0)
    scores = tuple(
        ClassScores(named[k], int(true_T[k]), _share(right[k], found_P[k]), _share(right[k], true_T[k]),
                    _share(2 * right[k], true_T[k] + found_P[k]))
        for k in range(width)
    )  # fmt: skip
    present = [row for row in scores if row.examples]
    bins = calibration(confidence_N, predicted_N == target_N)

    def sample(n: int) -> Sample:
        truth, said = named[target_N[n]], named[predicted_N[n]]
        return Sample(int(n), truth, said, float(confidence_N[n]), float(loss_N[n]), x_NX[n])

    drawn = np.random.default_rng(seed).permutation(count)[:SAMPLES]
    above_N = (log_NC > log_NC[rows, target_N][:, None]).sum(axis=1)
    top5 = float((above_N < 5).mean()) if width > 5 else None
    return ClassAnalysis(
        count, float(right.sum() / count), float(np.mean([row.recall for row in present])),
        float(np.mean([row.f1 for row in present])), top5,
        sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / count, confusion_TP, scores, bins,
        tuple(sample(n) for n in np.argsort(-loss_N, kind="stable")[:SAMPLES]),
        tuple(sample(n) for n in np.sort(drawn)),
    )  # fmt: skip


def labels_of(output_NK: Floats, target_NK: Array, names: Sequence[str] = ()) -> LabelAnalysis:
    """The analysis of label scores (logits) against zeros and ones."""
    count, width = output_NK.shape
    given_NK, due_NK = output_NK > 0, target_NK > 0.5
    right_K, given_K, due_K = (part.sum(axis=0) for part in (given_NK & due_NK, given_NK, due_NK))
    named = tuple(names) if len(names) == width else tuple(map(str, range(width)))
    scores = tuple(
        ClassScores(named[k], int(due_K[k]), _share(right_K[k], given_K[k]), _share(right_K[k], due_K[k]),
                    _share(2 * right_K[k], given_K[k] + due_K[k]))
        for k in range(width)
    )  # fmt: skip
    return LabelAnalysis(count, float(np.mean([row.f1 for row in scores])), scores)


def calibration(confidence_N: Floats, right_N: NDArray[np.bool_]) -> tuple[Bin, ...]:
    """Predictions in equal bins of confidence, empty ones left out."""
    place_N = np.minimum((confidence_N * BINS).astype(int), BINS - 1)
    found = []
    for number in range(BINS):
        here = place_N == number
        if here.any():
            found.append(Bin(int(here.sum()), float(confidence_N[here].mean()), float(right_N[here].mean())))
    return tuple(found)


def numbers_of(
    output_NK: Floats, target_NK: Floats, names: Sequence[str] = (), most: int = 400
) -> NumberAnalysis:
    """The analysis of predicted numbers against true ones."""
    count, width = output_NK.shape
    named = tuple(names) if len(names) == width else tuple(map(str, range(width)))
    error_NK = output_NK - target_NK
    spread_K = ((target_NK - target_NK.mean(axis=0)) ** 2).sum(axis=0)
    scores = tuple(
        NumberScores(
            named[k], float(np.abs(error_NK[:, k]).mean()), float(np.sqrt((error_NK[:, k] ** 2).mean())),
            float(1 - (error_NK[:, k] ** 2).sum() / spread_K[k]) if spread_K[k] else float("nan"),
        )
        for k in range(width)
    )  # fmt: skip
    return NumberAnalysis(count, scores, np.stack([target_NK, output_NK], axis=-1)[:most])


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
