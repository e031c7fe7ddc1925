"""Intervals beside an estimate: conformal quantiles of left-out values, in units of how far their kind usually is off.

Of one kind of program few values are published, and of a few the ninth of ten is hardly known. So each log of published
over estimated is divided by the spread of its kind of program; what is left is alike over kinds and is pooled.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from docs._generate.cost.evaluate import Left

Floats = NDArray[np.float64]

#: Kinds of programs by what bounds them: those of one group err alike.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("norm", "softmax", "reduction", "elementwise"),
    ("product", "convolution", "chain", "matrix-vector", "compressed"),
    ("attention", "block", "decode", "model", "training step"),
)


@dataclass(frozen=True)
class Recipe:
    """How intervals are made.

    `shrink`: weight, in programs, of the group's spread beside the kind's own. `pooled`: weight, in programs, of the
    other kinds in the size of an interval; infinite: the kind has no say before it is held to its own values.
    `symmetric`: as wide on both sides. `chips`: programs of a kind on one chip count as one; all paths are pooled.
    """

    shrink: float
    pooled: float
    symmetric: bool = False
    chips: bool = False


#: Share of values that an interval is to hold, and between which shares of its kind's own values it is held.
NOMINAL, HELD = 0.90, (0.86, 0.94)
#: Chips from which on a kind's values show how chips differ: an interval for a chip that is left out is made narrower
#: than that of other kinds only where so many agree; else at most to this share.
CHIPS, NARROWEST = 3, 0.95

#: Basis and quantity -> recipe. Of those tried, the ones whose intervals, printed and made without the values that
#: they are tried on, are outside 85 to 95 % in the fewest families; of these the ones with the least interval score
#: (width and twenty times what is missed, in logs) of left-out values.
RECIPES = {
    ("measured", "latency"): Recipe(24, 10),
    ("measured", "energy"): Recipe(4, 10),
    ("carried", "latency"): Recipe(24, math.inf, chips=True),
    ("carried", "energy"): Recipe(8, math.inf, symmetric=True),
}


def interval_of(seen: Sequence[Left], path: str, kind: str, basis: str) -> tuple[float, float, int]:
    """Factors on an estimate between which nine of ten values lie, and how many programs of this kind were seen.

    `seen` holds left-out values of one quantity; path and kind may be `any`.
    """
    recipe = RECIPES[basis, seen[0].row.quantity]
    if not recipe.chips and path != "any":
        seen = [item for item in seen if item.row.path == path]
    own = np.array([path in (i.row.path, "any") and kind in (i.kind, "any") for i in seen])
    labels = [("", kind) if mine else (i.row.path, i.kind) for i, mine in zip(seen, own, strict=True)]
    factors, weights = np.log([item.factor for item in seen]), _weights(seen, recipe)
    spread = _spreads(factors, weights, labels, recipe.shrink)
    mine = spread(("", kind))
    programs = {(i.row.chip, i.row.workload) for i, is_own in zip(seen, own, strict=True) if is_own}
    chips = math.inf if basis == "measured" else len({chip for chip, _ in programs})
    scores = factors / np.array([spread(label) for label in labels])
    low, high = _limits(scores, weights, own, chips >= CHIPS, recipe)
    return math.exp(low * mine), math.exp(high * mine), len(programs)


def _weights(seen: Sequence[Left], recipe: Recipe) -> Floats:
    """Values of one program on one chip count as one together; or all of a kind on one chip."""
    keys = [(i.row.path, i.row.chip, i.kind if recipe.chips else i.row.workload) for i in seen]
    counts = Counter(keys)
    return np.array([1 / counts[key] for key in keys])


class _spreads:
    """Root mean square of a kind's logs, shrunk to that of its group, and that to that of all."""

    def __init__(
        self, factors: Floats, weights: Floats, labels: Sequence[tuple[str, str]], shrink: float
    ) -> None:
        self._shrink = shrink
        self._sums: dict[tuple[str, str], Floats] = {}
        for label, factor, weight in zip(labels, factors, weights, strict=True):
            self._sums[label] = self._sums.get(label, np.zeros(2)) + np.array([weight * factor**2, weight])
        total = np.sum(list(self._sums.values()), axis=0)
        self._all = float(total[0] / total[1])

    def __call__(self, label: tuple[str, str]) -> float:
        group = next((group for group in GROUPS if label[1] in group), ())
        kin = [sums for (_, kind), sums in self._sums.items() if kind in group]
        near = self._shrunk(np.sum(kin, axis=0), self._all) if kin else self._all
        return math.sqrt(self._shrunk(self._sums.get(label, np.zeros(2)), near))

    def _shrunk(self, sums: Floats, to: float) -> float:
        return float((sums[0] + self._shrink * to) / (sums[1] + self._shrink))


def _limits(
    scores: Floats, weights: Floats, own: NDArray[np.bool_], narrow: bool, recipe: Recipe
) -> tuple[float, float]:
    """The interval in spreads: its shape is that of all kinds, its size as far as possible that of the kind."""
    if recipe.symmetric:
        high = _quantile(np.abs(scores), weights, NOMINAL)
        low = -high
    else:
        high = _quantile(scores, weights, (1 + NOMINAL) / 2)
        low = -_quantile(-scores, weights, (1 + NOMINAL) / 2)
    beyond, size = np.maximum(scores / high, scores / low), 1.0
    if not math.isinf(recipe.pooled):
        pool = recipe.pooled if own.any() else 1.0
        size = _quantile(beyond, own * weights + pool * weights / weights.sum(), NOMINAL)
    size = _held_to(np.sort(beyond[own]), size, narrow)
    return low * size, high * size


def _held_to(own: Floats, size: float, narrow: bool) -> float:
    """The size nearest to `size` with which the kind's own values, of sizes `own`, are held as often as they should."""
    count = len(own)
    least, most = math.ceil(HELD[0] * count), math.floor(HELD[1] * count)
    inside = int(np.sum(own <= size))
    if not 0 < least <= most < count or least <= inside <= most:
        return size
    between = (own[1:] + own[:-1]) / 2
    if inside < least:
        return float(between[least - 1])
    return float(between[most - 1] if narrow else max(between[most - 1], NARROWEST * size))


def _quantile(values: Floats, weights: Floats, level: float) -> float:
    """Conformal: as if one more value were there, beyond all others; the largest where there are few."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(np.interp(level * (reached[-1] + 1), reached, values[order]))
