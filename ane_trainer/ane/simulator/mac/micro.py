"""The inner loops of the Q15.16 multiply-accumulate as LLVM IR: one tile of the result over one panel of k, and
suspicious results in ascending k.

Law (M6 notes/numerics.md; reproduces ANEForge's published GEMM errors on M1..M5): every product is
rounded half away from zero to a multiple of 2^-16 and added to a signed 32-bit accumulator; a product
whose exponents sum to -17 or less is dropped.

How one fused multiply-add per product does it. Operand a is scaled by 2^16, so products count in units of
the last place. The accumulator is the float M + n with M = 1.5 * 2^23 and n the integer sum so far: as
long as |n| < 2^22 its unit in the last place is 1, so `fma(a, b, M + n)` rounds the exact product to an
integer and adds it, at once. The machine rounds ties to even; b is therefore stored one float32 step
further from zero. A product is p = j * 2^q with an integer |j| < 2^22 (two 11-bit significands), and the
step adds at most |p| * 2^-23 < 2^q / 2 to its magnitude: an exact tie (q < 0) goes outward, as the law
wants, and nothing else reaches or crosses a tie, the nearest being 2^q away (or 1/2 where q >= 0, and
|p| < 2^22 there). `narrow` does this in float32 and empties its accumulators into integers before |n|
can reach 2^22; `wide` in float64 (M = 1.5 * 2^52), where a panel of any operands stays in range. Sums
modulo 2^32 are order-free, so panels may be cut and mixed at will.

The drop rule: exp(a) + exp(b) >= -16 iff |b| >= 2^(-16 - exp(a)), a threshold stored beside each a
(0 where every b passes, as subnormals count as exponent -14); one compare masks the multiply-add.

`ordered` is for results whose accumulator may pass the limit: reaching 32768 (2^31 units) in magnitude at any time
freezes it; the result is then inf with the sign of the overflow (M6 notes/numerics.md: 16384 + 16384 - 16384 -
16384 + 1 = inf).
"""

from __future__ import annotations

from ane_trainer.ane.simulator.loops.ir import F32, F64, I32, I64, PTR, Definition, Function, Value, Variable
from ane_trainer.ane.simulator.mac.pack import Tile, result_of_units, threshold_bits, units_of_bias

NARROW_BITS = 0x4B400000  # float32 1.5 * 2^23
WIDE_BITS = 0x4338000000000000  # float64 1.5 * 2^52
WIDE_START = 1.5 * 2**52
LIMIT = 2.0**31

GROUP = 8
"""Steps of k between two checks of `ordered` where the accumulators are far from the limit."""


def narrow(tile: Tile, *, drop: bool) -> Definition:
    """`c[rows][columns]` i32 += sums of `depth` products in float32, which must stay below 2^22 units."""
    f = Function("narrow_drop" if drop else "narrow", internal=True, a=PTR, b=PTR, c=PTR, depth=I64)
    a_panel, b_panel, c, depth = f.parameters
    lanes, vector = tile.lanes, F32.of(tile.lanes)
    start = f.constant(vector, 1.5 * 2**23)
    sums = {(r, v): f.variable(start) for r in range(tile.rows) for v in range(tile.vectors)}
    with f.loop(0, depth) as k:
        a_row, b_row = a_panel.at(k * (2 * tile.padded_rows), F32), b_panel.at(k * tile.columns, F32)
        bs = [b_row.at(v * lanes, F32).load(vector) for v in range(tile.vectors)]
        sizes = [b.call("fabs") for b in bs] if drop else []
        for r in range(tile.rows):
            a = a_row.at(r, F32).load(F32).splat(lanes)
            least = a_row.at(tile.padded_rows + r, F32).load(F32).splat(lanes) if drop else None
            for v in range(tile.vectors):
                keep = None if least is None else sizes[v] >= least
                _multiply_add(tile, a, bs[v], sums[r, v], keep)
    for (r, v), total in sums.items():
        _add_to(c.at(r * tile.columns + v * lanes, I32), total.value.bits(I32) - NARROW_BITS)
    return f.definition()


def wide(tile: Tile) -> Definition:
    """Tile += panel in float64, for products of any size; rows in two halves."""
    f = Function("wide", internal=True, a=PTR, b=PTR, c=PTR, depth=I64)
    a_panel, b_panel, c, depth = f.parameters
    lanes, half = tile.lanes // 2, tile.rows // 2
    columns, vector = range(0, tile.columns, lanes), F32.of(lanes)
    with f.loop(0, tile.rows, half) as top:
        start = f.constant(F64.of(lanes), WIDE_START)
        sums = {(r, j): f.variable(start) for r in range(half) for j in columns}
        with f.loop(0, depth) as k:
            a_row = a_panel.at(k * (2 * tile.padded_rows) + top, F32)
            b_row = b_panel.at(k * tile.columns, F32)
            bs = {j: b_row.at(j, F32).load(vector) for j in columns}
            sizes = {j: b.call("fabs") for j, b in bs.items()}
            doubles = {j: _wide_operand(b) for j, b in bs.items()}
            for r in range(half):
                a = a_row.at(r, F32).load(F32).to(F64).splat(lanes)
                least = a_row.at(tile.padded_rows + r, F32).load(F32).splat(lanes)
                for j in columns:
                    _multiply_add(tile, a, doubles[j], sums[r, j], sizes[j] >= least)
        first = top * tile.columns
        for (r, j), total in sums.items():
            count = (total.value.bits(I64) - WIDE_BITS).to(I32)
            _add_to(c.at(first + (r * tile.columns + j), I32), count)
    return f.definition()


