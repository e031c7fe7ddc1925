"""Trace a torch function as capture does, lower it, and compare the program with torch in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ane_trainer.ane.capture.rewrites.decompositions import decomposition_table
from ane_trainer.ane.capture.trace.tracer import trace
from ane_trainer.ane.compiler.lower import lower
from ane_trainer.ane.stages import Captured, Lowered, Port
from tests.ane.reference import evaluate


def captured(function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> Captured:
    """The function of float32 inputs as a graph of the ops that the lowering sees."""
    names = [f"in_{i}" for i in range(len(inputs))]
    outs: list[int] = []

    def flat(*values: torch.Tensor) -> list[torch.Tensor]:
        results = [leaf for leaf in pytree.tree_leaves(function(*values)) if isinstance(leaf, torch.Tensor)]
        outs[:] = range(len(results))
        return results

    graph = trace(flat, dict(zip(names, inputs, strict=True)), decomposition_table())
    ports = tuple(Port(n, tuple(t.shape) or (1,), "batch") for n, t in zip(names, inputs, strict=True))
    results = tuple(Port(f"out_{i}", (), "result") for i in outs)
    return Captured(graph, ports, results, ())


def lowered(function: Callable[..., Any], inputs: Sequence[torch.Tensor], dtype: str = "fp32") -> Lowered:
    return lower(captured(function, inputs), dtype=dtype)


def run(program: Lowered, inputs: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """The program's outputs in float64."""
    feeds = {
        p.name: t.detach().double().numpy().reshape(p.shape)
        for p, t in zip(program.inputs, inputs, strict=True)
    }
    outputs = evaluate(program.program.main, feeds)
    return [outputs[p.name] for p in program.outputs]


def check(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], *, rtol: float = 1e-6, atol: float = 1e-6
) -> Lowered:
    """Assert that the lowered program computes what torch computes in float64."""
    program = lowered(function, [t.float() if t.is_floating_point() else t for t in inputs])
    exact = [t.double() if t.is_floating_point() else t for t in inputs]
    wanted = [t for t in pytree.tree_leaves(function(*exact)) if isinstance(t, torch.Tensor)]
    got = run(program, exact)
    assert len(wanted) == len(got)
    for want, have in zip(wanted, got, strict=True):
        reference = want.detach().double().numpy().reshape(have.shape)
        np.testing.assert_allclose(have, reference, rtol=rtol, atol=atol)
    return program


def gradients(
    function: Callable[..., torch.Tensor], *, of: Sequence[int] | None = None
) -> Callable[..., Any]:
    """The function's value, and the gradients of a weighting of it with respect to float inputs.

    The weighting depends on the first float input (as a value), so that no gradient is a constant.
    """

    def run_both(*inputs: torch.Tensor) -> list[torch.Tensor]:
        chosen = [i for i, t in enumerate(inputs) if t.is_floating_point()] if of is None else list(of)
        leaves = [t.detach().requires_grad_() if i in chosen else t for i, t in enumerate(inputs)]
        with torch.enable_grad():
            result = function(*leaves)
            ramp = (
                torch.arange(1, result.numel() + 1, dtype=result.dtype).reshape(result.shape) / result.numel()
            )
            mixer = next(t for t in inputs if t.is_floating_point()).detach()
            ramp = ramp * (mixer.mean() + 0.5)
            grads = torch.autograd.grad(result, [leaves[i] for i in chosen], ramp, allow_unused=True)
        return [result.detach(), *(g for g in grads if g is not None)]

    return run_both


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float64 normal numbers that fp32 holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
