"""LLVM IR of a whole block of the multiply-accumulate: loops over batch, panels of k, and tiles.

Per tile and panel of k the cheapest inner loop that is exact there is chosen (see `mac_micro`), from the
measures taken while packing. The result assumes that no accumulator overflows; the block reports bounds
from which the caller can tell, and `mac_ordered` recomputes what may have.
"""

from __future__ import annotations

from ane_trainer.ane.simulator.loops.ir import Function, constant
from ane_trainer.ane.simulator.mac.border import finish_tile, start_tile
from ane_trainer.ane.simulator.mac.micro import Tile, narrow, wide
from ane_trainer.ane.simulator.mac.ordered import ordered
from ane_trainer.ane.simulator.mac.pack import BLOCK_DEPTH, LARGE_BITS, pack_a, pack_b

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
)
"""The int64 arguments of `block`, in order: addresses, sizes, strides in elements; `bias` may be 0."""

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


_NARROW_LIMIT = 63.9
"""A narrow accumulator holds less than 64 = 2^22 * 2^-16, roundings of a panel (256 * 2^-17) included."""

_DECLARATIONS = """
declare i64 @llvm.smin.i64(i64, i64)
declare i32 @llvm.smax.i32(i32, i32)
declare i32 @llvm.smin.i32(i32, i32)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare float @llvm.maxnum.f32(float, float)
"""


def module(tile: Tile) -> str:
    """The module with the two entry points, `block(arguments, scratch)` and `ordered(...)`."""
    loops = [narrow(tile, drop=False), narrow(tile, drop=True), wide(tile), _multiply(tile)]
    borders = [pack_a(tile), pack_b(tile), start_tile(tile), finish_tile(tile)]
    drivers = [_panel(tile), block(tile), ordered(tile)]
    return _DECLARATIONS + _vector_declarations(tile) + "\n".join(loops + borders + drivers)


