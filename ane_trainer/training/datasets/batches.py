"""`Batches`: examples as an iterable of (x, y) batches, in an order and with changes that a seed fixes.

Threads keep the next batches ready while a step runs. What is delivered depends on the seed, the number of
the pass and the number of the batch only, so a pass can be continued in its middle.
"""

from __future__ import annotations

import random as python_random
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.ane.errors import DataError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.training.datasets.augment import Augmentation, change_pixels, change_values
from ane_trainer.training.datasets.description import DataDescription

Pair = tuple[torch.Tensor, torch.Tensor]

#: Batches that are kept ready, and the threads that make them.
AHEAD, THREADS = 4, 2

T = TypeVar("T")


class Examples(Protocol):
    """Examples that can be picked by number."""

    def __len__(self) -> int: ...

    @property
    def draws(self) -> bool:
        """Whether taking draws from the global random generators, as users' transforms do."""
        ...

    def take(self, rows_B: NDArray[np.int64]) -> tuple[Array, Array]:
        """Raw x [B, *in_shape] and targets y [B] or [B, K]."""
        ...

    def targets(self) -> Array:
        """All targets [N] or [N, K]."""
        ...


@dataclass(frozen=True)
class ArrayExamples:
    """Examples in two arrays of equal length."""

    x: Array
    y: Array
    draws = False

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows_B: NDArray[np.int64]) -> tuple[Array, Array]:
        """The rows of both arrays."""
        return self.x[rows_B], self.y[rows_B]

    def targets(self) -> Array:
        """The array of targets."""
        return self.y


@dataclass(frozen=True)
class Subset:
    """The examples of `rows`, in that order."""

    examples: Examples
    rows: NDArray[np.int64]

    @property
    def draws(self) -> bool:
        """As the whole."""
        return self.examples.draws

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows_B: NDArray[np.int64]) -> tuple[Array, Array]:
        """The examples at these places of the subset."""
        return self.examples.take(self.rows[rows_B])

    def targets(self) -> Array:
        """The subset's targets."""
        return self.examples.targets()[self.rows]


