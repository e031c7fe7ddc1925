"""Programs as they lie on disk, each with one planted fault: nothing was rewritten in them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Program, TensorType, Value
from ane_trainer.ane.mil.weights import from_array


def _scaled(b: Builder, factor: float, columns: int = 32) -> Value:
    return b.op("mul", x=b.input("x", TensorType("fp16", (4, columns))), y=factor)


def _weights(b: Builder, size: float) -> object:
    rng = np.random.default_rng(0)
    return from_array((rng.random((64, 16)) * size).astype(np.float16))


def norm(b: Builder) -> Value:
    h = _scaled(b, 500.0)
    q = b.op("mul", x=h, y=h, name="fault")
    v = b.op("add", x=b.op("reduce_mean", x=q, axes=[1], keep_dims=True), y=1e-5)
    return b.op("mul", x=h, y=b.op("rsqrt", x=v, epsilon=1e-6))


def length(b: Builder) -> Value:
    h = _scaled(b, 500.0)
    q = b.op("square", x=h, name="fault")
    return b.op("real_div", x=h, y=b.op("sqrt", x=b.op("reduce_sum", x=q, axes=[1], keep_dims=True)))


def small_norm(b: Builder) -> Value:
    h = _scaled(b, 5e-4)
    q = b.op("mul", x=h, y=h, name="fault")
    v = b.op("add", x=b.op("reduce_mean", x=q, axes=[1], keep_dims=True), y=6e-8)
    return b.op("mul", x=h, y=b.op("rsqrt", x=v, epsilon=1e-7))


def dead(b: Builder) -> Value:
    p = b.op("matmul", x=_scaled(b, 1e-4, 64), y=_weights(b, 0.02), name="fault")
    return b.op("mul", x=p, y=1000.0)


def accumulator(b: Builder) -> Value:
    h = b.op("add", x=b.op("abs", x=_scaled(b, 1.0, 64)), y=4.5)
    return b.op("mul", x=b.op("matmul", x=h, y=_weights(b, 200.0), name="fault"), y=1e-3)


def sliced(b: Builder) -> Value:
    s = b.op("slice_by_index", x=_scaled(b, 4000.0), begin=[0, 3], end=[4, 32], name="fault")
    return b.op("mul", x=s, y=1e-3)


def softmax(b: Builder) -> Value:
    e = b.op("exp", x=_scaled(b, 9.0), name="fault")
    return b.op("real_div", x=e, y=b.op("reduce_sum", x=e, axes=[1], keep_dims=True))


def log_of_sum(b: Builder) -> Value:
    e = b.op("exp", x=_scaled(b, 9.0), name="fault")
    return b.op("log", x=b.op("reduce_sum", x=e, axes=[1], keep_dims=False), epsilon=1e-6)


def variance(b: Builder) -> Value:
    h = b.op("add", x=_scaled(b, 1.0), y=40.0)
    squares = b.op("reduce_mean", x=b.op("mul", x=h, y=h), axes=[1], keep_dims=True)
    mean = b.op("reduce_mean", x=h, axes=[1], keep_dims=True)
    return b.op("sqrt", x=b.op("sub", x=squares, y=b.op("mul", x=mean, y=mean), name="fault"))


def offset(b: Builder) -> Value:
    return b.op("sub", x=b.op("add", x=_scaled(b, 1.0), y=1000.0), y=999.5, name="fault")


def tiny(b: Builder) -> Value:
    return b.op("mul", x=b.op("mul", x=_scaled(b, 1e-4), y=1e-4, name="fault"), y=30000.0)


def long_sum(b: Builder) -> Value:
    h = b.op("abs", x=_scaled(b, 30.0, 4096))
    return b.op("real_div", x=h, y=b.op("reduce_sum", x=h, axes=[1], keep_dims=True, name="fault"))


def epsilon(b: Builder) -> Value:
    z = b.op("relu", x=b.op("sub", x=_scaled(b, 1.0), y=60.0))
    s = b.op("add", x=b.op("reduce_sum", x=z, axes=[1], keep_dims=True), y=1e-8)
    return b.op("real_div", x=z, y=s, name="fault")


def fourth_power(b: Builder) -> Value:
    p = b.op("pow", x=b.op("add", x=b.op("abs", x=_scaled(b, 1.0)), y=30.0), y=4.0, name="fault")
    return b.op("pow", x=b.op("reduce_mean", x=p, axes=[1], keep_dims=True), y=0.25)


#: Program -> the rule and the remedy that `debug` has to find at the op called "fault", and the chip.
PLANTED: dict[Callable[[Builder], Value], tuple[str, str, str]] = {
    norm: ("overflow", "norm", "m4"),
    length: ("overflow", "norm", "m4"),
    small_norm: ("underflow", "norm", "m4"),
    dead: ("dead-products", "carry", "m4"),
    accumulator: ("accumulator", "carry", "m4"),
    sliced: ("clamped-slice", "carry", "m1"),
    softmax: ("table-end", "maximum", "m4"),
    log_of_sum: ("table-end", "maximum", "m4"),
    variance: ("cancellation", "variance", "m4"),
    offset: ("cancellation", "reassociate", "m4"),
    tiny: ("underflow", "carry", "m4"),
    long_sum: ("overflow", "carry", "m4"),
    epsilon: ("undefined", "epsilon", "m4"),
    fourth_power: ("overflow", "carry", "m4"),
}


def program_of(make: Callable[[Builder], Value]) -> Program:
    """The program that a function of the builder makes."""
    b = Builder()
    return Program((b.finish((make(b),)),))
