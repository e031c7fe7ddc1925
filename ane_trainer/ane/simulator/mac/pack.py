"""What enters and leaves a tile of the multiply-accumulate, as LLVM IR: operands packed into panels and measured on
the way, biases into accumulators, accumulators into results.

Layouts and the reasons for scale, step and threshold are in `micro.py`. Source strides are in elements
and may be anything (0 and negative too); rows and columns beyond the edge of a matrix are packed as zeros.
A bias is the accumulator's first value, rounded half away from zero to 2^-16; the result is rounded half
away from zero to fp16 and is never -0 (M6 notes/numerics.md, H11 for the bias).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ane_trainer.ane.simulator.loops.ir import F32, F64, I32, I64, PTR, Definition, Function, Value, Variable
from ane_trainer.ane.simulator.loops.lanes import half_away

BLOCK_DEPTH = 16  # steps of k copied at a time: source and target lines, pages too, stay near

LARGE_BITS = 0x7F000000  # float32 bits above every decoded value


@dataclass(frozen=True)
class Tile:
    """Register block: `rows` x (`vectors` * `lanes`) results; `lanes` float32 per vector register.

    Packed a holds per k `padded_rows` scaled values, then as many thresholds; packed b `columns` values.
    `masks`: the CPU has mask registers, so a masked multiply-add is one instruction.
    """

    lanes: int
    rows: int
    padded_rows: int
    vectors: int
    masks: bool

    @property
    def columns(self) -> int:
        """Columns of the result in one tile."""
        return self.lanes * self.vectors


def tile_for(lanes: int) -> Tile:
    """The register block for vectors of 16 (AVX-512), 8 (AVX2) or 4 (NEON, SSE) float32 lanes."""
    if lanes == 16:
        return Tile(16, rows=12, padded_rows=16, vectors=2, masks=True)
    if lanes == 8:
        return Tile(8, rows=4, padded_rows=4, vectors=2, masks=False)
    return Tile(4, rows=4, padded_rows=4, vectors=4, masks=False)


def pack_b(tile: Tile) -> Definition:
    """`pack_b(source, sk, sn, columns, depths, depth, valid, packed, stats, squares)`: up to `columns` columns; strides
    sk, sn, or where they are not null two tables of offsets.

    Each value is stored one float32 step away from zero (zeros stay). `stats` is two float32: the
    largest magnitude so far and the smallest nonzero magnitude so far. The columns' sums of squares are
    added to the `columns` float32 in `squares`.
    """
    f = Function(
        "pack_b", internal=True, source=PTR, sk=I64, sn=I64, columns=PTR, depths=PTR, depth=I64, valid=I64,
        packed=PTR, stats=PTR, squares=PTR,
    )  # fmt: skip
    source, sk, sn, columns, depths, depth, valid, packed, stats, all_squares = f.parameters
    lanes, integers = tile.lanes, I32.of(tile.lanes)
    full = valid.compare("eq", tile.columns)
    direct = sn.compare("eq", 1) & full & depths.is_null()
    origin, pitch = direct.choose(source, packed), direct.choose(sk, tile.columns)
    with f.when(~direct):
        _copy(f, Source(source, sn, sk, columns, depths), packed, tile.columns, (depth, valid), full)
    largest, smallest = f.variable(f.constant(integers, 0)), f.variable(f.constant(integers, LARGE_BITS))
    places = [all_squares.at(v * lanes, F32) for v in range(tile.vectors)]
    squares = [f.variable(place.load(F32.of(lanes))) for place in places]
    with f.loop(0, depth) as k:
        line, target = origin.at(k * pitch, F32), packed.at(k * tile.columns, F32)
        for v, square in enumerate(squares):
            bits = line.at(v * lanes, F32).load(integers)
            size = bits & 0x7FFFFFFF
            nonzero = size.compare("ne", 0)
            target.at(v * lanes, F32).store(bits | nonzero.to(I32))
            largest.set(largest.value.call("smax", size))
            _add_square(square, size.bits(F32))
            smallest.set(smallest.value.call("smin", nonzero.choose(size, LARGE_BITS)))
    for square, place in zip(squares, places, strict=True):
        place.store(square.value)
    for how, total, place in (("smax", largest, stats), ("smin", smallest, stats.at(1, F32))):
        place.store(total.value.reduce(how).call(how, place.load(I32)))
    return f.definition()


def pack_a(tile: Tile) -> Definition:
    """`pack_a(source, sm, sk, rows, depths, depth, valid, packed, stats, sums)`: up to `rows` rows; strides sm, sk, or
    where they are not null two tables of offsets.

    Per k: values times 2^16, then drop thresholds. `stats` gets two float32: the largest threshold, and
    the largest sum of eight neighbouring magnitudes of a row. The rows' sums of magnitudes, then their sums
    of squares, are added to the 2 * `padded_rows` float32 in `sums`.
    """
    f = Function(
        "pack_a", internal=True, source=PTR, sm=I64, sk=I64, rows=PTR, depths=PTR, depth=I64, valid=I64,
        packed=PTR, stats=PTR, sums=PTR,
    )  # fmt: skip
    source, sm, sk, rows, depths, depth, valid, packed, stats, sums = f.parameters
    lanes = tile.padded_rows
    vector, integers = F32.of(lanes), I32.of(lanes)
    _copy(
        f,
        Source(source, sm, sk, rows, depths),
        packed,
        2 * lanes,
        (depth, valid),
        valid.compare("eq", tile.rows),
    )
    thresholds, eights = (f.variable(f.constant(integers, 0)) for _ in range(2))
    square_place = sums.at(lanes, F32)
    squares = f.variable(square_place.load(vector))
    with f.loop(0, depth, 8) as first:
        group = f.variable(f.constant(vector, 0.0))
        with f.loop(first, (first + 8).call("smin", depth)) as k:
            place = packed.at(k * (2 * lanes), F32)
            bits = place.load(integers)
            size = bits & 0x7FFFFFFF
            least = threshold_bits(size)
            place.store(bits.bits(F32) * 65536.0)
            place.at(lanes, I32).store(least)
            thresholds.set(thresholds.value.call("smax", least))
            magnitude = size.bits(F32)
            group.set(group.value + magnitude)
            _add_square(squares, magnitude)
        total = group.value
        eights.set(eights.value.call("smax", total.bits(I32)))
        sums.store(sums.load(vector) + total)
    square_place.store(squares.value)
    stats.store(thresholds.value.reduce("smax"))
    stats.at(1, I32).store(eights.value.reduce("smax"))
    return f.definition()


def threshold_bits(size: Value) -> Value:
    """Bits of the least |b| that is not dropped: 2^(-16 - exp(a)), or 0 where that is 2^-14 or less.

    A subnormal a has exponent -14 (biased float32 field 113); a zero a drops nothing.
    """
    field = (size >> 23).call("smax", 127 - 14)
    wanted = size.function.constant(size.type, 127 - 16 + 127) - field
    matters = (wanted > 127 - 14) & size.compare("ne", 0)
    return matters.choose(wanted << 23, 0)


class Source(NamedTuple):
    """Where an operand's elements lie: its address, and strides along its lines and k, or tables of offsets."""

    address: Value
    line_stride: Value
    depth_stride: Value
    lines: Value
    depths: Value


