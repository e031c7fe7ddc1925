"""What users feed becomes what a step takes: tensors of the right types, targets that fit the loss, whole batches.

A last, smaller batch is filled up with copies of its own examples, and each example weighs as much as its
copies together, so that the loss is the mean over the real ones: bit for bit the same program, no second
compile. That needs a loss with a value per example, and a model in which examples do not see each other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss
from torch.utils import _pytree as pytree

from ane_trainer.ane.capture.calibrate import call_on_copies, module_mode
from ane_trainer.ane.capture.losses import (
    CLASS_LOSSES,
    LOSSES,
    Loss,
    check_class_numbers,
    get_loss,
    model_loss,
)
from ane_trainer.ane.errors import DataError
from ane_trainer.training import loop
from ane_trainer.training.datasets.batches import Batches
from ane_trainer.training.datasets.description import one_hot

#: The losses that compare number with number, by function and by class.
_PLAIN = (F.mse_loss, F.l1_loss, F.huber_loss, F.smooth_l1_loss, F.binary_cross_entropy,
          F.binary_cross_entropy_with_logits)  # fmt: skip
_PLAIN_MODULES = (nn.MSELoss, nn.L1Loss, nn.HuberLoss, nn.SmoothL1Loss, nn.BCELoss, nn.BCEWithLogitsLoss)
_CLASS_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)


def takes_classes(loss: Loss) -> bool:
    """Whether the loss is one whose target may be class numbers."""
    return loss in CLASS_LOSSES or isinstance(loss, _CLASS_MODULES)


def ignored_class(loss: Loss) -> int | None:
    """The class number that the loss leaves out; None if it has none."""
    return getattr(loss, "ignore_index", -100 if loss in CLASS_LOSSES else None)


def labels_counted(loss: Loss, labels: torch.Tensor) -> torch.Tensor:
    """Which class numbers count for the loss, as a mask of their shape."""
    ignored = ignored_class(loss)
    return torch.ones_like(labels, dtype=torch.bool) if ignored is None else labels != ignored


def compares_numbers(loss: Loss) -> bool:
    """Whether the loss compares the output number by number with a target of the same shape."""
    return loss in _PLAIN or isinstance(loss, _PLAIN_MODULES)


def share_of(loss: Loss, target: object, rows: int) -> float:
    """How much the loss of a batch of `rows` counts in a mean over batches.

    Of class numbers those count that are not left out (`ignore_index`), each with the weight of its class.
    """
    classes = takes_classes(loss) and isinstance(target, torch.Tensor) and not target.is_floating_point()
    if not classes or getattr(loss, "reduction", "mean") != "mean":
        return rows
    counted = cast(torch.Tensor, target)
    counted = counted[labels_counted(loss, counted)]
    weight = getattr(loss, "weight", None)
    each = counted.numel() if weight is None else float(weight[counted].sum())
    return each * rows / max(cast(torch.Tensor, target).numel(), 1)


# One batch ---------------------------------------------------------------------------------------------------


def check_target(y: object) -> None:
    """DataError DATA105 for the target of a dictionary without labels, which only a model's own loss does without."""
    if isinstance(y, tuple) and not y:
        raise DataError(
            'needs a pair (x, y), or a dictionary with "labels", for this loss; got a dictionary without. Let the '
            'data yield pairs, add "labels", or train with loss="model" what returns its own loss.',
            code="DATA105",
        )


def fit_target(loss: Loss, output_shape: Sequence[int], y: object) -> Any:
    """The target in the type and shape that the loss wants for outputs [B, ...] of `output_shape`.

    Class numbers become int64; numbers float32; a missing or spare axis of one is added or taken; class
    numbers become rows with a single 1 for a loss that compares numbers. DataError DATA105, DATA107.
    """
    if not isinstance(y, torch.Tensor) or not (takes_classes(loss) or compares_numbers(loss)):
        return y
    shape = tuple(output_shape)
    if takes_classes(loss):
        return _fit_classes(shape, y, ignored_class(loss))
    if y.shape == shape:
        return y.float()
    if (y.numel() == int(np.prod(shape)) and (*y.shape, 1) == shape) or y.shape == (*shape, 1):
        return y.reshape(shape).float()
    if len(shape) == 2 and y.dim() == 1 and not y.is_floating_point():
        check_class_numbers(y, shape[1])
        return torch.from_numpy(one_hot(y.long().numpy(), shape[1]))
    raise DataError(
        f"y needs the shape of the model's output, {list(shape)}, for this loss; got {list(y.shape)}. "
        "Reshape the targets, or take another loss.",
        code="DATA105",
    )


