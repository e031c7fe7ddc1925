"""What `torch.compile(backend="ane")` did: programs, host work, graph breaks, dispatches; in words."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ane_trainer.ane.chips.counting import flops
from ane_trainer.ane.dynamo.fallback import Segment, cpu_flops
from ane_trainer.ane.dynamo.options import Options
from ane_trainer.ane.mil.program import Program


class GraphBreakWarning(UserWarning):
    """Dynamo cut the model; each part is a program of its own."""


@dataclass
class ProgramRecord:
    """One compiled graph. `cpu` lists what the engine refused and the CPU runs (`fallback="cpu"`)."""

    role: str
    shapes: tuple[tuple[int, ...], ...]
    chip: str
    device: str
    programs: int
    ops: int
    engine_flop_fraction: float
    host: tuple[str, ...] = ()
    cpu: tuple[str, ...] = ()
    dispatches: int = 0

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
        text = (
            f"{self.role} [{shapes}]: {self.programs} program{'s' * (self.programs != 1)}, {self.ops} ops for "
            f"{self.chip} on {self.device}, {self.engine_flop_fraction:.0%} of its FLOPs, "
            f"{self.dispatches} dispatches"
        )
        lines = [text, *(f"  on the host: {item}" for item in self.host)]
        return "\n".join([*lines, *(f"  on the CPU (fallback): {item}" for item in self.cpu)])


@dataclass
class Report:
    """Everything since the start or `reset()`. `on_cpu`: code of which Dynamo made no graph."""

    graphs: int = 0
    graph_breaks: list[str] = field(default_factory=list)
    programs: list[ProgramRecord] = field(default_factory=list)
    on_cpu: list[str] = field(default_factory=list)

    @property
    def compiles(self) -> int:
        """Programs compiled so far."""
        return sum(record.programs for record in self.programs)

    @property
    def dispatches(self) -> int:
        """Programs run so far."""
        return sum(record.dispatches for record in self.programs)

    def __str__(self) -> str:
        head = f"{self.graphs} graphs, {self.compiles} programs, {self.dispatches} dispatches"
        breaks = [f"graph break: {text}" for text in self.graph_breaks]
        left = [f"no graph, on the CPU: {text}" for text in self.on_cpu]
        return "\n".join([head, *breaks, *left, *map(str, self.programs)])


_REPORT = Report()


def report() -> Report:
    """What was compiled and run since the start or `reset()`; `print(report())` reads as text."""
    return _REPORT


def reset() -> None:
    """Begin a new report. What is compiled stays compiled and counts from zero no more."""
    global _REPORT
    _REPORT = Report()


def begin_graph(graph: torch.fx.GraphModule) -> str:
    """Note a graph from Dynamo, and warn once for each graph break; returns the function's identity.

    All graphs that Dynamo makes of one function, for other shapes or modes, have the same identity.
    """
    _REPORT.graphs += 1
    reason: Any = getattr(graph, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        text = _in_words(reason)
        if text not in _REPORT.graph_breaks:
            _REPORT.graph_breaks.append(text)
            warnings.warn(
                f'torch.compile(backend="ane"): Dynamo cut the model in two: {text}. Each part is a program of '
                "its own; PyTorch runs what is between them on the CPU.",
                GraphBreakWarning,
                stacklevel=2,
            )
    from ane_trainer.ane.dynamo.torch_private import compile_id  # imports Dynamo, which takes seconds

    return compile_id() or str(id(graph))


def _in_words(reason: Any) -> str:
    """First sentence of the reason and the user's line."""
    lines = [line.strip() for line in str(reason.reason).splitlines() if line.strip()]
    text = lines[0] if lines else "no reason given"
    explanation = next((line for line in lines if line.startswith("Explanation:")), None)
    if explanation is not None:
        text = f"{text} ({explanation.removeprefix('Explanation:').strip().rstrip('.')})"
    frames = list(reason.user_stack)
    return f"{text}, at {frames[-1].filename}:{frames[-1].lineno}" if frames else text


def record_of(
    role: str,
    shapes: tuple[tuple[int, ...], ...],
    options: Options,
    segments: Sequence[Segment],
    programs: Sequence[Program],
    notes: tuple[str, ...],
) -> ProgramRecord:
    """The record of a graph's programs and of its segments on the CPU; `notes`: what the host does."""
    engine = sum(flops(op) for program in programs for op in program.main.ops)
    host = sum(cpu_flops(segment.graph) for segment in segments if segment.on_cpu)
    return ProgramRecord(
        role=role,
        shapes=shapes,
        chip=options.target.chip or "",
        device=options.target.device,
        programs=len(programs),
        ops=sum(len(program.main.ops) for program in programs),
        engine_flop_fraction=engine / (engine + host) if engine + host else 0.0,
        host=notes,
        cpu=tuple(text for segment in segments for text in segment.reasons),
    )
