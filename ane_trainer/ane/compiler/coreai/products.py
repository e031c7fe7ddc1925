"""Keeps Core AI's compiler from folding a reshape into a product's second operand, which it may do wrongly.

    before: `a @ reshape(b, [8, 32])` with b of [8, 1, 8, 4]: the runtime sums over b's third axis (1.0.0b3, Linux)
    after:  `a @ (reshape(b, [8, 32]) * 1)`, which the compiler leaves as it is

That happens in fp32 and fp16 alike where the last axis but one before the reshape is as long as the sum: the weight's
gradient of a layer behind a Flatten, with a batch as large as its images are high. The compiler also moves reshapes
through sums, so that the shape that it folds need not be one of the program: every reshape is kept apart.
"""

from __future__ import annotations

from dataclasses import replace

from ane_trainer.ane.mil.program import Function, Op, Value, literal

_RESHAPES = frozenset({"reshape", "expand_dims", "squeeze"})
#: Ops through which the compiler moves one.
_SEEN_THROUGH = frozenset({"identity", "transpose", "add", "sub", "slice_by_size", "tile"})


def keep_products_apart(function: Function) -> Function:
    """The function with a factor of 1 in front of each second operand that was reshaped."""
    made, ops = {op.result: op for op in function.ops if len(op.results) == 1}, list[Op]()
    for op in function.ops:
        y = op.arg("y")
        if op.kind == "matmul" and isinstance(y, Value) and _reshaped(made, y):
            apart = Value(f"{op.name}_apart", y.type)
            ops.append(Op("mul", (("x", y), ("y", literal(1.0, y.type.dtype))), (apart,), op.source))
            op = replace(op, args=tuple((k, apart if k == "y" else a) for k, a in op.args))
        ops.append(op)
    return replace(function, ops=tuple(ops))


def _reshaped(made: dict[Value, Op], value: Value) -> bool:
    op = made.get(value)
    if op is None or op.kind not in _RESHAPES | _SEEN_THROUGH:
        return False
    return op.kind in _RESHAPES or any(_reshaped(made, operand) for operand in op.operands())
