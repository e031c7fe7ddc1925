"""The operands of a 3x3 convolution by Winograd's F(2, 3) along the width, as M5's engine forms them.

Two neighbouring results of a row come from four neighbouring columns d and a kernel's row w:

    data t       d0 - d2,    d1 + d2,             d2 - d1,             d1 - d3
    weights u    w0,         (w0 + w1 + w2) / 2,  (w0 - w1 + w2) / 2,  w2
    left         t0 u0 + t1 u1 + t2 u2
    right        t1 u1 - t2 u2 - t3 u3

Each t and u is rounded to fp16 once, half away from zero. The products are those of the multiply-accumulate
unit, and all of a result's (three of a row, three rows, every channel) add up in one accumulator. Of sixteen
ways tried (width or height, either transform rounded half away or half to even, with and without the halves)
this alone gives the errors published for M5 Pro at 64, 128, 256 and 512 channels to all six digits (ANEForge
device_saturation_sweep; the other ways differ in the second to fourth digit at 64). It also fits the 1.45 times
the direct peak that M6 reaches: F(2, 3) has two thirds of the products (M6 notes/compute_array.md, H10). Which
shapes a compiler sends this way is known in part only: dense, stride 1 (ANE guide chapter 20).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ane_trainer.ane.chips.lookup import Chip
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.numbers.fp16 import round_half_away


def eligible(
    chip: Chip, kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...], groups: int
) -> bool:
    """True where the simulated chip convolves this way."""
    plain = set(strides) == {1} == set(dilations)
    return chip.winograd and kernel == (3, 3) and plain and groups == 1


def columns(padded: Array, width: int) -> tuple[Array, Array, Callable[[], None]]:
    """Operands for the left and the right results of each pair, and the step that fills them.

    `padded` `[N, C, H, width + 2]` holds the padded input when the step runs; the operands are
    `[N, 3 C, H, pairs]`, for a kernel of three rows and one column. An odd `width` has half a last pair.
    """
    pairs = (width + 1) // 2
    batch, channels, height = padded.shape[:3]
    left, right = (np.zeros((batch, 3, channels, height, pairs), np.float32) for _ in range(2))
    d = np.zeros((batch, channels, height, 2 * pairs + 2), np.float32)

    def fill() -> None:
        d[..., : width + 2] = padded
        d0, d1, d2, d3 = (d[..., place::2][..., :pairs] for place in range(4))
        left[:, 0] = round_half_away(d0 - d2)
        left[:, 1] = right[:, 0] = round_half_away(d1 + d2)
        left[:, 2] = right[:, 1] = round_half_away(d2 - d1)
        right[:, 2] = round_half_away(d1 - d3)

    shape = (batch, 3 * channels, height, pairs)
    return left.reshape(shape), right.reshape(shape), fill


def filters(weight: Array) -> tuple[Array, Array, Callable[[], None]]:
    """Weights `[Cout, 3 C, 3, 1]` for the left and the right results, and the step that fills them."""
    left, right = (np.zeros((weight.shape[0], 3, *weight.shape[1:3]), np.float32) for _ in range(2))

    def fill() -> None:
        w0, w1, w2 = np.moveaxis(weight.astype(np.float64), 3, 0)
        left[:, 0], right[:, 2] = w0, -w2
        left[:, 1] = right[:, 0] = round_half_away((w0 + w1 + w2) / 2)
        left[:, 2] = round_half_away((w0 - w1 + w2) / 2)
        right[:, 1] = -left[:, 2]

    shape = (weight.shape[0], 3 * weight.shape[1], weight.shape[2], 1)
    return left.reshape(shape), right.reshape(shape), fill
