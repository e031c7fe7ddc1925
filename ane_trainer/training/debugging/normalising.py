"""A norm in a form that cannot leave fp16: rows are divided by their largest entry before they are squared.

before: `q = x * x; v = reduce_mean(q) + eps; y = x * rsqrt(v)`
after:  `m = max |x| of the row; d = x / m; r = rsqrt(reduce_mean(d * d) + eps / m / m); y = d * r`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ane_trainer.ane.mil.program import Op, Value, literal
from ane_trainer.training.debugging.forms import Graph, Maker, Replay, Rewritten, is_square, number_of

_ROOTS, _REDUCTIONS = ("rsqrt", "sqrt"), ("reduce_mean", "reduce_sum")
_HOW = (
    "normalise before the square: m = x.abs().amax(dim, keepdim=True); "
    "(x / m) * rsqrt(((x / m) ** 2).mean(dim, keepdim=True) + eps / m**2), which is the same"
)


def norm(graph: Graph, op: Op, rule: str) -> list[Rewritten]:
    """The norm that `op` belongs to, rewritten; nothing where it belongs to none."""
    square = _square_before(graph, op)
    chain = None if square is None else _chain(graph, square)
    x = None if square is None else square.arg("x")
    if chain is None or not isinstance(x, Value):
        return []
    form = _Norm(graph, x, tuple(chain), _refined(graph, chain[-1]))
    replay = Replay(graph.function)
    replay.at(chain[0], form.scaled)
    replay.at(form.end, form.rooted)
    for user in graph.readers.get(form.end.name, []):
        if form.cancels(user):
            replay.at(user, lambda m, user=user: form.joined(m, user))  # type: ignore[misc]
    return [Rewritten("norm", _HOW, replay.result())]


@dataclass(frozen=True)
class _Norm:
    """x, and square -> sum or mean -> (times a number, plus epsilon) -> root; `end`: the root, or what refines it."""

    graph: Graph
    x: Value
    chain: tuple[Op, ...]
    end: Op

    def scaled(self, m: Maker) -> Mapping[str, Value]:
        """The rows divided by their largest entry, their squares, and what is under the root."""
        x, reduce = self.x, self.chain[1]
        axes, keep = reduce.arg("axes"), reduce.arg("keep_dims")
        rows = m.op("reduce_max", x=m.op("abs", x=x), axes=axes, keep_dims=True)
        rows = m.op("maximum", x=rows, y=2.0**-14)
        d = m.op("real_div", x=x, y=rows)
        value = m.op(reduce.kind, x=m.op("mul", x=d, y=d), axes=axes, keep_dims=keep)
        outer = rows
        if outer.type.shape != value.type.shape:
            outer = m.op("reshape", x=rows, shape=list(value.type.shape))
        for each, before in zip(self.chain[2:-1], self.chain[1:], strict=False):
            number = _other(each, before)
            assert number is not None
            value = m.op(
                each.kind, x=value, y=number if each.kind == "mul" else self._epsilon(m, number, outer)
            )
        m.known |= {"d": d, "outer": outer, "value": value}
        return {}

    def rooted(self, m: Maker) -> Mapping[str, Value]:
        """The root of the scaled rows, and the true one for whoever else reads it."""
        root, value, outer = self.chain[-1], m.known["value"], m.known["outer"]
        own = number_of(root.arg("epsilon"))
        if own:
            value = m.op("add", x=value, y=self._epsilon(m, own, outer))
        small = {"epsilon": literal(2.0**-24, self.x.type.dtype)} if root.kind == "rsqrt" else {}
        found = m.op(root.kind, x=value, **small)
        if self.end is not root:
            half = literal(0.5, self.x.type.dtype)
            product = m.op("mul", x=m.op("mul", x=value, y=found), y=m.op("mul", x=found, y=half))
            found = m.op("add", x=found, y=m.op("mul", x=m.op("sub", x=half, y=product), y=found))
        m.known["root"] = found
        return {self.end.name: m.op("real_div" if root.kind == "rsqrt" else "mul", x=found, y=outer)}

    def _epsilon(self, m: Maker, number: float, outer: Value) -> Value:
        once = m.op("real_div", x=literal(number, self.x.type.dtype), y=outer)
        return m.op("real_div", x=once, y=outer)

    def cancels(self, user: Op) -> bool:
        """Whether an op is x times rsqrt, or x over sqrt: there the rows' factor is gone."""
        root, a, b = self.chain[-1], user.arg("x"), user.arg("y")
        pair = [v.name for v in (a, b) if isinstance(v, Value)]
        if root.kind == "rsqrt":
            return user.kind == "mul" and sorted(pair) == sorted([self.x.name, self.end.name])
        return user.kind == "real_div" and pair == [self.x.name, root.name]

    def joined(self, m: Maker, user: Op) -> Mapping[str, Value]:
        """That op on the scaled numbers."""
        return {user.name: m.op(user.kind, x=m.known["d"], y=m.known["root"])}


def _square_before(graph: Graph, op: Op) -> Op | None:
    """The square that an op is, or whose reduction or root it is."""
    makers = graph.makers
    for _ in range(5):
        if is_square(op):
            return op
        values = [v for v in op.operands() if v.name in makers]
        if op.kind not in (*_REDUCTIONS, *_ROOTS, "add", "mul", "maximum", "reshape") or len(values) != 1:
            return None
        op = makers[values[0].name]
    return None


def _chain(graph: Graph, square: Op) -> list[Op] | None:
    """square -> sum or mean -> (times a number, plus epsilon) -> root; None where there is no such way."""
    readers, chain = graph.readers, [square]
    while chain[-1].kind not in _ROOTS:
        users = readers.get(chain[-1].name, [])
        following = [u for u in users if _continues(u, chain[-1])]
        if len(following) != 1 or len(chain) > 6:
            return None
        chain.append(following[0])
    reductions = [op for op in chain if op.kind in _REDUCTIONS]
    return chain if len(reductions) == 1 and chain[1] is reductions[0] else None


def _refined(graph: Graph, root: Op) -> Op:
    """`add(r, mul(sub(1/2, ...), r))` behind a root r, a step of Newton's as lowering writes it; else the root."""
    for user in graph.readers.get(root.name, []):
        x, y = user.arg("x"), user.arg("y")
        step = graph.makers.get(y.name) if isinstance(y, Value) else None
        if user.kind != "add" or not isinstance(x, Value) or x.name != root.name or step is None:
            continue
        rest = step.arg("x")
        left = graph.makers.get(rest.name) if isinstance(rest, Value) else None
        if step.kind == "mul" and left is not None and left.kind == "sub" and number_of(left.arg("x")) == 0.5:
            return user
    return root


def _continues(user: Op, before: Op) -> bool:
    with_number = user.kind in ("mul", "add", "maximum") and _other(user, before) is not None
    return user.kind in (*_ROOTS, *_REDUCTIONS) or with_number


def _other(op: Op, before: Op) -> float | None:
    """The number that an op joins with the result before it."""
    x, y = op.arg("x"), op.arg("y")
    return number_of(y if isinstance(x, Value) and x.name == before.name else x)
