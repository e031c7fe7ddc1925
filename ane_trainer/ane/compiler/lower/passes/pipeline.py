"""Small program passes: no-ops, transposes, broadcasts, equal ops, dead code.

Each pass maps a `Function` to a `Function` and shows before -> after in its docstring; none changes a result
by more than the sign of a zero.
"""

from __future__ import annotations

from dataclasses import replace

from ane_trainer.ane.compiler.lower.passes.layout import sink_transposes
from ane_trainer.ane.compiler.lower.passes.ranks import merge_axes
from ane_trainer.ane.compiler.lower.passes.rewriting import Rewriter, int_list, integers
from ane_trainer.ane.compiler.lower.passes.widths import factor_widths
from ane_trainer.ane.mil.opset import family
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, TensorType, Value, literal


def run_passes(function: Function) -> Function:
    """All passes in order."""
    steps = (dead_code, share, algebra, sink_tiles, transposes, sink_transposes, transposes, matmul_flags)
    for step in (*steps, merge_axes, factor_widths, share, transposes, share, dead_code):
        function = step(function)
    return function


def dead_code(function: Function) -> Function:
    """Drop ops whose results nobody reads."""
    live = set(function.outputs)
    kept: list[Op] = []
    for op in reversed(function.ops):
        if any(r in live for r in op.results):
            kept.append(op)
            live.update(op.operands())
    return replace(function, ops=tuple(reversed(kept)))


def share(function: Function) -> Function:
    """Equal ops on equal operands once: `a = exp(x); b = exp(x)` -> `a = exp(x)`."""
    seen: dict[tuple[str, tuple[tuple[str, Arg], ...]], Op] = {}

    def visit(rewriter: Rewriter, op: Op) -> None:
        first = seen.setdefault((op.kind, op.args), op)
        if first is op:
            rewriter.append(op)
            return
        for old, new in zip(op.results, first.results, strict=True):
            rewriter.replace_uses(old, new)

    return Rewriter(function).run(visit)


def _number(argument: Arg | None) -> float | None:
    """A rank-0 numeric literal's value."""
    if not isinstance(argument, Literal) or argument.type.rank or argument.type.dtype in ("string", "bool"):
        return None
    return float(argument.to_python())  # type: ignore[arg-type]


def algebra(function: Function) -> Function:
    """Arithmetic that does nothing: `mul(x, 1)`, `real_div(x, 1)`, `add(x, 0)`, `sub(x, 0)` -> `x`;

    `mul(mul(x, a), b)` -> `mul(x, a b)` when one of a, b is a power of two or -1 (then rounding is the same)
    and no factor is beyond [2^-14, 2^14]; `add(x, mul(y, -1))` -> `sub(x, y)`
    """
    neutral = {"mul": 1.0, "real_div": 1.0, "add": 0.0, "sub": 0.0}

    def visit(rewriter: Rewriter, op: Op) -> None:
        x, y = op.arg("x"), op.arg("y")
        if op.kind in ("mul", "add") and isinstance(x, Literal):
            x, y = y, x
        if (
            op.kind in neutral
            and _number(y) == neutral[op.kind]
            and isinstance(x, Value)
            and x.type == op.result.type
        ):
            rewriter.replace_uses(op.result, x)
            return
        inner = rewriter.producer(x)
        outer_factor = _number(y)
        if op.kind == "mul" and outer_factor is not None and inner is not None and inner.kind == "mul":
            merged = _merged_factor(inner, outer_factor)
            if merged is not None:
                rewriter.append(replace(op, args=merged))
                return
        rewriter.append(op)

    return Rewriter(function).run(visit)


def _merged_factor(inner: Op, factor: float) -> tuple[tuple[str, Arg], ...] | None:
    """Arguments of `mul(x, a * factor)` for `inner = mul(x, a)`; None when that could round differently."""
    x, a = inner.arg("x"), _number(inner.arg("y"))
    if a is None or not isinstance(x, Value):
        return None
    product = a * factor
    dtype = inner.result.type.dtype
    if not all(2.0**-14 <= abs(f) <= 2.0**14 for f in (a, factor, product)):
        return None
    # only a sign commutes with rounding, saturation and subnormals alike
    if abs(a) != 1 and abs(factor) != 1:
        return None
    return (("x", x), ("y", literal(product, dtype)))


def sink_tiles(function: Function) -> Function:
    """`add(tile(x), y)` -> `add(x, y)` where the reader broadcasts to the same shape anyway;

    `f(tile(x), c)` -> `tile(f(x, c))` for a number c, so that the next reader may drop the tile
    """

    def visit(rewriter: Rewriter, op: Op) -> None:
        if family(op.kind) != "binary":
            rewriter.append(op)
            return
        x, y = dict(op.args)["x"], dict(op.args)["y"]
        small_x, small_y = _untiled(rewriter, x), _untiled(rewriter, y)
        for a, b in ((small_x, small_y), (small_x, y), (x, small_y)):
            if _broadcast(a, b) == op.result.type.shape and (a is not x or b is not y):
                rewriter.append(replace(op, args=(("x", a), ("y", b))))
                return
        tiled = x if small_x is not x else y if small_y is not y else None
        if tiled is not None and (_number(x) is not None or _number(y) is not None):
            producer = rewriter.producer(tiled)
            assert producer is not None
            _sink(rewriter, op, small_x, small_y, producer)
            return
        rewriter.append(op)

    return Rewriter(function).run(visit)


