"""A whole block of the multiply-accumulate as LLVM IR: loops over batch, panels of k, and tiles.

Per tile and panel of k the cheapest inner loop that is exact there is chosen (see `micro.py`), from the
measures taken while packing. The result assumes that no accumulator overflows; the block reports bounds
from which the caller can tell, and `micro.ordered` recomputes what may have.
"""

from __future__ import annotations

from ane_trainer.ane.simulator.loops import ir
from ane_trainer.ane.simulator.loops.ir import F32, I32, I64, PTR, Definition, Function, Value
from ane_trainer.ane.simulator.mac.micro import narrow, ordered, wide
from ane_trainer.ane.simulator.mac.pack import (
    BLOCK_DEPTH,
    LARGE_BITS,
    Tile,
    finish_tile,
    pack_a,
    pack_b,
    start_tile,
)

PANEL_DEPTH = 256
"""Steps of k packed at a time: one panel of b stays in the first-level cache."""

FIELDS = (
    "a",
    "b",
    "out",
    "bias",
    "batch",
    "rows",
    "columns",
    "depth",
    "a_batch",
    "a_row",
    "a_k",
    "b_batch",
    "b_k",
    "b_column",
    "out_batch",
    "out_row",
    "out_column",
    "bias_batch",
    "bias_row",
    "bias_column",
    "a_rows",
    "a_depths",
    "b_depths",
    "b_columns",
)
"""The int64 arguments of `block`, in order: addresses, sizes, strides in elements; `bias` may be 0.

The last four are addresses of int64 tables of offsets in elements, or 0: an element of a lies at
a + a_rows[row] + a_depths[k] then (and its strides are 0), for example where a is the windows of an image.
"""

SCRATCH = ("packed_a", "packed_b", "tiles", "a_sums", "b_squares", "b_stats", "report")
"""Addresses of a thread's buffers, in order; `scratch_bytes` tells their sizes.

`report` gets three float32: the largest |bias|, and of sum |a||b| over all results of a block an upper
bound (sum |a| times max |b|) and the square of another (norm of a times norm of b), to float32 precision.
"""

_PITCH = PANEL_DEPTH + 2  # rows between panels of b: no power of two, which would crowd few cache sets


