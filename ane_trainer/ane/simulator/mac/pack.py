"""LLVM IR that packs the operands of the multiply-accumulate into panels and measures them on the way.

Layouts and the reasons for scale, step and threshold are in `mac_micro`. Source strides are in elements
and may be anything (0 and negative too); rows and columns beyond the edge of a matrix are packed as zeros.
"""

from __future__ import annotations

from ane_trainer.ane.simulator.loops.ir import Function, constant, vector_constant
from ane_trainer.ane.simulator.mac.micro import Tile

BLOCK_DEPTH = 16  # steps of k copied at a time: source and target lines, pages too, stay near

LARGE_BITS = 0x7F000000  # float32 bits above every decoded value


def pack_b(tile: Tile) -> str:
    """`pack_b(source, stride_k, stride_n, depth, valid, packed, stats, squares)`: up to `columns` columns.

    Each value is stored one float32 step away from zero (zeros stay). `stats` is two float32: the
    largest magnitude so far and the smallest nonzero magnitude so far. The columns' sums of squares are
    added to the `columns` float32 in `squares`.
    """
    parameters = [
        ("ptr", "source"),
        ("i64", "sk"),
        ("i64", "sn"),
        ("i64", "depth"),
        ("i64", "valid"),
        ("ptr", "packed"),
        ("ptr", "stats"),
        ("ptr", "squares"),
    ]
    f = Function("pack_b", parameters, internal=True)
    lanes, integers, vector = tile.lanes, f"<{tile.lanes} x i32>", f"<{tile.lanes} x float>"
    contiguous = f.op("icmp eq i64 %sn, 1")
    full = f.op(f"icmp eq i64 %valid, {tile.columns}")
    direct = f.op(f"and i1 {contiguous}, {full}")
    origin = f.op(f"select i1 {direct}, ptr %source, ptr %packed")
    pitch = f.op(f"select i1 {direct}, i64 %sk, i64 {tile.columns}")
    with f.when(f.negate(direct)):
        _copy(f, "%sn", str(tile.columns), full)
    largest = f.variable(integers, "zeroinitializer")
    smallest = f.variable(integers, vector_constant("i32", str(LARGE_BITS), lanes))
    places = [f.element("float", "%squares", str(v * lanes)) for v in range(tile.vectors)]
    squares = [f.variable(vector, f.load(vector, place)) for place in places]
    with f.loop("0", "%depth") as k:
        source = f.element("float", origin, f.mul(k, pitch))
        target = f.element("float", "%packed", f.mul(k, str(tile.columns)))
        for v in range(tile.vectors):
            bits = f.load(integers, f.element("i32", source, str(v * lanes)))
            size = _magnitude(f, bits, lanes)
            nonzero = f.op(f"icmp ne {integers} {size}, zeroinitializer")
            step = f.op(f"zext <{lanes} x i1> {nonzero} to {integers}")
            f.store(integers, f.op(f"or {integers} {bits}, {step}"), f.element("i32", target, str(v * lanes)))
            _keep(f, "smax", lanes, largest, size)
            _add_square(f, vector, squares[v], f.op(f"bitcast {integers} {size} to {vector}"))
            large = vector_constant("i32", str(LARGE_BITS), lanes)
            _keep(
                f,
                "smin",
                lanes,
                smallest,
                f.op(f"select <{lanes} x i1> {nonzero}, {integers} {size}, {integers} {large}"),
            )
    for slot, place in zip(squares, places, strict=True):
        f.store(vector, f.load(vector, slot, 1), place)
    _merge(f, "smax", lanes, largest, "%stats")
    _merge(f, "smin", lanes, smallest, f.element("i32", "%stats", "1"))
    return f.text()


def pack_a(tile: Tile) -> str:
    """`pack_a(source, stride_m, stride_k, depth, valid, packed, stats, sums)`: up to `rows` rows.

    Per k: values times 2^16, then drop thresholds. `stats` gets two float32: the largest threshold, and
    the largest sum of eight neighbouring magnitudes of a row. The rows' sums of magnitudes, then their sums
    of squares, are added to the 2 * `padded_rows` float32 in `sums`.
    """
    parameters = [
        ("ptr", "source"),
        ("i64", "sn"),
        ("i64", "sk"),
        ("i64", "depth"),
        ("i64", "valid"),
        ("ptr", "packed"),
        ("ptr", "stats"),
        ("ptr", "sums"),
    ]
    f = Function("pack_a", parameters, internal=True)
    lanes = tile.padded_rows
    vector, integers = f"<{lanes} x float>", f"<{lanes} x i32>"
    full = f.op(f"icmp eq i64 %valid, {tile.rows}")
    _copy(f, "%sn", str(2 * lanes), full)
    thresholds = f.variable(integers, "zeroinitializer")
    eights = f.variable(integers, "zeroinitializer")
    scale = vector_constant("float", constant(65536.0), lanes)
    square_place = f.element("float", "%sums", str(lanes))
    squares = f.variable(vector, f.load(vector, square_place))
    with f.loop("0", "%depth", "8") as first:
        group = f.variable(vector, "zeroinitializer")
        with f.loop(first, f.min(f.add(first, "8"), "%depth")) as k:
            place = f.element("float", "%packed", f.mul(k, str(2 * lanes)))
            bits = f.load(integers, place)
            size = _magnitude(f, bits, lanes)
            least = threshold_bits(f, size, lanes)
            value = f.op(f"bitcast {integers} {bits} to {vector}")
            f.store(vector, f.op(f"fmul {vector} {value}, {scale}"), place)
            f.store(integers, least, f.element("i32", place, str(lanes)))
            _keep(f, "smax", lanes, thresholds, least)
            magnitude = f.op(f"bitcast {integers} {size} to {vector}")
            f.store(vector, f.op(f"fadd {vector} {f.load(vector, group, 1)}, {magnitude}"), group, 1)
            _add_square(f, vector, squares, magnitude)
        total = f.load(vector, group, 1)
        _keep(f, "smax", lanes, eights, f.op(f"bitcast {vector} {total} to {integers}"))
        f.store(vector, f.op(f"fadd {vector} {f.load(vector, '%sums')}, {total}"), "%sums")
    f.store(vector, f.load(vector, squares, 1), square_place)
    _reduce(f, "smax", lanes, thresholds, "%stats")
    _reduce(f, "smax", lanes, eights, f.element("i32", "%stats", "1"))
    return f.text()


