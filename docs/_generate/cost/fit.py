"""Fit the rates of all chips and paths to published latencies, and the energy terms to published powers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from ane_trainer.ane.chips.cost import leaves_engine
from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.chips.work import function_work
from docs._generate.cost.distil import Row
from docs._generate.cost.solve import Array, Prior, Solution, solve
from docs._generate.cost.workloads import program

#: Rates in GB/s by stream, times in us, factors of the array's peak. A rate in DERIVED is a factor on its base.
PRIORS: dict[str, Prior] = {
    "dispatch_us": Prior(95, 1, (0, 0.05), (-0.5, 0.5), 0.4, 0.3, 0.3),
    "task_us": Prior(0.3, 1, (0, 0.05), (-0.5, 0.5), 0.1, 0.3, 0.1),
    "mac_task_us": Prior(0.5, 1, (0, 0.05), (-0.5, 0.5), 0.1, 0.3, 0.1),
    "read": Prior(15, 1, (0.5, 0.3), (1, 0.7), 1.0, 0.7, 0.5),
    "write": Prior(8, 1, (0.7, 0.4), (1.5, 0.7), 1.0, 0.8, 0.5),
    "large_write": Prior(1, 0.3, (0, 0.1), (0, 0.1), 0.1, 0.7, 0.1),
    "weight": Prior(60, 1, (0, 0.2), (0, 0.3), 0.3, 0.5, 0.3, (1, 0.3)),
    "small_weight": Prior(150, 1, (0, 0.2), (0, 0.3), 0.8, 0.4, 0.4, (1, 0.3)),
    "large_weight": Prior(0.9, 0.5, (0.2, 0.2), (0, 0.1), 0.1, 0.3, 0.1),
    "compressed": Prior(55, 1, (0, 0.2), (0, 0.3), 0.3, 0.4, 0.2, (1, 0.4)),
    "mac": Prior(0.95, 0.1, (0, 0.02), (0, 0.1), 0.03, 0.05, 0.03),
    "winograd": Prior(1.5, 0.1, (0, 0.01), (0, 0.01), 0.03, 0.05, 0.03),
    "int8": Prior(1.8, 0.3, (0, 0.05), (0, 0.05), 0.05, 0.3, 0.05),
    "pass": Prior(150, 1, (0.2, 0.3), (1, 0.5), 0.1, 0.4, 0.1),
    "spill": Prior(0.4, 0.5, (0.2, 0.2), (0, 0.2), 0.1, 0.3, 0.1),
    "spread": Prior(25, 1, (0.2, 0.3), (1, 0.5), 0.1, 0.4, 0.1),
    "softmax": Prior(10, 1, (0.2, 0.3), (1, 0.5), 0.1, 0.4, 0.1),
    "l2": Prior(3, 1, (0, 0.3), (0, 0.3), 0.1, 0.8, 0.1),
    "wide": Prior(2, 1, (0.2, 0.2), (0.5, 0.3), 0.1, 0.3, 0.1),
    "wide_near": Prior(2, 0.5, (0.2, 0.2), (0, 0.2), 0.1, 0.3, 0.1),
    "wide_spill": Prior(0.3, 0.5, (0.2, 0.2), (0, 0.2), 0.1, 0.3, 0.1),
    "deep_spill": Prior(2, 1, (0.2, 0.2), (0.5, 0.3), 0.1, 0.5, 0.1),
}
DERIVED = {
    "large_write": "write",
    "large_weight": "weight",
    "spill": "pass",
    "wide_near": "wide",
    "wide_spill": "wide",
}
#: Energy: W while a dispatch is under way, while the array computes or waits for weights, while passes run and while
#: outputs drain; pJ a multiply-accumulate and a byte; then shares of it: of a multiply-accumulate behind a
#: relu, half of whose activations are zero, and of a byte written.
ENERGY: dict[str, Prior] = {
    "dispatch_w": Prior(0.8, 1, (0, 0.1), (0, 0.5), 0.1, 0.6, 0.1),
    "mac_pj": Prior(0.9, 0.5, (0, 0.1), (0, 0.5), 0.1, 0.3, 0.1),
    "mac_w": Prior(2, 0.5, (0, 0.1), (0, 0.5), 0.1, 0.3, 0.1),
    "weight_pj": Prior(30, 1, (0, 0.1), (0, 0.5), 0.1, 0.3, 0.1),
    "transfer_pj": Prior(40, 1, (0, 0.1), (0, 1.5), 0.1, 0.3, 0.1),
    "pass_w": Prior(1, 0.5, (0, 0.1), (0, 0.5), 0.1, 0.3, 0.1),
    "write_w": Prior(0.07, 0.7, (0, 0.1), (0, 0.3), 0.1, 0.3, 0.1),
    "relu_share": Prior(0.6, 0.3, (0, 0.01), (0, 0.01), 0.03, 0.05, 0.03),
    "write_share": Prior(0.3, 0.5, (0, 0.01), (0, 0.01), 0.03, 0.1, 0.03),
}
NAMES = tuple(PRIORS)
_INDEX = {name: index for index, name in enumerate(NAMES)}
WEIGHTS = ("small_weight", "weight", "large_weight", "compressed")
TRANSFERS = ("read", "write", "large_write")
PASSES = ("pass", "spill", "spread", "softmax", "l2", "wide", "wide_near", "wide_spill", "deep_spill")
_STREAMS = (*WEIGHTS, *TRANSFERS, *PASSES)
_MACS, _WINOGRAD, _INT8, _PASS, _PRODUCT, _WORK, _RECTIFIED, _FIRST = range(8)


@cache
def _features(workload: str) -> tuple[Array, Array]:
    """Distinct ops of a program and how often each occurs; columns: cycles' macs, winograd, int8, whether an
    elementwise pass, whether a product, macs, those behind a relu, bytes by stream."""
    counts: Counter[tuple[float, ...]] = Counter()
    for work in function_work(program(workload).main):
        sizes = dict(work.weights) | dict(work.passes) | dict(work.transfers)
        facts = (work.macs / work.mac_rate, work.winograd, work.int8, work.unit == "elementwise", work.unit == "mac",
                 work.macs, work.macs * work.rectified)  # fmt: skip
        counts[(*map(float, facts), *(float(sizes.get(name, 0)) for name in _STREAMS))] += 1
    return np.array(list(counts)), np.array(list(counts.values()), dtype=float)


def fitted_to(row: Row) -> bool:
    """Whether the fit takes a row; what it leaves out, `cost-model.md` names."""
    word, *rest = row.workload.split()
    narrow = word == "pointwise_conv" and int(rest[2]) < 32  # under the direct path's least width
    zero_skipping = row.path == "coreml" and rest[-1] == "int4"  # three quarters of those weights are zero
    return not (
        narrow
        or zero_skipping
        or leaves_engine(function_work(program(row.workload).main), get_chip(row.chip))
    )


class _Batch:
    """The features of many rows, stacked."""

    def __init__(self, rows: Sequence[Row]) -> None:
        found = [_features(row.workload) for row in rows]
        self.size = len(rows)
        self.ops = np.concatenate([ops for ops, _ in found])
        self.counts = np.concatenate([counts for _, counts in found])
        self.row = np.repeat(np.arange(self.size), [len(counts) for _, counts in found])
        chips = [get_chip(row.chip) for row in rows]
        self.peak = np.array([chip.peak_fp16_flops / 2e6 for chip in chips])
        self.winograd = np.array([chip.winograd for chip in chips])

    def sum(self, values: Array) -> Array:
        """Sum over each row's ops."""
        return np.bincount(self.row, values * self.counts, self.size)

    def column(self, name: str) -> Array:
        return self.ops[:, _FIRST + _STREAMS.index(name)]

    def compute(self, logs: Array) -> tuple[Array, Array, Array]:
        """Compute time of each op in us, and which may use Winograd's form and int8."""
        rates = np.exp(logs)
        fast, int8 = (self.ops[:, _WINOGRAD] > 0) & self.winograd[self.row], self.ops[:, _INT8] > 0
        gain = np.where(fast, rates[self.row, _INDEX["winograd"]], 1.0)
        gain = gain * np.where(int8, rates[self.row, _INDEX["int8"]], 1.0)
        return self.ops[:, _MACS] / (self.peak[self.row] * rates[self.row, _INDEX["mac"]] * gain), fast, int8

    def streams(self, logs: Array) -> tuple[Array, dict[str, Array]]:
        """Rates, derived ones multiplied out, and the time of each op's streams in us."""
        rates = np.exp(logs)
        for name, base in DERIVED.items():
            rates[:, _INDEX[name]] *= rates[:, _INDEX[base]]
        return rates, {name: self.column(name) / rates[self.row, _INDEX[name]] / 1e3 for name in _STREAMS}

    def passing(self, logs: Array) -> Array:
        """Time of each row's passes and tasks in us."""
        rates, times = self.streams(logs)
        tasks = sum(
            self.sum(self.ops[:, unit]) * rates[:, _INDEX[name]]
            for name, unit in (("task_us", _PASS), ("mac_task_us", _PRODUCT))
        )
        return self.sum(np.sum([times[name] for name in PASSES], axis=0)) + tasks

    def latency(self, logs: Array) -> tuple[Array, Array]:
        """Latency of each row in us and its derivative by the log of each rate."""
        rates, times = self.streams(logs)
        slopes = np.zeros((self.size, len(NAMES)))
        compute, fast, int8 = self.compute(logs)
        bound = compute >= np.sum([times[name] for name in WEIGHTS], axis=0)
        total = rates[:, _INDEX["dispatch_us"]] + self.sum(np.where(bound, compute, 0.0))
        slopes[:, _INDEX["dispatch_us"]] = rates[:, _INDEX["dispatch_us"]]
        for name, where in (("mac", bound), ("winograd", bound & fast), ("int8", bound & int8)):
            slopes[:, _INDEX[name]] = -self.sum(np.where(where, compute, 0.0))
        for name, us in times.items():
            part = self.sum(np.where(bound, 0.0, us) if name in WEIGHTS else us)
            total = total + part
            for target in {name, DERIVED.get(name, name)}:  # a factor's time goes with its base, too
                slopes[:, _INDEX[target]] -= part
        for name, unit in (("task_us", _PASS), ("mac_task_us", _PRODUCT)):
            part = self.sum(self.ops[:, unit]) * rates[:, _INDEX[name]]
            total, slopes[:, _INDEX[name]] = total + part, part
        return total, slopes

    def energy(self, logs: Array, rates: Array) -> tuple[Array, Array]:
        """Energy of each row in uJ and its derivative by the log of each term, given the logs of rates."""
        compute, fast, _ = self.compute(rates)
        _, times = self.streams(rates)
        gain = np.where(fast, np.exp(rates)[self.row, _INDEX["winograd"]], 1.0)
        terms = dict(zip(ENERGY, np.exp(logs).T, strict=True))
        behind = (
            self.sum(np.where(fast, 0.0, self.ops[:, _RECTIFIED])) * 1e-6
        )  # Winograd's form fills zeros in
        dense = self.sum(self.ops[:, _WORK] / gain) * 1e-6 - behind
        weights, read, written = (
            self.sum(np.sum([self.column(name) for name in names], axis=0)) * 1e-6
            for names in (WEIGHTS, TRANSFERS[:1], TRANSFERS[1:])
        )
        behind, written = behind * terms["relu_share"], written * terms["write_share"]
        quantities = (
            np.exp(rates)[:, _INDEX["dispatch_us"]],
            dense + behind,
            self.sum(np.maximum(compute, np.sum([times[name] for name in WEIGHTS], axis=0))),
            weights,
            read + written,
            self.passing(rates),
            self.sum(np.sum([times[name] for name in TRANSFERS[1:]], axis=0)),
        )
        slopes = np.stack([term * of for term, of in zip(terms.values(), quantities, strict=False)], axis=1)
        shares = np.stack([terms["mac_pj"] * behind, terms["transfer_pj"] * written], axis=1)
        return slopes.sum(axis=1), np.concatenate([slopes, shares], axis=1)