def _sink(rewriter: Rewriter, op: Op, x: Arg, y: Arg, tile: Op) -> None:
    if op.result.type.dtype == "bool":  # tile is only known to take numbers
        rewriter.append(op)
        return
    small = tile.arg("x")
    assert isinstance(small, Value)
    inner = rewriter.fresh(TensorType(op.result.type.dtype, small.type.shape))
    rewriter.append(replace(op, args=(("x", x), ("y", y)), results=(inner,)))
    rewriter.append(
        replace(
            tile, args=(("x", inner), *(pair for pair in tile.args if pair[0] != "x")), results=op.results
        )
    )


def _untiled(rewriter: Rewriter, argument: Arg) -> Arg:
    """What a broadcast-like `tile` repeats: only axes of extent 1; else the argument itself."""
    producer = rewriter.producer(argument)
    if producer is None or producer.kind != "tile":
        return argument
    small, reps = producer.arg("x"), producer.arg("reps")
    if not isinstance(small, Value) or not isinstance(reps, Literal):
        return argument
    amounts = reps.to_python()
    assert isinstance(amounts, tuple)
    grows = all(r == 1 or n == 1 for r, n in zip(amounts, small.type.shape, strict=True))
    return small if grows else argument


def _broadcast(x: Arg | None, y: Arg | None) -> tuple[int, ...] | None:
    """The shape that two operands broadcast to."""
    if isinstance(x, tuple) or isinstance(y, tuple) or x is None or y is None:
        return None
    a, b = x.type.shape, y.type.shape
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    if any(m != n and 1 not in (m, n) for m, n in zip(a, b, strict=True)):
        return None
    return tuple(max(m, n) for m, n in zip(a, b, strict=True))


def transposes(function: Function) -> Function:
    """`transpose(transpose(x, p), q)` -> `transpose(x, p[q])`, an identity -> `x`; `reshape(reshape(x))` ->
    one;

    a transpose that only moves axes of extent 1 -> `reshape`
    """

    def visit(rewriter: Rewriter, op: Op) -> None:
        if op.kind == "transpose":
            _visit_transpose(rewriter, op)
        elif op.kind == "reshape":
            _visit_reshape(rewriter, op)
        else:
            rewriter.append(op)

    return Rewriter(function).run(visit)


def _visit_transpose(rewriter: Rewriter, op: Op) -> None:
    x, perm = op.arg("x"), integers(op.arg("perm"))
    inner = rewriter.producer(x)
    if inner is not None and inner.kind == "transpose":
        before = integers(inner.arg("perm"))
        x, perm = inner.arg("x"), tuple(before[p] for p in perm)
    assert isinstance(x, Value)
    if perm == tuple(range(len(perm))):
        rewriter.replace_uses(op.result, x)
        return
    moved = [p for p in perm if x.type.shape[p] != 1]
    if moved == sorted(moved):
        _visit_reshape(
            rewriter, replace(op, kind="reshape", args=(("x", x), ("shape", int_list(op.result.type.shape))))
        )
        return
    same = inner is None or inner.kind != "transpose"
    rewriter.append(op if same else replace(op, args=(("x", x), ("perm", int_list(perm)))))


def _visit_reshape(rewriter: Rewriter, op: Op) -> None:
    x = op.arg("x")
    inner = rewriter.producer(x)
    if inner is not None and inner.kind == "reshape":
        x = inner.arg("x")
    assert isinstance(x, Value)
    if x.type == op.result.type:
        rewriter.replace_uses(op.result, x)
        return
    same = inner is None or inner.kind != "reshape"
    rewriter.append(op if same else replace(op, args=(("x", x), ("shape", int_list(op.result.type.shape)))))


def matmul_flags(function: Function) -> Function:
    """`matmul(transpose(x, swap of the last two axes), y)` -> `matmul(x, y, transpose_x=not transpose_x)`; y
    alike.
    """

    def visit(rewriter: Rewriter, op: Op) -> None:
        if op.kind != "matmul":
            rewriter.append(op)
            return
        arguments = dict(op.args)
        for name in ("x", "y"):
            producer = rewriter.producer(arguments[name])
            if producer is not None and producer.kind == "transpose" and _swaps_last_two(producer):
                arguments[name] = dict(producer.args)["x"]
                flag = arguments[f"transpose_{name}"]
                assert isinstance(flag, Literal)
                arguments[f"transpose_{name}"] = literal(not flag.to_python(), "bool")
        args = tuple(arguments.items())
        rewriter.append(op if args == op.args else replace(op, args=args))

    return Rewriter(function).run(visit)


def _swaps_last_two(op: Op) -> bool:
    perm = integers(op.arg("perm"))
    rank = len(perm)
    return rank >= 2 and perm == (*range(rank - 2), rank - 1, rank - 2)