def scratch_bytes(tile: Tile, rows: int, columns: int) -> tuple[int, ...]:
    """Sizes of the `SCRATCH` buffers for blocks of up to `rows` x `columns`; packed_a must start as zeros."""
    tile_rows, tile_columns = -(-rows // tile.rows), -(-columns // tile.columns)
    return (
        8 * PANEL_DEPTH * tile.padded_rows,
        4 * _PITCH * tile_columns * tile.columns,
        4 * tile_rows * tile.rows * tile_columns * tile.columns,
        8 * tile_rows * tile.padded_rows,
        4 * tile_columns * tile.columns,
        8 * tile_columns,
        12,
    )


_NARROW_LIMIT = int(63.9 * 4096) / 4096  # exact in float32
"""A narrow accumulator holds less than 64 = 2^22 * 2^-16, roundings of a panel (256 * 2^-17) included."""


def module(tile: Tile) -> str:
    """The module with the two entry points, `block(arguments, scratch)` and `ordered(...)`."""
    loops = [narrow(tile, drop=False), narrow(tile, drop=True), wide(tile), _multiply(tile)]
    borders = [pack_a(tile), pack_b(tile), start_tile(tile), finish_tile(tile)]
    return ir.module([*loops, *borders, _panel(tile), block(tile), ordered(tile)])


def _multiply(tile: Tile) -> Definition:
    """`multiply(a, b, c, depth, a_stats, b_stats)`: one tile += one panel by the cheapest exact loop."""
    f = Function("multiply", internal=True, a=PTR, b=PTR, c=PTR, depth=I64, a_stats=PTR, b_stats=PTR)
    a, b, c, depth, a_stats, b_stats = f.parameters
    threshold, eight = a_stats.load(F32), a_stats.at(1, F32).load(F32)
    largest, smallest = b_stats.load(F32), b_stats.at(1, F32).load(F32)
    groups = f.constant(F32, _NARROW_LIMIT) / (eight * largest)
    is_wide = groups < 1.0
    with f.when(is_wide):
        f.invoke("wide", a, b, c, depth)
    with f.when(~is_wide):
        period = (groups > PANEL_DEPTH).choose(float(PANEL_DEPTH), groups).to(I64) * 8
        drops = threshold > smallest
        for condition, name in ((drops, "narrow_drop"), (~drops, "narrow")):
            with f.when(condition), f.loop(0, depth, period) as first:
                a_part, b_part = a.at(first * (2 * tile.padded_rows), F32), b.at(first * tile.columns, F32)
                f.invoke(name, a_part, b_part, c, period.call("smin", depth - first))
    return f.definition()


class _Arguments:
    """The fields of `block`'s two arrays."""

    def __init__(self, arguments: Value, scratch: Value) -> None:
        self._places = {name: (arguments, i) for i, name in enumerate(FIELDS)}
        self._places |= {name: (scratch, i) for i, name in enumerate(SCRATCH)}

    def number(self, name: str) -> Value:
        """A size or a stride."""
        array, i = self._places[name]
        return array.at(i, I64).load(I64)

    def address(self, name: str) -> Value:
        """An operand or a buffer."""
        array, i = self._places[name]
        return array.at(i, I64).load(PTR)

    def table(self, name: str, first: Value) -> Value:
        """A table of offsets from one of its elements on; null where there is none."""
        table = self.address(name)
        return table.is_null().choose(table, table.at(first, I64))


def _panel(tile: Tile) -> Definition:
    """`panel(...)`: all tiles of one matrix += one panel of k; raises `largest_b` to the largest |b|."""
    f = Function(
        "panel", internal=True,
        arguments=PTR, scratch=PTR, a=PTR, b=PTR, out=PTR, bias=PTR, first_k=I64, largest_b=PTR,
    )  # fmt: skip
    arguments, scratch, a, b, out, bias, first_k, largest_b = f.parameters
    get = _Arguments(arguments, scratch)
    rows, columns = get.number("rows"), get.number("columns")
    left = get.number("depth") - first_k
    depth = left.call("smin", PANEL_DEPTH)
    a_stats = f.room(F32, 2)
    _pack_all_b(f, tile, get, b, (first_k, depth), largest_b)
    with f.loop(0, rows, tile.rows) as top:
        index = top // tile.rows
        height = (rows - top).call("smin", tile.rows)
        sums = get.address("a_sums").at(index * (2 * tile.padded_rows), F32)
        corner = a.at(top * get.number("a_row"), F32)
        strides = get.number("a_row"), get.number("a_k")
        tables = get.table("a_rows", top), get.table("a_depths", first_k)
        f.invoke("pack_a", corner, *strides, *tables, depth, height, get.address("packed_a"), a_stats, sums)
        tile_row = index * ((columns + (tile.columns - 1)) // tile.columns)
        with f.loop(0, columns, tile.columns) as edge:
            position = edge // tile.columns
            size = height, (columns - edge).call("smin", tile.columns)
            c = get.address("tiles").at((tile_row + position) * (tile.rows * tile.columns), I32)
            with f.when(first_k.compare("eq", 0)):
                strides = get.number("bias_row"), get.number("bias_column")
                step = top * strides[0] + edge * strides[1]
                start = bias.is_null().choose(bias, bias.at(step, F32))
                f.invoke("start_tile", c, start, *strides, *size, get.address("report"))
            panel = get.address("packed_b").at(position * (_PITCH * tile.columns), F32)
            b_stats = get.address("b_stats").at(position * 2, F32)
            f.invoke("multiply", get.address("packed_a"), panel, c, depth, a_stats, b_stats)
            with f.when(left.compare("eq", depth)):
                strides = get.number("out_row"), get.number("out_column")
                place = out.at(top * strides[0], F32).at(edge * strides[1], F32)
                f.invoke("finish_tile", c, place, *strides, *size)
    return f.definition()


def _pack_all_b(
    f: Function, tile: Tile, get: _Arguments, b: Value, part: tuple[Value, Value], largest_b: Value
) -> None:
    """Pack all panels of b, a few rows of all panels at a time: rows may lie on as many memory pages.

    `part` is the first k and how many.
    """
    first_k, depth = part
    columns, stride_k, stride_n = get.number("columns"), get.number("b_k"), get.number("b_column")
    packed, all_stats, squares = get.address("packed_b"), get.address("b_stats"), get.address("b_squares")
    with f.loop(0, columns, tile.columns) as edge:
        stats = all_stats.at(edge // tile.columns * 2, F32)
        stats.store(f.constant(F32, 0.0))
        stats.at(1, I32).store(f.constant(I32, LARGE_BITS))
    with f.loop(0, depth, BLOCK_DEPTH) as top:
        height = (depth - top).call("smin", BLOCK_DEPTH)
        line = b.at(top * stride_k, F32)
        with f.loop(0, columns, tile.columns) as edge:
            position = edge // tile.columns
            width = (columns - edge).call("smin", tile.columns)
            source = line.at(edge * stride_n, F32)
            target = packed.at((position * _PITCH + top) * tile.columns, F32)
            stats = all_stats.at(position * 2, F32)
            tables = get.table("b_columns", edge), get.table("b_depths", first_k + top)
            sizes = height, width
            f.invoke(
                "pack_b", source, stride_k, stride_n, *tables, *sizes, target, stats, squares.at(edge, F32)
            )
            _raise(largest_b, stats.load(F32))


def _raise(address: Value, value: Value) -> None:
    """Raise the float32 at `address` to at least `value`."""
    address.store(address.load(F32).call("maxnum", value))


def block(tile: Tile) -> Definition:
    """`block(arguments, scratch)`: out = a @ b + bias for a batch, assuming no overflow."""
    f = Function("block", arguments=PTR, scratch=PTR)
    get = _Arguments(*f.parameters)
    report, a_sums, b_squares = get.address("report"), get.address("a_sums"), get.address("b_squares")
    f.clear(report, 4 * 3)
    rows = (get.number("rows") + (tile.rows - 1)) // tile.rows
    columns = (get.number("columns") + (tile.columns - 1)) // tile.columns * tile.columns
    with f.loop(0, get.number("batch")) as g:
        f.clear(a_sums, rows * (2 * tile.padded_rows) * 4)
        f.clear(b_squares, columns * 4)
        largest = f.variable(f.constant(F32, 0.0))
        a, b, out, bias = (
            get.address(name).at(g * get.number(f"{name}_batch"), F32) for name in ("a", "b", "out", "bias")
        )
        bias = get.address("bias").is_null().choose(f.null(), bias)
        with f.loop(0, get.number("depth"), PANEL_DEPTH) as first:
            a_part = a.at(first * get.number("a_k"), F32)
            b_part = b.at(first * get.number("b_k"), F32)
            f.invoke("panel", *f.parameters, a_part, b_part, out, bias, first, largest.place)
        _report(f, tile, rows, columns, largest.value)
    return f.definition()


def _report(f: Function, tile: Tile, tile_rows: Value, columns: Value, largest_b: Value) -> None:
    """Raise both bounds in `report` to those of one matrix of the batch."""
    get = _Arguments(*f.parameters)
    sums, squares, b_squares = (f.variable(f.constant(F32, 0.0)) for _ in range(3))
    with f.loop(0, tile_rows) as index, f.loop(0, tile.padded_rows) as row:
        place = get.address("a_sums").at(index * (2 * tile.padded_rows), F32).at(row, F32)
        _raise(sums.place, place.load(F32))
        _raise(squares.place, place.at(tile.padded_rows, F32).load(F32))
    with f.loop(0, columns) as column:
        _raise(b_squares.place, get.address("b_squares").at(column, F32).load(F32))
    bounds = sums.value * largest_b, squares.value * b_squares.value
    for number, bound in enumerate(bounds, 1):
        _raise(get.address("report").at(number, F32), bound)
