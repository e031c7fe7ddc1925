"""Assign each operation of a divided step to its program.

    forward   R0  F1 R1  F2 R2  ..  Fn Rn      F: a block; R: what lies between blocks (embedding, head, loss)
    backward  R0' Bn ..  B2 B1  R'
    after     G0  U1 .. Un  G1  V1 .. Vn  ..   G: what needs several blocks (do all gradients fit, their norm);
                                               U, V: a block's own accumulation, clipping and update

An operation knows its module by its source. It never comes before a program that makes what it reads, so that any
assignment runs; how many programs are alike depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ane_trainer.ane.mil.program import Literal, Op
from ane_trainer.ane.stages import Lowered

#: Sources of what follows backward (`capture.step`), by their first words.
_AFTER = ("loss scaling", "gradient accumulation", "gradient clipping", "optimizer ")
#: Target of the port whose value seeds the backward pass.
_SEED = "step/loss_scale"
#: "The rest": what belongs to no block.
REST = ""

FORWARD, BACKWARD, AFTER = 0, 1, 2
#: Phase, place in it, 0 for blocks and 1 for what follows them, order of blocks; then the piece of a long part.
Key = tuple[int, ...]
_FIRST: Key = (FORWARD, 0, 1, 0)
#: Sums, which the engine merges with a factor behind them.
SUMS = ("reduce_sum", "reduce_mean")


@dataclass(frozen=True)
class Place:
    """A program's place in the order of dispatches, and the block it belongs to (`REST`: none)."""

    key: Key
    block: str

    @property
    def title(self) -> str:
        """Phase and block, in words."""
        phase = ("forward", "backward", "gradients" if self.key[2] else "update")[self.key[0]]
        block = self.block if self.block or phase == "gradients" else "between blocks"
        piece = f", part {self.key[4] + 1}" if len(self.key) > 4 else ""
        return f"{phase} {block}".rstrip() + piece


@dataclass
class _Known:
    """What is known of a value: where it is made, and the blocks whose state or activations it stands on."""

    key: Key
    blocks: frozenset[str] = frozenset()
    crossing: bool = False  # made of several blocks: neutral for what comes after
    seeded: bool = False  # stands on the seed of the backward pass


@dataclass
class _Order:
    """Blocks of a phase in order of appearance; a block that is needed again later appears again."""

    phase: int
    count: int = 0
    last: dict[str, int] = field(default_factory=dict)

    def of(self, block: str, after: Key) -> Key:
        """The place of a block's operation that reads what `after` makes."""
        known = self.last.get(block)
        if known is None or (self.phase, known, 0, 0) < after:
            self.count += 1
            self.last[block] = known = self.count
        return (self.phase, known, 0, 0)

    def rest(self, after: Key) -> Key:
        """The place of an operation of no block."""
        return (self.phase, after[1] if after[0] == self.phase else 0, 1, 0)


@dataclass(frozen=True)
class Placement:
    """The place of each operation. `pairs`: sums, by number, and the factors that have to be where they are."""

    places: list[Place]
    pairs: Mapping[int, int]


def placement_of(lowered: Lowered, blocks: Mapping[str, str]) -> Placement:
    """The place of each operation. `blocks`: module path -> the name of the block that it is in."""
    found = _Assignment(lowered, blocks)
    found.settle()
    return Placement(found.places, found.pairs)


def origins_of(lowered: Lowered, blocks: Mapping[str, str]) -> list[Place]:
    """The place of the module that each operation is from, before any is moved to where it is read."""
    return _Assignment(lowered, blocks).places


def readers_of(ops: Sequence[Op]) -> dict[str, list[int]]:
    """For each value that is read the operations that read it, by number, once for each operand."""
    readers: dict[str, list[int]] = {}
    for index, op in enumerate(ops):
        for value in op.operands():
            readers.setdefault(value.name, []).append(index)
    return readers


