"""A value carried with a power of two through a program: v * 2^-k from one op on, until what follows is in range.

    before: `q = mul(x, x); s = reduce_sum(q); y = sqrt(s)`, q near 1e6
    after:  `q = mul(x * 2^-5, x * 2^-5); s = reduce_sum(q); y = sqrt(s) * 2^5`

Powers of two are exact. The range is judged by magnitudes that were measured in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ane_trainer.ane.compiler.lower.passes.rewriting import Rewriter
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, Value, literal
from ane_trainer.ane.verify.accuracy import CONTRACTIONS, OpAccuracy
from ane_trainer.training.debugging.forms import is_square, new_op, number_of

#: Where the largest number of a value is brought that was too large; operands of slices that clamp; too small ones.
WANTED, WANTED_SLICE, RAISED = 2.0**12, 2.0**11, 2.0**8
#: A true value is in range between these, its largest and its average number.
LARGEST, LEAST = 2.0**15, 2.0**-13

_LINEAR = frozenset(
    "abs relu reshape transpose expand_dims squeeze slice_by_index slice_by_size tile identity reduce_sum reduce_mean "
    "reduce_max reduce_min leaky_relu reverse gather pad reduce_l1_norm reduce_l2_norm avg_pool max_pool cumsum".split()
)
_ALIGNED = ("add", "sub", "maximum", "minimum")


class _Carrier:
    """One walk: `of[name]` is the power k of a value that is stored as v * 2^-k."""

    def __init__(self, function: Function, start: Op, power: int, measured: Mapping[str, OpAccuracy]) -> None:
        self.rewriter = Rewriter(function)
        self.start, self.power, self.measured = start, power, measured
        self.of: dict[str, int] = {}
        self.failed = False

    def visit(self, rewriter: Rewriter, op: Op) -> None:
        """Carry on through one op."""
        if self.failed:
            rewriter.append(op)
        elif op.name == self.start.name:
            self._begin(op)
        elif any(v.name in self.of for v in op.operands()):
            self._through(op)
        else:
            rewriter.append(op)

    def _begin(self, op: Op) -> None:
        k = self.power
        if op.kind == "exp":
            lowered = self._op("sub", op, x=op.arg("x"), y=k * math.log(2.0))
            self._finish(replace(op, args=_with(op, "x", lowered)), k)
            return
        names = {name for name, arg in op.args if isinstance(arg, Value) and arg.type.dtype == "fp16"}
        x, y = op.arg("x"), op.arg("y")
        degree = _degree(op)
        if degree is not None and degree >= 1 and degree == int(degree):
            each = math.ceil(k / degree)
            scaled = self._times(x, -each, op)
            args = op.args if op.kind != "mul" else _with(op, "y", scaled)
            self._finish(replace(op, args=_with(replace(op, args=args), "x", scaled)), int(each * degree))
        elif op.kind in CONTRACTIONS and "x" in names:
            args = _with(op, "x", self._times(x, -k, op))
            bias = op.arg("bias")
            if bias is not None:
                args = _with(replace(op, args=args), "bias", self._times(bias, -k, op))
            self._finish(replace(op, args=args), k)
        elif op.kind == "mul":
            first = -min(-k, self._room(x)) if k < 0 else k  # the operand must stay in range itself
            args = _with(op, "x", self._times(x, -first, op))
            if first != k:
                args = _with(replace(op, args=args), "y", self._times(y, first - k, op))
            self._finish(replace(op, args=args), k)
        elif op.kind == "real_div" and "x" in names:
            self._finish(replace(op, args=_with(op, "x", self._times(x, -k, op))), k)
        elif op.kind in _ALIGNED:
            args = _with(op, "x", self._times(x, -k, op))
            args = _with(replace(op, args=args), "y", self._times(y, -k, op))
            self._finish(replace(op, args=args), k)
        elif op.kind in _LINEAR and "x" in names:
            self._finish(replace(op, args=_with(op, "x", self._times(x, -k, op))), k)
        else:
            self._give_up(op)

    def _through(self, op: Op) -> None:
        powers = {n: self.of.get(a.name, 0) for n, a in op.args if isinstance(a, Value)}
        x, y = powers.get("x", 0), powers.get("y", 0)
        if op.kind in _LINEAR and {n for n, p in powers.items() if p} == {"x"}:
            self._finish(op, x)
        elif (degree := _degree(op)) is not None and op.kind != "mul":
            self._power(op, x, degree)
        elif op.kind in ("mul", "matmul"):
            self._product(op, x + y)
        elif op.kind == "real_div":
            self._product(op, x - y)
        elif op.kind in ("linear", "conv", "conv_transpose"):
            args, bias = op.args, op.arg("bias")
            if bias is not None:
                args = _with(op, "bias", self._times(bias, -x, op))
            self._finish(replace(op, args=args), x)
        elif op.kind in _ALIGNED:
            most = max(x, y, key=abs)
            args = op.args
            for name, power in (("x", x), ("y", y)):
                if power != most:
                    args = _with(replace(op, args=args), name, self._times(op.arg(name), power - most, op))
            self._finish(replace(op, args=args), most)
        elif op.kind == "log":
            self.rewriter.append(op)
            self._stand(op, self._op("add", op, x=op.result, y=x * math.log(2.0)))
        else:
            self._give_up(op)

    def _power(self, op: Op, k: int, degree: float) -> None:
        """A power or root: the exponent times its degree, made whole before."""
        epsilon, argument = op.arg("epsilon"), dict(op.args)["x"]
        while (k * degree) % 1:
            argument, k = self._times(argument, -1, op), k + 1
        args = _with(op, "x", argument)
        if isinstance(epsilon, Literal):
            value = literal(math.ldexp(number_of(epsilon) or 0.0, -k), epsilon.type.dtype)
            args = _with(replace(op, args=args), "epsilon", value)
        self._finish(replace(op, args=args), int(k * degree))

    def _product(self, op: Op, k: int) -> None:
        """A product or quotient; its first operand takes what brings the result into range."""
        found = self.measured.get(op.name)
        if found is not None and found.true_peak > 0.0:
            stored = found.true_peak * 2.0**-k
            if not LEAST <= stored <= LARGEST:
                shift = math.ceil(math.log2(stored / WANTED))
                op, k = replace(op, args=_with(op, "x", self._times(op.arg("x"), -shift, op))), k + shift
        self._finish(op, k)

    def _room(self, argument: Arg | None) -> int:
        """The power of two that an operand can grow by."""
        found = self.measured.get(argument.name) if isinstance(argument, Value) else None
        if isinstance(argument, Literal):
            number = number_of(argument)
            peak = abs(number) if number else 1.0
        else:
            peak = found.true_peak if found is not None and found.true_peak > 0.0 else 1.0
        return max(0, math.floor(math.log2(WANTED / peak)))

    def _finish(self, op: Op, k: int) -> None:
        """Append an op whose result is v * 2^-k; the true value again where that is in range."""
        self.rewriter.append(op)
        found = self.measured.get(op.name)
        peak, rms = (found.true_peak, found.rms) if found is not None else (0.0, 1.0)
        output = op.result in self.rewriter.function.outputs
        if k and ((peak <= LARGEST and rms >= LEAST) or output or peak == 0.0):
            self._stand(op, self._times(op.result, k, op))
        elif k:
            self.of[op.name] = k

    def _stand(self, op: Op, value: Arg) -> None:
        assert isinstance(value, Value)
        self.rewriter.replace_uses(op.result, value)

    def _give_up(self, op: Op) -> None:
        self.failed = True
        self.rewriter.append(op)

    def _times(self, argument: Arg | None, power: int, op: Op) -> Arg:
        """An operand times 2^power, in factors that fp16 holds."""
        assert argument is not None
        if isinstance(argument, Literal) and (number := number_of(argument)) is not None:
            return literal(math.ldexp(number, power), argument.type.dtype)
        value: Arg = argument
        while power:
            part = max(-14, min(14, power))
            value = self._op("mul", op, x=value, y=math.ldexp(1.0, part))
            power -= part
        return value

    def _op(self, kind: str, like: Op, **args: object) -> Value:
        return new_op(self.rewriter, like.source, kind, **args)


def carried(
    function: Function, op: Op, measured: Mapping[str, OpAccuracy], rule: str
) -> tuple[int, Function] | None:
    """(k, the function with the result of `op` carried as v * 2^-k); None where no power helps or it cannot be."""
    found = measured.get(op.name)
    if found is None or len(op.results) != 1 or op.result.type.dtype != "fp16" or not found.true_peak > 0.0:
        return None
    wanted = WANTED if found.true_peak > LARGEST or rule in ("overflow", "accumulator") else RAISED
    wanted = WANTED_SLICE if rule == "clamped-slice" else wanted
    power = math.ceil(math.log2(found.true_peak / wanted))
    if rule == "dead-products":
        power = min(power, math.floor(math.log2(found.true_peak / RAISED)))
    if power == 0 or (rule == "clamped-slice" and power < 0):
        return None
    carrier = _Carrier(function, op, power, measured)
    result = carrier.rewriter.run(carrier.visit)
    return None if carrier.failed or carrier.of.keys() & {v.name for v in result.outputs} else (power, result)


def _with(op: Op, name: str, value: Arg) -> tuple[tuple[str, Arg], ...]:
    return tuple((n, value if n == name else a) for n, a in op.args)


def _degree(op: Op) -> float | None:
    """The power that an op raises its operand to; None where it raises it to none."""
    if is_square(op):
        return 2.0
    if op.kind == "pow":
        return number_of(op.arg("y"))
    return {"sqrt": 0.5, "rsqrt": -0.5, "inverse": -1.0}.get(op.kind)
