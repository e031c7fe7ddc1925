"""Tensors of an optimizer as sums `coefficient * tensor`, with the coefficients left to the host.

`m * 0.9 + g * 0.1` is the form {m: 0.9, g: 0.1}; nothing is computed on the engine until an operation needs
the sum itself. Coefficients are expressions (`coefficients.py`) that reach the engine as scalar ports; tensors
are kept in units that are powers of two, chosen so that their largest entry is far from both ends of fp16. That
way 1e-8 and squares of gradients do not underflow, and a learning rate never rounds twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ane_trainer.ane.capture.user_optimizer.coefficients import (
    NOUGHT,
    UNIT,
    Coefficient,
    Environment,
    evaluate,
    is_number,
    minus,
    plus,
    power,
    times,
)
from ane_trainer.ane.capture.user_optimizer.following import NotFollowed

#: log2 of where the largest entry of a sum is put.
TARGET = 6
#: Range of log2 of a largest entry that is left as it is.
COMFORT = (-1.0, 10.0)
#: log2 of the smallest fp16 number.
LEAST = -24.0
#: Range of log2 of a port's largest value over the sampled steps.
_PORT = (-8.0, 10.0)


@dataclass(frozen=True, eq=False)
class Atom:
    """A tensor of the program that holds `2^exponent` times the numbers meant, or their roots if `squared`.

    `positive`: no entry is negative. `peak`: log2 of the largest entry, as sampled. `states`: the slots it hangs
    on. The numbers meant are also `factor` times larger (a state that is kept as a mean). `root`: it is a weight
    or a state as it was before the step; `chosen`: its entries were picked from two others. `least`: log2 of the
    smallest entry that is not 0 for want of range: the root of the smallest fp16 number is 2^-12.
    """

    tensor: torch.Tensor
    exponent: int
    peak: float
    positive: bool = False
    squared: bool = False
    states: frozenset[object] = frozenset()
    factor: Coefficient = UNIT
    root: bool = False
    chosen: bool = False
    least: float = LEAST


@dataclass(frozen=True, eq=False)
class Form:
    """The sum of `coefficient * atom` over `terms`, plus `constant`. `shape` is that of the whole."""

    terms: Mapping[Atom, Coefficient]
    shape: tuple[int, ...]
    constant: Coefficient = NOUGHT

    @property
    def states(self) -> frozenset[object]:
        return frozenset().union(*(a.states for a in self.terms))


@dataclass(frozen=True, eq=False)
class Mask:
    """A tensor of truth values."""

    tensor: torch.Tensor
    shape: tuple[int, ...]
    states: frozenset[object] = frozenset()


@dataclass(frozen=True)
class ScalarPort:
    """What the host sends: `coefficient * 2^power`, or the root of its magnitude."""

    name: str
    coefficient: Coefficient
    power: int
    root: bool = False

    def value(self, environment: Environment, known: dict[Coefficient, float]) -> float:
        """In float64; NaN where it has no value."""
        found = evaluate(self.coefficient, environment, known) * 2.0**self.power
        return math.sqrt(abs(found)) if self.root else found


def combine(a: Form, b: Form, factor: Coefficient, shape: tuple[int, ...]) -> Form:
    """a + factor * b"""
    terms = dict(a.terms)
    for atom, coefficient in b.terms.items():
        added = times(factor, coefficient)
        terms[atom] = plus(terms[atom], added) if atom in terms else added
    terms = {atom: c for atom, c in terms.items() if c != NOUGHT}
    return Form(terms, shape, plus(a.constant, times(factor, b.constant)))


def scaled(a: Form, factor: Coefficient) -> Form:
    """factor * a"""
    return combine(Form({}, a.shape), a, factor, a.shape)


@dataclass
class Workshop:
    """Makes tensors of forms. `samples` are environments of some steps; `decisions` the powers chosen so far.

    With `given` decisions these are followed instead. `limit`: log2 of what the present operation's result is
    clamped to afterwards. `ports` are collected; `feed(port)` gives a port's tensor.
    """

    samples: Sequence[Environment]
    feed: Callable[[ScalarPort], torch.Tensor]
    floor: float
    given: Sequence[int] | None = None
    decisions: list[int] = field(default_factory=list)
    ports: dict[tuple[Coefficient, int, bool], ScalarPort] = field(default_factory=dict)
    assumptions: dict[Coefficient, int] = field(default_factory=dict)
    limit: float | None = None
    _made: dict[object, Atom] = field(default_factory=dict)
    _known: list[dict[Coefficient, float]] = field(default_factory=list)

    # -- choices

    def decide(self, choose: Callable[[], float]) -> int:
        """A power of two: the next of the given ones, else what `choose` says."""
        number = len(self.decisions)
        self.decisions.append(self.given[number] if self.given is not None else round(finite(choose())))
        return self.decisions[-1]

    def values(self, coefficient: Coefficient) -> list[float]:
        """The coefficient at the sampled steps."""
        if not self._known:
            self._known = [{} for _ in self.samples]
        found = [evaluate(coefficient, e, k) for e, k in zip(self.samples, self._known, strict=True)]
        return [v for v in found if math.isfinite(v)]

    def bound(self, coefficient: Coefficient) -> float:
        """log2 of its largest magnitude; -inf if it is 0 or has no value."""
        largest = max((abs(v) for v in self.values(coefficient)), default=0.0)
        return math.log2(largest) if largest else -math.inf

    def sign_of(self, coefficient: Coefficient) -> int:
        """1 or -1 if all sampled values are on that side (or 0), which is checked again before each step.

        Raises: NotFollowed if they are not.
        """
        values = self.values(coefficient)
        for sign in (1, -1):
            if all(v * sign >= 0 for v in values):
                self.assumptions[coefficient] = sign
                return sign
        raise NotFollowed("uses a number that changes its sign where it must not", place=False)

    # -- ports and tensors

    def port(self, coefficient: Coefficient, exponent: int, root: bool = False) -> torch.Tensor:
        """[1]: the host's value of `coefficient * 2^exponent`."""
        key = (coefficient, exponent, root)
        known = self.ports.get(key)
        if known is None:
            known = self.ports[key] = ScalarPort(f"optimizer_{len(self.ports)}", *key)
        return self.feed(known)

    def multiplied(
        self, tensor: torch.Tensor, coefficient: Coefficient, exponent: int, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """tensor * coefficient * 2^exponent, with the power split off if the port would leave its range."""
        if gate is None and is_number(coefficient):
            return shifted(tensor * coefficient[1] if coefficient[1] != 1.0 else tensor, exponent)
        own = self.decide(lambda: self._port_exponent(coefficient, exponent))
        port = self.port(coefficient, own)
        return shifted(tensor * (port if gate is None else port * gate), exponent - own)

    def term(
        self, atom: Atom, coefficient: Coefficient, exponent: int, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The tensor of `coefficient * atom`, times 2^exponent."""
        coefficient = times(coefficient, atom.factor)
        if not atom.squared:
            return self.multiplied(atom.tensor, coefficient, exponent - atom.exponent, gate)
        apart = exponent - 2 * atom.exponent
        sign = self.sign_of(coefficient)
        if gate is None and is_number(coefficient):
            root = atom.tensor * math.sqrt(abs(coefficient[1]) * 2.0**apart)
        else:
            port = self.port(coefficient, apart, root=True)
            root = atom.tensor * (port if gate is None else port * gate)
        return root * root if sign > 0 else -(root * root)

    def total(self, form: Form, exponent: int, gate: torch.Tensor | None = None) -> torch.Tensor:
        """The whole form times 2^exponent, times `gate`."""
        parts = [self.term(a, c, exponent, gate) for a, c in form.terms.items()]
        if form.constant != NOUGHT:
            parts.append(self._everywhere(form.constant, exponent, gate))
        if not parts:
            return torch.zeros(form.shape or (1,))
        result = parts[0]
        for part in parts[1:]:
            result = result + part
        return result

    def _everywhere(self, value: Coefficient, exponent: int, gate: torch.Tensor | None) -> torch.Tensor:
        """[1]: a number that is added to all entries."""
        if is_number(value) and gate is None and -14 <= math.log2(abs(value[1])) + exponent <= 15:
            return torch.full((1,), value[1] * 2.0**exponent)
        port = self.port(value, exponent)
        return port if gate is None else port * gate

    def magnitude(self, form: Form) -> float:
        """log2 of a bound of the largest entry of the form, in the user's units."""
        found: list[float] = [self.bound(form.constant)]
        for atom, coefficient in form.terms.items():
            own = 2 * (atom.peak - atom.exponent) if atom.squared else atom.peak - atom.exponent
            found.append(own + self.bound(times(coefficient, atom.factor)))
        return max(found)

    def atom(self, form: Form, target: int = TARGET) -> Atom:
        """The form as one tensor with coefficient 1, computed once."""
        key = (frozenset(form.terms.items()), form.constant, target)
        made = self._made.get(key)
        if made is None:
            exponent = self.decide(lambda: finite(target - self.magnitude(form)))
            tensor = self.total(form, exponent)
            made = self._made[key] = Atom(
                tensor, exponent, float(target), self.positive(form), states=form.states
            )
        return made

    def single(self, form: Form) -> tuple[Atom, Coefficient]:
        """The form as coefficient * atom; a form of one term needs nothing computed."""
        if len(form.terms) == 1 and form.constant == NOUGHT:
            ((atom, coefficient),) = form.terms.items()
            if not atom.squared:
                return atom, times(coefficient, atom.factor)
        return self.atom(form), UNIT

    def positive(self, form: Form) -> bool:
        """Whether no entry can be negative."""
        signs = all(v >= 0 for v in self.values(form.constant))
        for atom, coefficient in form.terms.items():
            signs &= (atom.positive or atom.squared) and all(v >= 0 for v in self.values(coefficient))
        return signs

    def centered(self, atom: Atom, target: int = TARGET, multiple: int = 1) -> Atom:
        """The atom in a unit that brings its largest entry near 2^target, unless it is comfortable.

        The unit's power is one of `multiple`.
        """
        shift = self.decide(lambda: self._shift(atom, target, multiple))
        if shift == 0:
            return atom
        tensor = shifted(atom.tensor, shift)
        return Atom(
            tensor, atom.exponent + shift, atom.peak + shift, atom.positive, states=atom.states,
            least=max(LEAST, atom.least + shift),
        )  # fmt: skip

    def peak(self, tensor: torch.Tensor, otherwise: float) -> float:
        """log2 of the largest entry of a sampled tensor; `otherwise` if it is all 0."""
        largest = float(tensor.detach().abs().amax()) if self.given is None and tensor.numel() else 0.0
        return math.log2(largest) if 0.0 < largest < math.inf else otherwise

    def _shift(self, atom: Atom, target: int, multiple: int) -> float:
        shift = 0 if COMFORT[0] <= atom.peak <= COMFORT[1] else round(finite(target - atom.peak))
        return shift - (atom.exponent + shift) % multiple

    def raised(self, form: Form) -> Form:
        """The form with roots no smaller than those of the smallest fp16 number: what is divided by them stays small.

        Of a form that cannot be negative, in programs with a `floor` under what is divided by.
        """
        if not self.floor or not self.positive(form):
            return form
        return Form({self._raised(a): c for a, c in form.terms.items()}, form.shape, form.constant)

    def _raised(self, atom: Atom) -> Atom:
        if atom.least <= LEAST:
            return atom
        made = self._made.get(atom)
        if made is None:
            tensor = torch.clamp(atom.tensor, min=2.0**atom.least)
            made = self._made[atom] = replace(atom, tensor=tensor, least=LEAST)
        return made

    def _port_exponent(self, coefficient: Coefficient, exponent: int) -> float:
        bound = self.bound(coefficient)
        if not math.isfinite(bound) or _PORT[0] <= bound + exponent <= _PORT[1]:
            return exponent
        return -bound


def shifted(tensor: torch.Tensor, exponent: int) -> torch.Tensor:
    """tensor * 2^exponent, in factors that fp16 holds."""
    while exponent:
        part = max(-14, min(14, exponent))
        tensor = tensor * 2.0**part
        exponent -= part
    return tensor


def finite(value: float) -> float:
    """0 for what is not finite."""
    return value if math.isfinite(value) else 0.0


def without(form: Form, atom: Atom) -> tuple[Coefficient, Form]:
    """(coefficient of `atom`, the rest)."""
    rest = {a: c for a, c in form.terms.items() if a is not atom}
    return form.terms.get(atom, NOUGHT), Form(rest, form.shape, form.constant)


def common(a: Form, b: Form) -> Form | None:
    """The weights and states that both hold, each with coefficient 1; None if there are none."""
    shared = {atom: UNIT for atom in a.terms if atom.root and atom in b.terms}
    return Form(shared, a.shape) if shared else None


def difference(a: Form, b: Form) -> Form:
    """a - b"""
    return combine(a, b, minus(NOUGHT, UNIT), a.shape)


def root_of(coefficient: Coefficient) -> Coefficient:
    """The square root."""
    return power(coefficient, 0.5)
