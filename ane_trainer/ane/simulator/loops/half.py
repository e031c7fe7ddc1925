"""Decoding and encoding fp16 patterns at machine speed: what `fp16.decode` and `fp16.encode` do, as LLVM loops."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.simulator.loops import jit
from ane_trainer.ane.simulator.loops.team import Stage, Team, addresses, divided
from ane_trainer.ane.simulator.memory.fp16 import encode

#: IR that turns the float32 bits `%bits` of a decoded value into `%sign` and `%magnitude` of its fp16 pattern.
SIGN_AND_MAGNITUDE = """
          %high = lshr i32 %bits, 16
          %sign = and i32 %high, 32768
          %size = and i32 %bits, 2147483647
          %kept = lshr i32 %size, 13
          %normal = sub i32 %kept, 114688
          %value = bitcast i32 %size to float
          %scaled = fmul float %value, 0x4170000000000000
          %small = icmp ult i32 %size, 947912704
          %clipped = select i1 %small, float %scaled, float 0.0
          %subnormal = fptoui float %clipped to i32
          %magnitude = select i1 %small, i32 %subnormal, i32 %normal
"""


def decode_into(half: NDArray[np.float16], out: NDArray[np.float32], threads: int = 1) -> None:
    """Decode contiguous float16 patterns into contiguous float32 storage of the same size."""
    _share(_decoder(), half.size, threads, half, out)


def encoded(decoded: NDArray[np.float32], threads: int = 1) -> NDArray[np.float16]:
    """The fp16 patterns of a decoded array; `ValueError` for a value that no pattern decodes to."""
    if decoded.size < _FEW:
        return encode(decoded)
    patterns, wrong = np.empty(decoded.shape, np.float16), np.zeros(1, np.int32)
    _share(_encoder(), decoded.size, threads, np.ascontiguousarray(decoded), patterns, wrong)
    return encode(decoded) if wrong[0] else patterns  # the slow form names the value


def _share(loop: Callable[..., None], count: int, threads: int, *arrays: NDArray[Any]) -> None:
    arguments = addresses(*(array.__array_interface__["data"][0] for array in arrays))
    shares, place = divided(count, count, threads), ctypes.addressof(arguments)
    if len(shares) == 1:
        loop(place, 0, count)
    elif shares:
        Team([Stage(jit.address(loop), place)], shares, threads).run()


_FEW = 1 << 9
"""Numbers below which a compiled call brings nothing."""


@cache
def _encoder() -> Callable[..., None]:
    """A product by 2^-112 moves the exponent's bias, in the subnormals too; bits 13 on are the pattern but for the
    sign. What decodes back to other bits is wrong.
    """
    text = """
        define void @encode(ptr %arguments, i64 %first, i64 %last) {
        entry:
          %from = load ptr, ptr %arguments, align 8
          %second = getelementptr ptr, ptr %arguments, i64 1
          %out = load ptr, ptr %second, align 8
          %third = getelementptr ptr, ptr %arguments, i64 2
          %wrong = load ptr, ptr %third, align 8
          br label %head
        head:
          %i = phi i64 [ %first, %entry ], [ %next, %body ]
          %bad = phi i32 [ 0, %entry ], [ %still, %body ]
          %more = icmp slt i64 %i, %last
          br i1 %more, label %body, label %done
        body:
          %at = getelementptr float, ptr %from, i64 %i
          %x = load float, ptr %at, align 4
          %moved = fmul float %x, 0x38F0000000000000
          %bits = bitcast float %moved to i32
          %shifted = lshr i32 %bits, 13
          %size = and i32 %shifted, 32767
          %high = lshr i32 %bits, 16
          %sign = and i32 %high, 32768
          %pattern = or i32 %size, %sign
          %placed = and i32 %bits, -1879056384
          %tiny = bitcast i32 %placed to float
          %back = fmul float %tiny, 0x46F0000000000000
          %again = bitcast float %back to i32
          %given = bitcast float %x to i32
          %differs = xor i32 %again, %given
          %still = or i32 %bad, %differs
          %narrow = trunc i32 %pattern to i16
          %to = getelementptr i16, ptr %out, i64 %i
          store i16 %narrow, ptr %to, align 2
          %next = add i64 %i, 1
          br label %head
        done:
          %any = icmp ne i32 %bad, 0
          br i1 %any, label %tell, label %end
        tell:
          store i32 1, ptr %wrong
          br label %end
        end:
          ret void
        }
        """
    return jit.compile_ir(text, ["encode"])["encode"]


@cache
def _decoder() -> Callable[..., None]:
    """Exponent and fraction move up by 13 bits; a product by 2^112 moves the bias, in every exponent field."""
    text = """
        define void @decode(ptr %arguments, i64 %first, i64 %last) {
        entry:
          %half = load ptr, ptr %arguments, align 8
          %second = getelementptr ptr, ptr %arguments, i64 1
          %out = load ptr, ptr %second, align 8
          br label %head
        head:
          %i = phi i64 [ %first, %entry ], [ %next, %body ]
          %more = icmp slt i64 %i, %last
          br i1 %more, label %body, label %done
        body:
          %from = getelementptr i16, ptr %half, i64 %i
          %bits = load i16, ptr %from, align 2
          %wide = zext i16 %bits to i32
          %magnitude = and i32 %wide, 32767
          %placed = shl i32 %magnitude, 13
          %small = bitcast i32 %placed to float
          %value = fmul float %small, 0x46F0000000000000
          %number = bitcast float %value to i32
          %high = and i32 %wide, 32768
          %sign = shl i32 %high, 16
          %whole = or i32 %number, %sign
          %to = getelementptr i32, ptr %out, i64 %i
          store i32 %whole, ptr %to, align 4
          %next = add i64 %i, 1
          br label %head
        done:
          ret void
        }
        """
    return jit.compile_ir(text, ["decode"])["decode"]
