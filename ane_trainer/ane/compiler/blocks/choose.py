"""Decide whether a step is divided into programs of blocks, and how many blocks are one program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ane_trainer.ane.chips.lookup import get_chip, known_layers, limit
from ane_trainer.ane.compiler.blocks.alike import programs_of
from ane_trainer.ane.compiler.blocks.cut import Cutter
from ane_trainer.ane.compiler.blocks.places import Placement, placement_of
from ane_trainer.ane.compiler.blocks.recompute import recomputed
from ane_trainer.ane.compiler.blocks.shorten import shortened
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.stages import Dispatch, Lowered

#: Two blocks in one program may be shorter than twice one, by what they share: as much longer is tried.
_SAVED = 1.25
#: What `blocks=` may be besides a number.
BLOCKS = ("auto", "off")


@dataclass(frozen=True)
class Divided:
    """A step's distinct programs, its dispatches in order, and why it is divided."""

    programs: list[Lowered]
    dispatches: list[Dispatch]
    reason: str

    @property
    def longest(self) -> int:
        """Operations of the longest program."""
        return max(len(each.program.main.ops) for each in self.programs)

    @property
    def longest_block(self) -> int:
        """Operations of the longest program of a block; 1 where there are no blocks."""
        numbers = {each.program for each in self.dispatches if each.of_block}
        return max((len(self.programs[number].program.main.ops) for number in numbers), default=1)


@dataclass(frozen=True)
class Division:
    """How a step is to be divided: `wish` is "auto", "off" or the blocks that are one program, `repeating` the paths
    of modules that repeat, side by side (`capture.repeats`), `checkpoint` whether their activations are computed again
    in the backward pass.
    """

    wish: str | int
    repeating: Sequence[Sequence[str]]
    checkpoint: bool = False

    def again(self, lowered: Lowered) -> Lowered:
        """The step as it is to be divided: with what `checkpoint` computes again."""
        return recomputed(lowered, self._blocks(1)) if self.checkpoint else lowered

    def of(self, lowered: Lowered, chip: str, path: str) -> Divided | None:
        """The step in programs of blocks; None: it is one program."""
        if self.wish == "off":
            return None
        if isinstance(self.wish, int):
            return _divided(
                lowered, Cutter(lowered.program.main), self._placed(lowered, self.wish), f"blocks={self.wish}"
            )
        most, _ = known_layers(get_chip(chip), path)
        reason = _too_large(lowered, chip, path, most)
        if not reason:
            return None
        cutter = Cutter(lowered.program.main)
        found = self._in_blocks(lowered, cutter, most, reason)
        if len(lowered.program.main.ops) > most * len(found.programs):
            return found  # fewer programs serve all blocks than pieces would hold the step
        pieces = _divided(lowered, cutter, shortened(cutter, placement_of(lowered, {}), most), reason)
        return pieces if len(pieces.programs) <= len(found.programs) and pieces.longest <= most else found

    def _in_blocks(self, lowered: Lowered, cutter: Cutter, most: float, reason: str) -> Divided:
        """As many blocks in one program as fit, or one in several."""
        places = self._placed(lowered, 1)
        single = _divided(lowered, cutter, places, reason)
        if single.longest > most:
            return _divided(lowered, cutter, shortened(cutter, places, most), reason)
        count, room = max(map(len, self.repeating), default=1), most / single.longest_block
        for each in (n for n in range(count, 1, -1) if count % n == 0 and n <= _SAVED * room):
            found = _divided(lowered, cutter, self._placed(lowered, each), reason)
            if found.longest <= most:
                return found
        return single

    def _placed(self, lowered: Lowered, each: int) -> Placement:
        return placement_of(lowered, self._blocks(each))

    def _blocks(self, each: int) -> dict[str, str]:
        """Module path -> the name of its block: `each` of the modules that repeat, side by side, are one."""
        names: dict[str, str] = {}
        for paths in self.repeating:
            for start in range(0, len(paths), each):
                own = paths[start : start + each]
                more = "" if len(own) == 1 else f" to {own[-1].rpartition('.')[2]}"
                names |= dict.fromkeys(own, own[0] + more)
        return names


def _divided(lowered: Lowered, cutter: Cutter, placement: Placement, reason: str) -> Divided:
    programs, dispatches = programs_of(cutter.parts(placement.places), lowered)
    return Divided(programs, dispatches, reason)


def _too_large(lowered: Lowered, chip: str, path: str, most: float) -> str:
    """Why the step cannot be one program, in words; empty if it can, as one in fp32, which never reaches an engine."""
    ops = lowered.program.main.ops
    if any(value.type.dtype == "fp32" for value in lowered.program.main.inputs):
        return ""
    if len(ops) > most:
        return f"auto: {len(ops)} operations, and {most:g} are the most that are known to compile"
    row = limit(chip, "program_bytes", path)
    size = sum(one.type.nbytes for op in ops for _, one in op.literals() if isinstance(one.data, bytes))
    if row is not None and size > row.value:
        return f"auto: constants of {size} bytes, and a program holds {row.value:g}"
    return ""


def check_blocks(wish: str | int) -> None:
    """Raises: UsageError for what `blocks=` cannot be."""
    number = isinstance(wish, int) and not isinstance(wish, bool)
    if wish not in BLOCKS and not (number and int(wish) >= 1):
        raise UsageError(
            f'blocks: needs "auto", "off" or a number from 1 on (blocks that are one program); got {wish!r}. '
            "Choose one of them.",
            code="ANE104",
        )
