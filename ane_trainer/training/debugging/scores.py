"""How near a result is to what it should be, and what decides: a step's loss and updates, a program's outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ane_trainer.ane.capture.optimizers.rule import RESIDUAL
from ane_trainer.ane.dispatch.agreement import Agreement, Reference, judged
from ane_trainer.ane.mil.program import Function
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.stages import Compiled, Port
from ane_trainer.ane.verify.profiling import distance

#: Relative difference of a program's outputs up to which it agrees with double precision.
OUTPUT_TOLERANCE = 0.02
#: The note of a score whose step changed no weight.
SKIPPED = "the update is skipped"


@dataclass(frozen=True)
class Score:
    """Relative differences: of the loss, of all updates together; of a program the largest of an output's.

    `infinities`: numbers of the outputs that are infinite and should not be.
    """

    agrees: bool
    loss: float | None = None
    update: float | None = None
    output: float | None = None
    note: str = ""

    @property
    def worst(self) -> float:
        """The largest difference, in units of what is tolerated."""
        parts = [self.loss and self.loss / 0.01, self.update and self.update / 0.02]
        parts.append(self.output and self.output / OUTPUT_TOLERANCE)
        return max((p for p in parts if p is not None), default=0.0)

    def __str__(self) -> str:
        parts = [
            f"{name} {share(value)}"
            for name, value in (("loss", self.loss), ("updates", self.update), ("outputs", self.output))
            if value is not None
        ]
        return ", ".join([*parts, self.note] if self.note else parts) or "nothing to compare"


def share(value: float) -> str:
    """A relative difference in words: 0.04 %, 12 %, 10x or more."""
    if math.isnan(value):
        return "not a number"
    if value >= 10.0:
        return "10x or more"
    percent = 100.0 * value
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


class StepCriterion:
    """Judges outputs of a step's program by the first step's agreement with plain PyTorch in fp32."""

    def __init__(
        self, compiled: Compiled, feeds: Mapping[str, Array], expected: Reference, official: Agreement | None
    ) -> None:
        self.expected, self.official = expected, official
        self.outputs = {port.target: port for port in compiled.outputs if port.role == "state"}
        self.inputs = {port.target: port for port in compiled.inputs if port.role == "state"}
        self.loss = next(port for port in compiled.outputs if port.target == "loss")
        self.feeds = feeds
        self.applied = next((p.name for p in compiled.outputs if p.target == "applied"), None)

    @property
    def needs(self) -> frozenset[str]:
        """The outputs that it looks at."""
        names = [f"{name}{suffix}" for name in self.expected.changes or {} for suffix in ("", f"/{RESIDUAL}")]
        found = {self.outputs[target].name for target in names if target in self.outputs}
        return frozenset(found | {self.loss.name} | ({self.applied} if self.applied else set()))

    def strict(self) -> StepCriterion:
        """The same without allowance for what rounding to eleven bits costs this model."""
        found = copy.copy(self)
        found.official = None
        return found

    def __call__(self, outputs: Mapping[str, Array], exact: Mapping[str, Array]) -> Score:
        """The score of outputs that are decoded, or in double precision."""
        loss = float(np.asarray(outputs[self.loss.name], np.float64).reshape(-1)[0]) / self.loss.scale
        skipped = self.applied is not None and not float(outputs[self.applied].reshape(-1)[0]) > 0
        expected = self.expected
        known = {name: self._change(name, outputs) for name in expected.changes or {} if name in self.outputs}
        if skipped or not known:
            expected = expected.without_update()
        fp16 = None if self.official is None else self.official.fp16
        found = judged(1, loss, known, expected, fp16)
        update = None if expected.changes is None else found.update
        agrees = found.agrees and not skipped
        return Score(agrees, found.loss, update, note=SKIPPED if skipped else "")

    def _change(self, name: str, outputs: Mapping[str, Array]) -> torch.Tensor:
        after = self._value(name, outputs, self.outputs)
        before = self._value(name, self.feeds, self.inputs)
        shape = (self.expected.changes or {})[name].shape
        return torch.from_numpy(np.asarray(after - before)).reshape(shape).float()

    def _value(self, name: str, values: Mapping[str, Array], ports: Mapping[str, Port]) -> Array:
        total = np.zeros(())
        for target in (name, f"{name}/{RESIDUAL}"):
            port = ports.get(target)
            if port is not None:
                total = total + np.asarray(values[port.name], np.float64) / port.scale
        return np.asarray(total)


class OutputCriterion:
    """Judges outputs of any program by double precision: the largest relative difference of an output."""

    def __init__(self, function: Function) -> None:
        self.half = {v.name: v.type.dtype == "fp16" for v in function.outputs}

    def __call__(self, outputs: Mapping[str, Array], exact: Mapping[str, Array]) -> Score:
        """The score of outputs that are decoded, or in double precision."""
        worst, where = 0.0, ""
        undefined = sum(int((~np.isfinite(a)).sum()) for a in exact.values() if a.dtype == np.float64)
        if undefined:
            return Score(
                False, note=f"{undefined:,} numbers of the outputs are infinite or nan in double precision"
            )
        for name, half in self.half.items():
            found = distance(
                np.asarray(outputs[name], np.float64), np.asarray(exact[name], np.float64), half
            ).relative
            if found > worst:
                worst, where = found, name
        return Score(
            worst <= OUTPUT_TOLERANCE,
            output=worst,
            note=f"most in {where}" if where and len(self.half) > 1 else "",
        )
