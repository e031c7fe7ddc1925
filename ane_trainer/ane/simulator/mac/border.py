"""LLVM IR for the borders of the multiply-accumulate: bias into accumulators, accumulators into results.

A bias is the accumulator's first value, rounded half away from zero to 2^-16; the result is rounded half
away from zero to fp16 and is never -0 (M6 notes/numerics.md, H11 for the bias).
"""

from __future__ import annotations

from ane_trainer.ane.simulator.loops.ir import Function, constant, vector_constant
from ane_trainer.ane.simulator.mac.micro import Tile


def start_tile(tile: Tile) -> str:
    """`start_tile(c, bias, stride_m, stride_n, rows, columns, largest)`: accumulators from the bias.

    A null `bias` means zeros. `largest` (float32) is raised to the largest |bias|. Accumulators that
    the bias alone overflows hold some wrong value.
    """
    parameters = [
        ("ptr", "c"),
        ("ptr", "bias"),
        ("i64", "sm"),
        ("i64", "sn"),
        ("i64", "rows"),
        ("i64", "columns"),
        ("ptr", "largest"),
    ]
    f = Function("start_tile", parameters, internal=True)
    none = f.op("icmp eq ptr %bias, null")
    with f.when(none):
        f.do(f"call void @llvm.memset.p0.i64(ptr %c, i8 0, i64 {4 * tile.rows * tile.columns}, i1 false)")
    with f.when(f.negate(none)):
        row = f.variable(f"[{tile.columns} x float]", "zeroinitializer")
        with f.loop("0", "%rows") as r:
            line = f.element("float", "%bias", f.mul(r, "%sm"))
            with f.loop("0", "%columns") as j:
                f.store(
                    "float",
                    f.load("float", f.element("float", line, f.mul(j, "%sn"))),
                    f.element("float", row, j),
                )
            target = f.element("i32", "%c", f.mul(r, str(tile.columns)))
            for first in range(0, tile.columns, tile.lanes // 2):
                place = f.element("i32", target, str(first))
                _start(f, tile.lanes // 2, f.element("float", row, str(first)), place)
    return f.text()


def _start(f: Function, lanes: int, source: str, target: str) -> None:
    vector, integers = f"<{lanes} x float>", f"<{lanes} x i32>"
    value = f.load(vector, source)
    limit = constant(2.0**31 - 1)
    units = scaled_bias(f, value, lanes)
    kind = f"<{lanes} x double>"
    for compare, bound in (("olt", limit), ("ogt", constant(-(2.0**31 - 1)))):
        edge = vector_constant("double", bound, lanes)
        inside = f.op(f"fcmp {compare} {kind} {units}, {edge}")
        units = f.op(f"select <{lanes} x i1> {inside}, {kind} {units}, {kind} {edge}")
    f.store(integers, f.op(f"fptosi {kind} {units} to {integers}"), target)
    size = f.op(
        f"and {integers} {f.op(f'bitcast {vector} {value} to {integers}')}, "
        f"{vector_constant('i32', str(0x7FFFFFFF), lanes)}"
    )
    top = f.op(f"call i32 @llvm.vector.reduce.smax.v{lanes}i32({integers} {size})")
    old = f.load("i32", "%largest")
    f.store("i32", f.op(f"call i32 @llvm.smax.i32(i32 {top}, i32 {old})"), "%largest")


def scaled_bias(f: Function, value: str, lanes: int) -> str:
    """A float32 vector times 2^16 plus or minus one half, truncated: rounded half away, as float64."""
    kind, name = f"<{lanes} x double>", f"v{lanes}f64"
    double = f.op(f"fpext <{lanes} x float> {value} to {kind}")
    scaled = f.op(f"fmul {kind} {double}, {vector_constant('double', constant(65536.0), lanes)}")
    half = vector_constant("double", constant(0.5), lanes)
    half = f.op(f"call {kind} @llvm.copysign.{name}({kind} {half}, {kind} {scaled})")
    moved = f.op(f"fadd {kind} {scaled}, {half}")
    return f.op(f"call {kind} @llvm.trunc.{name}({kind} {moved})")


def rounded_result(f: Function, units: str, lanes: int) -> str:
    """Whole numbers of 2^-16 (float64 vector) to decoded fp16 (float32): 11 bits, half away, no -0."""
    kind, longs = f"<{lanes} x double>", f"<{lanes} x i64>"
    bits = f.op(f"bitcast {kind} {units} to {longs}")
    moved = f.op(f"add {longs} {bits}, {vector_constant('i64', str(1 << 41), lanes)}")
    kept = f.op(f"and {longs} {moved}, {vector_constant('i64', str(-(1 << 42)), lanes)}")
    value = f.op(f"bitcast {longs} {kept} to {kind}")
    value = f.op(f"fmul {kind} {value}, {vector_constant('double', constant(2.0**-16), lanes)}")
    value = f.op(f"fadd {kind} {value}, {vector_constant('double', constant(0.0), lanes)}")
    return f.op(f"fptrunc {kind} {value} to <{lanes} x float>")


def finish_tile(tile: Tile) -> str:
    """`finish_tile(c, out, stride_m, stride_n, rows, columns)`: accumulators to decoded fp16 results."""
    parameters = [
        ("ptr", "c"),
        ("ptr", "out"),
        ("i64", "sm"),
        ("i64", "sn"),
        ("i64", "rows"),
        ("i64", "columns"),
    ]
    f = Function("finish_tile", parameters, internal=True)
    lanes = tile.lanes // 2
    contiguous = f.op("icmp eq i64 %sn, 1")
    direct = f.op(f"and i1 {contiguous}, {f.op(f'icmp eq i64 %columns, {tile.columns}')}")
    row = f.variable(f"[{tile.columns} x float]", "zeroinitializer")
    with f.loop("0", "%rows") as r:
        source = f.element("i32", "%c", f.mul(r, str(tile.columns)))
        line = f.element("float", "%out", f.mul(r, "%sm"))
        target = f.op(f"select i1 {direct}, ptr {line}, ptr {row}")
        for first in range(0, tile.columns, lanes):
            count = f.load(f"<{lanes} x i32>", f.element("i32", source, str(first)))
            units = f.op(f"sitofp <{lanes} x i32> {count} to <{lanes} x double>")
            place = f.element("float", target, str(first))
            f.store(f"<{lanes} x float>", rounded_result(f, units, lanes), place)
        with f.when(f.negate(direct)), f.loop("0", "%columns") as j:
            f.store(
                "float",
                f.load("float", f.element("float", row, j)),
                f.element("float", line, f.mul(j, "%sn")),
            )
    return f.text()
