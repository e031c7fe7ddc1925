"""Parts of the loop: where it stands, the checks of a batch, the data's order, stopping by Ctrl-C."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ane_trainer.ane.errors import DataError

#: (x, y): x and y are tensors, or tuples or dicts of tensors.
Batch = tuple[Any, Any]


@dataclass
class Progress:
    """Where training stands: `epoch` passes are finished, `batch` batches of the next one are used.

    Counters run over the whole training; `*_before_epoch` are their values when the current epoch began.
    `skipped_steps` counts those before a resume, the compiled step counts the rest.
    """

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    bad_in_a_row: int = 0
    steps: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    seconds_steps: float = 0.0
    steps_before_epoch: int = 0
    skipped_before_epoch: int = 0
    seconds_before_epoch: float = 0.0

    def count(self, loss: float, *, skipped: bool) -> None:
        """One step with this loss is done."""
        self.steps += 1
        if math.isfinite(loss):
            self.loss_sum += loss
            self.loss_count += 1
        self.bad_in_a_row = self.bad_in_a_row + 1 if skipped or not math.isfinite(loss) else 0

    def next_epoch(self, skipped_steps: int) -> None:
        """The current epoch is finished; `skipped_steps` is the count of the whole training."""
        self.epoch += 1
        self.batch = self.loss_count = 0
        self.loss_sum = 0.0
        self.steps_before_epoch = self.steps
        self.skipped_before_epoch = skipped_steps
        self.seconds_before_epoch = self.seconds_steps


def open_pass(data: Iterable[Batch], epoch: int, batch: int, state: dict[str, Any] | None) -> Iterator[Batch]:
    """Pass number `epoch` over `data` from its batch number `batch` on.

    Data with `load_state_dict` continues from `state`, data with `set_epoch` is told the number; batches that
    were used before are otherwise read again and dropped.
    """
    continued = False
    if state is not None and hasattr(data, "load_state_dict"):
        data.load_state_dict(state)
        continued = True
    elif hasattr(data, "set_epoch"):
        data.set_epoch(epoch)
    iterator = iter(data)
    if not continued:
        for _ in range(batch):
            next(iterator, None)
    return iterator


def check_repeatable(data: Iterable[Batch], name: str, passes: int) -> None:
    """Refuse a one-shot iterator where more than one pass is needed."""
    if passes > 1 and iter(data) is data:
        raise DataError(
            f"{name}: needs data for {passes} passes; got {type(data).__name__}, an iterator that ends once. "
            "Pass the list, dataset or DataLoader itself.",
            code="DATA104",
        )


def length_of(data: object) -> int | None:
    """The number of batches, if the data knows it."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:
        return None


def batch_size_of(x: Any) -> int:
    """The number of examples: the first dimension of the first tensor."""
    return len(tensors_of(x)[0])


def is_batch_first(x: Any) -> bool:
    """Whether all tensors of a batch part have the examples as their first dimension."""
    count = batch_size_of(x)
    return all(t.dim() and len(t) == count for t in tensors_of(x))


def split_rows(x: Any, size: int) -> list[Any]:
    """Parts of at most `size` examples; a part whose tensors have other first dimensions stays whole."""
    count = batch_size_of(x)
    if not is_batch_first(x):
        return [x]

    def part(start: int) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda t: t[start : start + size], x)

    return [part(start) for start in range(0, count, size)]


def first_rows(output: Any, count: int, rows: int) -> Any:
    """An output of `rows` examples, of which the first `count` are wanted."""
    return pytree.tree_map_only(
        torch.Tensor, lambda t: t[:count] if t.dim() and len(t) == rows else t, output
    )


def joined(outputs: list[Any]) -> Any:
    """The outputs of consecutive parts as one."""
    if len(outputs) == 1:
        return outputs[0]
    leaves, specs = zip(*(pytree.tree_flatten(output) for output in outputs), strict=True)
    merged = [
        torch.cat(parts) if isinstance(parts[0], torch.Tensor) and parts[0].dim() else parts[0]
        for parts in zip(*leaves, strict=True)
    ]
    return pytree.tree_unflatten(merged, specs[0])


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors of a batch part: a tensor, or a tuple, list or dict of tensors."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def unpack(batch: Any, where: str) -> tuple[Any, Any]:
    """(x, y) of a batch; DataError if it is not a pair with tensors in it."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if not pair or not all(tensors_of(part) for part in batch):
        raise DataError(
            f"{where}: needs a pair (x, y) of tensors; got {type(batch).__name__}. "
            "Let the data yield pairs, e.g. torch.utils.data.DataLoader over (x, y) examples.",
            code="DATA105",
        )
    return batch[0], batch[1]


def fits_step(x: Any, y: Any, example: tuple[Any, Any], where: str) -> bool:
    """True if the batch has the shapes of `example`, False for a smaller last batch; DataError otherwise."""
    shapes = [tensor.shape for tensor in tensors_of((x, y))]
    wanted = [tensor.shape for tensor in tensors_of(example)]
    if shapes == wanted:
        return True
    inner = [shape[1:] for shape in shapes] == [shape[1:] for shape in wanted]
    if inner and len({shape[0] for shape in shapes}) == 1 and shapes[0][0] < wanted[0][0]:
        return False
    raise DataError(
        f"{where}: needs tensors of shapes {_text(wanted)} like the first batch; got {_text(shapes)}. "
        "Make all batches alike; a program has fixed shapes.",
        code="DATA105",
    )


def check_classes(y: Any, classes: int | None, where: str) -> None:
    """DataError for class numbers out of 0 .. classes - 1; None: y holds no class numbers."""
    if classes is None:
        return
    lowest, highest = int(y.min()), int(y.max())
    if lowest < 0 or highest >= classes:
        raise DataError(
            f"{where}: y needs class numbers 0 to {classes - 1}; got {lowest} to {highest}. "
            "Check the labels, or give the model more outputs.",
            code="DATA107",
        )


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Within the block, errors about data begin with the place."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error.args[0]}", code=error.code) from None


def _text(shapes: list[torch.Size]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the block, the first Ctrl-C only makes the yielded function return True; the second one raises.

    Signals can be handled in the main thread only; elsewhere nothing is changed.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def note(_signal: int, _frame: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
