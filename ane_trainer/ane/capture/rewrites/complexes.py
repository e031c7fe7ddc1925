"""Complex numbers as pairs of real ones: every complex tensor of a step becomes a real tensor [..., 2].

A rule computes the pair of its result from the pairs of its arguments, with real operations that are recorded; the
complex tensor itself is kept beside it, for autograd. Fourier transforms become products with matrices of cosines
and sines, n x n for n elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ane_trainer.ane.capture.trace.sources import Place
from ane_trainer.ane.capture.trace.torch_private import OpOverload, SideTable, without_modes
from ane_trainer.ane.errors import Finding, UnsupportedModel

aten = torch.ops.aten

#: Linear operations that act on real and imaginary parts alike.
_ALIKE = frozenset(
    (
        "view _unsafe_view reshape expand permute transpose t unsqueeze squeeze cat stack clone detach alias sum mean "
        "neg flip roll repeat select_backward slice_backward constant_pad_nd index_select embedding zeros_like "
        "new_zeros split split_with_sizes unbind contiguous lift_fresh as_strided gather index "
        "slice_scatter select_scatter where copy transpose"
    ).split()
)
#: Views that may be written to; their axes must not count the pair's.
_PARTS = {aten.slice.Tensor, aten.select.int}


def takes(func: OpOverload, args: object, kwargs: Mapping[str, object]) -> bool:
    """Whether the operation has to do with complex numbers, or makes some of tensors."""
    given = _flat(args)
    if func in _MAKERS or any(isinstance(a, torch.Tensor) and a.is_complex() for a in given):
        return True
    dtype = kwargs.get("dtype")
    makes = isinstance(dtype, torch.dtype) and dtype.is_complex
    makes = makes or any(isinstance(a, complex) for a in given)
    return makes and any(isinstance(a, torch.Tensor) for a in given)


class Complex(NamedTuple):
    """A complex tensor among a rule's arguments and results: real and imaginary part."""

    real: torch.Tensor
    imaginary: torch.Tensor


#: What a rule takes as a number: complex, real, or a Python number.
Operand = Complex | torch.Tensor | complex


