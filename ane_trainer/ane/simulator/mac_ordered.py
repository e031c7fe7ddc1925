"""LLVM IR of the multiply-accumulate in ascending k with the sticky overflow, for suspicious results.

Reaching 32768 (2^31 units) in magnitude at any time freezes the accumulator; the result is then inf with
the sign of the overflow (M6 notes/numerics.md: 16384 + 16384 - 16384 - 16384 + 1 = inf).
"""

from __future__ import annotations

from ane_trainer.ane.simulator.ir import Function, constant, vector_constant
from ane_trainer.ane.simulator.mac_border import rounded_result, scaled_bias
from ane_trainer.ane.simulator.mac_micro import Tile
from ane_trainer.ane.simulator.mac_pack import threshold_bits

LIMIT = 2.0**31


def ordered(tile: Tile) -> str:
    """`ordered(a, b, bias, out, items, count, depth, width)`: spans of `tile.columns` results each.

    All matrices are contiguous float32: a [M, depth], b [depth, width], bias and out [M, width], with
    `width` a multiple of `tile.columns`. `items` are `count` pairs of int64, row and first column.
    """
    parameters = [("ptr", "a"), ("ptr", "b"), ("ptr", "bias"), ("ptr", "out"), ("ptr", "items"),
                  ("i64", "count"), ("i64", "depth"), ("i64", "width")]
    f = Function("ordered", parameters)
    lanes = tile.lanes // 2
    spans = range(0, tile.columns, lanes)
    kind, singles = f"<{lanes} x double>", f"<{lanes} x float>"
    magic = vector_constant("double", constant(1.5 * 2**52), lanes)
    with f.loop("0", "%count") as item:
        row = f.load("i64", f.element("i64", "%items", f.mul(item, "2")), 8)
        edge = f.load("i64", f.element("i64", "%items", f.add(f.mul(item, "2"), "1")), 8)
        corner = f.add(f.mul(row, "%width"), edge)
        bias, out = f.element("float", "%bias", corner), f.element("float", "%out", corner)
        sums = {}
        for j in spans:
            start = scaled_bias(f, f.load(singles, f.element("float", bias, str(j))), lanes)
            sums[j] = f.variable(kind, f.op(f"fadd {kind} {start}, {magic}"))
        with f.loop("0", "%depth") as k:
            value, least = _operand(f, f.element("float", "%a", f.add(f.mul(row, "%depth"), k)), lanes)
            b_row = f.element("float", "%b", f.add(f.mul(k, "%width"), edge))
            for j in spans:
                _step(f, lanes, value, least, f.load(singles, f.element("float", b_row, str(j))), sums[j])
        for j in spans:
            units = f.op(f"fsub {kind} {f.load(kind, sums[j], 1)}, {magic}")
            result = _saturated(f, lanes, units, rounded_result(f, units, lanes))
            f.store(singles, result, f.element("float", out, str(j)))
    return f.text()


def _operand(f: Function, place: str, lanes: int) -> tuple[str, str]:
    """One a as float64 times 2^16, one step away from zero, and its drop threshold; both as vectors."""
    double = f.op(f"fpext float {f.load('float', place)} to double")
    bits = f.op(f"bitcast double {f.op(f'fmul double {double}, {constant(65536.0)}')} to i64")
    nonzero = f.op(f"zext i1 {f.op(f'fcmp une double {double}, {constant(0.0)}')} to i64")
    value = f.splat("double", f.op(f"bitcast i64 {f.op(f'or i64 {bits}, {nonzero}')} to double"), lanes)
    size = f.splat("i32", f.op(f"and i32 {f.load('i32', place)}, {0x7FFFFFFF}"), lanes)
    least = f.op(f"bitcast <{lanes} x i32> {threshold_bits(f, size, lanes)} to <{lanes} x float>")
    return value, least


def _step(f: Function, lanes: int, a: str, least: str, b: str, slot: str) -> None:
    kind, singles, name = f"<{lanes} x double>", f"<{lanes} x float>", f"v{lanes}f64"
    total = f.load(kind, slot, 1)
    size = f.op(f"call {singles} @llvm.fabs.v{lanes}f32({singles} {b})")
    keep = f.op(f"fcmp oge {singles} {size}, {least}")
    units = f.op(f"fsub {kind} {total}, {vector_constant('double', constant(1.5 * 2**52), lanes)}")
    under = f.op(f"xor <{lanes} x i1> {_over(f, lanes, units)}, {vector_constant('i1', 'true', lanes)}")
    alive = f.op(f"and <{lanes} x i1> {keep}, {under}")
    wide_b = f.op(f"fpext {singles} {b} to {kind}")
    added = f.op(f"call {kind} @llvm.fma.{name}({kind} {a}, {kind} {wide_b}, {kind} {total})")
    f.store(kind, f.op(f"select <{lanes} x i1> {alive}, {kind} {added}, {kind} {total}"), slot, 1)


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
