"""Complex numbers as pairs of real ones: every complex tensor of a step stands for a real tensor [..., 2].

A rule computes the pair of its result from the pairs of its arguments, with real operations that are recorded; the
complex tensor itself is kept beside it, for autograd. Fourier transforms become products with matrices of cosines
and sines, n x n for n elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ane_trainer.ane.capture.trace import sources
from ane_trainer.ane.errors import Finding, UnsupportedModel

aten = torch.ops.aten
_PAIR = "_ane_pair"
Pair = tuple[torch.Tensor, torch.Tensor]

#: Linear operations that act on real and imaginary parts alike.
_ALIKE = frozenset(
    (
        "view _unsafe_view reshape expand permute transpose t unsqueeze squeeze cat stack clone detach alias sum mean "
        "neg flip roll repeat select_backward slice_backward constant_pad_nd index_select embedding zeros_like "
        "new_zeros split split_with_sizes unbind contiguous _to_copy lift_fresh as_strided gather index"
    ).split()
)
#: Views that may be written to; their axes must not count the pair's.
_PARTS = {aten.slice.Tensor, aten.select.int}


def takes(func: Any, args: Any) -> bool:
    """Whether the operation has to do with complex numbers."""
    return func in _MAKERS or any(isinstance(a, torch.Tensor) and a.is_complex() for a in _flat(args))


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of `func`; runs where the real operations it makes are recorded.

    Raises: UnsupportedModel for an operation without a rule.
    """
    name = func.overloadpacket.__name__
    if torch.Tag.inplace_view in func.tags:
        raise _refusal(func)
    if name.endswith("_") and not name.endswith("__"):
        new = args[1] if name == "copy_" else _value(name.removesuffix("_"), func, args, kwargs)
        pair_of(args[0]).copy_(_joined(_halves(new)))
        return args[0]
    if func in _PARTS:
        x, dim, *rest = args if len(args) > 1 else (*args, 0)
        dim = dim % x.dim()
        return as_complex(func(pair_of(x), dim, *rest, **kwargs))
    return _value(name, func, args, kwargs)


