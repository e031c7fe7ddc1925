"""Rounds numbers to eleven significant bits, of any exponent: those of fp16 without its range."""

from __future__ import annotations

import torch

#: fp32: bits of the significand that go, the field of the exponent, and the least exponent whose unit is normal.
_GONE, _EXPONENT, _LEAST = 13, 0x7F800000, 11 << 23
_UNIT = 10 << 23


def to_eleven_bits(value: torch.Tensor, draws: torch.Generator | None = None) -> torch.Tensor:
    """Each number rounded to the nearest, half to even; with `draws` up or down at random, right on average.

    fp32 is rounded in its bits, in a fiftieth of the time that taking numbers apart needs; below 2^-116 coarser.
    """
    if value.dtype != torch.float32:
        return _taken_apart(value, draws)
    bits = value.view(torch.int32)
    if draws is None:
        odd = bits.bitwise_right_shift(_GONE).bitwise_and_(1)
        return odd.add_(bits).add_((1 << (_GONE - 1)) - 1).bitwise_and_(-1 << _GONE).view(torch.float32)
    unit = bits.bitwise_and(_EXPONENT).clamp_(min=_LEAST).sub_(_UNIT).view(torch.float32)
    up = torch.rand(value.shape, generator=draws, dtype=value.dtype)
    return (value / unit).add_(up).floor_().mul_(unit)


def _taken_apart(value: torch.Tensor, draws: torch.Generator | None) -> torch.Tensor:
    """The same of any type."""
    significand, exponent = torch.frexp(value)
    if draws is None:
        return torch.ldexp(torch.round(significand * 2048.0) / 2048.0, exponent)
    up = torch.rand(value.shape, generator=draws, dtype=value.dtype)
    return torch.ldexp(torch.floor(significand * 2048.0 + up) / 2048.0, exponent)
