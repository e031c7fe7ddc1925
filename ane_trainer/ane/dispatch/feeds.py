"""Prepare batches for the engine: checks, and conversion to the program's precision."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ane_trainer.ane.capture.batches import Structure, program_form, tensors_of
from ane_trainer.ane.capture.ports import batch_ports
from ane_trainer.ane.compiler.lower.indices.choose import MOST_ROWS
from ane_trainer.ane.compiler.lower.indices.codes import coded, most_rows
from ane_trainer.ane.errors import DataError, NumericsWarning
from ane_trainer.ane.mil.program import MAX_FP16
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.stages import PAIR, Chosen, Port


@dataclass(frozen=True)
class Range:
    """A float type: its name, its largest number, and the integer up to which all are exact."""

    name: str
    dtype: torch.dtype
    numpy: type[np.float16] | type[np.float32]
    largest: float
    largest_integer: int


RANGES = {
    "fp16": Range("fp16", torch.float16, np.float16, MAX_FP16, 2048),
    "fp32": Range("fp32", torch.float32, np.float32, float(np.finfo(np.float32).max), 2**24),
}


#: Numbers from here down are additive masks, not data: they stand for minus infinity.
_LEAST_SCORE = -1e6


@dataclass(frozen=True)
class Slot:
    """One tensor of the batch: its place in the user's structure, its port (None: not used) and shape.

    `wide`: integers above 2048 are sent as codes. `mask`: numbers below all that a score can be (minus infinity,
    -1e9) are sent as minus infinity. `high`: the port of the integers' quotients, if they travel in two numbers.
    `bounds`: least and largest integer; `chosen`: what they choose by number. Floats are sent times `scale`, a power
    of two. `merged`: the port's shape, where it has fewer axes; of a batch in shards the first is longer.
    """

    place: str
    port: str | None
    shape: tuple[int, ...]
    wide: bool = False
    mask: bool = False
    high: str | None = None
    bounds: tuple[float, float] | None = None
    scale: float = 1.0
    chosen: Chosen | None = None
    merged: tuple[int, ...] = ()


def slot_of(place: str, shape: tuple[int, ...], port: Port | None, *, mask: bool) -> Slot:
    """The slot of a tensor that goes to `port`, if it goes anywhere."""
    if port is None:
        return Slot(place, None, shape, mask=mask)
    coded, high = port.index_encoding == "coded", port.quotients or None
    merged = port.shape if len(port.shape) < len(shape) else ()
    return Slot(place, port.name, shape, coded, mask, high, port.bounds, port.scale, port.chosen, merged)


class Feeds:
    """Turns (x, y), or x alone, into the arrays of a program's batch ports."""

    def __init__(
        self, example: Sequence[object], names: Sequence[str], inputs: Sequence[Port], precision: str = "fp16"
    ) -> None:
        self._range = RANGES[precision]
        ports = {port.target: port for port in inputs if port.role == "batch"}
        self._parts = []
        for part, name in zip(map(program_form, example), names, strict=True):
            wanted = batch_ports(part, name)
            slots = [
                slot_of(p.target, tuple(t.shape), ports.get(p.target), mask=_is_mask(t))
                for p, t in zip(wanted, tensors_of(part), strict=True)
            ]
            self._parts.append((name, Structure.of(part), slots))

    def __call__(self, *batch: object) -> dict[str, Array]:
        """Arrays of the program's precision by port name.

        Raises: DataError for another structure or shape, for values that are not finite or beyond the
        precision's range, and for integers that it does not hold exactly.
        """
        feeds: dict[str, Array] = {}
        for (name, structure, slots), part in zip(self._parts, batch, strict=True):
            leaves = [part] if isinstance(part, torch.Tensor) else tensors_of(part)
            if len(leaves) != len(slots):
                raise DataError(
                    f"{name}: needs {len(slots)} tensors like the example; got {len(leaves)}. "
                    "Pass batches of one structure.",
                    code="DATA105",
                )
            for compiled, given in structure.differing(part) if structure.constants else ():
                raise DataError(
                    f"{name}: needs {compiled!r}, which is compiled in as it is no tensor; got {given!r}. Pass it as "
                    "a tensor, or compile another program for it.",
                    code="DATA105",
                )
            for slot, given in zip(slots, leaves, strict=True):
                leaf = given if given.layout is torch.strided else given.to_dense()
                if tuple(leaf.shape) != slot.shape:
                    raise _wrong_shape(slot, leaf)
                if slot.high is not None:
                    feeds |= to_pair(slot, leaf, self._range)
                elif slot.port is not None:
                    feeds[slot.port] = to_float(slot, leaf, self._range)
        return feeds


def check_numbers(place: str, leaf: torch.Tensor, chosen: Chosen) -> None:
    """Raises: DataError DATA107 for a number of which there is no class or row, as PyTorch's losses and look-ups do."""
    counted = leaf if chosen.left_out is None else leaf[leaf != chosen.left_out]
    if not counted.numel():
        return
    low, high = (int(end) for end in torch.aminmax(counted))
    if low < chosen.least or high > chosen.most:
        what, fix = "row numbers of a table,", "Check them, or give it more rows."
        if chosen.classes:
            what, fix = "class numbers", "Check the labels, or give the model more outputs."
        raise DataError(
            f"{place} needs {what} {chosen.least} to {chosen.most}; got {low} to {high}. {fix}",
            code="DATA107",
        )


