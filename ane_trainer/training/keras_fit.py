"""`fit_keras`: Keras' `Model.fit` in the engine's arithmetic, with its arguments and its history."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ane_trainer.ane.capture.trace.torch_private import pytree
from ane_trainer.ane.errors import UsageError
from ane_trainer.training.keras_callbacks import KerasCallbacks
from ane_trainer.training.keras_compiled import (
    CompiledLoss,
    CompiledMetrics,
    KerasModel,
    KerasRate,
    Tree,
    Weighted,
    optimizer_of_keras,
)
from ane_trainer.training.reporting.report import ConsoleReporter, Reporter
from ane_trainer.training.trainer import Trainer

#: Arguments of Keras' `fit` without a counterpart, with what they are where they do nothing.
_IDLE: Mapping[str, object] = {"initial_epoch": 0, "validation_freq": 1}


@dataclass(frozen=True)
class _More:
    """The arguments of Keras' `fit` behind the seventh."""

    validation_split: float = 0.0
    validation_data: Tree = None
    shuffle: bool = True
    class_weight: Mapping[int, float] | None = None
    sample_weight: Tree = None
    validation_batch_size: int | None = None
    steps_per_epoch: int | None = None
    validation_steps: int | None = None


def fit_keras(
    model: KerasModel, x: Tree, y: Tree = None, batch_size: int | None = None, epochs: int = 1,
    verbose: object = "auto", callbacks: Tree = None, **more: Any,
) -> Tree:  # fmt: skip
    """`model.fit(x, y, ...)` of a compiled Keras 3 model on PyTorch, on the engine or its simulator.

    Arguments are those of Keras: arrays, or structures of them, or batches (x, y) that can be run through again;
    `batch_size` (32), `epochs`, `validation_split` and `validation_data`, `shuffle`, `class_weight`, `sample_weight`,
    `callbacks`, `verbose` (0: warnings alone). What is left goes to `Trainer`: device, chip, fidelity, seed, ... Loss,
    metrics and optimizer are those of `compile`; the optimizer's state goes on in the next `fit_keras` of the same one.

    Returns Keras' `History`: loss, val_loss, and the metrics as val_NAME. On the training data metrics are not
    computed: the program has the loss alone.
    Raises: UsageError ANE104 for what has no counterpart, and what `Trainer` raises.
    """
    import keras

    chosen, options = _divided(more)
    own = optimizer_of_keras(model)
    pads = y is not None and _stands_copies(model)
    weighted = Weighted(pads or chosen.class_weight is not None or chosen.sample_weight is not None)
    train, val = _batches(x, y, batch_size or 32, chosen, weighted)
    if pads:
        train = _Filled(train, batch_size or 32)
    trainer = Trainer(
        model,
        CompiledLoss(model, weighted),
        own.optimizer,
        report=_Quiet() if verbose == 0 else ConsoleReporter(),
        metrics=CompiledMetrics(model, weighted),
        **{**own.options, **options},
    )
    history = keras.callbacks.History()
    history.set_model(model)
    given = [callbacks] if isinstance(callbacks, keras.callbacks.Callback) else list(callbacks or ())
    watching = [KerasCallbacks(*given, history, optimizer=own.own), KerasRate(own.own, own.optimizer)]
    trainer.fit(train, epochs, val, callbacks=watching)
    trainer.sync()
    return history


class _Quiet(Reporter):
    """Nothing on the terminal; what changes the result, such as a batch that is left out, as a warning of Python."""

    def note(self, topic: str, text: str) -> None:
        if topic in ("data", "warning"):
            warnings.warn(f"fit_keras: {text}", stacklevel=3)


def _stands_copies(model: KerasModel) -> bool:
    """Whether examples without weight in a batch change nothing: no batch norm, no penalty on activations."""
    statistics = any(
        v.value.is_floating_point()
        for layer in model._flatten_layers()
        if layer.trainable  # what is frozen is no statistic; batch norm then keeps its own
        for v in layer._non_trainable_variables
    )
    penalties = sum(getattr(v, "regularizer", None) is not None for v in model.trainable_variables)
    return not statistics and len(model.losses) <= penalties


def _divided(more: dict[str, Any]) -> tuple[_More, dict[str, Any]]:
    """Keras' arguments, and those of `Trainer`."""
    for name, idle in _IDLE.items():
        value = more.pop(name, idle)
        if value != idle:
            raise UsageError(
                f"fit_keras: needs {name}={idle}, which it does not have; got {value!r}. Leave it out.",
                code="ANE104",
            )
    names = {field.name for field in fields(_More)}
    return (
        _More(**{name: value for name, value in more.items() if name in names}),
        {name: value for name, value in more.items() if name not in names},
    )


