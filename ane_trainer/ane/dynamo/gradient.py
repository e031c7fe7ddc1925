"""The backward program, and the power of two that keeps its gradients within fp16.

A backward graph is linear in the gradients that come in, so they are multiplied by a power of two, the
program runs, and what comes out is divided by it in fp32. The first call, in full precision, says which power brings
the largest gradient out to WANTED and none on the way beyond FLOW_BOUND; what is small beside it gets a power of
its own (`capture.range`). From then on the power follows the gradients that come out. A graph with a function of
gradients that is not linear (a hook, an `autograd.Function` of the user's) takes them as they are, and each value of it
has a power of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from ane_trainer.ane.capture.range.degrees import is_linear
from ane_trainer.ane.dynamo.ends import split_backward
from ane_trainer.ane.dynamo.joint import KEPT, Kept
from ane_trainer.ane.dynamo.options import Options
from ane_trainer.ane.dynamo.programs import GraphFunction
from ane_trainer.ane.dynamo.torch_private import (
    make_boxed_func,
    one_at_a_time,
    refuse_second_derivatives,
    untraced,
)
from ane_trainer.ane.errors import DataError, Finding, UnsupportedModel

#: A gradient of this magnitude or more, as stored, counts as an overflow.
OVERFLOW = 32768.0
#: Where the largest gradient that comes out is put, and how far it may move before the power does.
WANTED, TOLERATED = 2048.0, 4.0
#: A call whose largest gradient is this share of the wanted one, or less, is run again.
EMPTY = 1.0 / 64.0
#: Where values on the way may get to, and the most by which the power is lowered for them.
FLOW_BOUND, LARGEST_CONCESSION = 2.0**14, 6
#: Attempts at a power for one call.
_ATTEMPTS = 12


def backward_function(
    module: GraphModule, example_inputs: Sequence[object], options: Options
) -> Callable[..., object]:
    """The compiler that AOTAutograd calls for backward graphs.

    A function that asks for gradients within gets here with Dynamo watching every frame.
    """
    del example_inputs
    make: Callable[..., Backward] = untraced(Backward)
    with one_at_a_time():  # AOTAutograd makes backward graphs outside of Dynamo's lock
        backward = make(module, options)
    return make_boxed_func(untraced(backward.__call__))


class Backward:
    """A backward graph as a function; `power` is that of two to which the largest incoming one is brought."""

    def __init__(self, module: GraphModule, options: Options) -> None:
        self._start, self._kept = split_backward(module), module.meta.get(KEPT) or Kept({})
        if self._start is not None:
            numbers = {n: i for i, n in enumerate(self._start.taken)}
            places = self._kept.places.items()
            self._kept.places = {numbers[n]: i for n, i in places if n in numbers}
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._tangents = [i for i, node in enumerate(placeholders) if node.name.startswith("tangents")]
        self._linear = is_linear(module)  # if not, gradients stay in their own unit
        self._function = GraphFunction(module, options, "backward")
        self._function.follows_gradients = not self._linear
        self.power = 6
        self._wanted = WANTED

    def __call__(self, *inputs: object) -> list[object]:
        """The gradients in fp32; nan everywhere if one that comes in is not finite, as PyTorch would spread it."""
        with self._function.lock:
            inputs = inputs if self._start is None else tuple(self._start.inputs(inputs))
            try:
                return self._gradients(*inputs)
            except DataError as error:
                lost = [v for v in inputs if _gradient(v) and not bool(v.isfinite().all())]  # type: ignore[attr-defined]
                if error.code != "DATA106" or not lost:
                    raise
                self._function.tell_of_lost_values()
                return self._without_numbers(inputs)

    def _gradients(self, *inputs: Any) -> list[object]:
        refuse_second_derivatives(_second_derivative)
        given = list(inputs)
        peak = max((float(given[i].abs().amax()) for i in self._tangents if given[i].numel()), default=0.0)
        if not math.isfinite(peak):
            return self._without_numbers(given)
        if peak and not self._function.calibrations:
            self._calibrate(given, peak)
        for attempt in range(_ATTEMPTS):
            last = attempt + 1 == _ATTEMPTS
            scale = 2.0 ** (self.power - math.frexp(peak)[1]) if peak and self._linear else 1.0
            values, known = self._function.values(self._scaled(given, scale))
            engine = self._function.run_or_none(values)
            if engine is None or self._function.left_range(OVERFLOW):
                if self._calibrate(given, peak) and not last:
                    continue
                if not self._function.can_calibrate:
                    self._function.tell_of_sizes()
            if engine is None:
                engine = self._function.run_engine(values)
            if self._function.beyond(OVERFLOW) and self._linear and not last:
                self.power -= 4
                continue
            results = self._function.results(known | {"engine": engine}, 1 << 30)
            largest = max((float(r.abs().amax()) for r in results if _gradient(r)), default=0.0)
            if not math.isfinite(largest):  # at the last attempt, too
                self._function.tell_of_sizes()
                break
            if largest > self._wanted * TOLERATED or 0.0 < largest < self._wanted / TOLERATED:
                self.power += math.floor(math.log2(self._wanted / largest))
            if largest == 0.0 or largest > EMPTY * self._wanted or not self._linear:
                break
        kept = self._kept if self._kept.are(given) else None
        if engine is not None and (self._function.expects or kept is not None):
            self._function.prove(self._function.values(given)[0], engine, scale=scale, kept=kept)
        return [r / scale if _gradient(r) else r for r in results]

    def _without_numbers(self, given: Sequence[object]) -> list[object]:
        """Gradients that are nan."""
        zeros = [torch.zeros_like(v) if isinstance(v, torch.Tensor) and _gradient(v) else v for v in given]
        return [r * math.nan if _gradient(r) else r for r in self._function(zeros, 1 << 30)]

    def _scaled(self, given: Sequence[Any], scale: float) -> list[Any]:
        values = list(given)
        for i in self._tangents:
            values[i] = given[i].float() * scale if scale else torch.zeros_like(given[i])
        return values

    def _calibrate(self, given: Sequence[Any], peak: float) -> bool:
        """Choose the power, and those beside single values, from this call in full precision; False if they stay."""
        function = self._function
        if not function.can_calibrate:
            return False
        found = function.measured(function.values(given)[0])
        dependent = function.followers(lambda node: node.name.startswith("tangents"))
        largest = max((found[n].peak for n in dependent & function.result_names() if n in found), default=0.0)
        flow = max((found[n].peak for n in dependent if n in found), default=0.0)
        if not math.isfinite(flow):
            return False
        if largest == 0.0 or not self._linear:
            return function.calibrate(found)
        wanted = math.floor(math.log2(WANTED / largest))
        exponent = max(min(wanted, math.floor(math.log2(FLOW_BOUND / flow))), wanted - LARGEST_CONCESSION)
        scale = 2.0**exponent
        for name in dependent & set(found):
            m = found[name]
            found[name] = dataclasses.replace(m, peak=m.peak * scale, rms=m.rms * scale)
        before, self.power, self._wanted = self.power, exponent + math.frexp(peak)[1], largest * scale
        return function.calibrate(found) or self.power != before


def _second_derivative() -> UnsupportedModel:
    found = Finding(
        "torch.autograd.grad", "create_graph=True", "is differentiated, and torch.compile has no second derivatives.",
        "Compile the function that calls torch.autograd.grad and returns the loss (torch 2.13 or later), give model "
        "and loss to compile_step, or call the model that was not compiled there.",
    )  # fmt: skip
    return UnsupportedModel(
        "torch.compile: the gradient of a gradient was asked for:", [found], code="ANE303"
    )


def _gradient(result: object) -> bool:
    return isinstance(result, torch.Tensor) and result.is_floating_point() and result.numel() > 0
