"""Matrix product on the engine's multiply-accumulate unit, bit for bit: matmul, linear, im2col convolution.

The law (M6 notes/numerics.md, measured on M4 and M6; with it ANEForge's published GEMM errors of M1, M1 Max,
M2 Pro, M4, M5 and M5 Pro reproduce): operands are decoded fp16; each exact product is dropped if its
exponents sum to -17 or less (subnormals count as -14), else rounded half away from zero to 2^-16; products
are summed in a signed 32-bit accumulator; a magnitude of 32768 reached at any time, in ascending k, is inf
and sticks; the bias is the accumulator's first value, rounded likewise; the result is rounded half away
from zero to fp16, and a zero is +0.

The work is done by code compiled on first use (about 0.15 s): `driver.py` and the modules it imports.
Results do not depend on the number of threads or on how the work is cut.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.loops.jit import compile_ir, host_vector_width, run_parallel
from ane_trainer.ane.simulator.mac.driver import FIELDS, SCRATCH, module, scratch_bytes
from ane_trainer.ane.simulator.mac.micro import GROUP
from ane_trainer.ane.simulator.mac.pack import Tile, tile_for

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

OVERFLOW = 32768.0
"""An accumulator of this magnitude is inf (ANEForge numeric_cliffs: the same on six chips)."""

_MOST_ROWS, _MOST_COLUMNS = 960, 512  # of one block: bounds the scratch memory to about 3 MB a thread
_ALONE = 1 << 19  # multiply-accumulates below which a second thread costs more than it brings


def mac_matmul(a: F32, b: F32, bias: F32 | None = None, *, threads: int, out: F32 | None = None) -> F32:
    """Return `a @ b + bias` as the engine computes it.

    `a` [..., M, K] and `b` [..., K, N] are decoded fp16 (see `fp16`); leading axes broadcast. `bias`
    broadcasts to the result, for instance [N] or [M, N]. Any strides are accepted, transposed views too.
    The result [..., M, N] is decoded fp16; it is written to `out` (float32, that shape, any strides) if
    given. `threads` is the largest number of threads to use. ValueError if shapes or dtypes do not fit.
    """
    a, b = np.asarray(a), np.asarray(b)
    bias = None if bias is None else np.asarray(bias)
    if out is None:
        out = np.empty(_result_shape(a, b), np.float32)
    mac_bind(a, b, bias, threads=threads, out=out)()
    return out


def mac_bind(a: F32, b: F32, bias: F32 | None = None, *, threads: int, out: F32) -> Callable[[], None]:
    """Return a step that computes `mac_matmul(a, b, bias, out=out)` on what the arrays then hold.

    Checks and cuts once, so that a step costs little more than its arithmetic. The step keeps the arrays
    alive. If `out` overlaps an operand, the result is made elsewhere and copied.
    """
    shape = _result_shape(a, b)
    for name, array in (("a", a), ("b", b), ("bias", bias), ("out", out)):
        if array is not None and (array.dtype != np.float32 or not array.flags.aligned):
            raise ValueError(f"mac_matmul: needs {name} aligned float32; got {array.dtype}. Use decode.")
    if out.shape != shape:
        raise ValueError(f"mac_matmul: needs out {shape}; got {out.shape}. Resize it.")
    if out.size == 0:
        return lambda: None
    if any(np.may_share_memory(out, array) for array in (a, b, bias) if array is not None):
        return _bind_aside(a, b, bias, threads, out)
    if a.shape[-1] == 0:  # an empty sum: the bias alone
        a, b = np.zeros((*a.shape[:-1], 1), np.float32), np.zeros((*b.shape[:-2], 1, b.shape[-1]), np.float32)
    a, b = _broadcast(a, (*shape[:-2], *a.shape[-2:])), _broadcast(b, (*shape[:-2], *b.shape[-2:]))
    bias = None if bias is None else _broadcast(bias, shape)
    blocks = [_Block(*parts) for parts in _cut(a, b, bias, out, threads)]
    if len(blocks) == 1:
        return blocks[0].run
    calls = [(block,) for block in blocks]
    return lambda: run_parallel(_Block.run, calls, threads)


@dataclass(frozen=True)
class Gathered:
    """A matrix whose element (row, column) is `memory[rows[row] + columns[column]]`: windows of an image, for example.

    `memory` is flat float32, the tables int64.
    """

    memory: F32
    rows: I64
    columns: I64

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)

    @property
    def swapped(self) -> Gathered:
        """The transposed matrix."""
        return Gathered(self.memory, self.columns, self.rows)

    def part(self, rows: slice, columns: slice) -> Gathered:
        """Some of its rows and columns."""
        return Gathered(self.memory, self.rows[rows], self.columns[columns])

    def dense(self) -> F32:
        """The matrix itself, a copy."""
        return np.asarray(self.memory[self.rows[:, None] + self.columns])


def mac_bind_gathered(a: Gathered | F32, b: Gathered | F32, *, threads: int, out: F32) -> Callable[[], None]:
    """As `mac_bind` of two matrices of which one or both are gathered; `out` overlaps neither."""
    blocks = [_Block(*parts) for parts in _cut_matrix(a, b, out, threads)]
    if len(blocks) == 1:
        return blocks[0].run
    calls = [(block,) for block in blocks]
    return lambda: run_parallel(_Block.run, calls, threads)


def _bind_aside(a: F32, b: F32, bias: F32 | None, threads: int, out: F32) -> Callable[[], None]:
    aside = np.empty(out.shape, np.float32)
    compute = mac_bind(a, b, bias, threads=threads, out=aside)

    def step() -> None:
        compute()
        np.copyto(out, aside)

    return step


def _result_shape(a: F32, b: F32) -> tuple[int, ...]:
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"mac_matmul: needs a [..., M, K] and b [..., K, N]; got {a.shape} and {b.shape}. "
            "Transpose or reshape an operand."
        )
    if a.ndim == b.ndim == 2:
        return (a.shape[0], b.shape[1])
    return (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])


def _broadcast(array: F32, shape: tuple[int, ...]) -> F32:
    return array if array.shape == shape else np.broadcast_to(array, shape)


@dataclass(frozen=True)
class _Engine:
    """The compiled entry points and their register block."""

    tile: Tile
    block: Callable[[int, int], None]
    ordered: Callable[..., None]


def _engine() -> _Engine:
    return _engine_of_width(host_vector_width())


@cache
def _engine_of_width(lanes: int) -> _Engine:
    tile = tile_for(lanes)
    functions = compile_ir(module(tile), ["block", "ordered"], vectorize=False)
    return _Engine(tile, functions["block"], functions["ordered"])


_Parts = tuple[Gathered | F32, Gathered | F32, F32 | None, F32]


def _cut(a: F32, b: F32, bias: F32 | None, out: F32, threads: int) -> Iterator[_Parts]:
    """Cut the product into independent blocks of three-axis views (batch, rows, columns)."""
    tile = _engine().tile
    rows, columns = out.shape[-2:]
    if 10 * _padded(columns, rows, tile) < 9 * _padded(rows, columns, tile):  # less padding transposed
        a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
        out, bias = out.swapaxes(-1, -2), None if bias is None else bias.swapaxes(-1, -2)
        rows, columns = columns, rows
    a, b, out = _three(a), _three(b), _three(out)
    bias = None if bias is None else _three(bias)
    wanted = _wanted(out.size * a.shape[-1], threads)
    batch_cuts = _cuts(out.shape[-3], 1, out.shape[-3], wanted)
    wanted = -(-wanted // (len(batch_cuts) * (out[..., 0, 0, 0].size)))
    along_rows = -(-rows // tile.rows) >= -(-columns // tile.columns)
    row_cuts = _cuts(rows, tile.rows, _MOST_ROWS, wanted if along_rows else 1)
    column_cuts = _cuts(columns, tile.columns, _MOST_COLUMNS, 1 if along_rows else wanted)
    for outer in np.ndindex(out.shape[:-3]):
        for g in batch_cuts:
            for m in row_cuts:
                for n in column_cuts:
                    part = None if bias is None else bias[outer][g, m, n]
                    yield a[outer][g, m], b[outer][g, :, n], part, out[outer][g, m, n]


def _cut_matrix(a: Gathered | F32, b: Gathered | F32, out: F32, threads: int) -> Iterator[_Parts]:
    """As `_cut` for one matrix."""
    tile = _engine().tile
    rows, columns = out.shape
    if 10 * _padded(columns, rows, tile) < 9 * _padded(rows, columns, tile):
        a, b, out = _swapped(b), _swapped(a), out.T
        rows, columns = columns, rows
    wanted = _wanted(out.size * a.shape[-1], threads)
    along_rows = -(-rows // tile.rows) >= -(-columns // tile.columns)
    for m in _cuts(rows, tile.rows, _MOST_ROWS, wanted if along_rows else 1):
        for n in _cuts(columns, tile.columns, _MOST_COLUMNS, 1 if along_rows else wanted):
            yield _part(a, m, slice(None)), _part(b, slice(None), n), None, out[None, m, n]


def _swapped(matrix: Gathered | F32) -> Gathered | F32:
    return matrix.swapped if isinstance(matrix, Gathered) else matrix.T


def _part(matrix: Gathered | F32, rows: slice, columns: slice) -> Gathered | F32:
    return matrix.part(rows, columns) if isinstance(matrix, Gathered) else matrix[None, rows, columns]


def _three(array: F32) -> F32:
    return array[None] if array.ndim == 2 else array


def _padded(rows: int, columns: int, tile: Tile) -> int:
    return -(-rows // tile.rows) * tile.rows * -(-columns // tile.columns) * tile.columns


def _wanted(work: int, threads: int) -> int:
    """Number of blocks that keeps the threads busy: more than threads if the work is long."""
    if threads <= 1 or work < _ALONE:
        return 1
    return threads if work < 16 * _ALONE else 2 * threads


def _cuts(size: int, unit: int, most: int, wanted: int) -> list[slice]:
    """Cut an axis into about equal parts, at multiples of `unit`, none longer than `most`."""
    units = -(-size // unit)
    count = min(units, max(wanted, -(-size // most)))
    edges = [unit * (units * i // count) for i in range(count)] + [size]
    return [slice(low, high) for low, high in pairwise(edges)]


class _Scratch(threading.local):
    """Each thread's buffers for one block; allocated once, sized for the largest block."""

    def __init__(self) -> None:
        tile = _engine().tile
        sizes = scratch_bytes(tile, _MOST_ROWS + tile.rows, _MOST_COLUMNS + tile.columns)
        self.buffers = [np.zeros(size + 64, np.uint8) for size in sizes]
        addresses = [(_address(buffer) + 63) // 64 * 64 for buffer in self.buffers]
        self.report = (ctypes.c_float * 3).from_address(addresses[SCRATCH.index("report")])
        self.addresses = (ctypes.c_int64 * len(SCRATCH))(*addresses)
        self.address = ctypes.addressof(self.addresses)


@cache
def _scratch() -> _Scratch:
    return _Scratch()


class _Block:
    """One block [G, M, N] of a product, ready to run; holds the views it reads and writes."""

    def __init__(self, a: Gathered | F32, b: Gathered | F32, bias: F32 | None, out: F32) -> None:
        self._arrays = a, b, bias, out
        self._depth = a.shape[-1]
        (a_place, a_strides, a_tables), (b_place, b_strides, b_tables) = _source(a), _source(b)
        self._numbers = (ctypes.c_int64 * len(FIELDS))(
            a_place,
            b_place,
            _address(out),
            0 if bias is None else _address(bias),
            *out.shape,
            self._depth,
            *a_strides,
            *b_strides,
            *_strides(out),
            *((0, 0, 0) if bias is None else _strides(bias)),
            *a_tables,
            *b_tables,
        )
        self._address = ctypes.addressof(self._numbers)

    def run(self) -> None:
        """Compute the block; recompute in order what may have overflowed."""
        scratch = _scratch()
        _engine().block(self._address, scratch.address)
        largest_bias, bound, bound_squared = scratch.report
        if _is_safe(min(bound, math.sqrt(bound_squared)), self._depth, largest_bias):
            return
        a, b, bias, out = self._arrays
        a, b = (x.dense()[None] if isinstance(x, Gathered) else x for x in (a, b))
        for g in range(len(out)):
            _repair(a[g], b[g], None if bias is None else bias[g], out[g])


def _source(x: Gathered | F32) -> tuple[int, tuple[int, ...], tuple[int, int]]:
    """Address, strides and addresses of tables of an operand."""
    if isinstance(x, Gathered):
        return _address(x.memory), (0, 0, 0), (_address(x.rows), _address(x.columns))
    return _address(x), _strides(x), (0, 0)


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _strides(array: F32) -> tuple[int, ...]:
    return tuple(stride >> 2 for stride in array.strides)


def _is_safe(sum_of_magnitudes: Any, depth: int, bias_magnitude: object) -> Any:
    """No partial sum can overflow; with room for the roundings and for float32 errors of the sum."""
    margin = 1.01 + depth * 2.0**-23
    return sum_of_magnitudes * margin + bias_magnitude + depth * 2.0**-17 + 1.0 < OVERFLOW


def _repair(a: F32, b: F32, bias: F32 | None, out: F32) -> None:
    """Recompute in ascending k those results of one matrix that may have reached the limit."""
    span = _engine().tile.columns
    (rows, depth), columns = a.shape, out.shape[1]
    a, b = np.ascontiguousarray(a), _padded_columns(b, span)
    start = np.zeros((rows, b.shape[1]), np.float32) if bias is None else _padded_columns(bias, span)
    suspicious = ~_is_safe(_bounds(a, b), depth, np.abs(start))
    spans = suspicious.reshape(rows, -1, span).any(axis=2)
    items = np.ascontiguousarray(np.argwhere(spans.T))
    spanned_b = np.ascontiguousarray(b.reshape(depth, -1, span).swapaxes(0, 1))
    room, result = _room(a, b), np.empty(start.shape, np.float32)
    arrays: tuple[Array, ...] = (a, spanned_b, start, result, room, items)
    _engine().ordered(*(_address(array) for array in arrays), len(items), depth, b.shape[1])
    chosen = np.repeat(spans, span, axis=1)[:, :columns]
    np.copyto(out, result[:, :columns], where=chosen)


def _padded_columns(array: F32, unit: int) -> F32:
    return np.ascontiguousarray(np.pad(array, ((0, 0), (0, -array.shape[1] % unit))))


def _bounds(a: F32, b: F32) -> F32:
    """Upper bounds [M, N] of sum |a||b|: the least of norm * norm, sum * max and max * sum."""
    a, b = np.abs(a), np.abs(b)
    bounds = np.outer(np.sqrt(np.einsum("mk,mk->m", a, a)), np.sqrt(np.einsum("kn,kn->n", b, b)))
    np.minimum(bounds, np.outer(a.sum(axis=1), b.max(axis=0)), out=bounds)
    return np.minimum(bounds, np.outer(a.max(axis=1), b.sum(axis=0)), out=bounds)


def _room(a: F32, b: F32) -> NDArray[np.float64]:
    """Magnitude [M, groups of k], in units of 2^-16, below which no sum can overflow within the group."""
    starts = np.arange(0, a.shape[1], GROUP)
    a_sums = np.add.reduceat(np.abs(a), starts, axis=1, dtype=np.float64)
    b_most = np.maximum.reduceat(np.abs(b).max(axis=1), starts)
    return np.asarray(2.0**31 - 65536.0 * 1.001 * a_sums * b_most - 2 * GROUP)
