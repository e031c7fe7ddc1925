"""Solve for the logs of many chips' constants together: a common mean, trends and shrunk deviations.

A constant of a chip on a path is, in logs,

    mean + a log(DRAM bandwidth / 200 GB/s) + b log(clock / 2 GHz) + c log(weight stream / 60 GB/s)
         + path + chip + chip on path

where each term has a normal prior that pulls it to zero, or to the trend, as far as rows do not decide it. The
residual is the log of estimated over published value, robust (pseudo-Huber). A chip without rows takes mean,
trends and path. Gauss-Newton with damping; derivatives are exact, since an estimate is a sum of parts that each
go with one constant or two.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.chips.lookup import get_chip
from docs._generate.cost.distil import Row

Array = NDArray[np.float64]
PATHS = ("e5rt", "direct", "coreml")
#: Relative error that counts as one unit of the loss.
_UNIT = 0.10
_DRAM_GB_S, _CLOCK_GHZ, _STREAM_GB_S = 200.0, 2.0, 60.0
#: Blocks of terms in front of those of paths and chips: mean and trends.
TRENDS = 4


class Prior(NamedTuple):
    """Start of a constant's mean and its deviation; mean and deviation of its trends with DRAM bandwidth and clock;
    deviations of path, chip, and chip on path; mean and deviation of its trend with the published weight stream."""

    mean: float
    spread: float
    dram: tuple[float, float]
    clock: tuple[float, float]
    path: float
    chip: float
    chip_path: float
    stream: tuple[float, float] = (0.0, 0.01)


#: Logs of constants by row -> estimated values, and their derivative by each log.
Evaluate = Callable[[Array], tuple[Array, Array]]


@dataclass(frozen=True)
class Solution:
    """Solved terms with their covariance; `blocks` says where the terms of a path, chip, chip on path begin."""

    names: tuple[str, ...]
    terms: Array
    covariance: Array
    blocks: Mapping[tuple[str, ...], int]

    def columns(self, chip: str, path: str) -> list[tuple[int, float]]:
        """Where the terms of a chip on a path begin, and the factor of each."""
        return _columns(self.blocks, len(self.names), chip, path)

    def logs(self, chip: str, path: str) -> Array:
        """Logs of the constants."""
        size = len(self.names)
        return np.sum(
            [factor * self.terms[start : start + size] for start, factor in self.columns(chip, path)], axis=0
        )

    def deviations(self, chip: str, path: str) -> Array:
        """Standard deviation of each log, given the rows and priors."""
        found = np.zeros(len(self.names))
        columns = self.columns(chip, path)
        for index in range(len(self.names)):
            rows = np.array([start + index for start, _ in columns])
            factors = np.array([factor for _, factor in columns])
            found[index] = math.sqrt(factors @ self.covariance[np.ix_(rows, rows)] @ factors)
        return found


def _columns(
    blocks: Mapping[tuple[str, ...], int], size: int, chip: str, path: str
) -> list[tuple[int, float]]:
    facts = get_chip(chip)
    dram = math.log((facts.dram_gb_s or 2 * _DRAM_GB_S) / _DRAM_GB_S)
    stream = math.log((facts.weight_stream_gb_s or _STREAM_GB_S) / _STREAM_GB_S)
    found = [(0, 1.0), (size, dram), (2 * size, math.log(facts.clock_ghz / _CLOCK_GHZ)), (3 * size, stream)]
    return found + [(blocks[key], 1.0) for key in ((path,), ("chip", chip), (chip, path)) if key in blocks]


def _layout(rows: Sequence[Row], priors: Sequence[Prior]) -> tuple[dict[tuple[str, ...], int], Array, Array]:
    """Blocks of terms with their prior means and deviations."""
    zero = [0.0] * len(priors)
    trends = [(p.dram, p.clock, p.stream) for p in priors]
    means = [[math.log(p.mean) for p in priors], *([t[i][0] for t in trends] for i in range(3))]
    spread = [[p.spread for p in priors], *([t[i][1] for t in trends] for i in range(3))]
    keys: list[tuple[tuple[str, ...], list[float]]] = [
        ((path,), [p.path for p in priors]) for path in PATHS[1:]
    ]
    keys += [(("chip", chip), [p.chip for p in priors]) for chip in sorted({row.chip for row in rows})]
    pairs = sorted({(row.chip, row.path) for row in rows})
    keys += [(pair, [p.chip_path for p in priors]) for pair in pairs]
    blocks = {key: (TRENDS + index) * len(priors) for index, (key, _) in enumerate(keys)}
    return (
        blocks,
        np.array(means + [zero] * len(keys)).ravel(),
        np.array(spread + [s for _, s in keys]).ravel(),
    )


def _row_weights(rows: Sequence[Row]) -> Array:
    """One over the unit of error; repeated programs and large families count less than their number."""
    same = Counter((row.chip, row.path, row.workload) for row in rows)
    families = Counter((row.chip, row.path, row.family) for row in rows)
    return np.array([
        same[row.chip, row.path, row.workload] ** -0.5
        * min(1.0, (12 / families[row.chip, row.path, row.family]) ** 0.25) / _UNIT
        for row in rows
    ])  # fmt: skip


def solve(rows: Sequence[Row], priors: Mapping[str, Prior], evaluate: Evaluate, steps: int = 60) -> Solution:
    """The terms that explain the rows' values best, under the priors."""
    size, (blocks, means, spread) = len(priors), _layout(rows, list(priors.values()))
    published, weights = np.log([row.value for row in rows]), _row_weights(rows)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.chip, row.path].append(index)
    members = [(_columns(blocks, size, *group), np.array(found)) for group, found in groups.items()]

    def state(terms: Array) -> tuple[float, Array, Array]:
        logs = np.zeros((len(rows), size))
        for columns, found in members:
            logs[found] = np.sum([factor * terms[start : start + size] for start, factor in columns], axis=0)
        values, slopes = evaluate(logs)
        error, pull = weights * (np.log(values) - published), (terms - means) / spread
        loss = float(np.sum(np.sqrt(1 + error**2) - 1) + 0.5 * np.sum(pull**2))
        return loss, error, slopes / values[:, None] * weights[:, None]

    terms, damping = means.copy(), 1e-3
    loss, error, slopes = state(terms)
    curvature = np.diag(1 / spread**2)
    for _ in range(steps):
        bend = 1 / np.sqrt(1 + error**2)
        jacobian = np.zeros((len(rows), terms.size))
        for columns, found in members:
            for start, factor in columns:
                jacobian[found, start : start + size] += factor * slopes[found]
        gradient = jacobian.T @ (bend * error) + (terms - means) / spread**2
        curvature = jacobian.T @ (bend[:, None] * jacobian) + np.diag(1 / spread**2)
        for _ in range(12):
            step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), gradient)
            trial = terms - np.clip(step, -1.5, 1.5)
            found_state = state(trial)
            if found_state[0] < loss:
                break
            damping *= 4
        else:
            break
        gain, terms, damping = loss - found_state[0], trial, damping / 5
        loss, error, slopes = found_state
        if gain < 1e-6 * loss:
            break
    return Solution(tuple(priors), terms, np.linalg.inv(curvature), blocks)