def _batches(x: Tree, y: Tree, size: int, chosen: _More, weighted: Weighted) -> tuple[Tree, Tree]:
    """Training and validation batches; with weights the target of a batch is (y, weights)."""
    val = chosen.validation_data
    if y is None:  # batches already
        if weighted.by_example or chosen.validation_split:
            raise UsageError(
                "fit_keras: needs arrays x and y for validation_split, class_weight and sample_weight; got "
                f"{type(x).__name__}. Pass arrays.",
                code="ANE104",
            )
        return _Again(x, chosen.steps_per_epoch), None if val is None else _validation(
            val, chosen, weighted, size
        )
    examples = _Examples((x, _with_weights(y, chosen, weighted)))
    if chosen.validation_split and val is None:  # Keras takes the last ones, before it shuffles
        first = int(len(examples) * (1 - chosen.validation_split))
        val_loader = DataLoader(examples.part(first, len(examples)), chosen.validation_batch_size or size)
        return DataLoader(examples.part(0, first), size, shuffle=chosen.shuffle), val_loader
    loader: Tree = DataLoader(examples, size, shuffle=chosen.shuffle)
    if chosen.steps_per_epoch:
        loader = _Again(loader, chosen.steps_per_epoch)
    return loader, None if val is None else _validation(val, chosen, weighted, size)


def _validation(val: Tree, chosen: _More, weighted: Weighted, size: int) -> Tree:
    if not isinstance(val, (tuple, list)):
        return _Again(val, chosen.validation_steps)
    x, y, *weights = val
    if weighted.by_example:
        y = (y, weights[0] if weights else np.ones(_rows(x), np.float32))
    loader = DataLoader(_Examples((x, y)), chosen.validation_batch_size or size)
    return _Again(loader, chosen.validation_steps) if chosen.validation_steps else loader


def _with_weights(y: Tree, chosen: _More, weighted: Weighted) -> Tree:
    """(y, weights [N]) where examples are weighted: one for each class, for each example, or their product."""
    if not weighted.by_example:
        return y
    weights = np.ones(_rows(y), np.float32)
    if chosen.class_weight is not None:
        classes = np.asarray(y)
        if classes.ndim > 1 and classes.shape[-1] > 1:
            classes = classes.argmax(-1)
        table = chosen.class_weight
        weights *= np.array([table.get(int(label), 1.0) for label in classes.reshape(-1)], np.float32)
    if chosen.sample_weight is not None:
        weights *= np.asarray(chosen.sample_weight, np.float32).reshape(-1)
    return y, weights


def _rows(data: Tree) -> int:
    return len(pytree.tree_leaves(data)[0])


class _Examples(Dataset[Tree]):
    """Rows `first` to `last` of arrays in any structure; numbers as PyTorch holds them, float64 as float32."""

    def __init__(self, arrays: Tree, first: int = 0, last: int | None = None) -> None:
        self._arrays = pytree.tree_map(_tensor, arrays)
        self._first = first
        self._last = _rows(self._arrays) if last is None else last

    def part(self, first: int, last: int) -> _Examples:
        """The examples from `first` up to `last`."""
        return _Examples(self._arrays, first, last)

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, number: int) -> Tree:
        return pytree.tree_map(lambda array: array[self._first + number], self._arrays)


def _tensor(array: Tree) -> torch.Tensor:
    tensor = torch.as_tensor(np.asarray(array) if not isinstance(array, torch.Tensor) else array)
    return tensor.float() if tensor.dtype == torch.float64 else tensor


class _Filled:
    """Batches whose last one is filled up to `size` by copies without weight; its own examples count for more, so
    that Keras' mean over the batch is theirs.
    """

    def __init__(self, batches: Tree, size: int) -> None:
        self._batches, self._size = batches, size

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tree]:
        for x, (y, weights) in self._batches:
            rows = len(weights)
            if rows < self._size:
                take = torch.arange(self._size) % rows
                x, y, weights = pytree.tree_map(operator.itemgetter(take), (x, y, weights))
                weights[rows:] = 0.0
                weights = weights * (self._size / rows)
            yield x, (y, weights)


class _Again:
    """Batches of any kind (`PyDataset`, a DataLoader, a generator) from the first one on each time; or, with `steps`,
    as many at a time, where the last time ended.
    """

    def __init__(self, data: Tree, steps: int | None = None) -> None:
        self._data, self._steps = data, steps
        self._running: Iterator[Tree] | None = None

    def __len__(self) -> int:
        return self._steps or len(self._data)

    def __iter__(self) -> Iterator[Tree]:
        if self._steps is None:
            yield from self._once()
            return
        for _ in range(self._steps):
            batch = None if self._running is None else next(self._running, None)
            if batch is None:
                self._running = self._once()
                batch = next(self._running, None)
            if batch is None:
                return
            yield batch

    def _once(self) -> Iterator[Tree]:
        if hasattr(self._data, "on_epoch_end"):  # Keras' own kind knows its batches by number
            yield from (self._data[number] for number in range(len(self._data)))
            self._data.on_epoch_end()
        else:
            yield from self._data
