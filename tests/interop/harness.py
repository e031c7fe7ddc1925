"""Builds, compiles and runs ANEForge graphs, and says how far a result is from a NumPy reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aneforge as af
import numpy as np
from aneforge import _runtime
from numpy.typing import NDArray

Array = NDArray[Any]

QUIET = "ignore::UserWarning"
"""ANEForge warns about dispatch cost and fp16 risk of every small graph."""


def run(graph: Callable[..., Any], *arrays: Array, **options: Any) -> Array:
    """Compile `graph` over inputs of the arrays' shapes, run it once, release it."""
    net = af.compile(graph(*(af.input(a.shape) for a in arrays)), **options)
    try:
        return np.asarray(net(*arrays))
    finally:
        net.release()


def values(*shape: int, seed: int = 0, low: float = -2.0, high: float = 2.0) -> Array:
    """Uniform values that fp16 holds exactly."""
    draw = np.random.default_rng([seed, *shape]).uniform(low, high, shape)
    return draw.astype(np.float16).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """A graph, its operands, what NumPy says, and how far off it may be: absolute + relative * |want|."""

    name: str
    graph: Callable[..., Any]
    operands: tuple[Array, ...]
    reference: Callable[..., Any]
    relative: float = 2e-3
    absolute: float = 2e-3
    options: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        got = run(self.graph, *self.operands, **self.options)
        want = np.asarray(self.reference(*self.operands), np.float64)
        assert got.shape == want.shape, f"{self.name}: shape {got.shape}, needs {want.shape}"
        excess = np.abs(got - want) - self.relative * np.abs(want) - self.absolute
        worst = np.unravel_index(np.argmax(excess), excess.shape) if excess.size else ()
        assert (excess <= 0).all(), f"{self.name}: got {got[worst]} for {want[worst]} at {worst}"

    def ops(self) -> set[str]:
        """Names of all graph ops of the case."""
        from aneforge._compile import _topo

        return {t.op for t in _topo(self.graph(*(af.input(a.shape) for a in self.operands)))}


def compile_text(folder: Path, text: str, **outputs: tuple[int, ...]) -> Any:
    """Compile a MIL text whose input is x of shape [1, 4]; the program."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.mil").write_text(text)
    return _runtime.E5RT.compile(
        folder / "model.mil", cache_dir=folder / "cache", inputs={"x": (1, 4)}, outputs=outputs
    )
