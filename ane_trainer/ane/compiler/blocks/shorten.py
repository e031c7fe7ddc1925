"""Split parts longer than a chip is known to compile, where few values cross the cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ane_trainer.ane.compiler.blocks.cut import Cutter, Part
from ane_trainer.ane.compiler.blocks.places import Key, Placement
from ane_trainer.ane.mil.program import Function

#: Share of a piece's length by which a cut may move to where less is alive.
_SLACK = 0.15
#: Pieces take turns: work that is made again in each makes some longer than planned.
_ROUNDS = 4


def shortened(cutter: Cutter, placement: Placement, most: float) -> Placement:
    """The same with parts of at most `most` operations, as far as pieces bring them down to it."""
    pieces: dict[Key, int] = {}
    found = placement
    whole = cutter.parts(placement.places)
    for _ in range(_ROUNDS):
        longest: dict[Key, int] = {}
        for part in whole if found is placement else cutter.parts(found.places):
            key = part.place.key[:4]
            longest[key] = max(longest.get(key, 0), len(part.ops))
        long = {key: n for key, n in longest.items() if n > most}
        if not long:
            break
        for key, n in long.items():
            now = pieces.get(key, 1)
            pieces[key] = max(now + 1, int(-(-now * n // most)))
        found = _in_pieces(cutter.function, placement, whole, pieces)
    return found


def _in_pieces(
    function: Function, placement: Placement, whole: Sequence[Part], pieces: dict[Key, int]
) -> Placement:
    """The parts of a placement in so many pieces, in the order of their operations."""
    places = list(placement.places)
    numbers = {op.results[0].name: i for i, op in enumerate(function.ops)}
    for part in whole:
        count = pieces.get(part.place.key)
        if count is None:
            continue
        ends = list(_ends(part, count))
        for number, op in enumerate(part.ops):
            index = numbers[op.results[0].name]
            if places[index].key == part.place.key:
                piece = sum(number >= end for end in ends)
                places[index] = replace(places[index], key=(*part.place.key, piece))
    for first, index in placement.pairs.items():
        places[index] = places[first]
    return replace(placement, places=places)


def _ends(part: Part, count: int) -> Iterator[int]:
    """Where pieces but the last end: near equal lengths, where the fewest bytes are alive."""
    alive = _alive(part)
    room = int(_SLACK * len(part.ops) / count)
    for number in range(1, count):
        middle = number * len(part.ops) // count
        yield min(range(middle - room, middle + room + 1), key=lambda i: (alive[i], abs(i - middle)))


def _alive(part: Part) -> list[int]:
    """For each place between operations the bytes that are made before it and read after it."""
    last = {value.name: i for i, op in enumerate(part.ops) for value in op.operands()}
    change = [0] * (len(part.ops) + 2)
    for i, op in enumerate(part.ops):
        for value in op.results:
            if value.name in last:
                change[i + 1] += value.type.nbytes
                change[last[value.name] + 1] -= value.type.nbytes
    found, now = [], 0
    for each in change:
        now += each
        found.append(now)
    return found