def _vector_declarations(tile: Tile) -> str:
    lines = []
    for lanes in sorted({tile.lanes, tile.lanes // 2, tile.padded_rows}):
        for kind, name in ((f"<{lanes} x float>", f"v{lanes}f32"), (f"<{lanes} x double>", f"v{lanes}f64")):
            lines += [
                f"declare {kind} @llvm.fma.{name}({kind}, {kind}, {kind})",
                f"declare {kind} @llvm.fabs.{name}({kind})",
                f"declare {kind} @llvm.trunc.{name}({kind})",
                f"declare {kind} @llvm.copysign.{name}({kind}, {kind})",
            ]
        lines.append(f"declare i1 @llvm.vector.reduce.or.v{lanes}i1(<{lanes} x i1>)")
        kind = f"<{lanes} x i32>"
        for which in ("smax", "smin"):
            lines += [
                f"declare {kind} @llvm.{which}.v{lanes}i32({kind}, {kind})",
                f"declare i32 @llvm.vector.reduce.{which}.v{lanes}i32({kind})",
            ]
    return "\n".join(lines) + "\n"


def _multiply(tile: Tile) -> str:
    """`multiply(a, b, c, depth, a_stats, b_stats)`: one tile += one panel by the cheapest exact loop."""
    f = Function(
        "multiply",
        [("ptr", "a"), ("ptr", "b"), ("ptr", "c"), ("i64", "depth"), ("ptr", "a_stats"), ("ptr", "b_stats")],
        internal=True,
    )
    threshold = f.load("float", "%a_stats")
    eight = f.load("float", f.element("float", "%a_stats", "1"))
    largest = f.load("float", "%b_stats")
    smallest = f.load("float", f.element("float", "%b_stats", "1"))
    groups = f.op(f"fdiv float {constant_float(_NARROW_LIMIT)}, {f.op(f'fmul float {eight}, {largest}')}")
    is_wide = f.op(f"fcmp olt float {groups}, {constant(1.0)}")
    with f.when(is_wide):
        f.do("call void @wide(ptr %a, ptr %b, ptr %c, i64 %depth)")
    with f.when(f.negate(is_wide)):
        ample = f.op(f"fcmp ogt float {groups}, {constant(float(PANEL_DEPTH))}")
        counted = f.op(f"select i1 {ample}, float {constant(float(PANEL_DEPTH))}, float {groups}")
        period = f.mul(f.op(f"fptosi float {counted} to i64"), "8")
        drops = f.op(f"fcmp ogt float {threshold}, {smallest}")
        for condition, name in ((drops, "narrow_drop"), (f.negate(drops), "narrow")):
            with f.when(condition), f.loop("0", "%depth", period) as first:
                a = f.element("float", "%a", f.mul(first, str(2 * tile.padded_rows)))
                b = f.element("float", "%b", f.mul(first, str(tile.columns)))
                depth = f.min(period, f.op(f"sub i64 %depth, {first}"))
                f.do(f"call void @{name}(ptr {a}, ptr {b}, ptr %c, i64 {depth})")
    return f.text()


def constant_float(value: float) -> str:
    """A float literal next to `value` (rounded to 12 bits of fraction, so that it is exact)."""
    return constant(int(value * 4096) / 4096)


class _Arguments:
    """Loads the fields of `block`'s two arrays."""

    def __init__(self, f: Function) -> None:
        self._f = f

    def number(self, name: str) -> str:
        return self._f.load("i64", self._place(name), 8)

    def address(self, name: str) -> str:
        return self._f.load("ptr", self._place(name), 8)

    def _place(self, name: str) -> str:
        if name in FIELDS:
            return self._f.element("i64", "%arguments", str(FIELDS.index(name)))
        return self._f.element("i64", "%scratch", str(SCRATCH.index(name)))


def _panel(tile: Tile) -> str:
    """`panel(...)`: all tiles of one matrix += one panel of k; raises `largest_b` to the largest |b|."""
    f = Function(
        "panel",
        [
            ("ptr", "arguments"),
            ("ptr", "scratch"),
            ("ptr", "a"),
            ("ptr", "b"),
            ("ptr", "out"),
            ("ptr", "bias"),
            ("i64", "first_k"),
            ("ptr", "largest_b"),
        ],
        internal=True,
    )
    get = _Arguments(f)
    rows, columns, total = get.number("rows"), get.number("columns"), get.number("depth")
    packed_a, packed_b, report = get.address("packed_a"), get.address("packed_b"), get.address("report")
    left = f.op(f"sub i64 {total}, %first_k")
    depth = f.min(left, str(PANEL_DEPTH))
    is_first = f.op("icmp eq i64 %first_k, 0")
    is_last = f.op(f"icmp eq i64 {left}, {depth}")
    a_stats = f.variable("[2 x float]", "zeroinitializer")
    _pack_all_b(f, tile, get, depth)
    with f.loop("0", rows, str(tile.rows)) as top:
        index = f.op(f"sdiv i64 {top}, {tile.rows}")
        height = f.min(f.op(f"sub i64 {rows}, {top}"), str(tile.rows))
        sums = f.element("float", get.address("a_sums"), f.mul(index, str(2 * tile.padded_rows)))
        a = f.element("float", "%a", f.mul(top, get.number("a_row")))
        f.do(
            f"call void @pack_a(ptr {a}, i64 {get.number('a_row')}, i64 {get.number('a_k')}, i64 {depth}, "
            f"i64 {height}, ptr {packed_a}, ptr {a_stats}, ptr {sums})"
        )
        out_row = f.element("float", "%out", f.mul(top, get.number("out_row")))
        bias_row = f.mul(top, get.number("bias_row"))
        tile_row = f.mul(index, f.op(f"sdiv i64 {f.add(columns, str(tile.columns - 1))}, {tile.columns}"))
        with f.loop("0", columns, str(tile.columns)) as left_edge:
            position = f.op(f"sdiv i64 {left_edge}, {tile.columns}")
            width = f.min(f.op(f"sub i64 {columns}, {left_edge}"), str(tile.columns))
            c = f.element(
                "i32", get.address("tiles"), f.mul(f.add(tile_row, position), str(tile.rows * tile.columns))
            )
            with f.when(is_first):
                step = f.add(bias_row, f.mul(left_edge, get.number("bias_column")))
                none = f.op("icmp eq ptr %bias, null")
                bias = f.op(f"select i1 {none}, ptr null, ptr {f.element('float', '%bias', step)}")
                f.do(
                    f"call void @start_tile(ptr {c}, ptr {bias}, i64 {get.number('bias_row')}, "
                    f"i64 {get.number('bias_column')}, i64 {height}, i64 {width}, "
                    f"ptr {report})"
                )
            b = f.element("float", packed_b, f.mul(position, str(_PITCH * tile.columns)))
            b_stats = f.element("float", get.address("b_stats"), f.mul(position, "2"))
            f.do(
                f"call void @multiply(ptr {packed_a}, ptr {b}, ptr {c}, i64 {depth}, ptr {a_stats}, "
                f"ptr {b_stats})"
            )
            with f.when(is_last):
                out = f.element("float", out_row, f.mul(left_edge, get.number("out_column")))
                f.do(
                    f"call void @finish_tile(ptr {c}, ptr {out}, i64 {get.number('out_row')}, "
                    f"i64 {get.number('out_column')}, i64 {height}, i64 {width})"
                )
    return f.text()


def _pack_all_b(f: Function, tile: Tile, get: _Arguments, depth: str) -> None:
    """Pack all panels of b, a few rows of all panels at a time: rows may lie on as many memory pages."""
    columns, stride_k, stride_n = get.number("columns"), get.number("b_k"), get.number("b_column")
    packed, all_stats, squares = get.address("packed_b"), get.address("b_stats"), get.address("b_squares")
    with f.loop("0", columns, str(tile.columns)) as edge:
        stats = f.element("float", all_stats, f.mul(f.op(f"sdiv i64 {edge}, {tile.columns}"), "2"))
        f.store("float", constant(0.0), stats)
        f.store("i32", str(LARGE_BITS), f.element("i32", stats, "1"))
    with f.loop("0", depth, str(BLOCK_DEPTH)) as top:
        height = f.min(f.op(f"sub i64 {depth}, {top}"), str(BLOCK_DEPTH))
        line = f.element("float", "%b", f.mul(top, stride_k))
        with f.loop("0", columns, str(tile.columns)) as edge:
            position = f.op(f"sdiv i64 {edge}, {tile.columns}")
            width = f.min(f.op(f"sub i64 {columns}, {edge}"), str(tile.columns))
            source = f.element("float", line, f.mul(edge, stride_n))
            panel = f.add(f.mul(position, str(_PITCH)), top)
            target = f.element("float", packed, f.mul(panel, str(tile.columns)))
            stats = f.element("float", all_stats, f.mul(position, "2"))
            f.do(
                f"call void @pack_b(ptr {source}, i64 {stride_k}, i64 {stride_n}, i64 {height}, "
                f"i64 {width}, ptr {target}, ptr {stats}, ptr {f.element('float', squares, edge)})"
            )
            _raise(f, "%largest_b", f.load("float", stats))


def _raise(f: Function, address: str, value: str) -> None:
    """Raise the float32 at `address` to at least `value`."""
    old = f.load("float", address)
    f.store("float", f.op(f"call float @llvm.maxnum.f32(float {old}, float {value})"), address)


def block(tile: Tile) -> str:
    """`block(arguments, scratch)`: out = a @ b + bias for a batch, assuming no overflow."""
    f = Function("block", [("ptr", "arguments"), ("ptr", "scratch")])
    get = _Arguments(f)
    report, a_sums, b_squares = get.address("report"), get.address("a_sums"), get.address("b_squares")
    _clear(f, report, "3")
    rows, columns = _rounded_up(f, get.number("rows"), tile.rows), get.number("columns")
    columns = f.mul(_rounded_up(f, columns, tile.columns), str(tile.columns))
    with f.loop("0", get.number("batch")) as g:
        _clear(f, a_sums, f.mul(rows, str(2 * tile.padded_rows)))
        _clear(f, b_squares, columns)
        largest = f.variable("float", constant(0.0))
        places = [
            f.element("float", get.address(name), f.mul(g, get.number(f"{name}_batch")))
            for name in ("a", "b", "out")
        ]
        none = f.op(f"icmp eq ptr {get.address('bias')}, null")
        moved = f.element("float", get.address("bias"), f.mul(g, get.number("bias_batch")))
        bias = f.op(f"select i1 {none}, ptr null, ptr {moved}")
        with f.loop("0", get.number("depth"), str(PANEL_DEPTH)) as first:
            a = f.element("float", places[0], f.mul(first, get.number("a_k")))
            b = f.element("float", places[1], f.mul(first, get.number("b_k")))
            f.do(
                f"call void @panel(ptr %arguments, ptr %scratch, ptr {a}, ptr {b}, ptr {places[2]}, "
                f"ptr {bias}, i64 {first}, ptr {largest})"
            )
        _report(f, tile, rows, columns, f.load("float", largest, 1))
    return f.text()


def _report(f: Function, tile: Tile, tile_rows: str, columns: str, largest_b: str) -> None:
    """Raise both bounds in `report` to those of one matrix of the batch."""
    get = _Arguments(f)
    sums = f.variable("float", constant(0.0))
    squares = f.variable("float", constant(0.0))
    b_squares = f.variable("float", constant(0.0))
    with f.loop("0", tile_rows) as index, f.loop("0", str(tile.padded_rows)) as row:
        place = f.element("float", get.address("a_sums"), f.mul(index, str(2 * tile.padded_rows)))
        place = f.element("float", place, row)
        _raise(f, sums, f.load("float", place))
        _raise(f, squares, f.load("float", f.element("float", place, str(tile.padded_rows))))
    with f.loop("0", columns) as column:
        _raise(f, b_squares, f.load("float", f.element("float", get.address("b_squares"), column)))
    bound = f.op(f"fmul float {f.load('float', sums)}, {largest_b}")
    square = f.op(f"fmul float {f.load('float', squares)}, {f.load('float', b_squares)}")
    _raise(f, f.element("float", get.address("report"), "1"), bound)
    _raise(f, f.element("float", get.address("report"), "2"), square)


def _rounded_up(f: Function, size: str, unit: int) -> str:
    """Number of units that hold `size`."""
    return f.op(f"sdiv i64 {f.add(size, str(unit - 1))}, {unit}")


def _clear(f: Function, address: str, count: str) -> None:
    """Zero `count` float32."""
    f.do(f"call void @llvm.memset.p0.i64(ptr {address}, i8 0, i64 {f.mul(count, '4')}, i1 false)")
