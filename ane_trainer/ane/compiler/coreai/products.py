"""Keeps Core AI's compiler from folding a reshape into a product's second operand, which it does wrongly.

    before: `a @ reshape(b, [8, 32])` with b of [8, 1, 8, 4]: the runtime sums over b's third axis (1.0.0b3, Linux)
    after:  `a @ (reshape(b, [8, 32]) * 1)`, which the compiler leaves as it is

That happens in fp32 and fp16 alike where the last axis but one before the reshape is as long as the sum: the weight's
gradient of a layer behind a Flatten, with a batch as large as its images are high.
"""

from __future__ import annotations

from dataclasses import replace

from ane_trainer.ane.mil.program import Function, Op, Value, literal

#: Ops through which the compiler looks for a reshape.
_SEEN_THROUGH = frozenset({"reshape", "expand_dims", "squeeze", "identity", "transpose"})


def keep_products_apart(function: Function) -> Function:
    """The function with a factor of 1 in front of each second operand that would be folded."""
    made, ops = {op.result: op for op in function.ops if len(op.results) == 1}, list[Op]()
    for op in function.ops:
        y = op.arg("y")
        if op.kind == "matmul" and isinstance(y, Value) and _folds(made, y, _summed(op)):
            apart = Value(f"{op.name}_apart", y.type)
            one = literal(1.0, y.type.dtype)
            ops.append(Op("mul", (("x", y), ("y", one)), (apart,), op.source))
            op = replace(op, args=tuple((k, apart if k == "y" else a) for k, a in op.args))
        ops.append(op)
    return replace(function, ops=tuple(ops))


def _summed(op: Op) -> set[int]:
    """The lengths of a product's second operand: the axis that is summed is one of them."""
    y = op.arg("y")
    assert isinstance(y, Value)
    return set(y.type.shape[-2:])


def _folds(made: dict[Value, Op], value: Value, lengths: set[int]) -> bool:
    """Whether `value` is, but for its shape, one whose last axis but one has such a length."""
    while (op := made.get(value)) is not None and op.kind in _SEEN_THROUGH:
        x = op.arg("x")
        if not isinstance(x, Value):
            return False
        value = x
        if op.kind != "transpose" and value.type.rank > 2 and value.type.shape[-2] in lengths:
            return True
    return False
