"""Aims of the cost model, each beside what cross-validation finds; `python -m docs._generate.cost table`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from docs._generate.cost.evaluate import UNITS, Left, groups, interval_of

#: Families of several ops; of transformer blocks; of whole models; whose energy is that of elementwise passes.
SEVERAL, BLOCKS, MODELS = ("chain", "stack"), ("block",), ("model", "training")
PASSES = ("elementwise", "reduction", "softmax", "norm")
#: Values of a family from which one alone outside its interval does not decide.
MANY = 20


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


def _held(left: Mapping[str, Sequence[Left]]) -> Iterator[Aim]:
    for scheme, basis, chips in (
        ("program", "measured", "known chips"),
        ("chip", "carried", "chips left out"),
    ):
        for quantity in ("latency", "energy"):
            mine = [item for item in left[scheme] if item.row.quantity == quantity]
            inside = [_holds(item, mine, basis) for item in mine]
            low, high = (0.85, 0.95) if basis == "measured" else (0.85, 0.98)
            yield Aim(f"{quantity}, {chips}: held", len(mine), low, high, float(np.mean(inside)))


def held_by_family(left: Mapping[str, Sequence[Left]]) -> dict[str, float]:
    """Of latency on known chips: the share of each path and family with MANY values that is held."""
    mine = [item for item in left["program"] if item.row.quantity == "latency"]
    found = groups(mine, lambda item: f"{item.row.path} {item.row.family}")
    return {
        name: float(np.mean([_holds(item, mine, "measured") for item in items]))
        for name, items in found.items()
        if len(items) >= MANY
    }


def _holds(item: Left, everything: Sequence[Left], basis: str) -> bool:
    """Whether a value lies in the interval of its kind and path that is made without its own program, or chip."""
    unit = UNITS[basis]
    rest = [each for each in everything if unit(each) != unit(item) and each.row.path == item.row.path]
    kind = [each for each in rest if each.kind == item.kind]
    low, high, _ = interval_of(kind, rest, basis, item.kind)
    return low <= item.factor <= high
