"""Aims of the cost model, each beside what cross-validation finds; `python -m docs._generate.cost table`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from docs._generate.cost.evaluate import BASES, Left, held, printed

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
    """Every aim. Errors are medians; *held* is the share of left-out values inside the printed intervals, and inside
    those of others, made without them."""
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


#: Basis of intervals -> how that is called which is left out when they are tried.
_TRIED = {"measured": "known chips", "carried": "chips left out"}


def _held(left: Mapping[str, Sequence[Left]]) -> Iterator[Aim]:
    families = held_by_family(left)
    for quantity in ("latency", "energy"):
        for chips in _TRIED.values():
            mine = [item for item in families if (item.quantity, item.chips) == (quantity, chips)]
            values = sum(item.values for item in mine)
            for what, inside in (("held", "printed"), ("held by others'", "apart")):
                share = sum(getattr(item, inside) for item in mine) / values
                yield Aim(f"{quantity}, {chips}: {what}", values, LEAST, MOST, share)
            well = [item.verdict != "no" for item in mine]
            yield Aim(f"{quantity}, {chips}: families held", len(mine), 1.0, 1.0, sum(well) / len(mine))
        unseen = held([item for item in left["family"] if item.row.quantity == quantity], "unseen")
        share = sum(unseen) / len(unseen)
        yield Aim(f"{quantity}, families left out: held by others'", len(unseen), LEAST, MOST, share)


@dataclass(frozen=True)
class Held:
    """How many of a family's left-out values are held, and on how many chips they are.

    `printed`: by the interval that is printed. `apart`: by one made without their program, or without their chip.
    """

    quantity: str
    chips: str
    family: str
    values: int
    machines: int
    printed: int
    apart: int

    @property
    def verdict(self) -> str:
        """Whether the printed interval holds 85 to 95 %; where no whole number of values is such a share, or no other
        chip has values of the family to make it of, that is said.
        """
        counts = [n for n in range(self.values + 1) if LEAST <= n / self.values <= MOST]
        if self.printed in counts:
            return "yes"
        if not counts:
            return f"no count of {self.values} is"
        return "one chip" if self.machines == 1 and self.chips == _TRIED["carried"] else "no"


def held_by_family(left: Mapping[str, Sequence[Left]]) -> list[Held]:
    """Every path and family of latency and energy, on known chips and on chips left out."""
    found = []
    for basis, chips in _TRIED.items():
        for quantity in ("latency", "energy"):
            mine = [item for item in left[BASES[basis][0]] if item.row.quantity == quantity]
            by_family = dict[str, list[tuple[str, bool, bool]]]()
            for item, *inside in zip(mine, printed(mine, basis), held(mine, basis), strict=True):
                by_family.setdefault(f"{item.row.path} {item.row.family}", []).append(
                    (item.row.chip, *inside)
                )
            for family, values in sorted(by_family.items()):
                machines, within, apart = zip(*values, strict=True)
                counts = len(values), len(set(machines)), sum(within), sum(apart)
                found.append(Held(quantity, chips, family, *counts))
    return found