def _copy(
    f: Function, source: Source, packed: Value, pitch: int, sizes: tuple[Value, Value], full: Value
) -> None:
    """packed[k * pitch + j] = source[line j, k], first zeroing the panel if it is not full; `sizes` of k and j."""
    depth, valid = sizes
    with f.when(~full):
        f.clear(packed, depth * (4 * pitch))
    strided = source.depths.is_null()
    dense = strided & source.depth_stride.compare("eq", 1)
    with f.when(dense):
        _copy_dense(f, source, packed, pitch, sizes)
    with f.when(~dense), f.loop(0, depth, BLOCK_DEPTH) as first:
        last = (first + BLOCK_DEPTH).call("smin", depth)
        with f.when(strided):
            _copy_lines(f, source, packed, pitch, (0, valid), (first, last))
        with f.when(~strided), f.loop(0, valid) as j:
            line, column = source.address.at(source.lines.at(j, I64).load(I64), F32), packed.at(j, F32)
            with f.loop(first, last) as k:
                column.at(k * pitch, F32).store(line.at(source.depths.at(k, I64).load(I64), F32).load(F32))


_SQUARE = 4
"""Lines and k of the squares that `_copy_dense` turns over in registers."""


def _copy_dense(f: Function, source: Source, packed: Value, pitch: int, sizes: tuple[Value, Value]) -> None:
    """The copy where k is dense in memory: by squares, then what they leave."""
    depth, valid = sizes
    whole_k, whole_j = depth // _SQUARE * _SQUARE, valid // _SQUARE * _SQUARE
    with f.loop(0, whole_k, _SQUARE) as k:
        with f.loop(0, whole_j, _SQUARE) as j:
            places = [source.address.at((j + i) * source.line_stride + k, F32) for i in range(_SQUARE)]
            for i, column in enumerate(_turned([place.load(F32.of(_SQUARE)) for place in places])):
                packed.at((k + i) * pitch + j, F32).store(column)
        _copy_lines(f, source, packed, pitch, (whole_j, valid), (k, k + _SQUARE))
    _copy_lines(f, source, packed, pitch, (0, valid), (whole_k, depth))


