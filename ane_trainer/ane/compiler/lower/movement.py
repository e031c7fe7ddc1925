"""The movement half of the operand algebra: emitting ops, booleans as numbers, reshapes, slices, padding.

The methods accept every operand and fold what is constant, so rules need no cases for constants. Booleans are MIL
`bool` values; where arithmetic or movement needs numbers, `number` makes them 1 and 0 (the engine has no `cast`, and
no `logical_and` and its like: ANEForge vocabulary sweep, M5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ane_trainer.ane.compiler.lower.operands import (
    STORED_FILL_ELEMENTS,
    Encoded,
    Operand,
    Shape,
    as_tensor,
    fill_value,
    is_bool,
    mil_shape,
    of_number,
    of_tensor,
    shape_of,
)
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import MAX_RANK, Literal, Value


@dataclass
class Movement:
    """Emits ops that move numbers. `dtype` is the program's float type (fp16; fp64 to check the rules)."""

    builder: Builder
    dtype: str = "fp16"
    _numbers: dict[Value, Value] = field(default_factory=dict)

    # -- emitting -----------------------------------------------------------------------------------

    def emit(self, kind: str, **args: object) -> Value:
        """One MIL op, arguments as they are (torch tensors become literals of their shape)."""
        ready: dict[str, Any] = {
            k: of_tensor(v, self.dtype) if isinstance(v, torch.Tensor) else v for k, v in args.items()
        }
        return self.builder.op(kind, **ready)

    def scalar(self, value: float) -> Literal:
        """A rank-0 literal of the program's float type."""
        return of_number(value, self.dtype)

    def value(self, x: Operand, shape: Shape | None = None) -> Value:
        """The operand as a MIL value (constants become `const` or `tile`), of `shape` when given."""
        if isinstance(x, Value):
            return x if shape is None else self.broadcast(x, shape)  # type: ignore[return-value]
        tensor = as_tensor(x)
        tensor = tensor.expand(shape) if shape is not None else tensor.reshape(mil_shape(tensor))
        fill = fill_value(tensor)
        if fill is None or tensor.numel() < STORED_FILL_ELEMENTS:
            return self.emit("const", val=tensor)
        one = torch.full((1,) * tensor.dim(), fill)
        return self.emit("tile", x=one, reps=tuple(tensor.shape))

    # -- booleans -----------------------------------------------------------------------------------

    def number(self, x: Operand) -> Operand:
        """A boolean as 1 and 0; numbers pass. `select(cond=b, a=ones, b=0)`."""
        if not is_bool(x):
            return x
        if not isinstance(x, Value):
            return as_tensor(x).to(torch.float64)
        if x not in self._numbers:
            ones = self.fill(1.0, x.type.shape)
            self._numbers[x] = self.emit("select", cond=x, a=ones, b=self.scalar(0.0))
        return self._numbers[x]

    def boolean(self, x: Operand) -> Operand:
        """A number as a boolean (not equal to 0); booleans pass."""
        if is_bool(x):
            return x
        if not isinstance(x, Value):
            return as_tensor(x).to(torch.bool)
        return self.emit("not_equal", x=x, y=self.scalar(0.0))

    def boolean_of_01(self, x: Operand) -> Operand:
        """A number known to be 0 or 1 as a boolean; `number` of the result is `x` again."""
        result = self.boolean(x)
        if isinstance(result, Value) and isinstance(x, Value):
            self._numbers[result] = x
        return result

    def fill(self, value: float, shape: Shape) -> Value | Literal:
        """A full-shape constant of one number: stored when small, else `tile` of one element."""
        if math.prod(shape) < STORED_FILL_ELEMENTS:
            return of_tensor(torch.full(shape, value, dtype=torch.float64), self.dtype)
        return self.value(torch.full((1,) * len(shape), value), shape)

    # -- movement -----------------------------------------------------------------------------------

    def _move(
        self, x: Operand, move: Callable[[Value], Value], fold: Callable[[torch.Tensor], torch.Tensor]
    ) -> Operand:
        """Move numbers; booleans travel as 1 and 0, since only comparisons and `select` are known to take
        bool.
        """
        if isinstance(x, Encoded):
            return x.each(lambda part: self._move(part, move, fold))
        if not isinstance(x, Value):
            return fold(torch.as_tensor(x))
        if is_bool(x):
            inner = self.number(x)
            assert isinstance(inner, Value)
            return self.boolean_of_01(move(inner))
        return move(x)

    def reshape(self, x: Operand, shape: Shape) -> Operand:
        shape = tuple(shape) or (1,)
        if shape_of(x) == shape:
            return x
        return self._move(x, lambda v: self.emit("reshape", x=v, shape=shape), lambda t: t.reshape(shape))

    def transpose(self, x: Operand, perm: Sequence[int]) -> Operand:
        perm = tuple(perm)
        if perm == tuple(range(len(perm))):
            return x
        if len(perm) > MAX_RANK and isinstance(x, Value):
            return _transpose_many(self, x, perm)
        return self._move(x, lambda v: self.emit("transpose", x=v, perm=perm), lambda t: t.permute(perm))

    def swap(self, x: Operand, a: int, b: int) -> Operand:
        """Transpose two axes."""
        rank = len(shape_of(x))
        perm = list(range(rank))
        perm[a % rank], perm[b % rank] = perm[b % rank], perm[a % rank]
        return self.transpose(x, perm)

    def broadcast(self, x: Operand, shape: Shape) -> Operand:
        """Repeat axes of extent 1 (`tile`) until the operand has `shape`."""
        if isinstance(x, Encoded):
            return x.each(lambda part: self.broadcast(part, shape))
        if not isinstance(x, Value):
            return torch.as_tensor(x).expand(shape)
        if x.type.shape == shape:
            return x
        old = (1,) * (len(shape) - x.type.rank) + x.type.shape
        reps = tuple(n // o for n, o in zip(shape, old, strict=True))
        return self._move(self.reshape(x, old), lambda v: self.emit("tile", x=v, reps=reps), lambda t: t)

    def slice(self, x: Operand, axis: int, start: int, stop: int, step: int = 1) -> Operand:
        """`x[..., start:stop:step, ...]` along one axis; never empty."""
        shape = shape_of(x)
        axis %= len(shape)
        stop = min(stop, shape[axis])
        if start == 0 and stop >= shape[axis] and step == 1:
            return x
        fold_slice = (slice(None),) * axis + (slice(start, stop, step),)

        def move(v: Value) -> Value:
            begin = tuple(start if i == axis else 0 for i in range(len(shape)))
            if step == 1:
                size = tuple(stop - start if i == axis else n for i, n in enumerate(shape))
                return self.emit("slice_by_size", x=v, begin=begin, size=size)
            end = tuple(stop if i == axis else n for i, n in enumerate(shape))
            stride = tuple(step if i == axis else 1 for i in range(len(shape)))
            return self.emit("slice_by_index", x=v, begin=begin, end=end, stride=stride)

        return self._move(x, move, lambda t: t[fold_slice])

    def concat(self, xs: Sequence[Operand], axis: int) -> Operand:
        xs = [x for x in xs if 0 not in shape_of(x)] or xs[:1]
        if len(xs) == 1:
            return xs[0]
        if not any(isinstance(x, Value) for x in xs):
            return torch.cat([torch.as_tensor(x) for x in xs], axis)
        axis %= len(shape_of(xs[0]))
        if any(is_bool(x) for x in xs):
            return self.boolean_of_01(self.concat([self.number(x) for x in xs], axis))
        ready = tuple(x if isinstance(x, Value) else of_tensor(torch.as_tensor(x), self.dtype) for x in xs)
        return self.emit("concat", values=ready, axis=axis)

    def pad(self, x: Operand, amounts: Sequence[tuple[int, int]], value: float = 0.0) -> Operand:
        """(before, after) per axis; negative amounts crop (a slice)."""
        amounts = list(amounts)
        for axis, (before, after) in enumerate(amounts):
            if before < 0 or after < 0:
                if max(0, -before) + max(0, -after) >= shape_of(x)[axis]:  # only padding is left: pad first
                    x = self.pad_axis(x, axis, max(0, before), max(0, after), value)
                    amounts[axis] = (0, 0)
                x = self.slice(x, axis, max(0, -before), shape_of(x)[axis] - max(0, -after))
        pairs = [(max(0, b), max(0, a)) for b, a in amounts]
        first = next((i for i, pair in enumerate(pairs) if pair != (0, 0)), None)
        if first is None:
            return x
        flat = tuple(n for pair in pairs[first:] for n in pair)
        fold = tuple(n for pair in reversed(pairs) for n in pair)
        constant = self.scalar(value)
        return self._move(
            x,
            lambda v: self.emit("pad", x=v, pad=flat, mode="constant", constant_val=constant),
            lambda t: torch.nn.functional.pad(t, fold, value=value),
        )

    def pad_axis(self, x: Operand, axis: int, before: int, after: int, value: float = 0.0) -> Operand:
        rank = len(shape_of(x))
        return self.pad(x, [(before, after) if i == axis % rank else (0, 0) for i in range(rank)], value)


def _transpose_many(ctx: Movement, x: Value, perm: Shape) -> Operand:
    """More axes than the engine has: neighbours that stay neighbours move as one, else axis by axis.

    `transpose(x [a,b,c,d,e,f], [0,1,3,2,4,5])` -> `reshape(transpose(reshape(x, [ab,c,d,ef]), [0,2,1,3]))`
    """
    shape = x.type.shape
    result = tuple(shape[p] for p in perm)
    groups: list[list[int]] = []
    for p in perm:
        if groups and groups[-1][-1] + 1 == p:
            groups[-1].append(p)
        else:
            groups.append([p])
    if len(groups) <= MAX_RANK:
        order = sorted(groups)
        merged = ctx.reshape(x, tuple(math.prod(shape[p] for p in g) for g in order))
        return ctx.reshape(ctx.transpose(merged, [order.index(g) for g in groups]), result)
    value: Operand = x
    now = list(range(len(perm)))
    for target, p in enumerate(perm):
        at = now.index(p)
        if at == target:
            continue
        sizes = [shape[a] for a in now]
        parts = (
            math.prod(sizes[:target]),
            math.prod(sizes[target:at]),
            sizes[at],
            math.prod(sizes[at + 1 :]),
        )
        value = ctx.transpose(ctx.reshape(value, parts), (0, 2, 1, 3))
        now.insert(target, now.pop(at))
    return ctx.reshape(value, result)
