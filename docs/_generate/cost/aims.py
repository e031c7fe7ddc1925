"""Aims of the cost model, each beside what cross-validation finds; `python -m docs._generate.cost table`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from docs._generate.cost.evaluate import Left, held

#: Families of several ops; of transformer blocks; of whole models; whose energy is that of elementwise passes.
SEVERAL, BLOCKS, MODELS = ("chain", "stack"), ("block",), ("model", "training")
PASSES = ("elementwise", "reduction", "softmax", "norm")
#: Share of left-out values that intervals are to hold, in each family.
LEAST, MOST = 0.85, 0.95


@dataclass(frozen=True)
class Aim:
    """An aim: what is measured of how many values, between which bounds it has to lie, and what was found."""

    what: str
    values: int
    low: float
    high: float
    found: float

    @property
    def met(self) -> bool:
        return self.low <= self.found <= self.high


def aims(left: Mapping[str, Sequence[Left]]) -> list[Aim]:
    """Every aim. Errors are medians; *held* is the share of left-out values inside intervals made without them."""
    return [*_errors(left), *_held(left)]


def _errors(left: Mapping[str, Sequence[Left]]) -> Iterator[Aim]:
    time = {
        scheme: [item for item in items if item.row.quantity == "latency"] for scheme, items in left.items()
    }
    energy = [item for item in left["program"] if item.row.quantity == "energy"]
    cases: list[tuple[str, Sequence[Left], float, Callable[[Left], bool]]] = [
        ("latency, programs left out", time["program"], 0.12, lambda item: True),
        ("latency, chips left out whole", time["chip"], 0.20, lambda item: True),
        ("latency, families left out", time["family"], 0.20, lambda item: True),
        ("latency, programs of several ops", time["program"], 0.15, lambda item: item.row.family in SEVERAL),
        ("latency, transformer blocks", time["program"], 0.25, lambda item: item.row.family in BLOCKS),
        ("latency, whole models", time["program"], 0.25, lambda item: item.row.family in MODELS),
        ("latency, decoders", time["program"], 0.25, lambda item: item.row.family == "decode"),
        ("latency, direct path", time["program"], 0.25, lambda item: item.row.path == "direct"),
        ("energy, programs left out", energy, 0.25, lambda item: True),
        ("energy, elementwise families", energy, 0.60, lambda item: item.row.family in PASSES),
    ]  # fmt: skip
    for what, items, most, member in cases:
        errors = [item.error for item in items if member(item)]
        yield Aim(f"{what}: median error", len(errors), 0.0, most, float(np.median(errors)))


#: What is left out -> the basis of the intervals that are tried on it, and how it is called.
_TRIED = {"program": ("measured", "known chips"), "chip": ("carried", "chips left out")}


def _held(left: Mapping[str, Sequence[Left]]) -> Iterator[Aim]:
    families = held_by_family(left)
    for quantity in ("latency", "energy"):
        for _, chips in _TRIED.values():
            mine = [item for item in families if (item.quantity, item.chips) == (quantity, chips)]
            values = sum(item.values for item in mine)
            yield Aim(
                f"{quantity}, {chips}: held", values, LEAST, MOST, sum(item.inside for item in mine) / values
            )
            well = [item.verdict != "no" for item in mine]
            yield Aim(f"{quantity}, {chips}: families held", len(mine), 1.0, 1.0, sum(well) / len(mine))


@dataclass(frozen=True)
class Held:
    """How many of a family's left-out values lie inside intervals made without them, and on how many chips they are."""

    quantity: str
    chips: str
    family: str
    values: int
    machines: int
    inside: int

    @property
    def verdict(self) -> str:
        """Whether 85 to 95 % are held; to one value, since no more is known of a few. Where no whole number of values
        is such a share, that is said. Of chips left out, whose values go together, too many inside decides nothing.
        """
        counts = [n for n in range(self.values + 1) if LEAST <= n / self.values <= MOST]
        if not counts:
            return f"no count of {self.values} is"
        if self.inside in counts:
            return "yes"
        if min(abs(self.inside - n) for n in counts) == 1:
            return "to one value"
        if self.chips == _TRIED["chip"][1] and self.inside > counts[-1]:
            return f"wide ({self.machines} chips)"
        return "no"


def held_by_family(left: Mapping[str, Sequence[Left]]) -> list[Held]:
    """Every path and family of latency and energy, on known chips and on chips left out."""
    found = []
    for scheme, (basis, chips) in _TRIED.items():
        for quantity in ("latency", "energy"):
            mine = [item for item in left[scheme] if item.row.quantity == quantity]
            by_family = dict[str, list[tuple[str, bool]]]()
            for item, inside in zip(mine, held(mine, basis), strict=True):
                by_family.setdefault(f"{item.row.path} {item.row.family}", []).append((item.row.chip, inside))
            for family, values in sorted(by_family.items()):
                machines, inside_all = len({chip for chip, _ in values}), sum(inside for _, inside in values)
                found.append(Held(quantity, chips, family, len(values), machines, inside_all))
    return found
