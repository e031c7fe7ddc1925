"""The model in evaluation mode, by a compiled forward pass for each batch size: loss, accuracy, predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from torch.utils import _pytree as pytree

from ane_trainer.ane.capture.calibrate import call_on_copies, module_mode
from ane_trainer.ane.capture.losses import model_loss
from ane_trainer.ane.dispatch import Target
from ane_trainer.ane.errors import DataError
from ane_trainer.training import engine, loop
from ane_trainer.training.folder.results import Metrics
from ane_trainer.training.intake import check_target, fit_target, labels_counted, share_of
from ane_trainer.training.language.own_loss import LossOnly, OwnLossIntake, joined, labels_that_count
from ane_trainer.training.loop import Batch
from ane_trainer.training.scores import Scores
from ane_trainer.utils import RunningMean, count_correct

#: Rows of a program for predictions where no training batch says how many.
_ROWS = 128


class Inference:
    """Forward passes of `model` on `target`. `example` is the first batch of training, once that is known."""

    def __init__(
        self, model: nn.Module, loss: Callable[[Any, Any], torch.Tensor], target: Target, fallback: str
    ) -> None:
        self.example: Any = None
        self.scores = Scores({})  #: what is measured beside loss and accuracy
        self.model, self._loss, self._target, self._fallback = model, loss, target, fallback
        self._compiled: dict[Any, dict[int, Callable[[Any], Any]]] = {}

    def evaluate(
        self, data: Iterable[Batch], stop: loop.Stop | None = None,
        see: Callable[[Any, Any, Any], object] | None = None,
    ) -> Metrics:  # fmt: skip
        """Mean loss and accuracy over `data`; a small batch is padded. KeyboardInterrupt if `stop` says so.

        `see` is called with each batch's x, output and target.
        """
        if self._loss is model_loss:
            return self._evaluate_own(data, stop)
        loss, examples, correct, counted = RunningMean(), 0, 0, 0
        self.scores.begin()
        for number, batch in enumerate(data, 1):
            x, y = loop.unpack(batch, f"evaluate: batch {number}")
            with loop.located(f"evaluate: batch {number}"):
                check_target(y)
                output = self._forward(x)
                target = fit_target(self._loss, output.shape, y) if isinstance(output, torch.Tensor) else y
            rows = loop.batch_size_of(x)
            if share := share_of(self._loss, target, rows):  # else the loss is the mean of nothing
                with torch.no_grad():
                    loss.update(float(self._loss(output, target)), share)
            examples += rows
            labels = target if _has_classes(output, target) else y
            if _has_classes(output, labels):
                right = labels_counted(self._loss, labels)
                correct, target = correct + count_correct(output[right], labels[right]), labels
                counted += int(right.sum())
            self.scores.add(output, target)
            if see is not None:
                see(x, output, target)
            if stop is not None:
                stop.check()
        if not examples:
            raise loop.empty("evaluate")
        accuracy = correct / counted if counted else None
        return Metrics(loss.mean, accuracy, examples, self.scores.found())

    def _evaluate_own(self, data: Iterable[Batch], stop: loop.Stop | None) -> Metrics:
        """The mean of the losses that the model returns itself, by the labels that count in each batch."""
        mean, examples, intake = RunningMean(), 0, OwnLossIntake(self.model, self._loss)
        for number, batch in enumerate(data, 1):
            where = f"evaluate: batch {number}"
            x, y = loop.unpack(batch, where)
            with loop.located(where):
                whole = joined(self.model, x, y)
                count, rows = labels_that_count(whole), loop.batch_size_of(whole)
                if intake.example is None:
                    intake.begin((), whole, ())
                whole = intake.fitted(whole)
                known = self._compiled.setdefault(("loss", _kind(whole), tuple(whole)), {})
                size = loop.batch_size_of(whole)
                if size not in known:
                    known[size] = engine.make_forward(
                        LossOnly(self.model), whole, self._target, self._fallback
                    )
                value = float(known[size](whole)) if count else 0.0
            mean.update(value, count)
            examples += rows
            if stop is not None:
                stop.check()
        if not mean.count:
            raise loop.empty("evaluate")
        return Metrics(mean.mean, None, examples)

    def predict(self, x: ArrayLike | torch.Tensor | tuple[object, ...] | dict[str, Any]) -> Any:
        """The model's output for examples x [N, ...], as float32."""
        try:
            examples = loop.as_tensors(x if isinstance(x, (torch.Tensor, tuple, dict)) else np.asarray(x))
        except ValueError:
            raise DataError(
                f"predict: needs examples x [N, ...] as one array; got a {type(x).__name__} that makes none. "
                "Pass x alone, without targets; `evaluate` takes batches.",
                code="DATA105",
            ) from None
        count = loop.batch_size_of(examples)
        if not count:
            raise loop.empty("predict")
        size = self._batch_size or min(count, _ROWS)
        with loop.located("predict"):
            return loop.joined([self._forward(part, size) for part in loop.split_rows(examples, size)])

    def _forward(self, x: object, size: int | None = None) -> Any:
        """The forward program's output for x, compiled for `size` rows or more; spare rows repeat."""
        count = loop.batch_size_of(x)
        together = loop.is_batch_first(x)
        kind = _kind(x)
        compiled = self._compiled.setdefault(kind, {})
        wished = max(count, self._batch_size)
        rows = size or min((known for known in compiled if known >= count), default=wished)
        if not together:
            rows = count
        padded = pytree.tree_map_only(torch.Tensor, lambda part: _pad_rows(part, rows), x) if together else x
        if not compiled and self.example is not None and kind != _kind(self.example):
            self._check(x)
        if rows not in compiled:
            compiled[rows] = engine.make_forward(self.model, padded, self._target, self._fallback)
        return loop.first_rows(compiled[rows](padded), count, rows)

    @property
    def _batch_size(self) -> int:
        """Training's; 0 where it is not known."""
        return loop.batch_size_of(self.example) if self.example is not None else 0

    def _check(self, x: object) -> None:
        """DataError for examples unlike those of training that do not go through the model."""
        try:
            with torch.no_grad(), module_mode(self.model, training=False):
                call_on_copies(self.model, x)
        except RuntimeError as error:
            got, wanted = (
                ", ".join(
                    f"{list(t.shape[1:])} {str(t.dtype).removeprefix('torch.')}"
                    for t in loop.tensors_of(part)
                )
                for part in (x, self.example)
            )
            raise DataError(
                f"x needs examples like those of training, {wanted}; got {got} ({str(error).splitlines()[0]}). "
                "Prepare them alike.",
                code="DATA105",
            ) from None


def _kind(x: object) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    together = loop.is_batch_first(x)
    return tuple((t.shape[together:], t.dtype) for t in loop.tensors_of(x))


def _pad_rows(part: torch.Tensor, size: int) -> torch.Tensor:
    return part if len(part) == size else part[torch.arange(size) % len(part)]


def _has_classes(output: object, y: object) -> bool:
    if not (isinstance(output, torch.Tensor) and isinstance(y, torch.Tensor)):
        return False
    return output.ndim == 2 and y.ndim == 1 and not y.is_floating_point()