class _Assignment:
    """Goes over the operations twice: in order, to place them; then backwards, to move what would cross in vain."""

    def __init__(self, lowered: Lowered, blocks: Mapping[str, str]) -> None:
        self.ops = lowered.program.main.ops
        self.blocks = blocks
        self.numbers = {name: i for i, name in enumerate(dict.fromkeys(blocks.values()))}
        self.values: dict[str, _Known] = {}
        for port in lowered.inputs:
            block = self.block_of(port.target) if port.role == "state" else REST
            own = port.role == "state" and not port.target.startswith("step/")
            self.values[port.name] = _Known(
                _FIRST, frozenset([block]) if own else frozenset(), seeded=port.target == _SEED
            )
        self.orders = (_Order(FORWARD), _Order(BACKWARD))
        self.places: list[Place] = []
        self._backward = False
        self._maker = {value.name: i for i, op in enumerate(self.ops) for value in op.results}
        self.pairs: dict[int, int] = {}
        for op in self.ops:
            self._assign(op)

    def settle(self) -> None:
        """Put sums and their factors together, and operations where they are read."""
        self._pair_sums()
        self._move()

    def block_of(self, path: str) -> str:
        """The block that a module, parameter or state belongs to."""
        path = path.split("/")[0]
        while path:
            if path in self.blocks:
                return self.blocks[path]
            path = path.rpartition(".")[0]
        return REST

    def _assign(self, op: Op) -> None:
        read = [self.values[v.name] for v in op.operands()]
        latest = max((known.key for known in read), default=_FIRST)
        seeded = any(known.seeded for known in read)
        source = op.source or ""
        after = source.startswith(_AFTER) or latest[0] == AFTER
        self._backward |= seeded and not after
        if after:
            place, known = self._after(read, latest)
        else:
            block = self.block_of(source.split(" (")[0])
            order = self.orders[BACKWARD if self._backward else FORWARD]
            neutral = not any(known.blocks or known.crossing for known in read) and not seeded
            key = order.of(block, latest) if block != REST else order.rest(latest)
            place = Place(max(key, latest), block)
            known = _Known(place.key, frozenset() if neutral else frozenset([block]))
        known.seeded = seeded and not after
        self.places.append(place)
        for value in op.results:
            self.values[value.name] = known

    def _after(self, read: Sequence[_Known], latest: Key) -> tuple[Place, _Known]:
        """A block's own where it stands on one block alone; what stands on several is common to all."""
        blocks = frozenset().union(*(known.blocks for known in read))
        crossing = max((known.key for known in read if known.crossing), default=None)
        if len(blocks) == 1:
            (block,) = blocks
            if crossing is None:
                return Place(latest, block), _Known(latest, blocks)
            key = max(latest, (AFTER, crossing[1] + 1, 0, self.numbers.get(block, len(self.numbers))))
            return Place(key, block), _Known(key, blocks)
        if not blocks and crossing is None:
            return Place(latest, REST), _Known(latest)
        key = max(latest, (AFTER, 0, 1, 0))
        key = (AFTER, key[1], 1, 0)
        return Place(key, REST), _Known(key, crossing=True)

    def _pair_sums(self) -> None:
        """A factor that the engine folds into the sum before it goes with the sum."""
        readers = readers_of(self.ops)
        made = {op.result.name: i for i, op in enumerate(self.ops) if op.kind in SUMS}
        for index, op in enumerate(self.ops):
            numbers = [a for _, a in op.args if isinstance(a, Literal) and a.type.size == 1]
            operand = next(op.operands(), None)
            if op.kind != "mul" or not numbers or operand is None or operand.name not in made:
                continue
            if len(readers[operand.name]) == 1:
                self.pairs[made[operand.name]] = index
                self.places[index] = self.places[made[operand.name]]

    def _move(self) -> None:
        """Values of no block that several programs read go to the first program; work that only a later program
        of the same block reads goes there, where it needs no more memory between them.
        """
        readers = readers_of(self.ops)
        paired = {index: first for first, index in self.pairs.items()}
        for index in reversed(range(len(self.ops))):
            op, place = self.ops[index], self.places[index]
            using = [self.places[i] for value in op.results for i in readers.get(value.name, ())]
            if index in paired or index in self.pairs or not using:
                continue
            if self._is_neutral(op) and any(other.key != place.key for other in using):
                self.places[index] = Place(_FIRST, REST)
                continue
            target = min(using, key=lambda p: p.key)
            if target.key <= place.key or target.block != place.block or place.block == REST:
                continue
            if self._crossing(op, place, target, readers) <= sum(v.type.nbytes for v in op.results):
                self.places[index] = target

    def _is_neutral(self, op: Op) -> bool:
        known = self.values[op.results[0].name]
        return not known.blocks and not known.crossing and not known.seeded and known.key[0] == FORWARD

    def _crossing(self, op: Op, place: Place, target: Place, readers: Mapping[str, list[int]]) -> int:
        """Bytes of operands that would have to be kept for `target` and are not kept for it yet."""
        found = 0
        for value in op.operands():
            maker = self._maker.get(value.name)
            if maker is None or self.places[maker].key != place.key:
                continue
            if not any(self.places[i].key >= target.key for i in readers[value.name]):
                found += value.type.nbytes
        return found
