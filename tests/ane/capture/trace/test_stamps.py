"""A function that is recorded once and copied gives the nodes, names and places that each of its runs would give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ane_trainer.ane.capture.rewrites.decompositions import decomposition_table
from ane_trainer.ane.capture.trace.sources import META_KEY, Place
from ane_trainer.ane.capture.trace.tracer import trace

Tensors = dict[str, torch.Tensor]
NUMBER = torch.tensor(3.0)


def moved(a: Tensors, b: Tensors) -> Tensors:
    mean = a["m"] + (b["g"] - a["m"]) * 0.1
    return {"m": mean, "w": a["w"] - mean / (mean.abs().amax() + 1.0)}


def unchanged(a: Tensors, b: Tensors) -> Tensors:
    return {"m": a["m"], "w": a["w"] * b["g"]}


def a_view(a: Tensors, b: Tensors) -> Tensors:
    return {"m": a["m"].flatten(), "w": (a["w"] * b["g"]).flatten()}


def written(a: Tensors, b: Tensors) -> Tensors:
    a["m"].mul_(2.0)
    return {"m": a["m"] + 1.0, "w": a["w"] * b["g"]}


def constant(a: Tensors, b: Tensors) -> Tensors:
    return {"m": a["m"] * NUMBER, "w": a["w"] * torch.ones(4, 2)[: b["g"].shape[0]]}


def several(a: Tensors, b: Tensors) -> Tensors:
    low, high = a["m"].sort(0)
    return {"m": low + high, "w": torch.cat([a["w"], b["g"]]).transpose(0, 1)}


def graph_of(function: Callable[[Tensors, Tensors], Tensors], stamped: bool) -> tuple[list[str], int]:
    """Each node with its place; and how often the function ran."""
    place, ran = Place(), 0
    shapes = [(4, 2), (4, 2), (3, 2), (4, 2)]

    def counted(a: Tensors, b: Tensors) -> Tensors:
        nonlocal ran
        ran += 1
        return function(a, b)

    def step(*values: torch.Tensor) -> list[torch.Tensor]:
        results = []
        for number in range(len(shapes)):
            place.text = f"parameter {number}"
            m, w, g = (value * 2.0 for value in values[3 * number : 3 * number + 3])
            g = m if number == 3 else g  # the same tensor twice: another structure
            given = {"m": m, "w": w}, {"g": g}
            new = place.stamp("update", counted, *given) if stamped else counted(*given)
            results += [value.exp() for value in new.values()]
        return results

    inputs = {f"{n}{i}": torch.randn(shape) for i, shape in enumerate(shapes) for n in "mwg"}
    graph = trace(step, inputs, decomposition_table(), place).graph
    return [f"{node.format_node()} {node.meta.get(META_KEY)}" for node in graph.nodes], ran


@pytest.mark.parametrize("function", [moved, unchanged, a_view, written, constant, several])
def test_copies_are_what_runs_record(function: Callable[[Tensors, Tensors], Tensors]) -> None:
    assert graph_of(function, stamped=True)[0] == graph_of(function, stamped=False)[0]


def test_equal_structures_run_once_and_what_cannot_be_copied_each_time() -> None:
    assert graph_of(moved, stamped=True)[1] == 3
    assert graph_of(several, stamped=True)[1] == 3
    for function in (a_view, written, constant):
        assert graph_of(function, stamped=True)[1] == 4
