"""Cut a step's function into parts, each with its inputs from earlier parts and outputs to later ones.

Only floats go from part to part: booleans and integers, and what is made of constants alone, are made again where they
are read, so that every port is one that an engine has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ane_trainer.ane.compiler.blocks.places import Key, Place
from ane_trainer.ane.mil.program import Function, Op, Value

_FLOATS = ("fp16", "fp32")
#: Results of these stay in the part that reads them, whose products an engine computes in integers.
_DECODED = ("dequantize", "constexpr_")


@dataclass
class Part:
    """One dispatch's work: operations in order, what they read of other parts, and which results others read."""

    place: Place
    ops: list[Op] = field(default_factory=list)
    inputs: dict[str, Value] = field(default_factory=dict)
    outputs: dict[str, Value] = field(default_factory=dict)


class Cutter:
    """Cuts one function at places; what it knows of the function serves each time."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.maker = {value.name: i for i, op in enumerate(function.ops) for value in op.results}
        self.results = {value.name for value in function.outputs}
        self.again = [self._is_made_again(op) for op in function.ops]
        self.places: Sequence[Place] = ()

    def parts(self, places: Sequence[Place]) -> list[Part]:
        """The parts in the order in which they are to run."""
        self.places = places
        own: dict[Key, Part] = {}
        order: dict[Key, list[int]] = {}
        for index, place in enumerate(self.places):
            if self.again[index]:
                continue
            own.setdefault(place.key, Part(place))
            order.setdefault(place.key, []).append(index)
        parts = [own[key] for key in sorted(own)]
        for part in parts:
            made: set[int] = set()
            for index in order[part.place.key]:
                self._take(index, part, made)
        self._outputs(parts)
        return [part for part in parts if part.outputs]

    def _is_made_again(self, op: Op) -> bool:
        if any(value.name in self.results for value in op.results):
            return False
        made = all(value.type.dtype not in _FLOATS for value in op.results)
        return made or op.kind.startswith(_DECODED) or next(op.operands(), None) is None

    def _take(self, index: int, part: Part, made: set[int]) -> None:
        """Put an operation into a part, after what it reads of those that are made again."""
        if index in made:
            return
        made.add(index)
        op = self.function.ops[index]
        for value in op.operands():
            maker = self.maker.get(value.name)
            if maker is None:
                part.inputs[value.name] = value
            elif self.again[maker]:
                self._take(maker, part, made)
            elif self.places[maker].key != part.place.key:
                part.inputs[value.name] = value
        part.ops.append(op)

    def _outputs(self, parts: Sequence[Part]) -> None:
        read = self.results | {name for part in parts for name in part.inputs}
        for part in parts:
            found = (value for op in part.ops for value in op.results)
            part.outputs = {v.name: v for v in found if v.name in read and not self.again[self.maker[v.name]]}
