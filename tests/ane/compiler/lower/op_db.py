"""PyTorch's operator database as test cases: which ops are claimed, and which samples are left out and why."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from tests.ane.compiler.lower.harness import gradients, lowered, run

CLAIMS = Path(__file__).parents[3] / "data" / "op_db_claims.txt"
LARGEST = 20_000
RTOL, ATOL = 1e-4, 1e-5

#: Why a sample is no case; every one is counted under its reason.
NO_TENSOR = "no tensor among its arguments"
RANK = "a tensor of more than 5 axes: the engine has no more"
EMPTY = "an empty tensor: the engine has none"
SIZE = f"a tensor of more than {LARGEST} elements: the reference takes too long"
COMPLEX = "complex numbers"
RESULT = "its result is empty, complex, no tensor, or not finite (fp16 programs have no inf or nan)"
RAISES = "torch itself refuses the sample in float64 on the CPU"
RANDOM = "its result is random"


@dataclass(frozen=True)
class Sample:
    """One call: `function(*tensors)` gives the op's result."""

    function: Callable[..., Any]
    tensors: list[torch.Tensor]
    trained: list[int]


def claims() -> dict[str, tuple[str, ...]]:
    """Op name -> what the refusals of its samples that are not claimed say, from the data file."""
    lines = [line for line in CLAIMS.read_text().splitlines() if line and not line.startswith("#")]
    return {name: tuple(rest) for name, *rest in (line.split(" | ") for line in lines)}


def operators(name: str) -> list[Any]:
    """The database's entries of this name that take float32, all variants."""
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if op.name == name and torch.float32 in op.dtypes]


def samples(op: Any) -> Iterator[Sample | str]:
    """The op's float samples, seeded; a string is the reason why one is left out."""
    torch.manual_seed(0)
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = list(op.sample_inputs("cpu", torch.float32, requires_grad=op.supports_autograd))
    for sample in given:
        leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        given_tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
        trained = [i for i, t in enumerate(given_tensors) if t.requires_grad]
        tensors = [t.detach() for t in given_tensors]
        reason = _unfit(tensors)
        if reason is not None:
            yield reason
            continue
        exact = [t.double() if t.is_floating_point() else t for t in tensors]
        function = _function(op, leaves, spec)
        yield _unfit_result(function, exact) or Sample(function, exact, trained)


def _function(op: Any, leaves: list[Any], spec: Any) -> Callable[..., Any]:
    def call(*tensors: torch.Tensor) -> Any:
        rest = iter(tensors)
        filled = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        first, args, kwargs = pytree.tree_unflatten(filled, spec)
        return op.op(first, *args, **kwargs)

    return call


def _unfit(tensors: Sequence[torch.Tensor]) -> str | None:
    if not tensors:
        return NO_TENSOR
    if any(t.is_complex() for t in tensors):
        return COMPLEX
    if any(t.dim() > 5 for t in tensors):
        return RANK
    if any(t.numel() == 0 for t in tensors):
        return EMPTY
    return SIZE if any(t.numel() > LARGEST for t in tensors) else None


def _unfit_result(function: Callable[..., Any], tensors: list[torch.Tensor]) -> str | None:
    try:
        results = [function(*tensors) for _ in range(2)]
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
        return RAISES
    first, second = ([t for t in pytree.tree_leaves(r) if isinstance(t, torch.Tensor)] for r in results)
    if not first or any(t.numel() == 0 or t.is_complex() or not bool(t.isfinite().all()) for t in first):
        return RESULT
    if any(t.dim() > 5 for t in first):
        return RANK
    return None if all(map(torch.equal, first, second)) else RANDOM


def check_sample(sample: Sample, differentiable: bool) -> None:
    """Forward, and gradients if the op has them, of the lowered program against torch in float64.

    The program is lowered for the sample in float32 and evaluated in float64.
    """
    _compare(sample.function, sample.tensors)
    value = sample.function(*sample.tensors)
    leaves = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
    if not differentiable or not leaves[0].is_floating_point():
        return

    def first_float(*tensors: torch.Tensor) -> torch.Tensor:
        parts = pytree.tree_leaves(sample.function(*tensors))
        return next(t for t in parts if isinstance(t, torch.Tensor) and t.is_floating_point())

    tracked = [t.clone().requires_grad_(i in sample.trained) for i, t in enumerate(sample.tensors)]
    with torch.enable_grad():
        reached = first_float(*tracked).requires_grad
    if reached:
        _compare(gradients(first_float, of=sample.trained), sample.tensors)


def _compare(function: Callable[..., Any], tensors: list[torch.Tensor]) -> None:
    program = lowered(function, [t.float() if t.is_floating_point() else t for t in tensors])
    wanted = [t for t in pytree.tree_leaves(function(*tensors)) if isinstance(t, torch.Tensor)]
    got = run(program, tensors)
    assert len(wanted) == len(got)
    for want, have in zip(wanted, got, strict=True):
        reference = want.detach().double().numpy()
        assert have.size == reference.size
        if not math.isfinite(float(np.abs(reference).max())):
            continue  # torch's own gradient is not finite there: fp16 programs have no inf or nan
        np.testing.assert_allclose(have.reshape(reference.shape), reference, rtol=RTOL, atol=ATOL)
