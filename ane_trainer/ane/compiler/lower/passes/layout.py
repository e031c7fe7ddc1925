"""Move transposes towards the results, past ops indifferent to axis order, so that they meet and cancel.

Channels-last convolutions and poolings (`windows.py`) leave a pair of transposes around every elementwise op
between them; after this pass and `passes.transposes` they remain only where an op needs channels first.
"""

from __future__ import annotations

from dataclasses import replace

from ane_trainer.ane.compiler.lower.passes.rewriting import Rewriter, int_list, integers
from ane_trainer.ane.mil.opset import family
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, TensorType, Value, literal

#: Operands by family of ops that do not care in which order the axes are.
_ALIKE = {"unary": ("x",), "reduction": ("x",), "binary": ("x", "y"), "select": ("cond", "a", "b")}

Perm = tuple[int, ...]


def sink_transposes(function: Function) -> Function:
    """`relu(transpose(x, p))` -> `transpose(relu(x), p)`; `add(transpose(x, p), transpose(y, p))` ->
    `transpose(add(x, y), p)`, where numbers and operands with one long axis follow by a reshape; `select`,
    `concat` and reductions alike: `reduce_sum(transpose(x, p), axes)` -> `reduce_sum(x, p[axes])`
    """
    return Rewriter(function).run(_visit)


def _visit(rewriter: Rewriter, op: Op) -> None:
    names = _operand_names(op)
    perm = next((p for n in names if (p := _perm(rewriter, op.arg(n))) is not None), None)
    if perm is None:
        rewriter.append(op)
    elif family(op.kind) == "reduction":
        _reduce(rewriter, op, perm)
    elif op.kind == "concat":
        _concat(rewriter, op, perm)
    else:
        _pointwise(rewriter, op, names, perm)


def _operand_names(op: Op) -> tuple[str, ...]:
    """The operands whose axes the op treats alike; none for an op that a transpose may not pass."""
    return _ALIKE.get(family(op.kind), ("values",) if op.kind == "concat" else ())


def _perm(rewriter: Rewriter, argument: Arg | None) -> Perm | None:
    """The permutation of the transpose that makes an operand (of its first, for several)."""
    first = argument[0] if isinstance(argument, tuple) else argument
    producer = rewriter.producer(first)
    return integers(producer.arg("perm")) if producer is not None and producer.kind == "transpose" else None


def _source(rewriter: Rewriter, argument: Arg | None, perm: Perm) -> Value | None:
    """What is transposed by `perm` to make an operand; None when it is made otherwise."""
    producer = rewriter.producer(argument)
    if producer is None or producer.kind != "transpose" or integers(producer.arg("perm")) != perm:
        return None
    source = producer.arg("x")
    return source if isinstance(source, Value) else None


def _before(shape: tuple[int, ...], perm: Perm) -> tuple[int, ...]:
    """The shape that `perm` turns into `shape`."""
    result = [0] * len(perm)
    for i, p in enumerate(perm):
        result[p] = shape[i]
    return tuple(result)


def _emit_transposed(rewriter: Rewriter, op: Op, args: dict[str, Arg], perm: Perm) -> None:
    """`op` on the sources, then the transpose that was before it."""
    shape = _before(op.result.type.shape, perm)
    inner = rewriter.fresh(TensorType(op.result.type.dtype, shape))
    merged = tuple((key, args.get(key, old)) for key, old in op.args)
    rewriter.append(replace(op, args=merged, results=(inner,)))
    outer = Op("transpose", (("x", inner), ("perm", int_list(perm))), op.results, op.source)
    rewriter.append(outer)


def _pointwise(rewriter: Rewriter, op: Op, names: tuple[str, ...], perm: Perm) -> None:
    if len(perm) != op.result.type.rank:
        rewriter.append(op)
        return
    plans: list[tuple[str, Value | Literal, Perm]] = []
    for name in names:
        plan = _follow(rewriter, op.arg(name), perm, full=op.kind == "select")
        if plan is None:
            rewriter.append(op)
            return
        plans.append((name, *plan))
    args: dict[str, Arg] = {}
    for name, value, shape in plans:
        args[name] = value
        if isinstance(value, Value) and value.type.shape != shape:
            moved = rewriter.fresh(TensorType(value.type.dtype, shape))
            rewriter.append(Op("reshape", (("x", value), ("shape", int_list(shape))), (moved,), op.source))
            args[name] = moved
    _emit_transposed(rewriter, op, args, perm)


def _follow(
    rewriter: Rewriter, argument: Arg | None, perm: Perm, full: bool
) -> tuple[Value | Literal, Perm] | None:
    """An operand before `perm` and the shape it then needs; None when it cannot follow.

    `full`: the op does not broadcast (`select` in coremltools 9), so axes of length 1 in front stay.
    """
    source = _source(rewriter, argument, perm)
    if source is not None:
        return source, source.type.shape
    if not isinstance(argument, (Value, Literal)) or argument.type.dtype == "bool":
        return None
    shape = argument.type.shape
    if argument.type.size == 1:
        return (argument, shape) if argument.type.rank <= 1 else None
    padded = (1,) * (len(perm) - len(shape)) + shape
    if sum(n != 1 for n in padded) != 1:
        return None
    before = _before(padded, perm)
    while not full and len(before) > 1 and before[0] == 1:
        before = before[1:]
    if isinstance(argument, Literal):
        argument = Literal(TensorType(argument.type.dtype, before), argument.data, argument.name)
    return argument, before


def _reduce(rewriter: Rewriter, op: Op, perm: Perm) -> None:
    source = _source(rewriter, op.arg("x"), perm)
    gone = integers(op.arg("axes"))
    keep = op.arg("keep_dims")
    assert source is not None
    assert isinstance(keep, Literal)
    axes: Arg = int_list(sorted(perm[a] for a in gone))
    if keep.to_python():
        _emit_transposed(rewriter, op, {"x": source, "axes": axes}, perm)
        return
    left = [p for i, p in enumerate(perm) if i not in gone]
    if left != sorted(left):
        rewriter.append(op)
        return
    merged = {"x": source, "axes": axes}
    rewriter.append(replace(op, args=tuple((k, merged.get(k, old)) for k, old in op.args)))


def _concat(rewriter: Rewriter, op: Op, perm: Perm) -> None:
    values, axis = op.arg("values"), op.arg("axis")
    assert isinstance(values, tuple)
    assert isinstance(axis, Literal)
    sources = [_source(rewriter, v, perm) for v in values]
    if any(s is None for s in sources):
        rewriter.append(op)
        return
    index = axis.to_python()
    assert isinstance(index, int)
    moved = literal(perm[index % len(perm)], "int32")
    _emit_transposed(
        rewriter, op, {"values": tuple(s for s in sources if s is not None), "axis": moved}, perm
    )
