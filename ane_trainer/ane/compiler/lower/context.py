"""What a lowering rule works with: the builder, the node's expected shape, and operations on operands.

An *operand* is a MIL value, a torch tensor that is known at compile time, or a Python number; the methods
accept all three and fold what is constant, so rules need no cases for constants. Shapes are MIL shapes:
rank 0 is `[1]`. Booleans are MIL `bool` values; where arithmetic or movement needs numbers, `number` makes
them 1 and 0 (the engine has no `cast`, and no `logical_and` and its like: ANEForge vocabulary sweep, M5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ane_trainer.ane.compiler.lower import literals
from ane_trainer.ane.compiler.lower.registry import Refusal
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import MAX_FP16, MAX_RANK, Literal, TensorType, Value
from ane_trainer.ane.stages import PAIR

Operand = Value | torch.Tensor | bool | int | float
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Absent:
    """A result that a rule does not compute; an op that reads it is refused for `reason`."""

    reason: str
    fix: str = ""


def mil_shape(tensor: Any) -> Shape:
    """A torch tensor's shape as the program has it: rank 0 is `[1]`."""
    return tuple(int(n) for n in tensor.shape) or (1,)


def shape_of(x: Operand) -> Shape:
    """The MIL shape of an operand; Python numbers are `()`."""
    if isinstance(x, Value):
        return x.type.shape
    return mil_shape(x) if isinstance(x, torch.Tensor) else ()


def broadcast_shape(*shapes: Shape) -> Shape:
    """The common shape under NumPy's rule."""
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def is_bool(x: Operand) -> bool:
    """True for a boolean value, tensor or Python bool."""
    if isinstance(x, Value):
        return x.type.dtype == "bool"
    return x.dtype == torch.bool if isinstance(x, torch.Tensor) else isinstance(x, bool)


def as_tensor(x: torch.Tensor | float) -> torch.Tensor:
    """A constant operand as a float64 (or bool) tensor."""
    tensor = torch.as_tensor(x)
    return tensor if tensor.dtype == torch.bool else tensor.to(torch.float64)


_FOLD: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "real_div": torch.div, "pow": torch.pow,
    "maximum": torch.maximum, "minimum": torch.minimum, "equal": torch.eq, "not_equal": torch.ne,
    "greater": torch.gt, "greater_equal": torch.ge, "less": torch.lt, "less_equal": torch.le,
}  # fmt: skip


