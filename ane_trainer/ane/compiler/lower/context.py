"""What a lowering rule works with: the node, and arithmetic, products, reductions and choice on operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ane_trainer.ane.compiler.lower.movement import Movement
from ane_trainer.ane.compiler.lower.operands import (
    KEEPS_EPSILON,
    Encoded,
    Operand,
    Shape,
    as_tensor,
    broadcast_shape,
    fill_value,
    keep_epsilon,
    mil_shape,
    of_tensor,
    shape_of,
)
from ane_trainer.ane.compiler.lower.registry import Refusal
from ane_trainer.ane.mil.program import MAX_FP16, Literal, TensorType, Value

_FOLD: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "real_div": torch.div, "pow": torch.pow,
    "maximum": torch.maximum, "minimum": torch.minimum, "equal": torch.eq, "not_equal": torch.ne,
    "greater": torch.gt, "greater_equal": torch.ge, "less": torch.lt, "less_equal": torch.le,
}  # fmt: skip


@dataclass
class Context(Movement):
    """State of one `lower` call: the node that is lowered now, and the operands of those before it.

    `wide`: floats of inputs in two numbers, for the integers that they turn into.
    """

    node: Node | None = None
    operands: dict[Node, Any] = field(default_factory=dict)
    wide: dict[Node, Encoded] = field(default_factory=dict)

    # -- the node -----------------------------------------------------------------------------------

    @property
    def meta(self) -> Any:
        """The fake tensor (or tuple of them) that the node computes."""
        assert self.node is not None
        return self.node.meta["val"]

    @property
    def shape(self) -> Shape:
        """The MIL shape of the node's only result."""
        return mil_shape(self.meta)

    def used(self, index: int) -> bool:
        """Whether result `index` of a multi-result node is read by anybody."""
        assert self.node is not None
        return any(user.args[1] == index for user in self.node.users)

    # -- arithmetic ---------------------------------------------------------------------------------

    def _arithmetic(self, x: Operand) -> Value | Literal:
        """An operand of a broadcasting op; constants filled with one number become scalars."""
        x = self.number(x)
        if isinstance(x, Value):
            return x
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            return self.scalar(float(x))
        tensor = as_tensor(x)
        fill = fill_value(tensor)
        return of_tensor(tensor, self.dtype) if fill is None else self.scalar(fill)

    def binary(self, kind: str, x: Operand, y: Operand) -> Operand:
        """`kind(x, y)` with broadcasting; the result has the broadcast shape even where a fill is a
        scalar.
        """
        if not isinstance(x, Value) and not isinstance(y, Value):
            return _FOLD[kind](as_tensor(self.number(x)), as_tensor(self.number(y)))
        full = broadcast_shape(shape_of(x), shape_of(y))
        if kind in KEEPS_EPSILON and self.dtype == "fp16":
            x, y = keep_epsilon(x), keep_epsilon(y)
        result = self.emit(kind, x=self._arithmetic(x), y=self._arithmetic(y))
        return result if result.type.shape == full else self.broadcast(result, full)

    def unary(self, kind: str, x: Operand, **args: object) -> Value:
        """`kind(x)` for an op that keeps its input's type."""
        return self.emit(kind, x=self.value(self.number(x)), **args)

    def add(self, x: Operand, y: Operand) -> Operand:
        return self.binary("add", x, y)

    def sub(self, x: Operand, y: Operand) -> Operand:
        return self.binary("sub", x, y)

    def mul(self, x: Operand, y: Operand) -> Operand:
        return self.binary("mul", x, y)

    def div(self, x: Operand, y: Operand) -> Operand:
        """x / y; by a constant it is a product with the reciprocal.

        A product is rounded once; `real_div` goes through the inverse table (13.5 ulp at worst, M6
        notes/numerics.md). Exact for powers of two; otherwise the reciprocal's rounding adds half an ulp.
        A reciprocal that fp16 cannot hold (1/c beyond MAX_FP16 or below 2^-24) stays a division.
        """
        if not isinstance(y, Value):
            numbers = as_tensor(self.number(y))
            inverse = 1.0 / numbers
            if bool(((inverse.abs() <= MAX_FP16) & (inverse.abs() >= 2.0**-14)).all()):
                return self.mul(x, inverse)
        return self.binary("real_div", x, y)

    def square(self, x: Operand) -> Operand:
        """x * x as `mul`: the `square` op before a nonlinearity fails for some widths (ANEForge, M5)."""
        return self.mul(x, x)

    def inverse(self, x: Operand) -> Operand:
        """1 / x by the inverse table and one Newton step: r (2 - x r), which leaves about 2 of 13.5 ulp."""
        if not isinstance(x, Value):
            return 1.0 / as_tensor(x)
        first = self.unary("inverse", x, epsilon=self.scalar(0.0))
        return self.mul(first, self.sub(2.0, self.mul(x, first)))

    # -- contraction and reduction --------------------------------------------------------------------

    def matmul(self, x: Operand, y: Operand, *, tx: bool = False, ty: bool = False) -> Operand:
        """`x @ y` over the last two axes; `tx`, `ty` transpose an operand first."""
        if not isinstance(x, Value) and not isinstance(y, Value):
            left, right = as_tensor(x), as_tensor(y)
            return (left.mT if tx else left) @ (right.mT if ty else right)
        x, y = self.number(x), self.number(y)
        return self.emit("matmul", x=x, y=y, transpose_x=tx, transpose_y=ty)

    def reduce(self, kind: str, x: Operand, axes: Sequence[int] | None, *, keep: bool = False) -> Operand:
        """`reduce_<kind>`; a full reduction gives `[1]`."""
        x = self.value(self.number(x))
        rank = x.type.rank
        gone = tuple(sorted(a % rank for a in axes)) if axes else tuple(range(rank))
        if len(gone) == rank and not keep:
            return self.reshape(self.emit(f"reduce_{kind}", x=x, axes=gone, keep_dims=True), (1,))
        return self.emit(f"reduce_{kind}", x=x, axes=gone, keep_dims=keep)

    def sum(self, x: Operand, axes: Sequence[int] | None = None, *, keep: bool = False) -> Operand:
        return self.reduce("sum", x, axes, keep=keep)

    def mean(self, x: Operand, axes: Sequence[int] | None = None, *, keep: bool = False) -> Operand:
        return self.reduce("mean", x, axes, keep=keep)

    # -- choice -------------------------------------------------------------------------------------

    def where(self, cond: Operand, a: Operand, b: Operand) -> Operand:
        """`a` where cond, else `b`. `select` needs cond and one of a, b in the full shape; constants help:

        constant cond:  where(c, x, v) -> mul(x, c) + v (1 - c), or minimum(x, {+inf | v}) for v = -inf
        """
        full = broadcast_shape(shape_of(cond), shape_of(a), shape_of(b))
        if not isinstance(cond, Value):
            return self.broadcast(self._where_constant(as_tensor(self.boolean(cond)), a, b), full)
        a, b = self.number(a), self.number(b)
        if not isinstance(a, Value) and not isinstance(b, Value):
            x, y = as_tensor(a), as_tensor(b)
            if fill_value(x) == 1.0 and fill_value(y) == 0.0:
                return self.broadcast(self.number(cond), full)
            a = self.value(x, full)
        cond = self.broadcast(cond, full)
        return self.emit("select", cond=cond, a=self._branch(a, full), b=self._branch(b, full))

    def _branch(self, x: Operand, full: Shape) -> Value | Literal:
        if isinstance(x, Value):
            return self.value(x, full)
        fill = fill_value(as_tensor(x))
        return self.scalar(fill) if fill is not None else of_tensor(as_tensor(x).expand(full), self.dtype)

    def _where_constant(self, cond: torch.Tensor, a: Operand, b: Operand) -> Operand:
        if bool(cond.all()):
            return a
        if not bool(cond.any()):
            return b
        a, b = self.number(a), self.number(b)
        if not isinstance(a, Value) and not isinstance(b, Value):
            return torch.where(cond, as_tensor(a), as_tensor(b))
        if isinstance(b, Value) and not isinstance(a, Value):
            cond, a, b = ~cond, b, a
        if not isinstance(b, Value):
            other = as_tensor(b)
            if bool((other <= -MAX_FP16).all()):
                return self.binary("minimum", a, torch.where(cond, math.inf, other))
            kept = self.mul(a, cond.double())
            return kept if not bool(other.any()) else self.add(kept, torch.where(cond, 0.0, other))
        return self.add(self.mul(a, cond.double()), self.mul(b, (~cond).double()))

    # -- refusing -----------------------------------------------------------------------------------

    def refuse(self, reason: str, fix: str = "") -> Refusal:
        """`raise ctx.refuse("needs X; got Y.", "Do Z.")`."""
        return Refusal(reason, fix)

    def placeholder(self, tensor: Any) -> Value:
        """A value of a result's type that no op makes, to go on after a refusal and find the others."""
        dtype = "bool" if tensor.dtype == torch.bool else self.dtype
        return Value("refused", TensorType(dtype, mil_shape(tensor)))