def threshold_bits(f: Function, size: str, lanes: int) -> str:
    """Bits of the least |b| that is not dropped: 2^(-16 - exp(a)), or 0 where that is 2^-14 or less.

    A subnormal a has exponent -14 (biased float32 field 113); a zero a drops nothing.
    """
    kind = f"<{lanes} x i32>"

    def number(value: int) -> str:
        return vector_constant("i32", str(value), lanes)

    field = f.op(f"lshr {kind} {size}, {number(23)}")
    field = f.op(f"call {kind} @llvm.smax.v{lanes}i32({kind} {field}, {kind} {number(127 - 14)})")
    wanted = f.op(f"sub {kind} {number(127 - 16 + 127)}, {field}")
    matters = f.op(f"icmp sgt {kind} {wanted}, {number(127 - 14)}")
    nonzero = f.op(f"icmp ne {kind} {size}, zeroinitializer")
    matters = f.op(f"and <{lanes} x i1> {matters}, {nonzero}")
    power = f.op(f"shl {kind} {wanted}, {number(23)}")
    return f.op(f"select <{lanes} x i1> {matters}, {kind} {power}, {kind} zeroinitializer")


def _copy(f: Function, stride: str, pitch: str, full: str) -> None:
    """packed[k * pitch + j] = source[k * sk + j * stride], first zeroing the panel if it is not full."""
    with f.when(f.negate(full)):
        size = f.mul("%depth", str(4 * int(pitch)))
        f.do(f"call void @llvm.memset.p0.i64(ptr %packed, i8 0, i64 {size}, i1 false)")
    with f.loop("0", "%depth", str(BLOCK_DEPTH)) as first:
        last = f.min(f.add(first, str(BLOCK_DEPTH)), "%depth")
        with f.loop("0", "%valid") as j:
            line = f.element("float", "%source", f.mul(j, stride))
            column = f.element("float", "%packed", j)
            with f.loop(first, last) as k:
                value = f.load("float", f.element("float", line, f.mul(k, "%sk")))
                f.store("float", value, f.element("float", column, f.mul(k, pitch)))


def _magnitude(f: Function, bits: str, lanes: int) -> str:
    """Float32 bits without their sign; as integers they are ordered as the magnitudes are."""
    return f.op(f"and <{lanes} x i32> {bits}, {vector_constant('i32', str(0x7FFFFFFF), lanes)}")


def _keep(f: Function, which: str, lanes: int, slot: str, value: str) -> None:
    kind = f"<{lanes} x i32>"
    old = f.load(kind, slot, 1)
    f.store(kind, f.op(f"call {kind} @llvm.{which}.v{lanes}i32({kind} {old}, {kind} {value})"), slot, 1)


def _add_square(f: Function, vector: str, slot: str, value: str) -> None:
    square = f.op(f"fmul {vector} {value}, {value}")
    f.store(vector, f.op(f"fadd {vector} {f.load(vector, slot, 1)}, {square}"), slot, 1)


def _reduce(f: Function, which: str, lanes: int, slot: str, target: str) -> None:
    value = f.load(f"<{lanes} x i32>", slot, 1)
    f.store("i32", f.op(f"call i32 @llvm.vector.reduce.{which}.v{lanes}i32(<{lanes} x i32> {value})"), target)


def _merge(f: Function, which: str, lanes: int, slot: str, target: str) -> None:
    value = f.load(f"<{lanes} x i32>", slot, 1)
    new = f.op(f"call i32 @llvm.vector.reduce.{which}.v{lanes}i32(<{lanes} x i32> {value})")
    old = f.load("i32", target)
    f.store("i32", f.op(f"call i32 @llvm.{which}.i32(i32 {old}, i32 {new})"), target)