def _is_mask(tensor: torch.Tensor) -> bool:
    """Whether the example's tensor holds numbers that stand for minus infinity, and no others beyond fp16."""
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    low, high = torch.aminmax(tensor.detach())
    return bool(low <= _LEAST_SCORE) and bool(high <= RANGES["fp16"].largest)


def _wrong_shape(slot: Slot, leaf: torch.Tensor) -> DataError:
    return DataError(
        f"{slot.place}: needs the shape {list(slot.shape)} that the program was compiled for; got "
        f"{list(leaf.shape)}. Drop the last, smaller batch, or compile a program for this shape.",
        code="DATA105",
    )


def to_float(slot: Slot, leaf: torch.Tensor, limits: Range) -> Array:
    """The tensor as a contiguous array (rounded ties to even, as a host converts); rank 0 becomes [1]."""
    leaf = leaf.detach()
    if slot.chosen is not None and slot.high is None:
        check_numbers(slot.place, leaf, slot.chosen)
    if slot.scale != 1.0:
        leaf = leaf.float() * slot.scale
    if leaf.numel() and leaf.dtype != torch.bool:
        low, high = torch.aminmax(leaf)
        if slot.mask and leaf.is_floating_point():
            leaf = torch.where(leaf <= _LEAST_SCORE, -math.inf, leaf)
            low = low.clamp(min=-limits.largest)
        largest = max(-float(low), float(high))  # nan if any entry is
        if leaf.is_floating_point() and not largest <= limits.largest:
            raise _not_representable(slot, leaf, largest, limits)
        if slot.wide and limits.largest_integer < largest < most_rows(limits.name) and float(low) >= -2048:
            leaf = coded(leaf)
        elif not leaf.is_floating_point():
            most = limits.largest_integer
            _check_integers(slot.place, low, high, slot.bounds or (-most, most))
    array: Array = leaf.to("cpu", limits.dtype).contiguous().numpy()
    return array.reshape((-1, *slot.merged[1:]) if slot.merged else slot.shape or (1,))


def _check_integers(place: str, low: torch.Tensor, high: torch.Tensor, bounds: tuple[float, float]) -> None:
    """Raises: DataError for integers that the program was not compiled for."""
    least, most = bounds
    if int(high) > most or int(low) < least:
        raise DataError(
            f"{place}: needs integers from {least:.0f} to {most:.0f}, as compiled for the example or a table; "
            f"got {int(high) if int(high) > most else int(low)}. Compile with an example that has the largest.",
            code="DATA107",
        )


def to_pair(slot: Slot, leaf: torch.Tensor, limits: Range) -> dict[str, Array]:
    """Integers as remainders and quotients by port; floats by quotients towards 0."""
    if leaf.is_floating_point():
        return _float_pair(slot, leaf, limits)
    if slot.chosen is not None:
        check_numbers(slot.place, leaf, slot.chosen)
    low, high = torch.aminmax(leaf)
    _check_integers(slot.place, low, high, slot.bounds or (-MOST_ROWS, MOST_ROWS - 1))
    assert slot.port is not None
    assert slot.high is not None
    parts = {slot.port: leaf % PAIR, slot.high: torch.div(leaf, PAIR, rounding_mode="floor")}
    return {name: to_float(slot, part, limits) for name, part in parts.items()}


def _float_pair(slot: Slot, leaf: torch.Tensor, limits: Range) -> dict[str, Array]:
    """Floats that are read as integers, too: no remainder is rounded up to the next whole number; without scale."""
    numbers = leaf.detach().double()
    high = torch.trunc(numbers / PAIR)
    rest = numbers - high * PAIR
    to_float(slot, leaf, limits)  # refuses what fp16 does not hold
    slot = replace(slot, scale=1.0)
    assert slot.port is not None
    assert slot.high is not None
    low, most = to_float(slot, rest, limits), to_float(slot, high, limits)
    past = np.trunc(low) != np.trunc(rest.numpy().reshape(low.shape))
    return {slot.port: np.where(past, np.nextafter(low, low.dtype.type(0)), low), slot.high: most}


def tell_of_rounded_integers(place: str, largest: float) -> None:
    """Warn that a result of integers has some that fp16 may have rounded: `largest` is 2048 or more."""
    warnings.warn(
        f"{place}: needs integers below 2048, which fp16 holds; got {largest:.0f}, which may be rounded. Return what "
        'they are made of and compute them on the host, or use precision="fp32".',
        NumericsWarning,
        stacklevel=3,
    )


def _not_representable(slot: Slot, leaf: torch.Tensor, largest: float, limits: Range) -> DataError:
    finite = torch.isfinite(leaf)
    if bool(finite.all()):
        need, got = f"magnitudes up to {limits.largest:g} ({limits.name})", f"{largest:g}"
        fix = "Normalise the data."
    else:
        wrong = int(leaf.numel() - finite.sum())
        need, got, fix = "finite numbers", f"{wrong} that are nan or inf", "Clean the data."
    return DataError(f"{slot.place}: needs {need}; got {got}. {fix}", code="DATA106")
