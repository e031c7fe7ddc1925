"""Parts of the loop: where it stands, the checks of a batch, the data's order, stopping by Ctrl-C."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ane_trainer.ane.dispatch.state import incomplete
from ane_trainer.ane.errors import DataError, Diverged, Interrupted, UsageError
from ane_trainer.training.datasets.opening import by_rows
from ane_trainer.utils import seeded

#: (x, y): x and y are tensors, or tuples or dicts of tensors.
Batch = tuple[Any, Any]


#: An epoch's mean loss beyond so many times the first step's says that training went astray.
GROWN_LOSS = 10.0


@dataclass
class Progress:
    """Where training stands: `epoch` passes are finished, `batch` batches of the next one are used.

    Counters run over the whole training; `*_before_epoch` are their values when the current epoch began.
    `skipped_steps` counts those before a resume, the compiled step counts the rest. `passed` is 1 when all
    batches of the pass are used, and what remains of the epoch is its evaluation. `first_loss` is that of the
    first step that had a finite one.
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
    passed: int = 0
    first_loss: float | None = None

    def count(self, loss: float, examples: int, *, skipped: bool) -> None:
        """One step with this loss, the mean over so many examples, is done."""
        self.steps += 1
        if math.isfinite(loss):
            self.loss_sum += loss * examples
            self.loss_count += examples
            self.first_loss = loss if self.first_loss is None else self.first_loss
        self.bad_in_a_row = self.bad_in_a_row + 1 if skipped or not math.isfinite(loss) else 0

    def next_epoch(self, skipped_steps: int) -> None:
        """The current epoch is finished; `skipped_steps` is the count of the whole training."""
        self.epoch += 1
        self.batch = self.loss_count = self.passed = 0
        self.loss_sum = 0.0
        self.steps_before_epoch = self.steps
        self.skipped_before_epoch = skipped_steps
        self.seconds_before_epoch = self.seconds_steps

    def strayed(self, loss: float) -> str | None:
        """What to say of an epoch's mean loss that is far beyond the first step's; None for any other."""
        first = self.first_loss
        if first is None or loss <= GROWN_LOSS * max(abs(first), 0.1):
            return None
        return (
            f"the loss has grown from {first:.4g} to {loss:.4g}: the model has not learned; lower the learning rate, "
            "or look for outliers in the data"
        )


def open_pass(data: Iterable[Batch], epoch: int, batch: int, state: dict[str, Any] | None) -> Iterator[Batch]:
    """Pass number `epoch` over `data` from its batch number `batch` on.

    Data with `load_state_dict` continues from `state`, data with `set_epoch` is told the number; batches that
    were used before are otherwise read again and dropped.
    """
    continued = False
    if state is not None and hasattr(data, "load_state_dict"):
        try:
            data.load_state_dict(state)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise incomplete("checkpoint", [f"the data cannot go on from its state ({error!r})"]) from None
        continued = True
    elif hasattr(data, "set_epoch"):
        data.set_epoch(epoch)
    iterator = iter(by_rows(data))
    if not continued:
        for _ in range(batch):
            next(iterator, None)
    return iterator


def first_batch(data: Iterable[Batch], seed: int) -> Batch | None:
    """The first batch of the first pass, which an earlier process compiled its step for; None if there is none.

    Another batch would do, but its numbers might lead to other scales, and so to other bits.
    """
    if iter(data) is data:
        return None
    with seeded(seed):
        for batch in open_pass(data, 0, 0, None):
            return unpack(batch, "train: first batch")
    return None


def check_epochs(epochs: int) -> None:
    """UsageError for anything but a whole number of passes."""
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 0:
        raise UsageError(f"fit: needs a whole number of epochs; got {epochs!r}. Choose one.", code="ANE104")


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


def batch_size_of(x: object) -> int:
    """The number of examples: the first dimension of the first tensor."""
    return len(tensors_of(x)[0])


def is_batch_first(x: object) -> bool:
    """Whether all tensors of a batch part have the examples as their first dimension."""
    count = batch_size_of(x)
    return all(t.dim() and len(t) == count for t in tensors_of(x))


def split_rows(x: object, size: int) -> list[Any]:
    """Parts of at most `size` examples; a part whose tensors have other first dimensions stays whole."""
    count = batch_size_of(x)
    if not is_batch_first(x):
        return [x]

    def part(start: int) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda t: t[start : start + size], x)

    return [part(start) for start in range(0, count, size)]


def first_rows(output: object, count: int, rows: int) -> Any:
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


