"""Facts of a compiled training step: its programs and dispatches, where they run, their cost and transfers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import torch

from ane_trainer.ane.capture import StepCapture
from ane_trainer.ane.capture.gradients import GradientOptions
from ane_trainer.ane.chips.cost import Cost
from ane_trainer.ane.chips.counting import flops
from ane_trainer.ane.dispatch.host_optimizer import HostOptimizer
from ane_trainer.ane.dispatch.loading import LoadedStep, Subject, cost_of
from ane_trainer.ane.dispatch.options import StepOptions, Target
from ane_trainer.ane.mil.program import Program
from ane_trainer.ane.stages import Compiled, Dispatch


class StepFacts:
    """The parts of a training step, and what can be said of them without running it.

    `gradient_options` may be replaced by others that clip and accumulate alike, with other limits.
    """

    def __init__(
        self,
        subject: Subject,
        target: Target,
        options: StepOptions,
        loaded: LoadedStep,
        host: HostOptimizer | None,
        host_reason: str,
    ) -> None:
        self.target, self.options = target, options
        self.gradient_options: GradientOptions = options.gradients
        self._subject, self._loaded = subject, loaded
        self._host, self._host_reason = host, host_reason
        self._own_shards = 1 if options.exchange is None else len(options.exchange.shards.own)

    @property
    def capture(self) -> StepCapture:
        """What was captured, for whatever chip."""
        return self._loaded.capture

    @property
    def compiled(self) -> Compiled:
        """The whole step as one program, with its ports, whose scales are those of the present units.

        A step in programs of blocks has `programs` and `dispatches`; what they are together is printed when asked for.
        """
        compiled = self._loaded.whole
        lowered = compiled.legalized.lowered
        inputs, outputs = (self._loaded.mirror.scaled(ports) for ports in (lowered.inputs, lowered.outputs))
        lowered = dataclasses.replace(lowered, inputs=inputs, outputs=outputs)
        return dataclasses.replace(
            compiled, legalized=dataclasses.replace(compiled.legalized, lowered=lowered)
        )

    @property
    def programs(self) -> tuple[Compiled, ...]:
        """What is compiled for a step: one program, or those of its blocks; of a divided batch backward and update."""
        return self._loaded.programs

    def parts(self) -> list[tuple[str, Compiled]]:
        """Programs beside the first, or of blocks all, by a name for files."""
        return self._loaded.named_parts()

    @property
    def dispatches(self) -> tuple[Dispatch, ...]:
        """The runs of programs of blocks that make a step, in order; none where the step is one program."""
        return tuple(
            d for part in self._loaded.wholes if part.chain is not None for d in part.chain.dispatches
        )

    @property
    def dispatches_per_step(self) -> int:
        """How many programs one call runs."""
        return len(self._loaded.dispatched(self._own_shards))

    @property
    def program(self) -> Program:
        """The MIL program of the whole step; where batches are divided, of the backward."""
        return self._loaded.whole.program

    @property
    def optimizer_on(self) -> str:
        """ "engine", or "host" if PyTorch updates the weights."""
        return "host" if self._host is not None else "engine"

    @property
    def engine_flop_fraction(self) -> float:
        """Share of the step's floating-point operations in the program; the rest is the host's optimizer.

        On the host they are counted in the first update, and before it as 10 a parameter (Adam's).
        """
        if self._host is None:
            return 1.0
        ops = [op for part in self._loaded.wholes for op in part.program.main.ops]
        engine = self.gradient_options.accumulate * sum(flops(op) for op in ops)
        host = self._host.flops or 10 * sum(p.numel() for p in self._subject.model.parameters())
        return engine / (engine + host)

    @property
    def loss_scale(self) -> float:
        """The present loss scale."""
        return self._loaded.mirror.scaling("loss_scale")

    @property
    def host_bytes_per_step(self) -> int:
        """Bytes between host and engine in one step: batch, scalars, results; of a host optimizer also weights."""
        bytes_each = np.dtype(self._loaded.dtype).itemsize
        ports = [port for part in self._loaded.wholes for port in (*part.inputs, *part.outputs)]
        batch = sum(bytes_each * math.prod(p.shape) for p in ports if p.role != "state")
        weights = sum(bytes_each * p.numel() for p in self._subject.model.parameters() if p.requires_grad)
        return batch + (weights if self._host is not None else 0)

    def text(self) -> str:
        """The program as MIL text; of a step in programs of blocks those, one after the other."""
        return self._loaded.compiled.text

    def cost(self) -> Cost:
        """Estimated time and energy of one step on the chip; of a divided one without what processes exchange."""
        return cost_of(self._loaded.dispatched(self._own_shards), self.target.path)

    def placement(self) -> dict[str, object]:
        """Where the step runs and how that is known."""
        where, how = self.target.placement()
        if self._host is not None:
            name = type(self._subject.optimizer).__name__
            where = f"{where}; optimizer {name} on the host (PyTorch fp32), gradients read back each step"
            where += f": it {self._host_reason}" if self._host_reason else ""
        return {
            "where": where, "how": how, "device": self.target.device, "choice": self.target.reason,
            "optimizer_on": self.optimizer_on, "optimizer_reason": self._host_reason,
            "programs": len(self.programs), "dispatches": self.dispatches_per_step, "blocks": self._loaded.chosen,
        }  # fmt: skip

    def _parameters(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Parameters as whoever updates them holds them."""
        known = dict(self._subject.model.named_parameters())
        values = {name: known[name].detach().float().clone() for name in names}
        if self._host is None:
            for name, value in values.items():
                self._loaded.mirror.pull(name, value)
        return values