def _turned(rows: list[Value]) -> list[Value]:
    """A square of values with rows and columns exchanged."""
    half = len(rows) // 2
    for _ in range(len(rows).bit_length() - 1):
        rows = [rows[i // 2].interleaved(rows[i // 2 + half], bool(i % 2)) for i in range(len(rows))]
    return rows


def _copy_lines(
    f: Function,
    source: Source,
    packed: Value,
    pitch: int,
    lines: tuple[Value | int, Value],
    depths: tuple[Value, Value],
) -> None:
    """The copy element by element, of lines and k from the first to before the last."""
    with f.loop(*lines) as j:
        line, column = source.address.at(j * source.line_stride, F32), packed.at(j, F32)
        with f.loop(*depths) as k:
            column.at(k * pitch, F32).store(line.at(k * source.depth_stride, F32).load(F32))


def _add_square(total: Variable, value: Value) -> None:
    square = value * value
    total.set(total.value + square)


def start_tile(tile: Tile) -> Definition:
    """`start_tile(c, bias, sm, sn, rows, columns, largest)`: accumulators from the bias of strides sm, sn.

    A null `bias` means zeros. `largest` (float32) is raised to the largest |bias|. Accumulators that
    the bias alone overflows hold some wrong value.
    """
    f = Function(
        "start_tile", internal=True, c=PTR, bias=PTR, sm=I64, sn=I64, rows=I64, columns=I64, largest=PTR
    )
    c, bias, sm, sn, rows, columns, largest = f.parameters
    none = bias.is_null()
    with f.when(none):
        f.clear(c, 4 * tile.rows * tile.columns)
    with f.when(~none):
        row = f.room(F32, tile.columns)
        with f.loop(0, rows) as r:
            line = bias.at(r * sm, F32)
            with f.loop(0, columns) as j:
                row.at(j, F32).store(line.at(j * sn, F32).load(F32))
            target = c.at(r * tile.columns, I32)
            for first in range(0, tile.columns, tile.lanes // 2):
                value = row.at(first, F32).load(F32.of(tile.lanes // 2))
                target.at(first, I32).store(_clamped(units_of_bias(value)).to(I32))
                size = (value.bits(I32) & 0x7FFFFFFF).reduce("smax")
                largest.store(size.call("smax", largest.load(I32)))
    return f.definition()


def _clamped(units: Value) -> Value:
    """Within 32 bits with sign."""
    edge = 2.0**31 - 1
    units = (units < edge).choose(units, edge)
    return (units > -edge).choose(units, -edge)


def units_of_bias(bias: Value) -> Value:
    """A float32 vector in units of 2^-16, rounded half away, as float64."""
    return half_away(bias.to(F64) * 65536.0)


def result_of_units(units: Value) -> Value:
    """Whole numbers of 2^-16 (float64 vector) to decoded fp16 (float32): 11 bits, half away, no -0."""
    kept = (units.bits(I64) + (1 << 41)) & -(1 << 42)
    return (kept.bits(F64) * 2.0**-16 + 0.0).to(F32)


def finish_tile(tile: Tile) -> Definition:
    """`finish_tile(c, out, sm, sn, rows, columns)`: accumulators to decoded fp16 results of strides sm, sn."""
    f = Function("finish_tile", internal=True, c=PTR, out=PTR, sm=I64, sn=I64, rows=I64, columns=I64)
    c, out, sm, sn, rows, columns = f.parameters
    lanes = tile.lanes // 2
    direct = sn.compare("eq", 1) & columns.compare("eq", tile.columns)
    row = f.room(F32, tile.columns)
    with f.loop(0, rows) as r:
        source, line = c.at(r * tile.columns, I32), out.at(r * sm, F32)
        target = direct.choose(line, row)
        for first in range(0, tile.columns, lanes):
            units = source.at(first, I32).load(I32.of(lanes)).to(F64)
            target.at(first, F32).store(result_of_units(units))
        with f.when(~direct), f.loop(0, columns) as j:
            line.at(j * sn, F32).store(row.at(j, F32).load(F32))
    return f.definition()