def _fit_classes(shape: tuple[int, ...], y: torch.Tensor, ignored: int | None) -> torch.Tensor:
    if len(shape) < 2 or (y.is_floating_point() and y.shape == shape):
        return y
    if y.dim() == len(shape) and y.shape == (shape[0], 1, *shape[2:]) and shape[1] != 1:
        y = y.squeeze(1)
    if y.is_floating_point():
        if not bool((y == y.round()).all()):
            raise DataError(
                "y needs whole class numbers; got fractions. Round them, or regress.", code="DATA107"
            )
        y = y.long()
    y = y.long() if y.dtype == torch.bool else y
    if y.shape == shape:
        raise DataError(
            f"y needs class numbers of shape {[shape[0], *shape[2:]]}, or a probability for each class as floats; "
            f"got whole numbers of shape {list(y.shape)}. Pass y.argmax(1) of one-hot rows, or y.float().",
            code="DATA105",
        )
    if y.shape != (shape[0], *shape[2:]):
        raise DataError(
            f"y needs class numbers of shape {[shape[0], *shape[2:]]} for outputs {list(shape)}; "
            f"got {list(y.shape)}. The model's outputs need the classes as their second axis.",
            code="DATA105",
        )
    check_class_numbers(y if ignored is None else y[y != ignored], shape[1])
    return y.long()


# A last, smaller batch ---------------------------------------------------------------------------------------


def per_example(loss: Loss) -> Loss | None:
    """The loss with a value for each example, of which it is the mean; None if that is not known of it."""
    if loss in LOSSES.values() and loss is not model_loss:
        return lambda output, y: cast(Any, loss)(output, y, reduction="none")
    known = isinstance(loss, (*_PLAIN_MODULES, *_CLASS_MODULES)) and loss.reduction == "mean"
    if not known or getattr(loss, "weight", None) is not None or type(loss).__module__ != _Loss.__module__:
        return None
    single = copy.copy(cast(_Loss, loss))
    single.reduction = "none"
    return single


class WeightedLoss:
    """The mean of a loss's values, each times its weight; the target is (y, weights), see `fill_up`."""

    def __init__(self, loss: Loss) -> None:
        single = per_example(loss)
        assert single is not None
        self._single = single

    def __call__(self, output: object, target: tuple[object, torch.Tensor]) -> torch.Tensor:
        """The weighted mean."""
        y, weights = target
        losses = self._single(output, y)
        if losses.dim() > weights.dim():
            losses = losses.flatten(weights.dim()).mean(dim=-1)
        return (losses * weights).mean()


def fill_up(
    x: object, y: torch.Tensor, rows: int, ignored: int | None
) -> tuple[object, torch.Tensor, torch.Tensor]:
    """x and y with copies of their examples up to `rows`, and the weights of the losses' values, with mean 1.

    A value that counts, of n that do, weighs 1 / n, divided among its copies, times the number of all values.
    Weights have the shape of y where it holds class numbers (of which `ignored` does not count), else [rows].
    """
    count = len(y)
    source = torch.arange(rows) % count
    copies_R = torch.bincount(source, minlength=count)[source].float()
    x = pytree.tree_map_only(torch.Tensor, lambda t: t[source], x)
    if y.is_floating_point():
        return x, y[source], rows / (count * copies_R)
    counts = torch.ones_like(y, dtype=torch.bool) if ignored is None else y != ignored
    total = max(int(counts.sum()), 1)
    share = counts[source] / copies_R.reshape(-1, *([1] * (y.dim() - 1)))
    return x, y[source], share * (share.numel() / total)