def _value(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rule = _RULES.get(name)
    if rule is not None:
        return rule(*args, **kwargs)
    if name in _ALIKE:
        return _each(func, args, kwargs)
    raise _refusal(func)


def _refusal(func: Any) -> UnsupportedModel:
    finding = Finding(
        sources.current() or str(func), str(func), "has no rule for complex numbers.",
        "Write it with real and imaginary parts.",
    )  # fmt: skip
    return UnsupportedModel("The step needs complex numbers:", [finding])


def pair_of(x: torch.Tensor) -> torch.Tensor:
    """[..., 2]: real and imaginary part; of a constant they are a constant."""
    pair = getattr(x, _PAIR, None)
    if pair is None:
        with torch.utils._python_dispatch._disable_current_modes():
            pair = torch.view_as_real(x.resolve_conj()).clone()
        setattr(x, _PAIR, pair)
    return pair


def as_complex(pair: torch.Tensor) -> torch.Tensor:
    """The complex tensor that stands for a pair."""
    with torch.utils._python_dispatch._disable_current_modes():
        result = torch.view_as_complex(pair.detach().clone(memory_format=torch.contiguous_format))
    setattr(result, _PAIR, pair)
    return result


def _halves(x: Any) -> Pair:
    if isinstance(x, torch.Tensor) and x.is_complex():
        pair = pair_of(x)
        return pair[..., 0], pair[..., 1]
    if isinstance(x, torch.Tensor):
        return x, torch.zeros_like(x)
    return torch.tensor(complex(x).real), torch.tensor(complex(x).imag)


def _joined(parts: Pair) -> torch.Tensor:
    real, imaginary = torch.broadcast_tensors(*parts)  # type: ignore[no-untyped-call]
    return torch.stack([real, imaginary], -1)


def _complex(parts: Pair) -> torch.Tensor:
    return as_complex(_joined(parts))


def _each(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` of the real parts and of the imaginary parts."""
    options = {k: v for k, v in kwargs.items() if k != "dtype"}
    real, imaginary = (func(*_part(args, i), **options) for i in (0, 1))
    if isinstance(real, (list, tuple)):
        return [_complex(parts) for parts in zip(real, imaginary, strict=True)]
    return _complex((real, imaginary))


def _part(argument: Any, which: int) -> Any:
    if isinstance(argument, torch.Tensor):
        if argument.is_complex() or argument.is_floating_point():
            return _halves(argument)[which]
        return argument
    if isinstance(argument, (list, tuple)):
        return type(argument)(_part(item, which) for item in argument)
    return argument


# -- arithmetic


def _real_factor(x: Any) -> bool:
    return not (isinstance(x, complex) or (isinstance(x, torch.Tensor) and x.is_complex()))


def _mul(x: Any, y: Any) -> torch.Tensor:
    if _real_factor(x) or _real_factor(y):
        (factor, other) = (x, y) if _real_factor(x) else (y, x)
        real, imaginary = _halves(other)
        return _complex((real * factor, imaginary * factor))
    (a, b), (c, d) = _halves(x), _halves(y)
    return _complex((a * c - b * d, a * d + b * c))


def _div(x: Any, y: Any) -> torch.Tensor:
    if _real_factor(y):
        real, imaginary = _halves(x)
        return _complex((real / y, imaginary / y))
    (a, b), (c, d) = _halves(x), _halves(y)
    size = c * c + d * d
    return _complex(((a * c + b * d) / size, (b * c - a * d) / size))


def _add(x: Any, y: Any, *, alpha: float = 1) -> torch.Tensor:
    (a, b), (c, d) = _halves(x), _halves(y)
    return _complex((a + c * alpha, b + d * alpha))


def _product(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Matrix products."""

    def rule(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        (a, b), (c, d) = _halves(x), _halves(y)
        return _complex((function(a, c) - function(b, d), function(a, d) + function(b, c)))

    return rule


def _exp(x: torch.Tensor) -> torch.Tensor:
    real, imaginary = _halves(x)
    size = torch.exp(real)
    return _complex((size * torch.cos(imaginary), size * torch.sin(imaginary)))


def _abs(x: torch.Tensor) -> torch.Tensor:
    real, imaginary = _halves(x)
    return torch.sqrt(real * real + imaginary * imaginary)


def _sgn(x: torch.Tensor) -> torch.Tensor:
    real, imaginary = _halves(x)
    size = torch.clamp(_abs(x), min=1e-7)
    return _complex((real / size, imaginary / size))


def _conj(x: torch.Tensor) -> torch.Tensor:
    real, imaginary = _halves(x)
    return _complex((real, -imaginary))


# -- Fourier transforms


def _matrices(n: int, forward: bool) -> Pair:
    """[n, n]: cosines and sines of the transform."""
    steps = torch.outer(torch.arange(n), torch.arange(n)) % n
    angle = steps.double() * (2.0 * math.pi / n)
    return torch.cos(angle).float(), (torch.sin(angle) * (-1.0 if forward else 1.0)).float()


def _transformed(parts: Pair, dim: int, forward: bool) -> Pair:
    real, imaginary = (part.movedim(dim, -1) for part in parts)
    cosines, sines = _matrices(real.shape[-1], forward)
    new = real @ cosines - imaginary @ sines, real @ sines + imaginary @ cosines
    return new[0].movedim(-1, dim), new[1].movedim(-1, dim)


def _scaled(parts: Pair, count: int, normalization: int) -> Pair:
    factor = {0: 1.0, 1: 1.0 / math.sqrt(count), 2: 1.0 / count}[int(normalization)]
    return parts if factor == 1.0 else (parts[0] * factor, parts[1] * factor)


def _c2c(x: torch.Tensor, dim: Sequence[int], normalization: int, forward: bool) -> torch.Tensor:
    parts = _halves(x)
    for d in dim:
        parts = _transformed(parts, d, forward)
    return _complex(_scaled(parts, math.prod(x.shape[d] for d in dim), normalization))


def _r2c(x: torch.Tensor, dim: Sequence[int], normalization: int, onesided: bool) -> torch.Tensor:
    last, n = dim[-1], x.shape[dim[-1]]
    cosines, sines = _matrices(n, forward=True)
    kept = n // 2 + 1 if onesided else n
    moved = x.movedim(last, -1)
    parts = (moved @ cosines[:, :kept]).movedim(-1, last), (moved @ sines[:, :kept]).movedim(-1, last)
    for d in dim[:-1]:
        parts = _transformed(parts, d, forward=True)
    return _complex(_scaled(parts, math.prod(x.shape[d] for d in dim), normalization))


def _c2r(x: torch.Tensor, dim: Sequence[int], normalization: int, last_dim_size: int) -> torch.Tensor:
    parts = _halves(x)
    for d in dim[:-1]:
        parts = _transformed(parts, d, forward=False)
    last, n = dim[-1], int(last_dim_size)
    kept = n // 2 + 1
    weights = torch.tensor([1.0 if k == 0 or 2 * k == n else 2.0 for k in range(kept)]).unsqueeze(1)
    cosines, sines = (m[:kept] * weights for m in _matrices(n, forward=False))
    real, imaginary = (part.movedim(last, -1)[..., :kept] for part in parts)
    result = (real @ cosines - imaginary @ sines).movedim(-1, last)
    count = n * math.prod(x.shape[d] for d in dim[:-1])
    return _scaled((result, result), count, normalization)[0]


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]


#: Operations that make complex numbers of real ones.
_MAKERS = {aten.view_as_complex.default, aten._fft_r2c.default, aten.complex.default, aten.polar.default}

_RULES: dict[str, Callable[..., Any]] = {
    "view_as_complex": as_complex, "view_as_real": lambda x: pair_of(x).clone(),
    "complex": lambda real, imaginary: _complex((real, imaginary)),
    "polar": lambda size, angle: _complex((size * torch.cos(angle), size * torch.sin(angle))),
    "mul": _mul, "div": _div, "add": _add, "sub": lambda x, y, alpha=1: _add(x, y, alpha=-alpha),
    "mm": _product(torch.mm), "bmm": _product(torch.bmm), "exp": _exp, "abs": _abs, "sgn": _sgn, "_conj": _conj,
    "_conj_physical": _conj, "conj_physical": _conj, "resolve_conj": lambda x: x,
    "real": lambda x: _halves(x)[0].clone(), "imag": lambda x: _halves(x)[1].clone(),
    "_fft_c2c": _c2c, "_fft_r2c": _r2c, "_fft_c2r": _c2r,
}  # fmt: skip
