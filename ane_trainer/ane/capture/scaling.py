"""Dynamic loss scaling on the engine: the overflow flag, and the next scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: Targets of the step's own state begin with this, which no module path can.
SCALING = "step/"
#: Target of the result with the largest magnitude of each gradient in its unit, whether the scaled ones fit (1 or 0),
#: of clipping to a norm the factor, times the shift, and whether it fits, and the largest magnitudes of guarded values.
HEALTH = "health"
#: How the names of guarded values end that the update does not read, so that it is kept.
STATISTICS = " (running statistics)"
#: 1 while all batches that are being accumulated had gradients that fit.
FITS = "accumulated_fits"
#: A scaled gradient of this magnitude or more counts as an overflow (the accumulator's range ends here).
OVERFLOW = 32768.0
LARGEST_SCALE = 32768.0
SMALLEST_SCALE = 2.0**-6
#: Good steps before the scale doubles; the counter is fp16, exact to 2048.
GROWTH_INTERVAL = 500


def gradient_peaks(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[1] each: the largest magnitude of a gradient."""
    return [gradient.abs().amax().reshape(1) for gradient in gradients]


def all_below(values: torch.Tensor, limit: torch.Tensor | float) -> torch.Tensor:
    """[1]: 1.0 if every value is below the limit, else 0.0."""
    return (values.amax().reshape(1) < limit).to(torch.float32)


def next_scale(
    scale: torch.Tensor,
    inverse: torch.Tensor,
    good: torch.Tensor,
    ok: torch.Tensor,
    ceiling: float = LARGEST_SCALE,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss_scale, 1 / loss_scale, good_steps) after a step; powers of two throughout, so all is exact.

    A bad step halves the scale; GROWTH_INTERVAL good ones in a row double it; it stays from SMALLEST_SCALE to
    `ceiling`, a power of two.
    """
    good = (good + 1.0) * ok
    grow = (good >= GROWTH_INTERVAL).to(torch.float32)
    factor = (ok * 0.5 + 0.5) * (grow + 1.0)
    inverse_factor = (2.0 - ok) * (1.0 - grow * 0.5)
    new_scale = torch.clamp(scale * factor, SMALLEST_SCALE, ceiling)
    new_inverse = torch.clamp(inverse * inverse_factor, 1.0 / ceiling, 1.0 / SMALLEST_SCALE)
    return new_scale, new_inverse, good * (1.0 - grow)