def tensors_of(value: object) -> list[torch.Tensor]:
    """The tensors of a batch part: a tensor, or a tuple, list or dict of tensors."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def unpack(batch: object, where: str) -> tuple[Any, Any]:
    """(x, y) of a batch as tensors; DataError if it is not a pair of parts with numbers, of equal lengths.

    Of a dictionary, as Hugging Face's collators make them, y is "labels" and x the rest; without labels y is ().
    """
    if isinstance(batch, Mapping):
        with located(where):
            named = {str(name): as_tensors(part) for name, part in batch.items()}
            y = named.pop("labels", ())
            if tensors_of(named):
                check_rows(named, y)
                return named, y
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        with located(where):
            x, y = (as_tensors(part) for part in batch)
            if tensors_of(x) and tensors_of(y):
                check_rows(x, y)
                return x, y
    got, parts = type(batch).__name__, batch if isinstance(batch, (tuple, list)) else ()
    if parts:
        few = ", ".join(_kind(part) for part in parts[:3]) + (", ..." if len(parts) > 3 else "")
        got += f" of {len(parts)} ({few})"
    raise DataError(
        f"{where}: needs a pair (x, y) of tensors or arrays, or a dictionary of them with labels; got {got}. "
        "Let the data yield pairs; single examples go into torch.utils.data.DataLoader(data, batch_size=32).",
        code="DATA105",
    )


def _kind(part: object) -> str:
    """A part of a batch in a message: its type, of a tensor its shape, of a list what is in it."""
    if isinstance(part, torch.Tensor):
        return f"tensor {list(part.shape)}"
    return (
        f"{type(part).__name__} of {type(part[0]).__name__}"
        if isinstance(part, (list, tuple)) and part
        else type(part).__name__
    )


def as_tensors(part: object) -> Any:
    """Arrays and lists of numbers as tensors, float64 as float32; DataError DATA105 for complex numbers."""
    if isinstance(part, (list, tuple)) and part and all(isinstance(n, (int, float, np.number)) for n in part):
        part = np.asarray(part)
    return pytree.tree_map(_as_tensor, part)


def _as_tensor(leaf: object) -> Any:
    if isinstance(leaf, (np.ndarray, np.generic)):
        if leaf.dtype.kind not in "biufc":
            raise DataError(f"needs numbers; got dtype {leaf.dtype}. Convert it.", code="DATA105")
        leaf = torch.from_numpy(np.ascontiguousarray(leaf))
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.is_complex():
        raise DataError(
            "needs real numbers; got complex ones. Pass real and imaginary parts.", code="DATA105"
        )
    return leaf.float() if leaf.dtype == torch.float64 else leaf


def check_rows(x: object, y: object) -> None:
    """DataError DATA104, DATA105 for an empty batch, and for x and y of different lengths."""
    lengths = [len(leaf) for part in (x, y) for leaf in pytree.tree_leaves(part) if has_rows(leaf)]
    if any(length == 0 for length in lengths):
        raise DataError("needs at least one example; got none. Leave empty batches out.", code="DATA104")
    x_rows, y_rows = (
        next((len(leaf) for leaf in pytree.tree_leaves(part) if has_rows(leaf)), None) for part in (x, y)
    )
    single = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    if single and None not in (x_rows, y_rows) and x_rows != y_rows:
        raise DataError(
            f"needs a target for each example; got {x_rows} examples and {y_rows} targets. Make them equal.",
            code="DATA105",
        )


def has_rows(leaf: object) -> bool:
    """Whether it is a tensor with examples along its first axis."""
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0


def fits_step(x: object, y: object, example: tuple[object, object], where: str) -> bool:
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


def diverged(where: str, what: str, loss: float, loss_scale: float, health: Mapping[str, int]) -> Diverged:
    """ANE401: the last loss is not finite, or it is and gradients are not; `health` counts those by module."""
    wanted, fix = "a loss that stays finite", "Lower the learning rate, or look for outliers in the data."
    if math.isfinite(loss):
        worst = max(health, key=lambda name: health[name], default="")
        wanted = "gradients that fit"
        what += f"; the loss is finite ({loss:.4g}), its gradients are not" + (
            f", most often of {worst}" if worst else ""
        )
        fix = "Normalise what goes into that module, scale the loss down, or lower the learning rate."
    return Diverged(f"{where}: needs {wanted}; got {what} (loss scale {loss_scale:g}). {fix}", code="ANE401")


def empty(what: str) -> DataError:
    """The error for data without a batch."""
    return DataError(
        f"{what}: needs at least one batch; got none. Pass data that is not empty.", code="DATA104"
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


class Stop:
    """Whether training is to stop: after the step that runs, or, while nothing would be lost, at once.

    `signal` is the number of the signal that asked for it. Until `begun` is set a signal raises KeyboardInterrupt
    where it comes, but for imports, whose code drops it or makes another error of it; afterwards the first one is
    noted, and a second Ctrl-C while the checkpoint is being written is ignored.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.begun = self._raised = False

    def __call__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """KeyboardInterrupt, with the signal's number, if training is to stop."""
        if self.signal is not None:
            raise KeyboardInterrupt(self.signal)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.signal = self.signal or number
        if not self.begun and not self._raised and not _imports(frame):
            self._raised = True
            raise KeyboardInterrupt(number)


def _imports(frame: FrameType | None) -> bool:
    """As `__main__` asks it, which has its own so as to listen before it imports anything."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def interruptible() -> Iterator[Stop]:
    """Within the block, Ctrl-C, SIGTERM and SIGHUP are noted by the `Stop` that is yielded.

    A block within another one has the outer one's. Signals can be handled in the main thread only; elsewhere
    nothing is changed. A signal that the process ignores (nohup) stays ignored.
    """
    outer = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    if isinstance(outer, Stop):
        yield outer
        return
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, stop.note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within the block a signal ends in Interrupted, with the exit code that shells give it."""
    with interruptible():
        try:
            yield
        except KeyboardInterrupt as error:
            stopped = Interrupted("train: stopped before training began; there is nothing to go on from.")
            raise with_exit_code(stopped, error) from None


def with_exit_code(stopped: Interrupted, error: KeyboardInterrupt) -> Interrupted:
    """The error with the exit code of the signal that came."""
    stopped.exit_code = 128 + (error.args[0] if error.args else signal.SIGINT)
    return stopped
