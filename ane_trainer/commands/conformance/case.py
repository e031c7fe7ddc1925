"""One case of the suite while it is built: a program, its seeded inputs, its outputs as fp16."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Literal, Program, TensorType, Value
from ane_trainer.ane.mil.weights import Array, from_array

Half = NDArray[np.float16]
Build = Callable[["Sheet"], Value | tuple[Value, ...]]


@dataclass(frozen=True)
class Case:
    """A named program of the suite; `build` fills a sheet, the same way every time."""

    name: str
    family: str
    build: Build

    def make(self) -> tuple[Program, dict[str, Half]]:
        """The program and what is fed to it; both depend on the name alone."""
        sheet = Sheet(self.name)
        made = self.build(sheet)
        values = made if isinstance(made, tuple) else (made,)
        outputs = tuple(sheet.as_half(value) for value in values)
        return Program((sheet.b.finish(outputs),)), sheet.feeds


class Sheet:
    """A builder with seeded inputs. Equal names give equal sheets on every machine and version of NumPy."""

    def __init__(self, name: str) -> None:
        self.b = Builder()
        self.feeds: dict[str, Half] = {}
        self._seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")

    def op(self, kind: str, **args: Any) -> Value:
        """Add an operation."""
        return self.b.op(kind, **args)

    def given(self, array: Array) -> Value:
        """A runtime input that is fed these numbers."""
        half = np.ascontiguousarray(array, np.float16)
        value = self.b.input(f"in{len(self.feeds)}", TensorType("fp16", half.shape))
        self.feeds[value.name] = half
        return value

    def patterns(self, *shape: int) -> Value:
        """All 65536 bit patterns of fp16, in an order of their own."""
        return self.given(self._permutation().reshape(shape or (256, 256)))

    def bits(self, *shape: int) -> Value:
        """Random bit patterns: every exponent is as likely as any other."""
        return self.given((self._draw(shape) >> np.uint64(48)).astype(np.uint16).view(np.float16))

    def spread(self, *shape: int, scale: float = 1.0) -> Value:
        """Numbers spread evenly from -scale to scale."""
        return self.given(self.even(*shape, scale=scale))

    def weight(self, *shape: int, scale: float = 1.0, dtype: str = "fp16") -> Literal:
        """A constant spread evenly from -scale to scale."""
        return from_array(self.even(*shape, scale=scale), dtype=dtype)

    def positive(self, *shape: int) -> Literal:
        """A constant from 0.5 to 1.5."""
        return from_array((self.even(*shape, scale=0.5) + np.float16(1)).astype(np.float16))

    def even(self, *shape: int, scale: float = 1.0) -> Half:
        """float16 numbers spread evenly from -scale to scale."""
        unit = (self._draw(shape) >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0
        return (unit * scale).astype(np.float16)

    def as_half(self, value: Value) -> Value:
        """A result as the fp16 that a port can carry: bool as 0 and 1, int8 through its scale of 1."""
        if value.type.dtype == "bool":
            return self.op("select", cond=value, a=_filled(value, 1.0), b=_filled(value, 0.0))
        if value.type.dtype in ("int8", "uint8"):
            return self.op("dequantize", input=value, scale=1.0)
        return value

    def _draw(self, shape: tuple[int, ...]) -> NDArray[np.uint64]:
        """Random 64-bit words by splitmix64, which no library can change."""
        count = int(np.prod(shape))
        with np.errstate(over="ignore"):
            state = np.uint64(self._seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(
                0x9E3779B97F4A7C15
            )
            self._seed = int(state[-1])
            mixed = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (mixed ^ (mixed >> np.uint64(31))).reshape(shape)

    def _permutation(self) -> Half:
        return np.argsort(self._draw((65536,)), kind="stable").astype(np.uint16).view(np.float16)


def fingerprint(text: str, weights: bytes, feeds: Mapping[str, Array]) -> str:
    """Twelve hexadecimal digits that change with the program or its inputs."""
    digest = hashlib.sha256(text.encode() + b"\0" + weights)
    for name in sorted(feeds):
        digest.update(name.encode() + np.ascontiguousarray(feeds[name]).tobytes())
    return digest.hexdigest()[:12]


def _filled(value: Value, number: float) -> Literal:
    return from_array(np.full(value.type.shape, number, np.float16))