def _wide_operand(packed: Value) -> Value:
    """Float64 of a packed b: the step away from zero (bit 29 of the double) becomes a float64 step."""
    bits = packed.to(F64).bits(I64)
    step = bits & (1 << 29)
    return ((bits ^ step) | (step >> 29)).bits(F64)


def _multiply_add(tile: Tile, a: Value, b: Value, total: Variable, keep: Value | None) -> None:
    """total = fma(a, b, total) where `keep` (everywhere if None)."""
    old = total.value
    if keep is not None and not tile.masks:
        b = keep.choose(b, 0.0)
    new = a.call("fma", b, old)
    total.set(keep.choose(new, old) if keep is not None and tile.masks else new)


def _add_to(place: Value, count: Value) -> None:
    place.store(place.load(count.type) + count)


def ordered(tile: Tile) -> Definition:
    """`ordered(a, b, bias, out, room, items, count, depth, width)`: spans of `tile.columns` results.

    Contiguous float32: a [M, depth], b [width / tile.columns, depth, tile.columns], bias and out
    [M, width]. `room` is float64 [M, ceil(depth / GROUP)]: an accumulator below it (in units) cannot reach
    the limit within that group. `items` are `count` pairs of int64, span and row.
    """
    f = Function(
        "ordered", a=PTR, b=PTR, bias=PTR, out=PTR, room=PTR, items=PTR, count=I64, depth=I64, width=I64
    )
    all_a, all_b, all_bias, all_out, all_room, items, count, depth, width = f.parameters
    lanes = tile.lanes // 2
    places, singles = range(0, tile.columns, lanes), F32.of(lanes)
    groups = (depth + (GROUP - 1)) // GROUP
    with f.loop(0, count) as item:
        span, row = (items.at(item * 2 + i, I64).load(I64) for i in range(2))
        corner = row * width + span * tile.columns
        bias, out = all_bias.at(corner, F32), all_out.at(corner, F32)
        starts = {j: units_of_bias(bias.at(j, F32).load(singles)) for j in places}
        sums = {j: f.variable(start + WIDE_START) for j, start in starts.items()}
        a, b = all_a.at(row * depth, F32), all_b.at(span * (depth * tile.columns), F32)
        with f.loop(0, groups) as group:
            near = _any_beyond(all_room.at(row * groups + group, F64).load(F64).splat(lanes), sums)
            first = group * GROUP
            last = (first + GROUP).call("smin", depth)
            for condition, careful in ((~near, False), (near, True)):
                with f.when(condition), f.loop(first, last) as k:
                    value, least = _operand(a.at(k, F32), lanes)
                    b_row = b.at(k * tile.columns, F32)
                    for j in places:
                        _step(value, least, b_row.at(j, F32).load(singles), sums[j], careful)
        for j, total in sums.items():
            units = total.value - WIDE_START
            out.at(j, F32).store(_saturated(units, result_of_units(units)))
    return f.definition()


def _any_beyond(room: Value, sums: dict[int, Variable]) -> Value:
    """True where any accumulator is at or beyond `room` (a vector of one number)."""
    beyond = [(total.value - WIDE_START).call("fabs") >= room for total in sums.values()]
    some = beyond[0]
    for more in beyond[1:]:
        some = some | more
    return some.reduce("or")


def _operand(place: Value, lanes: int) -> tuple[Value, Value]:
    """One a as float64 times 2^16, one step away from zero, and its drop threshold; both as vectors."""
    double = place.load(F32).to(F64)
    bits = (double * 65536.0).bits(I64) | double.compare("ne", 0.0).to(I64)
    size = (place.load(I32) & 0x7FFFFFFF).splat(lanes)
    return bits.bits(F64).splat(lanes), threshold_bits(size).bits(F32)


def _step(a: Value, least: Value, b: Value, total: Variable, careful: bool) -> None:
    """total = fma(a, b, total) where b is not dropped and, if `careful`, the total is not frozen."""
    old = total.value
    keep = b.call("fabs") >= least
    if careful:
        keep = keep & ~_over(old - WIDE_START)
    total.set(keep.choose(a.call("fma", b.to(F64), old), old))


def _over(units: Value) -> Value:
    return units.call("fabs") >= LIMIT


def _saturated(units: Value, result: Value) -> Value:
    """The engine's inf where the accumulator has reached the limit, else the result."""
    inf = result.function.constant(result.type, 65536.0).call("copysign", units.to(F32))
    return _over(units).choose(inf, result)
