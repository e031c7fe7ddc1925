"""Other forms of an op to blame, to be tried: each says what a user would write, and is the program so written.

carry       the value times 2^-k from the op on, until what is computed of it is in range again
norm        rows divided by their largest entry before they are squared: x / m * rsqrt(mean((x / m)^2) + eps / m^2)
maximum     the largest entry is subtracted before exp
variance    the mean is subtracted before the square: mean((x - mean(x))^2) for mean(x^2) - mean(x)^2
offset      a number that is added to much smaller ones is left out: x for x + 300, where nothing depends on it
logsigmoid  min(x, 0) - log(1 + exp(-|x|)) for log(sigmoid(x))
epsilon     a larger one
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil.program import Arg, Literal, Op, Value, literal
from ane_trainer.training.debugging.carrying import carried
from ane_trainer.training.debugging.forms import Graph, Maker, Replay, Rewritten, is_square, number_of
from ane_trainer.training.debugging.normalising import norm


def rewrites_at(graph: Graph, op: Op, rule: str) -> list[Rewritten]:
    """The rewrites that fit an op with a fault of this rule, the likeliest first."""
    found = []
    for make in (norm, _maximum, _logsigmoid, _variance, _offset, _reassociate, _carry, _epsilon):
        try:
            rewritten = make(graph, op, rule)
        except ProgramError:  # a type rule refuses the form here
            continue
        found += rewritten
    return found


def _carry(graph: Graph, op: Op, rule: str) -> list[Rewritten]:
    """The value of `op` times a power of two."""
    if rule in ("integers", "cancellation"):
        return []
    found = carried(graph.function, op, graph.measured, rule)
    if found is None:
        return []
    power, function = found
    way = "divided" if power > 0 else "multiplied"
    how = (
        f"carry it {way} by 2^{abs(power)}: scale what goes into `{op.kind}` by 2^{-power} and undo it "
        "where the numbers are in range again"
    )
    return [Rewritten("carry", how, function)]


def _maximum(graph: Graph, op: Op, rule: str) -> list[Rewritten]:
    """exp(x) / sum(exp(x)), log(sum(exp(x))); numbers that both are multiplied by stay."""
    makers, readers = graph.makers, graph.readers
    while op.kind != "exp":
        values = [v for v in op.operands() if v.name in makers]
        if op.kind not in ("reduce_sum", "reduce_mean", "real_div", "log", "mul", "inverse") or not values:
            return []
        op = makers[values[0].name]
    x, shown = op.arg("x"), [op.name]
    for name in shown:  # it grows: the exponential, and it times numbers
        users = readers.get(name, [])
        shown += [u.name for u in users if u.kind == "mul" and None in (_value(u, "x"), _value(u, "y"))]
    sums = [u for n in shown for u in readers.get(n, []) if u.kind in ("reduce_sum", "reduce_mean")]
    first = next((s for s in sums if _axes_alike(s, sums)), None)
    if not isinstance(x, Value) or first is None:
        return []
    replay = Replay(graph.function)

    def lowered(m: Maker) -> Mapping[str, Value]:
        largest = m.op("reduce_max", x=x, axes=first.arg("axes"), keep_dims=True)
        m.known["largest"] = largest
        return {op.name: m.op("exp", x=m.op("sub", x=x, y=largest))}

    def back(m: Maker, use: Op) -> Mapping[str, Value]:
        largest = m.known["largest"]
        if largest.type.shape != use.result.type.shape:
            largest = m.op("reshape", x=largest, shape=list(use.result.type.shape))
        return {use.name: m.op("add", x=use.result, y=largest)}

    replay.at(op, lowered)
    for total in sums:
        for use in readers.get(total.name, []):
            if use.kind == "log":
                replay.at(use, lambda m, use=use: back(m, use))  # type: ignore[misc]
    how = (
        "subtract the row's largest entry before exp: x - x.amax(dim, keepdim=True), as torch.softmax and "
        "torch.logsumexp do"
    )
    return [Rewritten("maximum", how, replay.result())]


def _value(op: Op, name: str) -> Value | None:
    arg = op.arg(name)
    return arg if isinstance(arg, Value) else None


def _axes_alike(one: Op, others: Sequence[Op]) -> bool:
    return all(o.arg("axes") == one.arg("axes") for o in others)


def _logsigmoid(graph: Graph, op: Op, rule: str) -> list[Rewritten]:
    makers, readers = graph.makers, graph.readers
    pairs: list[tuple[Op, Op]] = []
    if op.kind == "sigmoid":
        pairs = [(op, u) for u in readers.get(op.name, []) if u.kind == "log"]
    elif (
        op.kind == "log"
        and isinstance(v := op.arg("x"), Value)
        and v.name in makers
        and makers[v.name].kind == "sigmoid"
    ):
        pairs = [(makers[v.name], op)]
    if not pairs:
        return []
    replay = Replay(graph.function)
    for sigmoid, log in pairs:

        def stable(m: Maker, sigmoid: Op = sigmoid, log: Op = log) -> Mapping[str, Value]:
            x = sigmoid.arg("x")
            away = m.op("mul", x=m.op("abs", x=x), y=-1.0)
            rest = m.op("log", x=m.op("add", x=m.op("exp", x=away), y=1.0), epsilon=0.0)
            return {log.name: m.op("sub", x=m.op("minimum", x=x, y=0.0), y=rest)}

        replay.at(log, stable)
    how = (
        "take F.logsigmoid(x), or the loss on logits (binary_cross_entropy_with_logits), for log(sigmoid(x))"
    )
    return [Rewritten("logsigmoid", how, replay.result())]


def _variance(graph: Graph, op: Op, rule: str) -> list[Rewritten]:
    """mean(x * x) - mean(x) * mean(x)."""
    makers = graph.makers
    sub = (
        op if op.kind == "sub" else next((u for u in graph.readers.get(op.name, []) if u.kind == "sub"), None)
    )
    if sub is None:
        return []
    a, b = sub.arg("x"), sub.arg("y")
    if not (isinstance(a, Value) and isinstance(b, Value) and a.name in makers and b.name in makers):
        return []
    mean, square = makers[a.name], makers[b.name]
    if mean.kind != "reduce_mean" or not is_square(square):
        return []
    inner = mean.arg("x")
    outer = square.arg("x")
    if not isinstance(inner, Value) or inner.name not in makers or not is_square(makers[inner.name]):
        return []
    x = makers[inner.name].arg("x")
    if (
        not isinstance(x, Value)
        or not isinstance(outer, Value)
        or makers.get(outer.name, sub).kind != "reduce_mean"
    ):
        return []
    replay = Replay(graph.function)

    def centred(m: Maker) -> Mapping[str, Value]:
        middle = m.op("reduce_mean", x=x, axes=mean.arg("axes"), keep_dims=True)
        d = m.op("sub", x=x, y=middle)
        q = m.op("mul", x=d, y=d)
        return {sub.name: m.op("reduce_mean", x=q, axes=mean.arg("axes"), keep_dims=mean.arg("keep_dims"))}

    replay.at(sub, centred)
    how = "subtract the mean before the square: ((x - x.mean(dim, keepdim=True)) ** 2).mean(dim)"
    return [Rewritten("variance", how, replay.result())]


#: How many ops above one an offset is looked for, and how many times what it is added to it is at least.
_ABOVE, _LARGER = 8, 8.0


def _offset(graph: Graph, op: Op, rule: str) -> list[Rewritten]:
    """x + c, c much larger than x, without c: right where what follows depends on differences alone, as a norm does."""
    if rule not in ("overflow", "accumulator", "cancellation", "rounding"):
        return []
    makers, level = graph.makers, [op]
    for _ in range(_ABOVE):
        for each in level:
            x, c = each.arg("x"), number_of(each.arg("y"))
            if (
                each.kind not in ("add", "sub")
                or c is None
                or not isinstance(x, Value)
                or x.name not in makers
            ):
                continue
            profile = graph.measured[makers[x.name].name].profile
            if abs(c) >= _LARGER * max(abs(profile.low or 0.0), abs(profile.high or 0.0)):
                return [_without(graph, each, x)]
        level = [makers[v.name] for each in level for v in each.operands() if v.name in makers]
    return []


def _without(graph: Graph, op: Op, x: Value) -> Rewritten:
    replay = Replay(graph.function)
    replay.at(op, lambda m: {op.name: x})
    place = (op.source or op.name).partition(" (")[2].rstrip(")") or op.name
    how = (
        f"leave out the number that is added at {place}: nothing behind it depends on it, and beside it fp16 has no "
        "digits left for what it is added to"
    )
    return Rewritten("offset", how, replay.result())


def _reassociate(graph: Graph, op: Op, rule: str) -> list[Rewritten]:
    """(x + c) - d and the like."""
    inner = next((graph.makers[v.name] for v in op.operands() if v.name in graph.makers), None)
    signs = {"add": 1.0, "sub": -1.0}
    if inner is None or op.kind not in signs or inner.kind not in signs:
        return []
    x, c, d = inner.arg("x"), number_of(inner.arg("y")), number_of(op.arg("y"))
    if not isinstance(x, Value) or c is None or d is None:
        return []
    replay, total = Replay(graph.function), signs[inner.kind] * c + signs[op.kind] * d
    replay.at(op, lambda m: {op.name: m.op("add", x=x, y=total)})
    how = f"join the two constants: x + {total:.6g}, so that the large one never meets x"
    return [Rewritten("reassociate", how, replay.result())]


#: Epsilons that are tried.
_EPSILONS = (2.0**-14, 1e-4, 1e-3)


def _epsilon(graph: Graph, op: Op, rule: str) -> list[Rewritten]:
    """A larger number in the sum or maximum under a division, a root or a logarithm."""
    makers = graph.makers
    places = [op, *(makers[v.name] for v in op.operands() if v.name in makers)]
    found = []
    for epsilon in _EPSILONS:
        for place in places:
            args = _with_epsilon(place, epsilon)
            if args is not None:
                ops = tuple(replace(o, args=args) if o.name == place.name else o for o in graph.function.ops)
                how = (
                    f"take an epsilon of {epsilon:.2g} in `{place.kind}`: fp16 has nothing between 0 and 6e-8"
                )
                found.append(Rewritten("epsilon", how, replace(graph.function, ops=ops)))
                break
    return found


def _with_epsilon(op: Op, epsilon: float) -> tuple[tuple[str, Arg], ...] | None:
    """The op's arguments with a larger epsilon; None where it has none that is smaller."""
    for name, arg in op.args:
        number = number_of(arg)
        if number is None or not isinstance(arg, Literal) or not arg.type.dtype.startswith("fp"):
            continue
        place = name == "epsilon" and op.kind in ("rsqrt", "log", "inverse")
        place = place or (op.kind in ("add", "maximum") and 0.0 <= number < epsilon)
        if place and number < epsilon and math.isfinite(number):
            value = literal(epsilon, arg.type.dtype)
            new: Arg = value if not arg.type.shape else Literal(arg.type, value.data)
            return tuple((n, new if n == name else a) for n, a in op.args)
    return None