@dataclass
class Context:
    """State of one `lower` call. `dtype` is the program's float type (fp16; fp64 to check the rules)."""

    builder: Builder
    dtype: str = "fp16"
    node: Node | None = None
    operands: dict[Node, Any] = field(default_factory=dict)
    _numbers: dict[Value, Value] = field(default_factory=dict)
    #: Integers of batch ports, unchanged so far: value -> names of the ports.
    integers: dict[Value, frozenset[str]] = field(default_factory=dict)
    #: Integers in two numbers (`pairs.py`): remainder -> quotient.
    high: dict[Value, Value] = field(default_factory=dict)
    #: Ports whose integers above 2048 are sent as codes (`integers.py`), and ports that arithmetic reads.
    wide: set[str] = field(default_factory=set)
    computed: dict[str, Node] = field(default_factory=dict)

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

    def use_codes(self, index: Value) -> bool:
        """Let the ports behind `index` send codes; False if it does not come straight from ports."""
        while index not in self.integers:
            producer = self.builder.producer(index)
            if producer is None or producer.kind not in ("reshape", "transpose"):
                return False
            index = next(producer.operands())
        self.wide |= self.integers[index]
        return True

    # -- emitting -----------------------------------------------------------------------------------

    def emit(self, kind: str, **args: Any) -> Value:
        """One MIL op, arguments as they are (torch tensors become literals of their shape)."""
        ready: dict[str, Any] = {
            k: literals.of_tensor(v, self.dtype) if isinstance(v, torch.Tensor) else v
            for k, v in args.items()
        }
        return self.builder.op(kind, **ready)

    def scalar(self, value: float) -> Literal:
        """A rank-0 literal of the program's float type."""
        return literals.of_number(value, self.dtype)

    def value(self, x: Operand, shape: Shape | None = None) -> Value:
        """The operand as a MIL value (constants become `const` or `tile`), of `shape` when given."""
        if isinstance(x, Value):
            return x if shape is None else self.broadcast(x, shape)  # type: ignore[return-value]
        tensor = as_tensor(x)
        tensor = tensor.expand(shape) if shape is not None else tensor.reshape(mil_shape(tensor))
        fill = literals.fill_value(tensor)
        if fill is None or tensor.numel() < literals.STORED_FILL_ELEMENTS:
            return self.emit("const", val=tensor)
        one = torch.full((1,) * tensor.dim(), fill)
        return self.emit("tile", x=one, reps=tuple(tensor.shape))

    def _arithmetic(self, x: Operand) -> Value | Literal:
        """An operand of a broadcasting op; constants filled with one number become scalars."""
        x = self.number(x)
        if isinstance(x, Value):
            return x
        tensor = as_tensor(x)
        fill = literals.fill_value(tensor)
        return literals.of_tensor(tensor, self.dtype) if fill is None else self.scalar(fill)

    def binary(self, kind: str, x: Operand, y: Operand) -> Operand:
        """`kind(x, y)` with broadcasting; the result has the broadcast shape even where a fill is a
        scalar.
        """
        if not isinstance(x, Value) and not isinstance(y, Value):
            return _FOLD[kind](as_tensor(self.number(x)), as_tensor(self.number(y)))  # type: ignore[arg-type]
        full = broadcast_shape(shape_of(x), shape_of(y))
        if kind in literals.KEEPS_EPSILON and self.dtype == "fp16":
            x, y = literals.keep_epsilon(x), literals.keep_epsilon(y)
        result = self.emit(kind, x=self._arithmetic(x), y=self._arithmetic(y))
        return result if result.type.shape == full else self.broadcast(result, full)

    def unary(self, kind: str, x: Operand, **args: Any) -> Value:
        """`kind(x)` for an op that keeps its input's type."""
        return self.emit(kind, x=self.value(self.number(x)), **args)

    # -- arithmetic ---------------------------------------------------------------------------------

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
            numbers = as_tensor(self.number(y))  # type: ignore[arg-type]
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
        if math.prod(shape) < literals.STORED_FILL_ELEMENTS:
            return literals.of_tensor(torch.full(shape, value, dtype=torch.float64), self.dtype)
        return self.value(torch.full((1,) * len(shape), value), shape)

    # -- movement -----------------------------------------------------------------------------------

    def _move(
        self, x: Operand, move: Callable[[Value], Value], fold: Callable[[torch.Tensor], torch.Tensor]
    ) -> Operand:
        """Move numbers; booleans travel as 1 and 0, since only comparisons and `select` are known to take
        bool.
        """
        if not isinstance(x, Value):
            return fold(torch.as_tensor(x))
        if is_bool(x):
            inner = self.number(x)
            assert isinstance(inner, Value)
            return self.boolean_of_01(move(inner))
        result = move(x)
        if x in self.high and result not in self.high:
            self.high[result] = move(self.high[x])
        return result

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
            return self._transpose_many(x, perm)
        return self._move(x, lambda v: self.emit("transpose", x=v, perm=perm), lambda t: t.permute(perm))

    def _transpose_many(self, x: Value, perm: Shape) -> Operand:
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
            merged = self.reshape(x, tuple(math.prod(shape[p] for p in g) for g in order))
            return self.reshape(self.transpose(merged, [order.index(g) for g in groups]), result)
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
            value = self.transpose(self.reshape(value, parts), (0, 2, 1, 3))
            now.insert(target, now.pop(at))
        return self.reshape(value, result)

    def swap(self, x: Operand, a: int, b: int) -> Operand:
        """Transpose two axes."""
        rank = len(shape_of(x))
        perm = list(range(rank))
        perm[a % rank], perm[b % rank] = perm[b % rank], perm[a % rank]
        return self.transpose(x, perm)

    def broadcast(self, x: Operand, shape: Shape) -> Operand:
        """Repeat axes of extent 1 (`tile`) until the operand has `shape`."""
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
        if self.is_pair(*xs):
            return self.of_halves(lambda *parts: self.concat(parts, axis), *xs)
        ready = tuple(
            x if isinstance(x, Value) else literals.of_tensor(torch.as_tensor(x), self.dtype) for x in xs
        )
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
        if self.is_pair(x) and value != 0:
            border = torch.nn.functional.pad(torch.zeros(shape_of(x)), fold, value=1.0)
            return self.where(border.bool(), value, self.pad(x, pairs))
        constant = self.scalar(value)
        return self._move(
            x,
            lambda v: self.emit("pad", x=v, pad=flat, mode="constant", constant_val=constant),
            lambda t: torch.nn.functional.pad(t, fold, value=value),
        )

    def pad_axis(self, x: Operand, axis: int, before: int, after: int, value: float = 0.0) -> Operand:
        rank = len(shape_of(x))
        return self.pad(x, [(before, after) if i == axis % rank else (0, 0) for i in range(rank)], value)

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
        if self.is_pair(a, b):
            return self.of_halves(lambda x, y: self.where(cond, x, y), a, b)
        if not isinstance(cond, Value):
            return self.broadcast(self._where_constant(as_tensor(self.boolean(cond)), a, b), full)  # type: ignore[arg-type]
        a, b = self.number(a), self.number(b)
        if not isinstance(a, Value) and not isinstance(b, Value):
            x, y = as_tensor(a), as_tensor(b)
            if literals.fill_value(x) == 1.0 and literals.fill_value(y) == 0.0:
                return self.broadcast(self.number(cond), full)
            a = self.value(x, full)
        cond = self.broadcast(cond, full)
        return self.emit("select", cond=cond, a=self._branch(a, full), b=self._branch(b, full))

    def _branch(self, x: Operand, full: Shape) -> Value | Literal:
        if isinstance(x, Value):
            return self.value(x, full)
        fill = literals.fill_value(as_tensor(x))
        return (
            self.scalar(fill)
            if fill is not None
            else literals.of_tensor(as_tensor(x).expand(full), self.dtype)
        )

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

    # -- integers in two numbers ----------------------------------------------------------------------

    def is_pair(self, *xs: Operand) -> bool:
        """Whether one of them is the remainder of a pair (see `pairs.py`)."""
        return bool(self.high) and any(isinstance(x, Value) and x in self.high for x in xs)

    def of_halves(self, function: Callable[..., Operand], *xs: Operand) -> Value:
        """`function` of the remainders and of the quotients, as a pair."""
        lows = [x if isinstance(x, Value) else torch.as_tensor(x).double() % PAIR for x in xs]
        highs = [
            self.high.get(x, torch.zeros(x.type.shape).double())
            if isinstance(x, Value)
            else torch.floor(torch.as_tensor(x).double() / PAIR)
            for x in xs
        ]
        with_high = dict(self.high)
        self.high.clear()
        low, high = function(*lows), function(*highs)
        self.high |= with_high
        assert isinstance(low, Value)
        assert isinstance(high, Value)
        self.high[low] = high
        return low

    # -- refusing -----------------------------------------------------------------------------------

    def refuse(self, reason: str, fix: str = "") -> Refusal:
        """`raise ctx.refuse("needs X; got Y.", "Do Z.")`."""
        return Refusal(reason, fix)

    def placeholder(self, tensor: Any) -> Value:
        """A value of a result's type that no op makes, to go on after a refusal and find the others."""
        dtype = "bool" if tensor.dtype == torch.bool else self.dtype
        return Value("refused", TensorType(dtype, mil_shape(tensor)))