def has_smaller_batch(data: Iterable[object]) -> bool | None:
    """Whether the data has a batch of fewer examples than the first one; None where only a pass over it tells."""
    if isinstance(data, Batches):
        return len(data) > 1 and not data.drop_last and data.num_examples % data.batch_size != 0
    if isinstance(data, torch.utils.data.DataLoader):
        size, dataset = data.batch_size, data.dataset
        if size is None or isinstance(dataset, torch.utils.data.IterableDataset):
            return None
        if data.drop_last:
            return False
        count = len(cast(Sized, data.sampler))
        return count > size and count % size != 0
    if isinstance(data, (list, tuple)):
        return any(_rows_of(batch) < _rows_of(data[0]) for batch in data)
    return None


def _rows_of(batch: object) -> int:
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if hasattr(leaf, "shape") and len(leaf.shape)]
    return len(leaves[0]) if leaves else 0


def mixes_examples(model: nn.Module, call: Callable[[object], object], x: object) -> bool:
    """Whether an example's output in training depends on the others in its batch, as with batch norm.

    Tried on the host: the first example's output must stay when the others are replaced. The module's
    buffers, mode and PyTorch's generator are left as they were.
    """
    rows = len(pytree.tree_leaves(x)[0])
    other = pytree.tree_map_only(torch.Tensor, lambda t: t[torch.arange(rows) * 0], x)
    buffers = {name: value.detach().clone() for name, value in model.named_buffers()}
    outputs = []
    try:
        for given in (x, other):
            with torch.no_grad(), torch.random.fork_rng(devices=[]), module_mode(model, training=True):
                torch.manual_seed(0)
                outputs.append(pytree.tree_leaves(call(given)))
    finally:
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
    first = [[leaf[0] for leaf in output if loop.has_rows(leaf)] for output in outputs]
    return not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*first, strict=True))


# A whole training --------------------------------------------------------------------------------------------


