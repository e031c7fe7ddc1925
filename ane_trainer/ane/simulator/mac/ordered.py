"""LLVM IR of the multiply-accumulate in ascending k with the sticky overflow, for suspicious results.

Reaching 32768 (2^31 units) in magnitude at any time freezes the accumulator; the result is then inf with
the sign of the overflow (M6 notes/numerics.md: 16384 + 16384 - 16384 - 16384 + 1 = inf).
"""

from __future__ import annotations

from ane_trainer.ane.simulator.loops.ir import Function, constant, vector_constant
from ane_trainer.ane.simulator.mac.border import rounded_result, scaled_bias
from ane_trainer.ane.simulator.mac.micro import Tile
from ane_trainer.ane.simulator.mac.pack import threshold_bits

LIMIT = 2.0**31

GROUP = 8
"""Steps of k between two checks where the accumulators are far from the limit."""


def ordered(tile: Tile) -> str:
    """`ordered(a, b, bias, out, room, items, count, depth, width)`: spans of `tile.columns` results.

    Contiguous float32: a [M, depth], b [width / tile.columns, depth, tile.columns], bias and out
    [M, width]. `room` is float64 [M, ceil(depth / GROUP)]: an accumulator below it (in units) cannot reach
    the limit within that group. `items` are `count` pairs of int64, span and row.
    """
    parameters = [
        ("ptr", "a"),
        ("ptr", "b"),
        ("ptr", "bias"),
        ("ptr", "out"),
        ("ptr", "room"),
        ("ptr", "items"),
        ("i64", "count"),
        ("i64", "depth"),
        ("i64", "width"),
    ]
    f = Function("ordered", parameters)
    lanes = tile.lanes // 2
    places = range(0, tile.columns, lanes)
    kind, singles = f"<{lanes} x double>", f"<{lanes} x float>"
    magic = vector_constant("double", constant(1.5 * 2**52), lanes)
    groups = f.op(f"sdiv i64 {f.add('%depth', str(GROUP - 1))}, {GROUP}")
    with f.loop("0", "%count") as item:
        span = f.load("i64", f.element("i64", "%items", f.mul(item, "2")), 8)
        row = f.load("i64", f.element("i64", "%items", f.add(f.mul(item, "2"), "1")), 8)
        corner = f.add(f.mul(row, "%width"), f.mul(span, str(tile.columns)))
        bias, out = f.element("float", "%bias", corner), f.element("float", "%out", corner)
        sums = {}
        for j in places:
            start = scaled_bias(f, f.load(singles, f.element("float", bias, str(j))), lanes)
            sums[j] = f.variable(kind, f.op(f"fadd {kind} {start}, {magic}"))
        a = f.element("float", "%a", f.mul(row, "%depth"))
        b = f.element("float", "%b", f.mul(span, f.mul("%depth", str(tile.columns))))
        with f.loop("0", groups) as group:
            room = f.load("double", f.element("double", "%room", f.add(f.mul(row, groups), group)), 8)
            near = _any_beyond(f, lanes, room, sums)
            first = f.mul(group, str(GROUP))
            last = f.min(f.add(first, str(GROUP)), "%depth")
            for condition, careful in ((f.negate(near), False), (near, True)):
                with f.when(condition), f.loop(first, last) as k:
                    value, least = _operand(f, f.element("float", a, k), lanes)
                    b_row = f.element("float", b, f.mul(k, str(tile.columns)))
                    for j in places:
                        operand = f.load(singles, f.element("float", b_row, str(j)))
                        _step(f, lanes, value, least, operand, sums[j], careful)
        for j in places:
            units = f.op(f"fsub {kind} {f.load(kind, sums[j], 1)}, {magic}")
            result = _saturated(f, lanes, units, rounded_result(f, units, lanes))
            f.store(singles, result, f.element("float", out, str(j)))
    return f.text()


def _any_beyond(f: Function, lanes: int, room: str, sums: dict[int, str]) -> str:
    kind = f"<{lanes} x double>"
    limit = f.splat("double", room, lanes)
    beyond = vector_constant("i1", "false", lanes)
    for slot in sums.values():
        units = f.op(
            f"fsub {kind} {f.load(kind, slot, 1)}, {vector_constant('double', constant(1.5 * 2**52), lanes)}"
        )
        size = f.op(f"call {kind} @llvm.fabs.v{lanes}f64({kind} {units})")
        beyond = f.op(f"or <{lanes} x i1> {beyond}, {f.op(f'fcmp oge {kind} {size}, {limit}')}")
    return f.op(f"call i1 @llvm.vector.reduce.or.v{lanes}i1(<{lanes} x i1> {beyond})")


def _operand(f: Function, place: str, lanes: int) -> tuple[str, str]:
    """One a as float64 times 2^16, one step away from zero, and its drop threshold; both as vectors."""
    double = f.op(f"fpext float {f.load('float', place)} to double")
    bits = f.op(f"bitcast double {f.op(f'fmul double {double}, {constant(65536.0)}')} to i64")
    nonzero = f.op(f"zext i1 {f.op(f'fcmp une double {double}, {constant(0.0)}')} to i64")
    value = f.splat("double", f.op(f"bitcast i64 {f.op(f'or i64 {bits}, {nonzero}')} to double"), lanes)
    size = f.splat("i32", f.op(f"and i32 {f.load('i32', place)}, {0x7FFFFFFF}"), lanes)
    least = f.op(f"bitcast <{lanes} x i32> {threshold_bits(f, size, lanes)} to <{lanes} x float>")
    return value, least


def _step(f: Function, lanes: int, a: str, least: str, b: str, slot: str, careful: bool) -> None:
    """sum = fma(a, b, sum) where b is not dropped and, if `careful`, the sum is not frozen."""
    kind, singles, name = f"<{lanes} x double>", f"<{lanes} x float>", f"v{lanes}f64"
    total = f.load(kind, slot, 1)
    size = f.op(f"call {singles} @llvm.fabs.v{lanes}f32({singles} {b})")
    keep = f.op(f"fcmp oge {singles} {size}, {least}")
    if careful:
        units = f.op(f"fsub {kind} {total}, {vector_constant('double', constant(1.5 * 2**52), lanes)}")
        over = _over(f, lanes, units)
        under = f.op(f"xor <{lanes} x i1> {over}, {vector_constant('i1', 'true', lanes)}")
        keep = f.op(f"and <{lanes} x i1> {keep}, {under}")
    wide_b = f.op(f"fpext {singles} {b} to {kind}")
    added = f.op(f"call {kind} @llvm.fma.{name}({kind} {a}, {kind} {wide_b}, {kind} {total})")
    f.store(kind, f.op(f"select <{lanes} x i1> {keep}, {kind} {added}, {kind} {total}"), slot, 1)


def _over(f: Function, lanes: int, units: str) -> str:
    kind = f"<{lanes} x double>"
    size = f.op(f"call {kind} @llvm.fabs.v{lanes}f64({kind} {units})")
    return f.op(f"fcmp oge {kind} {size}, {vector_constant('double', constant(LIMIT), lanes)}")


def _saturated(f: Function, lanes: int, units: str, rounded: str) -> str:
    singles = f"<{lanes} x float>"
    over = _over(f, lanes, units)
    small = f.op(f"fptrunc <{lanes} x double> {units} to {singles}")
    inf = vector_constant("float", constant(65536.0), lanes)
    inf = f.op(f"call {singles} @llvm.copysign.v{lanes}f32({singles} {inf}, {singles} {small})")
    return f.op(f"select <{lanes} x i1> {over}, {singles} {inf}, {singles} {rounded}")
