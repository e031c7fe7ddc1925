"""Merge equal parts into one program: the same operations on the same shapes, whatever their inputs are called.

Numbers that differ between them (a layer's own power of two) become inputs, where an operation takes them as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ane_trainer.ane.compiler.blocks.cut import Part
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, Program, TensorType, Value
from ane_trainer.ane.stages import Dispatch, Lowered, Port

#: Parameters that are tensors by kind of operation; a constant may be an input there.
_TENSORS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("add", "sub", "mul", "real_div", "maximum", "minimum", "matmul"), ("x", "y")),
    "select": ("a", "b"),
}
_SUMS = ("reduce_sum", "reduce_mean")

#: (operation, argument, item) of a literal in a part.
Spot = tuple[int, int, int]


@dataclass
class _Shape:
    """A part without its names: what has to be equal, the numbers that may differ, and the names by position."""

    key: tuple[object, ...]
    numbers: dict[Spot, Literal]
    names: list[str]


@dataclass
class _Kind:
    """Parts of one shape."""

    parts: list[Part] = field(default_factory=list)
    shapes: list[_Shape] = field(default_factory=list)


def programs_of(parts: Sequence[Part], lowered: Lowered) -> tuple[list[Lowered], list[Dispatch]]:
    """The distinct programs, and for each part the dispatch of one of them."""
    kinds: dict[tuple[object, ...], _Kind] = {}
    where: list[tuple[_Kind, int]] = []
    for part in parts:
        shape = _shape(part)
        kind = kinds.setdefault(shape.key, _Kind())
        where.append((kind, len(kind.parts)))
        kind.parts.append(part)
        kind.shapes.append(shape)
    ports = {port.name: port for port in (*lowered.inputs, *lowered.outputs)}
    made = {id(kind): (number, *_program(kind, ports)) for number, kind in enumerate(kinds.values())}
    programs = [program for _, program, _ in made.values()]
    dispatches = []
    for kind, place in where:
        number, program, spots = made[id(kind)]
        dispatches.append(_dispatch(number, program, spots, kind, place))
    return programs, dispatches


def _shape(part: Part) -> _Shape:
    numbering: dict[str, int] = {}
    numbers: dict[Spot, Literal] = {}
    sums: set[str] = set()
    rows = []
    for index, op in enumerate(part.ops):
        row: list[object] = [op.kind]
        for place, (name, argument) in enumerate(op.args):
            for item, one in enumerate(_items(argument)):
                if isinstance(one, Value):
                    row += [name, numbering.setdefault(one.name, len(numbering)), one.type]
                elif _may_differ(op, name, one, sums):
                    numbers[index, place, item] = one
                    row += [name, "number", one.type]
                else:
                    row += [name, one]
        if op.kind in _SUMS:
            sums.add(op.result.name)
        row += [(numbering.setdefault(v.name, len(numbering)), v.type) for v in op.results]
        rows.append(tuple(row))
    return _Shape(tuple(rows), numbers, list(numbering))


def _items(argument: Arg) -> Iterator[Value | Literal]:
    yield from argument if isinstance(argument, tuple) else (argument,)


def _may_differ(op: Op, name: str, constant: Literal, sums: set[str]) -> bool:
    """Whether the constant could be an input; a factor that the engine folds into a sum could not."""
    if name not in _TENSORS.get(op.kind, ()) or constant.type.dtype not in ("fp16", "fp32"):
        return False
    return not any(value.name in sums for value in op.operands())


def _program(kind: _Kind, ports: Mapping[str, Port]) -> tuple[Lowered, list[Spot]]:
    """One program for all parts of a kind, called as in the first; and where it takes numbers as inputs."""
    first, shape = kind.parts[0], kind.shapes[0]
    spots = [s for s, one in shape.numbers.items() if any(o.numbers[s] != one for o in kind.shapes[1:])]
    given = {spot: _number_input(spot, shape.numbers[spot], shape.names) for spot in spots}
    ops = tuple(_with_inputs(op, index, given) for index, op in enumerate(first.ops))
    place = {name: i for i, name in enumerate(shape.names)}
    inputs = [*first.inputs.values(), *given.values()]
    read = {
        position
        for part, own in zip(kind.parts, kind.shapes, strict=True)
        for position, name in enumerate(own.names)
        if name in part.outputs
    }
    outputs = [v for op in first.ops for v in op.results if place[v.name] in read]
    function = Function("main", tuple(inputs), ops, tuple(outputs))
    lowered = Lowered(
        Program((function,)),
        tuple(_port(v, ports.get(v.name), "batch") for v in inputs),
        tuple(_port(v, ports.get(v.name), "result") for v in outputs),
        (),
    )
    return lowered, spots


def _port(value: Value, known: Port | None, role: str) -> Port:
    """A value at a border; what the whole step calls it where it is a port of that."""
    target = value.name if known is None else known.target
    return Port(value.name, value.type.shape, role, target, 1.0 if known is None else known.scale)


def _number_input(spot: Spot, number: Literal, taken: Sequence[str]) -> Value:
    name = "number_{}_{}_{}".format(*spot)
    while name in taken:
        name += "_"
    return Value(name, TensorType(number.type.dtype, number.type.shape or (1,)))


def _with_inputs(op: Op, index: int, given: Mapping[Spot, Value]) -> Op:
    """The operation with inputs for some of its constants."""
    if not any(spot[0] == index for spot in given):
        return op
    args = []
    for place, (name, argument) in enumerate(op.args):
        items = tuple(given.get((index, place, i), one) for i, one in enumerate(_items(argument)))
        args.append((name, items if isinstance(argument, tuple) else items[0]))
    return replace(op, args=tuple(args))


def _dispatch(number: int, program: Lowered, spots: Sequence[Spot], kind: _Kind, place: int) -> Dispatch:
    """How one part runs its kind's program."""
    called = dict(zip(kind.shapes[0].names, kind.shapes[place].names, strict=True))
    function, own = program.program.main, kind.shapes[place]
    count = len(function.inputs) - len(spots)
    constants = zip((v.name for v in function.inputs[count:]), (own.numbers[s] for s in spots), strict=True)
    return Dispatch(
        number,
        tuple((v.name, called[v.name]) for v in function.inputs[:count]),
        tuple((v.name, called[v.name]) for v in function.outputs),
        tuple(constants),
        kind.parts[place].place.title,
        bool(kind.parts[place].place.block),
    )
