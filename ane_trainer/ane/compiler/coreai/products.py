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
    reshaped, ops = set[Value](), list[Op]()
    for op in function.ops:
        if op.kind in _RESHAPES or (op.kind in _SEEN_THROUGH and not reshaped.isdisjoint(op.operands())):
            reshaped.add(op.result)
        y = op.arg("y")
        if op.kind == "matmul" and isinstance(y, Value) and y in reshaped:
            apart = Value(f"{op.name}_apart", y.type)
            ops.append(Op("mul", (("x", y), ("y", literal(1.0, y.type.dtype))), (apart,), op.source))
            op = replace(op, args=tuple((k, apart if k == "y" else a) for k, a in op.args))
        ops.append(op)
    return replace(function, ops=tuple(ops))
