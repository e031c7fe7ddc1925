"""Rounding and table look-up at machine speed: `fp16.round_half_away` and `tables.evaluate` as LLVM loops."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.simulator.kernels.tables import evaluate, lookup
from ane_trainer.ane.simulator.loops import jit
from ane_trainer.ane.simulator.loops.half import SIGN_AND_MAGNITUDE
from ane_trainer.ane.simulator.memory.fp16 import F32, round_half_away

_FEW = 1 << 10
"""Numbers below which a call costs more than it brings."""


def rounded(x: NDArray[Any]) -> F32:
    """Decoded fp16 of real numbers, as `round_half_away` gives it. A contiguous float32 array is used up."""
    if x.size < _FEW or x.dtype not in (np.float32, np.float64) or not x.flags.c_contiguous:
        return round_half_away(x)
    out = x if x.dtype == np.float32 and x.flags.writeable else np.empty(x.shape, np.float32)
    _loops()["round32" if x.dtype == np.float32 else "round64"](x.ctypes.data, out.ctypes.data, x.size)
    return out


def table_of(name: str, x: F32) -> F32:
    """The table `name` of decoded values, as `tables.evaluate` gives it."""
    if x.size < _FEW or not x.flags.c_contiguous or x.dtype != np.float32:
        return evaluate(name, x)
    out = np.empty(x.shape, np.float32)
    _loops()["gather"](x.ctypes.data, out.ctypes.data, x.size, lookup(name).ctypes.data)
    return out


def _round(name: str, real: str, bits: str, shift: int, most: int, least: int) -> str:
    """Normal numbers: half a unit is added to the bits, the rest cut. Below 2^-14: multiples of 2^-24."""
    top = 1 << (int(bits[1:]) - 1)
    narrow = "fptrunc double %number to float" if real == "double" else "fadd float %number, -0.0"
    return f"""
        declare {real} @llvm.floor.{"f64" if real == "double" else "f32"}({real})
        declare {bits} @llvm.umin.{bits}({bits}, {bits})
        define void @{name}(ptr %data, ptr %out, i64 %count) {{
        entry:
          br label %head
        head:
          %i = phi i64 [ 0, %entry ], [ %next, %body ]
          %more = icmp slt i64 %i, %count
          br i1 %more, label %body, label %done
        body:
          %at = getelementptr {bits}, ptr %data, i64 %i
          %bits = load {bits}, ptr %at
          %sign = and {bits} %bits, {-top}
          %size = and {bits} %bits, {top - 1}
          %half_up = add {bits} %size, {1 << (shift - 1)}
          %cut = and {bits} %half_up, {-(1 << shift)}
          %normal = call {bits} @llvm.umin.{bits}({bits} %cut, {bits} {most})
          %value = bitcast {bits} %size to {real}
          %scaled = fmul {real} %value, 0x4170000000000000
          %whole = call {real} @llvm.floor.{"f64" if real == "double" else "f32"}({real} %scaled)
          %part = fsub {real} %scaled, %whole
          %up = fcmp oge {real} %part, 0x3FE0000000000000
          %one = select i1 %up, {real} 1.0, {real} 0.0
          %steps = fadd {real} %whole, %one
          %tiny = fmul {real} %steps, 0x3E70000000000000
          %tiny_bits = bitcast {real} %tiny to {bits}
          %small = icmp ult {bits} %size, {least}
          %magnitude = select i1 %small, {bits} %tiny_bits, {bits} %normal
          %signed = or {bits} %magnitude, %sign
          %number = bitcast {bits} %signed to {real}
          %result = {narrow}
          %to = getelementptr float, ptr %out, i64 %i
          store float %result, ptr %to
          %next = add i64 %i, 1
          br label %head
        done:
          ret void
        }}
        """


_GATHER = """
        define void @gather(ptr noalias %data, ptr noalias %out, i64 %count, ptr noalias %table) {
        entry:
          br label %head
        head:
          %i = phi i64 [ 0, %entry ], [ %next, %body ]
          %more = icmp slt i64 %i, %count
          br i1 %more, label %body, label %done
        body:
          %at = getelementptr i32, ptr %data, i64 %i
          %bits = load i32, ptr %at
          SIGN_AND_MAGNITUDE
          %pattern = or i32 %magnitude, %sign
          %index = zext i32 %pattern to i64
          %entry_at = getelementptr float, ptr %table, i64 %index
          %found = load float, ptr %entry_at
          %to = getelementptr float, ptr %out, i64 %i
          store float %found, ptr %to
          %next = add i64 %i, 1
          br label %head
        done:
          ret void
        }
        """.replace("SIGN_AND_MAGNITUDE", SIGN_AND_MAGNITUDE)


def round64_text() -> str:
    """LLVM IR of `round64(ptr doubles, ptr floats, i64 count)`: decoded fp16 of real numbers."""
    return _round("round64", "double", "i64", 42, 0x40F0000000000000, 0x3F10000000000000)


@cache
def _loops() -> dict[str, Callable[..., None]]:
    text = _round("round32", "float", "i32", 13, 0x47800000, 0x38800000)
    text += round64_text() + _GATHER
    return jit.compile_ir(text, ["round32", "round64", "gather"])
