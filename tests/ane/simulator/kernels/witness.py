"""How one op is held against double precision: draw a call, run it through `simulate`, compare within its
bound.

`OPS[kind]` draws one call and what it should give, PyTorch in double precision as the witness. Ops without
arithmetic must agree in every bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Program, TensorType
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.simulator import simulate

Rng = np.random.Generator


@dataclass(frozen=True)
class Drawn:
    """One call: runtime inputs by parameter name, other parameters, and the results in double precision.

    A result may differ by `ulps` fp16 units of its own or of `scale` (absolute values that were summed), plus
    `absolute`. 0 of each means equal bits.
    """

    inputs: dict[str, np.ndarray]
    params: dict[str, object]
    want: tuple[np.ndarray, ...]
    ulps: float = 0.0
    absolute: float = 0.0
    scale: np.ndarray | float = 0.0


OPS: dict[str, Callable[[Rng], Drawn]] = {}


def op(kinds: str) -> Callable[[Callable[..., Drawn]], Callable[..., Drawn]]:
    def register(draw: Callable[..., Drawn]) -> Callable[..., Drawn]:
        for kind in kinds.split():
            OPS[kind] = (lambda rng, kind=kind: draw(rng, kind)) if draw.__code__.co_argcount == 2 else draw
        return draw

    return register


def normal(rng: Rng, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float16)


def sizes(rng: Rng, count: int, low: int = 1, high: int = 6) -> tuple[int, ...]:
    return tuple(int(n) for n in rng.integers(low, high + 1, count))


def wide(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x).astype(np.float64))


def spacing(x: np.ndarray) -> np.ndarray:
    """fp16 units in the last place at magnitudes x."""
    return 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-24))), -14) - 10)


def run(kind: str, drawn: Drawn, fidelity: str) -> tuple[np.ndarray, ...]:
    b = Builder()
    dtypes = {"float16": "fp16", "bool": "bool", "int32": "int32", "int8": "int8", "uint8": "uint8"}
    args: dict[str, object] = {}
    feeds = {}
    for name, array in drawn.inputs.items():
        items = array if isinstance(array, tuple) else (array,)
        values = []
        for i, item in enumerate(items):
            values.append(b.input(f"{name}{i}", TensorType(dtypes[item.dtype.name], item.shape)))
            feeds[values[-1].name] = item
        args[name] = tuple(values) if isinstance(array, tuple) else values[0]
    params = {k: from_array(v) if isinstance(v, np.ndarray) else v for k, v in drawn.params.items()}
    results = b.multi(kind, **args, **params)
    outputs = simulate(
        Program((b.finish(results),)), feeds, chip="m4", fidelity=fidelity, threads=1, path=None
    )
    return tuple(outputs[v.name] for v in results)


def check(kind: str, drawn: Drawn, fidelity: str) -> None:
    for got, want in zip(run(kind, drawn, fidelity), drawn.want, strict=True):
        assert got.shape == want.shape, (got.shape, want.shape)
        if not drawn.ulps and not drawn.absolute:
            assert np.array_equal(got.astype(np.float64), want.astype(np.float64)), kind
            continue
        error = np.abs(got.astype(np.float64) - want)
        allowed = drawn.ulps * spacing(np.maximum(np.abs(want), drawn.scale)) + drawn.absolute
        assert (error <= allowed).all(), (kind, float((error - allowed).max()), float(error.max()))


def moved(rng: Rng, *shape: int) -> np.ndarray:
    """Any fp16 patterns but inf and NaN: a move keeps every bit."""
    return normal(rng, *shape, scale=100)


def explicit_padding(params: dict, size: tuple[int, ...], kernel: tuple[int, ...]) -> list[tuple[int, int]]:
    """(before, after) as the pad types are defined: `same` gives ceil(size / stride) results."""
    strides = params.get("strides", [1] * len(size))
    dilations = params.get("dilations", [1] * len(size))
    if params["pad_type"] == "valid":
        return [(0, 0)] * len(size)
    if params["pad_type"] == "custom":
        return [(params["pad"][2 * i], params["pad"][2 * i + 1]) for i in range(len(size))]
    pairs = []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max(0, (math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n)
        halves = (total // 2, total - total // 2)
        pairs.append(halves if params["pad_type"] == "same" else halves[::-1])
    return pairs


def padded(x: torch.Tensor, pairs: list[tuple[int, int]], value: float = 0.0) -> torch.Tensor:
    return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=value)