class Intake:
    """Batches of one training in the form of its step. `begin` settles that form on the first batch.

    loss      what the step is to be compiled with: the given one, or one that takes weights.
    example   the first batch, without weights.
    notes     a sentence each about what was decided or is left out.
    """

    def __init__(self, model: nn.Module, loss: str | Loss) -> None:
        self.loss = loss
        self.example: tuple[Any, Any] | None = None
        self.notes: list[str] = []
        self._obstacle: str | None = None  # why a smaller batch is left out
        self._announced = False
        self._model, self._function = model, get_loss(loss)
        self._tail: tuple[int, ...] | None = None  # of the output's shape, without the examples
        self._ignored = ignored_class(self._function)

    @property
    def weighted(self) -> bool:
        """Whether targets come with weights, so that a smaller batch can be filled up."""
        return isinstance(self.loss, WeightedLoss)

    def begin(self, data: Iterable[object], x: object, y: object) -> tuple[object, object]:
        """Settle the form on the first batch of `data`; the batch in that form. DataError if it cannot be."""
        check_target(y)
        smaller = has_smaller_batch(data)
        if self._needs_output(x, y) or smaller is not False:
            self._tail = self._try(x)
        self.example = (x, self._fitted(x, y))
        rows = loop.batch_size_of(x)
        if isinstance(data, Batches) and data.left_out:
            self.notes.append(
                f"{data.left_out:,} of {data.num_examples:,} examples are left out of each epoch, not always the "
                f"same ones: batches are of {rows}"
            )
        elif smaller is not False:
            self._obstacle = self._cannot_weigh(x)
            if self._obstacle is None:
                self.loss = WeightedLoss(self._function)
            elif smaller:
                self._announce_left_out(rows)
        fitted = self.example[1]
        if isinstance(y, torch.Tensor) and fitted.dim() > y.dim() and fitted.shape[-1] > 1:
            self.notes.append(
                f"class numbers become rows of {fitted.shape[-1]} with a single 1, for this loss"
            )
        return self._weighed(x, self.example[1], rows)

    def __call__(self, x: object, y: object, where: str) -> tuple[object, object] | None:
        """The batch in the form of the step; None for a smaller one that is left out, with a note."""
        assert self.example is not None
        with loop.located(where):
            check_target(y)
            x, y = self._form(x, y)
        if not loop.fits_step(x, y, self.example, where) and not self.weighted:
            self._announce_left_out(loop.batch_size_of(self.example[0]))
            return None
        return self._weighed(x, y, loop.batch_size_of(self.example[0]))

    def examples(self, x: object, y: object) -> int:
        """Of how many examples the loss of a batch is the mean; a loss that weighs copies by 0 says so itself."""
        own = getattr(self._function, "examples", None)
        return loop.batch_size_of(x) if own is None else int(own(y))

    def suits(self, data: Iterable[object], x: object, y: object) -> bool:
        """Whether the form that was settled on other data is that of this data, too, whose first batch is (x, y)."""
        settled = self.weighted or self._obstacle is not None or has_smaller_batch(data) is False
        try:
            return settled and (self.example is None or loop.fits_step(*self._form(x, y), self.example, ""))
        except DataError:  # which `begin` reports
            return False

    def _form(self, x: object, y: object) -> loop.Batch:
        """The batch as it is held against the example."""
        return x, self._fitted(x, y)

    def take_notes(self) -> list[str]:
        """The notes since the last call."""
        notes, self.notes = self.notes, []
        return notes

    def nothing_taken(self, where: str) -> DataError:
        """The error for an epoch of which every batch was left out."""
        return DataError(
            f"{where}: needs a batch as large as the step's; got smaller ones alone, and {self._obstacle}. "
            "Use batches of one size.",
            code="DATA105",
        )

    def _announce_left_out(self, rows: int) -> None:
        if not self._announced:
            why = self._obstacle or "the batches before had as many"
            self.notes.append(f"a batch of fewer than {rows} examples is left out: {why}")
        self._announced = True

    def counts(self, x: object, y: object) -> bool:
        """Whether anything of this batch, in the form of the step, counts: a class number that is not left out."""
        labels = y[0] if self.weighted and isinstance(y, tuple) else y
        if self._ignored is None or not isinstance(labels, torch.Tensor) or labels.is_floating_point():
            return True
        return bool((labels != self._ignored).any())

    def _weighed(self, x: object, y: Any, rows: int) -> tuple[object, object]:
        if not self.weighted:
            return x, y
        x, y, weights = fill_up(x, y, rows, self._ignored)
        return x, (y, weights)

    def _fitted(self, x: object, y: object) -> Any:
        return (
            y if self._tail is None else fit_target(self._function, (loop.batch_size_of(x), *self._tail), y)
        )

    def _needs_output(self, x: object, y: object) -> bool:
        """Whether the shape of the model's output is needed to settle the targets, or the inputs look wrong."""
        odd = any(
            leaf.dtype != torch.float32 for leaf in pytree.tree_leaves(x) if isinstance(leaf, torch.Tensor)
        )
        classes = isinstance(y, torch.Tensor) and y.dim() == 1 and y.dtype == torch.int64
        return odd or compares_numbers(self._function) or (takes_classes(self._function) and not classes)

    def _try(self, x: object) -> tuple[int, ...] | None:
        """The shape of the model's output for x, by a pass on the host; None where it is not one tensor.

        DataError where the model does not take x because of its type; other errors come when compiling.
        """
        try:
            with torch.no_grad(), module_mode(self._model, training=False):
                output = call_on_copies(self._model, x)
        except (RuntimeError, TypeError) as error:
            types = {
                str(leaf.dtype).removeprefix("torch.")
                for leaf in pytree.tree_leaves(x)
                if loop.has_rows(leaf)
            }
            if types <= {"float32"}:
                return None
            raise DataError(
                f"x needs numbers of a type that the model takes, float32 for most; got {', '.join(sorted(types))} "
                f"({str(error).splitlines()[0]}). Scale pixels, e.g. x.float() / 255, or open the data by "
                "load_dataset, which does.",
                code="DATA105",
            ) from None
        return tuple(output.shape[1:]) if isinstance(output, torch.Tensor) and output.dim() else None

    def _cannot_weigh(self, x: object) -> str | None:
        """Why a smaller batch cannot be filled up; None if it can."""
        if per_example(self._function) is None:
            return "the loss is not known to be a mean over examples"
        if self._tail is None or not isinstance(self.example and self.example[1], torch.Tensor):
            return "output and target are not one tensor each"
        if mixes_examples(self._model, lambda given: call_on_copies(self._model, given), x):
            return "examples of a batch influence each other in the model, as in batch norm"
        return None