class Batches:
    """An iterable of (x, y): x float32 [B, *in_shape], normalised; y int64 [B] (classes) or float32 [B, K].

    With `shuffle`, each pass (`iter()`) has a new order that depends on `seed` and the number of the pass
    only; `set_epoch(n)` chooses the number of the next one. `state_dict()` says where a pass stands, also in
    the middle of it, and `load_state_dict()` continues there with the very same batches. `drop_last` leaves
    out a last batch of fewer than `batch_size` examples. `len()` is the number of batches of a pass.
    `augment` changes the images of each pass; `ahead` batches are loaded in the background (0: none).
    """

    def __init__(
        self, examples: Examples, description: DataDescription, *, split: str = "train", batch_size: int = 128,
        seed: int = 0, shuffle: bool = False, drop_last: bool = False,
        augment: Sequence[Augmentation] = (),
    ) -> None:  # fmt: skip
        self.examples, self.description, self.split = examples, description, split
        self.batch_size, self.seed, self.shuffle, self.drop_last = batch_size, seed, shuffle, drop_last
        self.augmentations = tuple(augment)
        self.ahead = 0 if examples.draws else AHEAD  #: batches; global generators are not for two threads
        self.seconds_waited = 0.0  #: that consumers waited for batches, over all passes
        self._next_epoch = 0
        self._skip = 0  # batches of the next pass that were delivered before a resume
        self._current: tuple[int, int] | None = None  # the pass in progress: its number, batches delivered

    @property
    def name(self) -> str:
        """Of the dataset."""
        return self.description.name

    @property
    def source(self) -> str:
        """Where the data came from."""
        return self.description.source

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.description.in_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """By class number."""
        return self.description.class_names

    @property
    def num_classes(self) -> int:
        """The number of classes; labels are 0 to num_classes - 1."""
        return len(self.class_names)

    @property
    def num_examples(self) -> int:
        """The number of examples in this split (after `limit`)."""
        return len(self.examples)

    @property
    def left_out(self) -> int:
        """Examples of a pass that are in no batch, since the last one would be smaller."""
        return self.num_examples % self.batch_size if self.drop_last else 0

    @property
    def mean(self) -> float | None:
        """The one mean of images; None for other data, or one a channel."""
        return self._one(self.description.mean)

    @property
    def std(self) -> float | None:
        """The one standard deviation of images; None for other data, or one a channel."""
        return self._one(self.description.std)

    def _one(self, numbers: tuple[float, ...]) -> float | None:
        return numbers[0] if self.description.kind == "image" and len(numbers) == 1 else None

    @property
    def pixel_max(self) -> float:
        """What values are divided by first."""
        return self.description.pixel_max

    @property
    def images(self) -> torch.Tensor:
        """All examples [N, *in_shape] before normalisation."""
        return torch.from_numpy(self.examples.take(np.arange(self.num_examples))[0])

    @property
    def labels(self) -> torch.Tensor:
        """All targets."""
        return torch.from_numpy(self.examples.targets())

    def __len__(self) -> int:
        full, rest = divmod(self.num_examples, self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __repr__(self) -> str:
        size = f"{self.num_examples:,} examples, {len(self)} batches of {self.batch_size}"
        return f"Batches({self.name} {self.split}: {size})"

    def __iter__(self) -> Iterator[Pair]:
        epoch, start = self._next_epoch, self._skip
        self._next_epoch, self._skip = epoch + 1, 0
        self._current = (epoch, start)
        return self._pass(epoch, start)

    def _pass(self, epoch: int, start: int) -> Iterator[Pair]:
        order = self.order(epoch)
        numbers = range(start, len(self))
        with closing(
            in_background(lambda number: self.batch(epoch, number, order), numbers, self.ahead)
        ) as ready:
            for number in numbers:
                began = time.perf_counter()
                pair = next(ready)
                self.seconds_waited += time.perf_counter() - began
                self._current = (epoch, number + 1)
                yield pair

    def batch(self, epoch: int, number: int, order: NDArray[np.int64] | None = None) -> Pair:
        """Batch `number` of pass `epoch`; `order` is the pass's, if it is at hand."""
        rows_N = self.order(epoch) if order is None else order
        rows_B = rows_N[number * self.batch_size : (number + 1) * self.batch_size]
        with seeded_by([self.seed, epoch, number, 5]) if self.examples.draws else nullcontext():
            x, y = self.examples.take(rows_B)
        if not self.augmentations:
            return self._as_input(x), torch.from_numpy(y)
        random = np.random.Generator(np.random.PCG64([self.seed, epoch, number, 1]))
        x = self.description.normalise(change_pixels(x, self.augmentations, random))
        classes = self.num_classes if self.description.task == "classify" else None
        x, y = change_values(x, y, self.augmentations, random, classes)
        return torch.from_numpy(x), torch.from_numpy(y)

    def _as_input(self, x: Array) -> torch.Tensor:
        # NumPy picks and scales the rows: a batch is too small to gain from PyTorch's threads, and on a busy
        # machine waiting for them took 9 ms a batch (0.09 ms without).
        return torch.from_numpy(self.description.normalise(x))

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The example numbers [N] in the order of pass `epoch`; a function of the seed and `epoch` only."""
        if not self.shuffle:
            return np.arange(self.num_examples)
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        return generator.permutation(self.num_examples)

    def normalise(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Raw values to the float32 values that the model sees."""
        return self._as_input(images_BCHW.numpy())

    def set_epoch(self, epoch: int) -> None:
        """Make the next `iter()` pass number `epoch`, from its first batch."""
        self._next_epoch, self._skip, self._current = epoch, 0, None

    def state_dict(self) -> dict[str, object]:
        """Where the data stands: the pass in progress, how many of its batches are delivered, whose it is."""
        epoch, batch = self._current if self._current is not None else (self._next_epoch, self._skip)
        if batch >= len(self):
            epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch, **self._identity()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue where `state` was taken; DataError DATA103 if it belongs to other data or order."""
        added = {"augment": [], "targets_crc32": self._identity()["targets_crc32"]}  # absent from old states
        different = [f"{key} {known!r} (here {value!r})" for key, value in self._identity().items()
                     if (known := state.get(key, added.get(key))) != value]  # fmt: skip
        if different:
            raise DataError(
                f"Batches.load_state_dict: needs the state of the same data; got {', '.join(different)}. "
                "Load the dataset with the settings of the run that is resumed.",
                code="DATA103",
            )
        epoch, batch = state.get("epoch"), state.get("batch")
        if not (isinstance(epoch, int) and isinstance(batch, int) and epoch >= 0 and 0 <= batch <= len(self)):
            raise DataError(
                f"Batches.load_state_dict: needs epoch and batch of a pass; got {epoch!r} and {batch!r}. "
                "Pass what state_dict() returned.",
                code="DATA103",
            )
        self._next_epoch, self._skip, self._current = epoch, batch, None

    def _identity(self) -> dict[str, object]:
        keys = ("name", "split", "num_examples", "batch_size", "seed", "shuffle", "drop_last")
        return {
            **{key: getattr(self, key) for key in keys},
            "augment": [str(item) for item in self.augmentations],
            "targets_crc32": zlib.crc32(np.ascontiguousarray(self.examples.targets()).tobytes()),
        }


@contextmanager
def seeded_by(numbers: Sequence[int]) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's generators within the block, then put them back."""
    state = int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint32)[0])
    before_python, before_numpy = python_random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(state)
        np.random.seed(state)
        python_random.seed(state)
        try:
            yield
        finally:
            python_random.setstate(before_python)
            np.random.set_state(before_numpy)


def in_background(make: Callable[[int], T], numbers: Sequence[int], ahead: int) -> Generator[T, None, None]:
    """`make(number)` for each number in turn, up to `ahead` of them made by threads before they are asked for.

    An error comes out where its batch would have; closing the iterator ends the threads.
    """
    if ahead < 1 or len(numbers) < 2:
        yield from map(make, numbers)
        return
    loader = ThreadPoolExecutor(THREADS, thread_name_prefix="ane_trainer-batches")
    waiting: deque[Future[T]] = deque()
    try:
        for number in numbers:
            waiting.append(loader.submit(make, number))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        loader.shutdown(wait=True, cancel_futures=True)
