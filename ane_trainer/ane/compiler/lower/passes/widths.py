"""Factor an axis longer than the engine takes, such as a flattened image, where ops treat its elements alike.

before: `y = reshape(x [2,1,384,384], [2,147456]); s = reduce_mean(mul(y, y), axes=[1])`
after:  `y = reshape(x, [2,384,384]); s = reduce_mean(mul(y, y), axes=[1,2])`

Elementwise ops, reductions, `reshape`, `tile` and constants are taken; a tensor that anything else reads keeps its
axis, and the chip refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ane_trainer.ane.compiler.lower.passes.rewriting import Rewriter, int_list, integers
from ane_trainer.ane.mil.opset import family
from ane_trainer.ane.mil.program import MAX_RANK, Arg, Function, Literal, Op, TensorType, Value

#: The longest axis that every chip takes (ANE guide app. A).
MAX_WIDTH = 16384
#: From here on some chip refuses an axis.
_TOO_WIDE = 65536
_TAKEN = ("unary", "binary", "select", "reduction")
Shape = tuple[int, ...]


def factor_widths(function: Function) -> Function:
    """`f(x [.., n])` with n above 65536 -> `f(x [.., n1, n2])`, n = n1 n2"""
    if not any(_wide(v.type.shape) is not None for op in function.ops for v in op.results):
        return function
    kept = {v for op in function.ops if not _taken(op) for v in (*op.operands(), *op.results)} | {
        *function.outputs
    }
    if any(v.type.dtype == "bool" and _wide(v.type.shape) is not None for v in kept):
        return function  # booleans are not reshaped
    narrow: dict[Value, Value] = {}

    def visit(rewriter: Rewriter, op: Op) -> None:
        wide = [v for v in (*op.operands(), *op.results) if _wide(v.type.shape) is not None]
        if not wide or not _taken(op) or not _visit(rewriter, op, narrow):
            rewriter.append(op)

    return Rewriter(function).run(visit)


def _taken(op: Op) -> bool:
    return family(op.kind) in _TAKEN or op.kind in ("reshape", "tile", "const")


def _wide(shape: Shape) -> tuple[int, int, int] | None:
    """(axis, n1, n2) of the only axis above the limit; None if there is none, no place for one more, or no factors."""
    long = [i for i, n in enumerate(shape) if n > _TOO_WIDE]
    if len(long) != 1 or len(shape) >= MAX_RANK:
        return None
    n = shape[long[0]]
    factors = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return (long[0], factors[-1], n // factors[-1]) if n // factors[-1] <= MAX_WIDTH else None


def _split(shape: Shape, wide: tuple[int, int, int]) -> Shape:
    axis, rows, columns = wide
    return (*shape[:axis], *((1, 1) if shape[axis] == 1 else (rows, columns)), *shape[axis + 1 :])


def _as_narrow(
    rewriter: Rewriter, x: Value | Literal, rank: int, wide: tuple[int, int, int], narrow: dict[Value, Value]
) -> Value | Literal:
    """An operand of an elementwise op with the axis in factors (or two of extent 1)."""
    if x.type.rank == 0:
        return x
    if isinstance(x, Value) and x in narrow and x.type.rank == rank:
        return narrow[x]
    type_ = TensorType(x.type.dtype, _split((1,) * (rank - x.type.rank) + x.type.shape, wide))
    return replace(x, type=type_) if isinstance(x, Literal) else _reshaped(rewriter, x, type_.shape)


def _reshaped(rewriter: Rewriter, x: Value, shape: Sequence[int]) -> Value:
    result = rewriter.fresh(TensorType(x.type.dtype, tuple(shape)))
    rewriter.append(Op("reshape", (("x", x), ("shape", int_list(shape))), (result,)))
    return result


def _visit(rewriter: Rewriter, op: Op, narrow: dict[Value, Value]) -> bool:
    wide = _wide(op.result.type.shape)
    if op.kind == "reshape":
        return _reshape(rewriter, op, wide, narrow)
    if family(op.kind) == "reduction":
        return _reduce(rewriter, op, narrow)
    if wide is None:
        return False
    rank = op.result.type.rank
    arguments: list[tuple[str, Arg]] = []
    for name, value in op.args:
        if name == "reps":
            reps = integers(value)
            arguments.append((name, int_list([*reps[: wide[0]], *_repeats(op, wide), *reps[wide[0] + 1 :]])))
        elif isinstance(value, tuple) or value.type.dtype in ("string", "int32"):
            arguments.append((name, value))
        else:
            arguments.append((name, _as_narrow(rewriter, value, rank, wide, narrow)))
    _emit(rewriter, op, tuple(arguments), _split(op.result.type.shape, wide), narrow)
    return True


def _repeats(op: Op, wide: tuple[int, int, int]) -> Shape:
    source = op.arg("x")
    assert isinstance(source, Value | Literal)
    return wide[1:] if source.type.shape[wide[0]] == 1 else (1, 1)


def _emit(
    rewriter: Rewriter, op: Op, args: tuple[tuple[str, Arg], ...], shape: Shape, narrow: dict[Value, Value]
) -> None:
    """The op with its result in factors, and (for readers that know nothing of it) in the shape that it had."""
    inner = rewriter.fresh(TensorType(op.result.type.dtype, shape))
    rewriter.append(replace(op, args=args, results=(inner,)))
    narrow[op.result] = inner
    if op.result.type.dtype != "bool":
        back = int_list(op.result.type.shape)
        rewriter.append(Op("reshape", (("x", inner), ("shape", back)), op.results))


def _reshape(
    rewriter: Rewriter, op: Op, wide: tuple[int, int, int] | None, narrow: dict[Value, Value]
) -> bool:
    source = op.arg("x")
    assert isinstance(source, Value)
    source = narrow.get(source, source)
    shape = _split(op.result.type.shape, wide) if wide is not None else op.result.type.shape
    args: tuple[tuple[str, Arg], ...] = (("x", source), ("shape", int_list(shape)))
    if wide is None:
        rewriter.append(replace(op, args=args))
    else:
        _emit(rewriter, op, args, shape, narrow)
    return True


def _reduce(rewriter: Rewriter, op: Op, narrow: dict[Value, Value]) -> bool:
    source, keep = op.arg("x"), op.arg("keep_dims")
    assert isinstance(source, Value)
    assert isinstance(keep, Literal)
    wide = _wide(source.type.shape)
    if wide is None or source not in narrow:
        return False
    axis, rank = wide[0], source.type.rank
    gone = [a % rank for a in integers(op.arg("axes"))]
    moved = sorted({b for a in gone for b in ((a, a + 1) if a == axis else (a + (a > axis),))})
    new: dict[str, Arg] = {"x": narrow[source], "axes": int_list(moved)}
    args = tuple((name, new.get(name, value)) for name, value in op.args)
    inner = narrow[source].type.shape
    kept = bool(keep.to_python())
    shape = tuple(1 if i in moved else n for i, n in enumerate(inner) if kept or i not in moved)
    _emit(rewriter, op, args, shape, narrow)
    if axis in gone:
        del narrow[op.result]
    return True
