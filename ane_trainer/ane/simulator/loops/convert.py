"""Whole arrays at machine speed: fp16 patterns decoded and encoded, real numbers rounded, engine tables looked up.

What `fp16.decode`, `fp16.encode`, `fp16.round_half_away` and `tables.evaluate` define, as LLVM loops.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.loops import jit, lanes
from ane_trainer.ane.simulator.loops.ir import (
    F32,
    F64,
    I16,
    I32,
    I64,
    PTR,
    Definition,
    Function,
    Type,
    Value,
    module,
)
from ane_trainer.ane.simulator.loops.jit import Stage, Team, addresses, divided
from ane_trainer.ane.simulator.numbers.fp16 import encode, round_half_away
from ane_trainer.ane.simulator.numbers.tables import evaluate, lookup

Singles = NDArray[np.float32]

_FEW = 1 << 10
"""Numbers below which a compiled call brings nothing."""


def decode_into(half: NDArray[np.float16], out: Singles, threads: int = 1) -> None:
    """Decode contiguous float16 patterns into contiguous float32 storage of the same size."""
    _share(_decoder(), half.size, threads, half, out)


def encoded(values: Singles, threads: int = 1) -> NDArray[np.float16]:
    """The fp16 patterns of a decoded array; `ValueError` for a value that no pattern decodes to."""
    if values.size < _FEW:
        return encode(values)
    patterns, wrong = np.empty(values.shape, np.float16), np.zeros(1, np.int32)
    _share(_encoder(), values.size, threads, np.ascontiguousarray(values), patterns, wrong)
    return encode(values) if wrong[0] else patterns  # the slow form names the value


def rounded(x: Array) -> Singles:
    """Decoded fp16 of real numbers, as `round_half_away` gives it. A contiguous float32 array is used up."""
    if x.size < _FEW or x.dtype not in (np.float32, np.float64) or not x.flags.c_contiguous:
        return round_half_away(x)
    out = x if x.dtype == np.float32 and x.flags.writeable else np.empty(x.shape, np.float32)
    _rounders()["round32" if x.dtype == np.float32 else "round64"](x.ctypes.data, out.ctypes.data, x.size)
    return out


def table_of(name: str, x: Singles) -> Singles:
    """The table `name` of decoded values, as `tables.evaluate` gives it."""
    if x.size < _FEW or not x.flags.c_contiguous or x.dtype != np.float32:
        return evaluate(name, x)
    out = np.empty(x.shape, np.float32)
    _rounders()["gather"](x.ctypes.data, out.ctypes.data, x.size, lookup(name).ctypes.data)
    return out


def _share(loop: Callable[..., None], count: int, threads: int, *arrays: Array) -> None:
    arguments = addresses(*(array.__array_interface__["data"][0] for array in arrays))
    shares, place = divided(count, count, threads), ctypes.addressof(arguments)
    if len(shares) == 1:
        loop(place, 0, count)
    elif shares:
        Team([Stage(jit.address(loop), place)], shares, threads).run()


@cache
def _encoder() -> Callable[..., None]:
    f = Function("encode", arguments=PTR, first=I64, last=I64)
    arguments, first, last = f.parameters
    source, out, wrong = (arguments.at(i, PTR).load(PTR) for i in range(3))
    bad = f.variable(f.constant(I32, 0))
    with f.loop(first, last) as i:
        patterns, differs = lanes.encoded(source.at(i, F32).load(F32))
        bad.set(bad.value | differs)
        out.at(i, I16).store(patterns)
    with f.when(bad.value.compare("ne", 0)):
        wrong.store(f.constant(I32, 1))
    return jit.compile_ir(module([f.definition()]), ["encode"])["encode"]


@cache
def _decoder() -> Callable[..., None]:
    f = Function("decode", arguments=PTR, first=I64, last=I64)
    arguments, first, last = f.parameters
    half, out = (arguments.at(i, PTR).load(PTR) for i in range(2))
    with f.loop(first, last) as i:
        out.at(i, F32).store(lanes.decoded(half.at(i, I16).load(I16)))
    return jit.compile_ir(module([f.definition()]), ["decode"])["decode"]


@cache
def _rounders() -> dict[str, Callable[..., None]]:
    loops = [_round("round32", F32, I32, 13), round64(), _gather()]
    return jit.compile_ir(module(loops), ["round32", "round64", "gather"])


def round64() -> Definition:
    """`round64(ptr doubles, ptr floats, i64 count)`: decoded fp16 of real numbers."""
    return _round("round64", F64, I64, 42)


def _round(name: str, real: Type, word: Type, shift: int) -> Definition:
    f = Function(name, data=PTR, out=PTR, count=I64)
    data, out, count = f.parameters
    with f.loop(0, count) as i:
        out.at(i, F32).store(_half_away(data.at(i, word).load(word), real, shift))
    return f.definition()


def _half_away(bits: Value, real: Type, shift: int) -> Value:
    """Normal numbers: half a unit is added to the bits, the rest cut. Below 2^-14: multiples of 2^-24."""
    word, top = bits.type, 1 << (8 * bits.type.bytes - 1)
    largest, smallest = (0x47800000, 0x38800000) if real is F32 else (0x40F0 << 48, 0x3F10 << 48)
    sign, size = bits & -top, bits & top - 1
    normal = (size + (1 << shift - 1) & -(1 << shift)).call("umin", largest)
    scaled = size.bits(real) * 2.0**24
    whole = scaled.call("floor")
    steps = whole + (scaled - whole >= 0.5).choose(bits.function.constant(real, 1.0), 0.0)
    tiny = (steps * 2.0**-24).bits(word)
    number = (size.below(smallest).choose(tiny, normal) | sign).bits(real)
    return number.to(F32) if real is F64 else number


def _gather() -> Definition:
    f = Function("gather", disjoint=True, data=PTR, out=PTR, count=I64, table=PTR)
    data, out, count, table = f.parameters
    with f.loop(0, count) as i:
        out.at(i, F32).store(lanes.looked_up(data.at(i, F32).load(F32), table))
    return f.definition()
