"""The multiply-accumulate law lane by lane (see `product.py`), for sums of few products: depthwise convolution.

An accumulator is a float64 that counts multiples of 2^-16; whole numbers to 2^51 are exact there. Once its
magnitude is 2^31 (32768) it stays, and `mac_end` makes inf of it.
"""

from __future__ import annotations

from typing import Protocol

from ane_trainer.ane.simulator.loops.ir import constant


class Writer(Protocol):
    """What emits instructions for vectors of `width` lanes (`fuse.Emitter`)."""

    width: int

    def fresh(self, text: str) -> str: ...

    def constant(self, value: float, element: str) -> str: ...

    def mac_round(self, x: str) -> str: ...


def emit(w: Writer, code: str, s: list[str]) -> str:
    """One step: `mac_start` (bias), `mac_add` (accumulator, x, weight) or `mac_end` (accumulator)."""
    if code == "mac_start":
        return _whole(w, w.fresh(f"fmul {_of(w, 'float')} {s[0]}, {w.constant(65536.0, 'float')}"))
    return _add(w, *s) if code == "mac_add" else _end(w, s[0])


def _of(w: Writer, element: str) -> str:
    return element if w.width == 1 else f"<{w.width} x {element}>"


def _name(w: Writer, name: str, element: str = "f64") -> str:
    return f"@llvm.{name}.{element}" if w.width == 1 else f"@llvm.{name}.v{w.width}{element}"


def _constant(w: Writer, value: float) -> str:
    text = constant(value)
    return text if w.width == 1 else "<" + ", ".join([f"double {text}"] * w.width) + ">"


def _whole(w: Writer, scaled: str) -> str:
    """The nearest whole number, ties away from zero, as float64."""
    d = _of(w, "double")
    wide = w.fresh(f"fpext {_of(w, 'float')} {scaled} to {d}")
    half = w.fresh(f"call {d} {_name(w, 'copysign')}({d} {_constant(w, 0.5)}, {d} {wide})")
    return w.fresh(f"call {d} {_name(w, 'trunc')}({d} {w.fresh(f'fadd {d} {wide}, {half}')})")


def _exponent(w: Writer, x: str) -> str:
    """The float32 exponent field of a decoded number; subnormal fp16 counts as 2^-14."""
    i = _of(w, "i32")
    bits = w.fresh(f"bitcast {_of(w, 'float')} {x} to {i}")
    field = w.fresh(f"and {i} {bits}, {w.constant(0x7F800000, 'i32')}")
    return w.fresh(f"call {i} {_name(w, 'umax', 'i32')}({i} {field}, {i} {w.constant(113 << 23, 'i32')})")


def _add(w: Writer, total: str, x: str, weight: str) -> str:
    f, d, i, truth = (_of(w, t) for t in ("float", "double", "i32", "i1"))
    product = w.fresh(f"fmul {f} {w.fresh(f'fmul {f} {x}, {weight}')}, {w.constant(65536.0, 'float')}")
    exponents = w.fresh(f"add {i} {_exponent(w, x)}, {_exponent(w, weight)}")
    kept = w.fresh(f"icmp ugt {i} {exponents}, {w.constant((254 - 17) << 23, 'i32')}")
    term = w.fresh(f"select {truth} {kept}, {f} {product}, {f} {w.constant(0.0, 'float')}")
    more = w.fresh(f"fadd {d} {total}, {_whole(w, term)}")
    size = w.fresh(f"call {d} {_name(w, 'fabs')}({d} {total})")
    stuck = w.fresh(f"fcmp oge {d} {size}, {_constant(w, 2.0**31)}")
    return w.fresh(f"select {truth} {stuck}, {d} {total}, {d} {more}")


def _end(w: Writer, total: str) -> str:
    """The engine's result. Bits beyond float32 are cut: they lie below every tie of the fp16 rounding."""
    d, wide = _of(w, "double"), _of(w, "i64")
    bits = w.fresh(f"bitcast {d} {total} to {wide}")
    kept = w.fresh(f"and {wide} {bits}, {w.constant(-(1 << 29), 'i64')}")
    number = w.fresh(f"fptrunc {d} {w.fresh(f'bitcast {wide} {kept} to {d}')} to {_of(w, 'float')}")
    return w.mac_round(w.fresh(f"fmul {_of(w, 'float')} {number}, {w.constant(2.0**-16, 'float')}"))
