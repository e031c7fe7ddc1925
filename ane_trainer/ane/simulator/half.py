"""Decoding fp16 patterns at machine speed: what `fp16.decode` does, as one LLVM loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.simulator import jit


def decode_into(half: NDArray[np.float16], out: NDArray[np.float32]) -> None:
    """Decode contiguous float16 patterns into contiguous float32 storage of the same size."""
    _decoder()(half.ctypes.data, out.ctypes.data, half.size)


@cache
def _decoder() -> Callable[..., None]:
    """Exponent and fraction move up by 13 bits; a product by 2^112 moves the bias, in every exponent field."""
    return jit.compile_ir(
        """
        define void @decode(ptr noalias %half, ptr noalias %out, i64 %count) {
        entry:
          br label %head
        head:
          %i = phi i64 [ 0, %entry ], [ %next, %body ]
          %more = icmp slt i64 %i, %count
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
        """,
        ["decode"],
    )["decode"]