@dataclass(frozen=True)
class Fit:
    """The fitted rates and energy terms of every chip and path."""

    time: Solution
    power: Solution

    def rates(self, chip: str, path: str) -> dict[str, float]:
        """Constants by name: derived rates multiplied out, energy terms included."""
        found = dict(zip(NAMES, np.exp(self.time.logs(chip, path)).tolist(), strict=True))
        found |= {name: found[name] * found[base] for name, base in DERIVED.items()}
        return found | dict(zip(ENERGY, np.exp(self.power.logs(chip, path)).tolist(), strict=True))

    def predict(self, rows: Sequence[Row]) -> Array:
        """Estimated value of each row."""
        batch, rates = _Batch(rows), np.array([self.time.logs(row.chip, row.path) for row in rows])
        powers = np.array([self.power.logs(row.chip, row.path) for row in rows])
        energy = np.array([row.quantity == "energy" for row in rows])
        return np.where(energy, batch.energy(powers, rates)[0], batch.latency(rates)[0])


def fit(rows: Sequence[Row]) -> Fit:
    """Rates first, then energy terms given the rates' compute times."""
    timed = [row for row in rows if row.quantity == "latency" and fitted_to(row)]
    time = solve(timed, PRIORS, _Batch(timed).latency)
    powered = [row for row in rows if row.quantity == "energy" and fitted_to(row)]
    batch, rates = _Batch(powered), np.array([time.logs(row.chip, row.path) for row in powered])
    return Fit(time, solve(powered, ENERGY, lambda logs: batch.energy(logs, rates)))
