"""Matrix product on the engine's multiply-accumulate unit, bit for bit: matmul, linear, im2col convolution.

The law (M6 notes/numerics.md, measured on M4 and M6; with it ANEForge's published GEMM errors of M1, M1 Max,
M2 Pro, M4, M5 and M5 Pro reproduce): operands are decoded fp16; each exact product is dropped if its
exponents sum to -17 or less (subnormals count as -14), else rounded half away from zero to 2^-16; products
are summed in a signed 32-bit accumulator; a magnitude of 32768 reached at any time, in ascending k, is inf
and sticks; the bias is the accumulator's first value, rounded likewise; the result is rounded half away
from zero to fp16, and a zero is +0.

The work is done by code compiled on first use (about 0.2 s): `mac_driver` and the modules it imports.
Results do not depend on the number of threads or on how the work is cut.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.simulator.jit import compile_ir, host_vector_width, run_parallel
from ane_trainer.ane.simulator.mac_driver import FIELDS, PANEL_DEPTH, module
from ane_trainer.ane.simulator.mac_micro import Tile, tile_for

F32 = NDArray[np.float32]

OVERFLOW = 32768.0
"""An accumulator of this magnitude is inf (ANEForge numeric_cliffs: the same on six chips)."""

_MOST_ROWS, _MOST_COLUMNS = 960, 512  # of one block: bounds the scratch memory to about 3 MB a thread
_ALONE = 1 << 19  # multiply-accumulates below which a second thread costs more than it brings


def mac_matmul(
    a: F32, b: F32, bias: F32 | None = None, *, threads: int, out: F32 | None = None
) -> F32:
    """Return `a @ b + bias` as the engine computes it.

    `a` [..., M, K] and `b` [..., K, N] are decoded fp16 (see `fp16`); leading axes broadcast. `bias`
    broadcasts to the result, for instance [N] or [M, N]. Any strides are accepted, transposed views too.
    The result [..., M, N] is decoded fp16; it is written to `out` (float32, that shape, any strides) if
    given. `threads` is the largest number of threads to use. ValueError if shapes or dtypes do not fit.
    """
    a, b = _operand("a", a), _operand("b", b)
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"mac_matmul: needs a [..., M, K] and b [..., K, N]; got {a.shape} and {b.shape}. "
                         "Transpose or reshape an operand.")
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*lead, a.shape[-2], b.shape[-1])
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32:
        raise ValueError(f"mac_matmul: needs out float32 {shape}; got {out.dtype} {out.shape}. Allocate it so.")
    if out.size == 0:
        return out
    if a.shape[-1] == 0:  # an empty sum: the bias alone
        a, b = np.zeros((*a.shape[:-1], 1), np.float32), np.zeros((*b.shape[:-2], 1, b.shape[-1]), np.float32)
    if bias is not None:
        bias = np.broadcast_to(_operand("bias", bias), shape)
    a, b = np.broadcast_to(a, (*lead, *a.shape[-2:])), np.broadcast_to(b, (*lead, *b.shape[-2:]))
    inputs = (a, b) if bias is None else (a, b, bias)
    if not out.flags.aligned or any(np.may_share_memory(out, array) for array in inputs):
        out[...] = mac_matmul(a, b, bias, threads=threads)
        return out
    run_parallel(_run_block, list(_blocks(a, b, bias, out, threads)), threads)
    return out


def _operand(name: str, array: F32) -> F32:
    array = np.asarray(array)
    if array.dtype != np.float32:
        raise ValueError(f"mac_matmul: needs {name} as float32; got {array.dtype}. Use fp16.decode.")
    return array if array.flags.aligned else array.copy()


@dataclass(frozen=True)
class _Engine:
    """The compiled entry points and their register block."""

    tile: Tile
    block: Callable[[int], None]
    ordered: Callable[..., None]


@cache
def _engine() -> _Engine:
    tile = tile_for(host_vector_width())
    functions = compile_ir(module(tile), ["block", "ordered"])
    return _Engine(tile, functions["block"], functions["ordered"])


_Block = tuple[F32, F32, F32 | None, F32]


def _blocks(a: F32, b: F32, bias: F32 | None, out: F32, threads: int) -> Iterator[_Block]:
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
    return [slice(low, high) for low, high in zip(edges[:-1], edges[1:], strict=True)]


class _Scratch(threading.local):
    """Each thread's buffers for one block; allocated once, sized for the largest block."""

    def __init__(self) -> None:
        tile = _engine().tile
        tile_rows, tile_columns = -(-_MOST_ROWS // tile.rows) + 1, -(-_MOST_COLUMNS // tile.columns) + 1
        sizes_bytes = (
            8 * PANEL_DEPTH * tile.padded_rows, 4 * PANEL_DEPTH * tile_columns * tile.columns,
            4 * tile_rows * tile.rows * tile_columns * tile.columns, 4 * tile_rows * tile.padded_rows,
            8 * tile_columns, 64,
        )
        self.buffers = [np.zeros(size // 64 * 64 + 128, np.uint8) for size in sizes_bytes]
        self.addresses = [(buffer.ctypes.data + 63) // 64 * 64 for buffer in self.buffers]
        self.report = (ctypes.c_float * 2).from_address(self.addresses[-1])
        self.arguments = (ctypes.c_int64 * len(FIELDS))()


@cache
def _scratch() -> _Scratch:
    return _Scratch()


def _run_block(a: F32, b: F32, bias: F32 | None, out: F32) -> None:
    """Compute one block [G, M, N]; recompute in order what may have overflowed."""
    scratch = _scratch()
    batch, rows, columns = out.shape
    depth = a.shape[-1]
    scratch.arguments[:] = [
        _address(a), _address(b), _address(out), 0 if bias is None else _address(bias),
        batch, rows, columns, depth, *_strides(a), *_strides(b), *_strides(out),
        *((0, 0, 0) if bias is None else _strides(bias)), *scratch.addresses,
    ]
    _engine().block(ctypes.addressof(scratch.arguments))
    bound, largest_bias = scratch.report
    if not _is_safe(bound, depth, largest_bias):
        for g in range(batch):
            _repair(a[g], b[g], None if bias is None else bias[g], out[g])


def _address(array: F32) -> int:
    return int(array.__array_interface__["data"][0])


def _strides(array: F32) -> tuple[int, ...]:
    return tuple(stride >> 2 for stride in array.strides)


def _is_safe(sum_of_magnitudes: Any, depth: int, bias_magnitude: Any) -> Any:
    """No partial sum can overflow; with room for the roundings and for float32 errors of the sum."""
    margin = 1.01 + depth * 2.0**-23
    return sum_of_magnitudes * margin + bias_magnitude + depth * 2.0**-17 + 1.0 < OVERFLOW


def _repair(a: F32, b: F32, bias: F32 | None, out: F32) -> None:
    """Recompute those results of one matrix whose sum of magnitudes reaches the limit, in ascending k."""
    engine = _engine()
    span = engine.tile.columns
    (rows, depth), columns = a.shape, out.shape[1]
    padding = -columns % span
    a = np.ascontiguousarray(a)
    b = np.ascontiguousarray(np.pad(b, ((0, 0), (0, padding))))
    start = np.zeros((rows, columns), np.float32) if bias is None else bias
    start = np.ascontiguousarray(np.pad(start, ((0, 0), (0, padding))))
    suspicious = ~_is_safe(np.abs(a) @ np.abs(b), depth, np.abs(start))
    spans = suspicious.reshape(rows, -1, span).any(axis=2)
    items = np.ascontiguousarray(np.argwhere(spans) * np.array([1, span]))
    result = np.empty(start.shape, np.float32)
    engine.ordered(_address(a), _address(b), _address(start), _address(result), _address(items),
                   len(items), depth, columns + padding)
    chosen = np.repeat(spans, span, axis=1)[:, :columns]
    out[chosen] = result[:, :columns][chosen]
