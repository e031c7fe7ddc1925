"""The results of the stages: what capture, lower, legalize and compile hand to each other.

    capture -> Captured    lower -> Lowered    legalize -> Legalized    compile -> Compiled

A training step is one pure function `(state, batch, scalars) -> (state', loss, ...)`. Its ports say which
input or output is what; an `Alias` says which output becomes which input of the next step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ane_trainer.ane.errors import Finding
from ane_trainer.ane.mil.program import Literal, Program

if TYPE_CHECKING:
    import torch

#: What a port carries. "state" stays on the engine between steps; "batch" and "scalar" come from the host
#: every step; "result" goes back to the host every step.
ROLES = ("state", "batch", "scalar", "result")


#: Integers that one fp16 number cannot hold travel as a remainder and a quotient by this (`lower.indices.split`).
PAIR = 1024


@dataclass(frozen=True)
class Chosen:
    """Rows of a table, or classes (`classes`), that integers choose from `least` to `most`; `left_out`: a class number
    that a loss leaves out (`ignore_index`), whatever it is.
    """

    least: int
    most: int
    classes: bool = False
    left_out: int | None = None


@dataclass(frozen=True)
class Port:
    """One input or output of a step, by name.

    `shape` is the tensor's shape in the program (rank-0 tensors become `(1,)`). `target` is the dotted name
    in the module or optimizer that a state port mirrors, e.g. `fc1.weight`, `fc1.weight/exp_avg`,
    `fc1.weight/residual`, `step/loss_scale`. The port holds the user's value times `scale` (a power of two).
    `index_encoding` says how integers travel: "none" as they are, "coded" as the codes of `lower.indices.codes`,
    "split" as remainders by `PAIR` in this port and quotients (rounded down) in the port named by `quotients`; of a
    captured result "split" says that it may leave so.
    `bounds`: least and largest integer of the example; in a lowered step, of what it takes. `chosen`: what its integers
    choose by number, where PyTorch takes no others.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    target: str = ""
    scale: float = 1.0
    index_encoding: str = "none"
    quotients: str = ""
    bounds: tuple[float, float] | None = None
    chosen: Chosen | None = None


@dataclass(frozen=True)
class Alias:
    """`output` of this step is `input` of the next one."""

    output: str
    input: str


@dataclass(frozen=True)
class Captured:
    """A functional FX graph of ATen ops: placeholders are `inputs` in order, results are `outputs` in order.

    `guarded`: places of the forward pass whose largest magnitude, as stored, is at the end of the health result.
    """

    graph: torch.fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    aliases: tuple[Alias, ...]
    guarded: tuple[str, ...] = ()

    def as_text(self) -> str:
        """The graph as readable Python."""
        return str(self.graph.print_readable(print_output=False))


@dataclass(frozen=True)
class Lowered:
    """The same step as one MIL program; port names are the program's input and output names.

    `notes`: what the user has to know of its numbers, which does not refuse it.
    """

    program: Program
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    aliases: tuple[Alias, ...]
    notes: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Legalized:
    """A lowered step that `chip` accepts on `path`; `notes` are the findings that do not refuse it."""

    lowered: Lowered
    chip: str
    path: str
    notes: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Dispatch:
    """One run of a program within a step of several: its number, and what its ports are in the whole step.

    inputs, outputs  (port of the program, value of the step): ports of the whole step by their names, and what
                     programs hand to each other
    constants        (port of the program, number) where programs for several blocks differ
    title            phase and block, for people
    of_block         whether it is a block's, not what lies between blocks or is common to all
    """

    program: int
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Literal], ...] = ()
    title: str = ""
    of_block: bool = False


@dataclass(frozen=True)
class Chain:
    """A step in several programs: each distinct one once, and the dispatches in order. `chosen`: why, in words."""

    programs: tuple[Compiled, ...]
    dispatches: tuple[Dispatch, ...]
    chosen: str = ""

    @property
    def in_turn(self) -> tuple[Compiled, ...]:
        """The program of each dispatch."""
        return tuple(self.programs[each.program] for each in self.dispatches)


@dataclass(frozen=True)
class Compiled:
    """What a device loads: program, ports and the files it was written to.

    `fingerprint` is the SHA-256 of text and weights; equal programs compile once. A step that is divided has its
    programs in `chain`: `text` is theirs, `program` what they are together.
    """

    legalized: Legalized
    text: str
    weights: bytes = field(repr=False)
    fingerprint: str
    folder: Path | None = None
    chain: Chain | None = None

    @property
    def programs(self) -> tuple[Compiled, ...]:
        """What is compiled for the engine: this program, or those of the chain."""
        return (self,) if self.chain is None else self.chain.programs

    @property
    def in_turn(self) -> tuple[Compiled, ...]:
        """The program of each dispatch, in order."""
        return (self,) if self.chain is None else self.chain.in_turn

    @property
    def program(self) -> Program:
        return self.legalized.lowered.program

    @property
    def chip(self) -> str:
        return self.legalized.chip

    @property
    def inputs(self) -> tuple[Port, ...]:
        return self.legalized.lowered.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self.legalized.lowered.outputs

    @property
    def aliases(self) -> tuple[Alias, ...]:
        return self.legalized.lowered.aliases