class Pairs:
    """The pair [..., 2] that each complex tensor of one capture stands for, for as long as the tensor lives."""

    def __init__(self, place: Place) -> None:
        self._pairs: SideTable[torch.Tensor] = SideTable()
        self._place = place

    def compute(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, object]) -> Any:
        """The result of `func`; runs where the real operations it makes are recorded.

        Raises: UnsupportedModel for an operation without a rule.
        """
        name = func.overloadpacket.__name__
        if torch.Tag.inplace_view in func.tags:
            return self._viewed(func, *args)
        if name in _OF_PAIRS:
            return _OF_PAIRS[name](self, *args)
        if name.endswith("_") and not name.endswith("__"):
            new = self._split(args[1]) if name == "copy_" else self._value(name[:-1], func, args, kwargs)
            self.of(args[0]).copy_(_joined(_halves(new)))
            return args[0]
        if func in _PARTS:
            x, dim, *rest = args if len(args) > 1 else (*args, 0)
            return self.stand_in(func(self.of(x), dim % x.dim(), *rest, **kwargs))
        return self._whole(self._value(name, func, args, kwargs))

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """[..., 2]: real and imaginary part; of a constant they are a constant."""
        pair = self._pairs.get(x)
        if pair is None:
            with without_modes():
                pair = torch.view_as_real(x.resolve_conj()).clone()
            self._pairs[x] = pair
        return pair

    def stand_in(self, pair: torch.Tensor) -> torch.Tensor:
        """The complex tensor that stands for a pair."""
        with without_modes():
            result = torch.view_as_complex(pair.detach().clone(memory_format=torch.contiguous_format))
        self._pairs[result] = pair
        return result

    def _viewed(self, func: OpOverload, x: torch.Tensor, *axes: int) -> torch.Tensor:
        """A tensor whose axes are changed in place, as `torch.stft` does: its pair's are the same, but for the last."""
        name, pair = func.overloadpacket.__name__, self.of(x)
        plain = {"transpose_": torch.transpose, "unsqueeze_": torch.unsqueeze, "squeeze_": torch.squeeze}.get(
            name
        )
        if name == "t_" and x.dim() == 2:
            plain, axes = torch.transpose, (0, 1)
        if plain is None or not axes or not all(isinstance(axis, int) for axis in axes):
            raise self.refusal(func)
        rank = x.dim() + (name == "unsqueeze_")
        changed = plain(pair, *(axis % rank for axis in axes))  # type: ignore[operator]
        with without_modes():
            getattr(x, name)(*(() if name == "t_" else axes))
        self._pairs[x] = changed
        return x

    def _value(self, name: str, func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        rule = _RULES.get(name)
        if rule is not None and (result := rule(*map(self._split, args), **kwargs)) is not NotImplemented:
            return result
        if name in _ALIKE:
            return _each(func, self._split(args), kwargs)
        raise self.refusal(func)

    def _split(self, argument: object) -> Any:
        """The argument with `Complex` in place of complex tensors."""
        if isinstance(argument, torch.Tensor) and argument.is_complex():
            pair = self.of(argument)
            return Complex(pair[..., 0], pair[..., 1])
        if isinstance(argument, (list, tuple)):
            return type(argument)(map(self._split, argument))
        return argument

    def _whole(self, result: object) -> Any:
        """A rule's result with complex tensors in place of `Complex`."""
        if isinstance(result, Complex):
            return self.stand_in(_joined(result))
        return [self._whole(item) for item in result] if isinstance(result, list) else result

    def refusal(self, func: object) -> UnsupportedModel:
        finding = Finding(
            self._place.text or str(func), str(func), "has no rule for complex numbers.",
            "Write it with real and imaginary parts.",
        )  # fmt: skip
        return UnsupportedModel("The step needs complex numbers:", [finding])


def _halves(x: Operand) -> Complex:
    if isinstance(x, Complex):
        return x
    if isinstance(x, torch.Tensor):
        return Complex(x, torch.zeros_like(x))
    return Complex(torch.tensor(complex(x).real), torch.tensor(complex(x).imag))


def _joined(parts: Complex) -> torch.Tensor:
    real, imaginary = torch.broadcast_tensors(*parts)  # type: ignore[no-untyped-call]
    return torch.stack([real, imaginary], -1)


def _filled(x: Operand, value: complex = 1.0, **_: object) -> Complex:
    """`full_like` and `ones_like`."""
    like, value = _halves(x).real, complex(value)
    return Complex(torch.full_like(like, value.real), torch.full_like(like, value.imag))


def _equal(x: Operand, y: Operand) -> torch.Tensor:
    (a, b), (c, d) = _halves(x), _halves(y)
    return (a == c) & (b == d)


def _power(x: Operand, exponent: object) -> object:
    """Whole powers from 0 to 8, as products."""
    if not isinstance(exponent, (int, float)) or exponent not in range(9):
        return NotImplemented
    result: Operand = Complex(torch.ones(()), torch.zeros(()))
    for _ in range(int(exponent)):
        result = _mul(result, x)
    return result


def _converted(x: Operand, *args: object, **kwargs: object) -> Complex:
    """`x.to(complex)` of a real tensor, and copies of complex ones."""
    return Complex(*(part.clone() for part in _halves(x)))


def _each(func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
    """`func` of the real parts and of the imaginary parts."""
    options = {k: v for k, v in kwargs.items() if k != "dtype"}
    real, imaginary = (func(*_part(args, i), **options) for i in (0, 1))
    if isinstance(real, (list, tuple)):
        return [Complex(*parts) for parts in zip(real, imaginary, strict=True)]
    return Complex(real, imaginary)


def _part(argument: object, which: int) -> Any:
    if isinstance(argument, Complex):
        return argument[which]
    if isinstance(argument, torch.Tensor):
        return _halves(argument)[which] if argument.is_floating_point() else argument
    if isinstance(argument, (list, tuple)):
        return type(argument)(_part(item, which) for item in argument)
    return argument


# -- arithmetic


def _mul(x: Operand, y: Operand) -> Complex:
    for factor, other in ((x, y), (y, x)):
        if not isinstance(factor, (complex, Complex)):
            real, imaginary = _halves(other)
            return Complex(real * factor, imaginary * factor)
    (a, b), (c, d) = _halves(x), _halves(y)
    return Complex(a * c - b * d, a * d + b * c)


def _div(x: Operand, y: Operand) -> Complex:
    if not isinstance(y, (complex, Complex)):
        real, imaginary = _halves(x)
        return Complex(real / y, imaginary / y)
    (a, b), (c, d) = _halves(x), _halves(y)
    size = c * c + d * d
    return Complex((a * c + b * d) / size, (b * c - a * d) / size)


def _add(x: Operand, y: Operand, *, alpha: float = 1) -> Complex:
    (a, b), (c, d) = _halves(x), _halves(y)
    return Complex(a + c * alpha, b + d * alpha)


def _product(function: Callable[..., torch.Tensor]) -> Callable[[Operand, Operand], Complex]:
    """Matrix products."""

    def rule(x: Operand, y: Operand) -> Complex:
        (a, b), (c, d) = _halves(x), _halves(y)
        return Complex(function(a, c) - function(b, d), function(a, d) + function(b, c))

    return rule


def _exp(x: Complex) -> Complex:
    real, imaginary = x
    size = torch.exp(real)
    return Complex(size * torch.cos(imaginary), size * torch.sin(imaginary))


def _abs(x: Complex) -> torch.Tensor:
    real, imaginary = x
    return torch.sqrt(real * real + imaginary * imaginary)


def _sgn(x: Complex) -> Complex:
    real, imaginary = x
    size = torch.clamp(_abs(x), min=1e-7)
    return Complex(real / size, imaginary / size)


def _conj(x: Complex) -> Complex:
    real, imaginary = x
    return Complex(real, -imaginary)


# -- Fourier transforms


def _matrices(n: int, forward: bool, like: torch.Tensor) -> Complex:
    """[n, n]: cosines and sines of the transform, of the same dtype as `like`."""
    steps = torch.outer(torch.arange(n), torch.arange(n)) % n
    angle = steps.double() * (2.0 * math.pi / n)
    sines = torch.sin(angle) * (-1.0 if forward else 1.0)
    return Complex(torch.cos(angle).to(like.dtype), sines.to(like.dtype))


def _transformed(parts: Complex, dim: int, forward: bool) -> Complex:
    real, imaginary = (part.movedim(dim, -1) for part in parts)
    cosines, sines = _matrices(real.shape[-1], forward, real)
    new = real @ cosines - imaginary @ sines, real @ sines + imaginary @ cosines
    return Complex(*(part.movedim(-1, dim) for part in new))


def _scaled(parts: Complex, count: int, normalization: int) -> Complex:
    factor = {0: 1.0, 1: 1.0 / math.sqrt(count), 2: 1.0 / count}[int(normalization)]
    return parts if factor == 1.0 else Complex(parts.real * factor, parts.imaginary * factor)


def _c2c(x: Complex, dim: Sequence[int], normalization: int, forward: bool) -> Complex:
    for d in dim:
        x = _transformed(x, d, forward)
    return _scaled(x, math.prod(x.real.shape[d] for d in dim), normalization)


def _r2c(x: torch.Tensor, dim: Sequence[int], normalization: int, onesided: bool) -> Complex:
    last, n = dim[-1], x.shape[dim[-1]]
    cosines, sines = _matrices(n, True, x)
    kept = n // 2 + 1 if onesided else n
    moved = x.movedim(last, -1)
    parts = Complex(*((moved @ part[:, :kept]).movedim(-1, last) for part in (cosines, sines)))
    for d in dim[:-1]:
        parts = _transformed(parts, d, forward=True)
    return _scaled(parts, math.prod(x.shape[d] for d in dim), normalization)


def _c2r(x: Complex, dim: Sequence[int], normalization: int, last_dim_size: int) -> torch.Tensor:
    for d in dim[:-1]:
        x = _transformed(x, d, forward=False)
    last, n = dim[-1], int(last_dim_size)
    kept = n // 2 + 1
    weights = torch.tensor([[1.0 if k == 0 or 2 * k == n else 2.0] for k in range(kept)]).to(x.real)
    cosines, sines = (m[:kept] * weights for m in _matrices(n, False, x.real))
    real, imaginary = (part.movedim(last, -1)[..., :kept] for part in x)
    result = (real @ cosines - imaginary @ sines).movedim(-1, last)
    count = n * math.prod(x.real.shape[d] for d in dim[:-1])
    return _scaled(Complex(result, result), count, normalization).real


def _flat(value: object) -> list[object]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]


#: Operations that make complex numbers of real ones.
_MAKERS = {aten.view_as_complex.default, aten._fft_r2c.default, aten.complex.default, aten.polar.default}

#: Operations on the pair itself.
_OF_PAIRS: dict[str, Callable[..., torch.Tensor]] = {
    "view_as_complex": lambda pairs, pair: pairs.stand_in(pair), "resolve_conj": lambda pairs, x: x,
    "view_as_real": lambda pairs, x: pairs.of(x).clone(),
}  # fmt: skip

_RULES: dict[str, Callable[..., object]] = {
    "complex": Complex, "_to_copy": _converted,
    "polar": lambda size, angle: Complex(size * torch.cos(angle), size * torch.sin(angle)),
    "mul": _mul, "div": _div, "add": _add, "sub": lambda x, y, alpha=1: _add(x, y, alpha=-alpha),
    "rsub": lambda x, y, alpha=1: _add(y, x, alpha=-alpha), "pow": _power,
    "angle": lambda x: torch.atan2(x.imaginary, x.real), "full_like": _filled, "ones_like": _filled,
    "eq": _equal, "ne": lambda x, y: ~_equal(x, y),
    "mm": _product(torch.mm), "bmm": _product(torch.bmm), "exp": _exp, "abs": _abs, "sgn": _sgn, "_conj": _conj,
    "_conj_physical": _conj, "conj_physical": _conj,
    "real": lambda x: x.real.clone(), "imag": lambda x: x.imaginary.clone(),
    "_fft_c2c": _c2c, "_fft_r2c": _r2c, "_fft_c2r": _c2r,
}  # fmt: skip
