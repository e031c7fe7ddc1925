"""Reduce rank above 5 by merging adjacent axes that the op treats identically.

before: `y = mul(x [4,2,1,8,8,8], x)`       after: `y = reshape(mul(reshape(x, [4096]), reshape(x, [4096])))`

The reshapes between two such ops fall together in the passes that follow. Booleans are not reshaped (only
comparisons and `select` are known to take them): ops on one share the grouping of the op that made it, and where
that cannot be they stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from ane_trainer.ane.compiler.lower.passes.rewriting import Rewriter, int_list, integers
from ane_trainer.ane.mil.opset import family
from ane_trainer.ane.mil.program import MAX_RANK, Arg, Function, Literal, Op, TensorType, Value

Groups = tuple[tuple[int, ...], ...]


def merge_axes(function: Function) -> Function:
    """`f(x)` of rank above 5 -> `reshape(f(reshape(x)))` with adjacent axes merged."""
    grouped: dict[Value, tuple[Value, Groups]] = {}

    def visit(rewriter: Rewriter, op: Op) -> None:
        tensors = [a for _, a in op.args for a in (a if isinstance(a, tuple) else (a,))]
        ranks = [t.type.rank for t in (*tensors, *op.results) if t.type.dtype not in ("int32", "string")]
        form = _FORMS.get(op.kind) or _FAMILY_FORMS.get(family(op.kind))
        if max(ranks, default=0) <= MAX_RANK or form is None or not form(rewriter, op, grouped):
            rewriter.append(op)

    return Rewriter(function).run(visit)


def _merged(shape: Sequence[int], groups: Groups) -> tuple[int, ...]:
    return tuple(math.prod(shape[i] for i in group) for group in groups)


def _runs(rank: int, joins: Callable[[tuple[int, ...]], bool]) -> Groups:
    """Axes in runs of neighbours, as long as `joins` of the run holds."""
    groups: list[tuple[int, ...]] = []
    for axis in range(rank):
        longer = (*groups[-1], axis) if groups else (axis,)
        if groups and joins(longer):
            groups[-1] = longer
        else:
            groups.append((axis,))
    return tuple(groups)


def _as_groups(rewriter: Rewriter, x: Value | Literal, rank: int, groups: Groups) -> Value | Literal:
    """The operand with its axes (those in front that it lacks are 1) merged."""
    if x.type.rank == 0:
        return x
    shape = _merged((1,) * (rank - x.type.rank) + x.type.shape, groups)
    type_ = TensorType(x.type.dtype, shape)
    if isinstance(x, Literal):
        return replace(x, type=type_)
    if x.type == type_:
        return x
    result = rewriter.fresh(type_)
    rewriter.append(Op("reshape", (("x", x), ("shape", int_list(shape))), (result,)))
    return result


def _back(rewriter: Rewriter, op: Op, args: tuple[tuple[str, Arg], ...], shape: tuple[int, ...]) -> Value:
    """The op on merged operands, and its result in the shape that readers expect."""
    inner = rewriter.fresh(TensorType(op.result.type.dtype, shape))
    rewriter.append(replace(op, args=args, results=(inner,)))
    if op.result.type.dtype != "bool":
        shape_arg = int_list(op.result.type.shape)
        rewriter.append(Op("reshape", (("x", inner), ("shape", shape_arg)), (op.result,)))
    return inner


def _pointwise(rewriter: Rewriter, op: Op, grouped: dict[Value, tuple[Value, Groups]]) -> bool:
    full = op.result.type.shape
    rank = len(full)
    operands = {k: a for k, a in op.args if not isinstance(a, tuple) and a.type.rank}
    if any(a.type.dtype == "string" for a in operands.values()):
        return False
    spread = [(1,) * (rank - a.type.rank) + a.type.shape for a in operands.values()]

    groups = _runs(rank, lambda run: all(_fits(full, s, (run,)) for s in spread))
    known = {grouped[a][1] for a in operands.values() if isinstance(a, Value) and a in grouped}
    if known:
        groups = next(iter(known))
    fits = all(_fits(full, s, groups) for s in spread) and len(known) <= 1
    made = all(a in grouped for a in operands.values() if isinstance(a, Value) and a.type.dtype == "bool")
    if not fits or not made or len(groups) > MAX_RANK:
        return False
    arguments: list[tuple[str, Arg]] = []
    for key, argument in op.args:
        if key in operands and argument in grouped:
            arguments.append((key, grouped[argument][0]))
        elif key in operands:
            arguments.append((key, _as_groups(rewriter, operands[key], rank, groups)))
        else:
            arguments.append((key, argument))
    inner = _back(rewriter, op, tuple(arguments), _merged(full, groups))
    if op.result.type.dtype == "bool":
        grouped[op.result] = inner, groups
    return True


def _fits(full: Sequence[int], shape: Sequence[int], groups: Groups) -> bool:
    """Whether an operand has each run whole or not at all."""
    return all(
        all(shape[i] == full[i] for i in group) or all(shape[i] == 1 for i in group) for group in groups
    )


def _touching(
    rewriter: Rewriter, op: Op, touched: set[int], lists: dict[str, object], key: str = "x"
) -> bool:
    """An op that does something on the `touched` axes only; `lists` are its lists with one entry per axis.

    An entry of a merged run of untouched axes is that of `lists`: a constant, or "extent" for the whole of it.
    """
    argument = dict(op.args)[key]
    operands = argument if isinstance(argument, tuple) else (argument,)
    rank = operands[0].type.rank
    groups = _runs(rank, touched.isdisjoint)
    if len(groups) > MAX_RANK or any(o.type.dtype == "bool" for o in operands):
        return False
    arguments: list[tuple[str, Arg]] = []
    for name, value in op.args:
        if name == key:
            ready = tuple(_as_groups(rewriter, o, rank, groups) for o in operands)
            arguments.append((name, ready if isinstance(argument, tuple) else ready[0]))
        elif name in lists:
            old, whole = integers(value), lists[name]
            sizes = _merged(operands[0].type.shape, groups)
            new = [
                old[g[0]] if g[0] in touched else size if whole == "extent" else whole
                for g, size in zip(groups, sizes, strict=True)
            ]
            arguments.append((name, int_list(new)))  # type: ignore[arg-type]
        else:
            arguments.append((name, value))
    _back(rewriter, op, tuple(arguments), _merged(op.result.type.shape, groups))
    return True


def _slice(rewriter: Rewriter, op: Op, _: object) -> bool:
    x = dict(op.args)["x"]
    assert isinstance(x, Value)
    touched = {i for i, (n, m) in enumerate(zip(x.type.shape, op.result.type.shape, strict=True)) if n != m}
    whole: dict[str, object] = {"begin": 0, "size": "extent", "end": "extent", "stride": 1}
    return _touching(rewriter, op, touched, whole)


def _tile(rewriter: Rewriter, op: Op, _: object) -> bool:
    touched = {i for i, n in enumerate(integers(op.arg("reps"))) if n != 1}
    return _touching(rewriter, op, touched, {"reps": 1})


def _concat(rewriter: Rewriter, op: Op, _: object) -> bool:
    axis = op.arg("axis")
    assert isinstance(axis, Literal)
    rank = op.result.type.rank
    at = int(axis.to_python()) % rank  # type: ignore[arg-type]
    groups = _runs(rank, lambda run: at not in run)
    position = next(k for k, g in enumerate(groups) if at in g)
    moved = replace(axis, data=position.to_bytes(4, "little"))
    args = tuple((k, moved if k == "axis" else a) for k, a in op.args)
    return _touching(rewriter, replace(op, args=args), {at}, {}, "values")


def _pad(rewriter: Rewriter, op: Op, _: object) -> bool:
    x, amounts = dict(op.args)["x"], integers(op.arg("pad"))
    assert isinstance(x, Value)
    rank = x.type.rank
    pairs = ((0, 0),) * (rank - len(amounts) // 2) + tuple(zip(amounts[::2], amounts[1::2], strict=True))
    touched = {i for i, pair in enumerate(pairs) if pair != (0, 0)}
    groups = _runs(rank, touched.isdisjoint)
    if len(groups) > MAX_RANK:
        return False
    flat = int_list(n for g in groups for n in (pairs[g[0]] if g[0] in touched else (0, 0)))
    args = tuple((k, flat if k == "pad" else a) for k, a in op.args)
    return _touching(rewriter, replace(op, args=args), touched, {})


def _reduce(rewriter: Rewriter, op: Op, _: object) -> bool:
    x, gone = dict(op.args)["x"], op.arg("axes")
    assert isinstance(x, Value)
    rank = x.type.rank
    axes = {a % rank for a in integers(gone)}
    wide = {i for i, n in enumerate(x.type.shape) if n != 1}  # axes of extent 1 go with any others
    groups = _runs(rank, lambda run: wide.isdisjoint(axes & set(run)) or wide & set(run) <= axes)
    positions = [k for k, g in enumerate(groups) if wide & axes & set(g)]
    if len(groups) > MAX_RANK or not positions:
        return False
    keep = op.arg("keep_dims")
    assert isinstance(keep, Literal)
    shape = _merged(x.type.shape, groups)
    kept = [1 if k in positions else n for k, n in enumerate(shape) if k not in positions or keep.to_python()]
    new = {"x": _as_groups(rewriter, x, rank, groups), "axes": int_list(positions)}
    _back(rewriter, op, tuple((k, new.get(k, a)) for k, a in op.args), tuple(kept))
    return True


def _const(rewriter: Rewriter, op: Op, _: object) -> bool:
    value = op.arg("val")
    if not isinstance(value, Literal) or op.result.type.dtype == "bool":
        return False
    flat = (value.type.size,)
    _back(rewriter, op, (("val", replace(value, type=TensorType(value.type.dtype, flat))),), flat)
    return True


_Form = Callable[[Rewriter, Op, dict[Value, tuple[Value, Groups]]], bool]
_FORMS: dict[str, _Form] = {
    "slice_by_size": _slice, "slice_by_index": _slice, "tile": _tile, "concat": _concat, "pad": _pad, "const": _const
}  # fmt: skip
_FAMILY_FORMS: dict[str, _Form] = {
    "unary": _pointwise, "binary": _pointwise, "select": _pointwise, "reduction": _reduce
}  # fmt: skip
