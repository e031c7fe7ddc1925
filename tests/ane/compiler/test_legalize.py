"""Every limit: one case refused with a way out, one that just passes; notes; the rewrite of slices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ane_trainer.ane.compiler.legalize import legalize
from ane_trainer.ane.errors import UnsupportedModel, UsageError
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Function, Program, TensorType, Value
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.stages import Legalized, Lowered
from tests.ane.reference import evaluate

Build = Callable[[Builder], Value]


def program(build: Build) -> Lowered:
    builder = Builder()
    builder.source = "net.layer (model.py:5)"
    result = build(builder)
    return Lowered(Program((builder.finish((result,)),)), (), (), ())


def x(builder: Builder, *shape: int, name: str = "x") -> Value:
    return builder.input(name, TensorType("fp16", shape))


def relu(*shape: int) -> Build:
    return lambda b: b.op("relu", x=x(b, *shape))


def matmul(m: int, k: int, n: int, *lead: int) -> Build:
    return lambda b: b.op(
        "matmul", x=x(b, *lead, m, k), y=x(b, *lead, k, n, name="y"), transpose_x=False, transpose_y=False
    )


def conv(shape: tuple[int, ...], weight: tuple[int, ...], *, constant: bool = True) -> Build:
    from ane_trainer.ane.mil.program import Literal

    def build(b: Builder) -> Value:
        kernel: object = x(b, *weight, name="w")
        if constant:
            kernel = Literal(TensorType("fp16", weight), bytes(2 * int(np.prod(weight))))
        return b.op("conv", x=x(b, *shape), weight=kernel)

    return build


def pool(kind: str, size: int, window: int) -> Build:
    return lambda b: b.op(
        kind, x=x(b, 1, 1, size, size), kernel_sizes=(window, window), strides=(1, 1), pad_type="valid"
    )


#: name -> chip, what just passes, what is refused, words of the reason
LIMITS: dict[str, tuple[str, Build, Build, str]] = {
    "rank": ("m4", relu(1, 1, 1, 1, 2), relu(1, 1, 1, 1, 1, 2), "at most 5 axes"),
    "width_m1": ("m1", relu(1, 16384), relu(1, 16385), "a width of at most 16384"),
    "width_m4": ("m4", relu(65536), relu(65537), "a width of at most 65536"),
    "height_m2": ("m2", relu(16384, 1), relu(16385, 1), "a height of at most 16384"),
    "channels": ("m1", relu(65536, 1, 1), relu(65537, 1, 1), "a channels of at most 65536"),
    "batch": ("m5", relu(65536, 1, 1, 1), relu(65537, 1, 1, 1), "a batch of at most 65536"),
    "depth_m3": ("m3", relu(1, 16384, 1, 1, 1), relu(1, 16385, 1, 1, 1), "a depth of at most 16384"),
    "matmul_rank": ("m4", matmul(2, 2, 2, 1, 1), matmul(2, 2, 2, 1, 1, 1), "at most 4 axes"),
    "contraction": ("m1", matmul(1, 16384, 1), matmul(1, 16385, 1), "a contraction of at most 16384"),
    "outputs": ("m1", matmul(1, 1, 16384), matmul(1, 1, 16385), "rows and columns of at most 16384"),
    "conv_rank": (
        "m4",
        conv((1, 1, 3, 3), (1, 1, 3, 3)),
        conv((1, 1, 3, 3, 3), (1, 1, 3, 3, 3)),
        "at most 4 axes",
    ),
    "kernel_width_m1": (
        "m1",
        conv((1, 1, 1, 20), (1, 1, 1, 13)),
        conv((1, 1, 1, 20), (1, 1, 1, 14)),
        "kernel width of at most 13",
    ),
    "kernel_width_m5": (
        "m5",
        conv((1, 1, 1, 20), (1, 1, 1, 15)),
        conv((1, 1, 1, 20), (1, 1, 1, 16)),
        "kernel width of at most 15",
    ),
    "kernel_height": (
        "m4",
        conv((1, 1, 40, 1), (1, 1, 32, 1)),
        conv((1, 1, 40, 1), (1, 1, 33, 1)),
        "kernel height of at most 32",
    ),
    "runtime_weight": (
        "m4",
        conv((1, 1, 4, 4), (1, 1, 3, 3), constant=False),
        conv((2, 1, 4, 4), (1, 1, 3, 3), constant=False),
        "not constant",
    ),
    "max_pool": ("m1", pool("max_pool", 30, 28), pool("max_pool", 30, 29), "a window of at most 28"),
    "avg_pool": ("m4", pool("avg_pool", 40, 31), pool("avg_pool", 40, 32), "a window of at most 31"),
    "transpose": (
        "m1",
        lambda b: b.op("transpose", x=x(b, 16384, 1, 1), perm=(1, 0, 2)),
        lambda b: b.op("transpose", x=x(b, 16385, 1, 1), perm=(1, 0, 2)),
        "axes of at most 16384",
    ),
    "refused_op": ("m1", relu(3), lambda b: b.op("cos", x=x(b, 3)), "the engine refuses this op"),
}


def test_a_decoded_weight_is_constant() -> None:
    """More than one image is for weights that no input reaches, whatever ops make them."""

    def build(b: Builder) -> Value:
        weight = b.op(
            "constexpr_affine_dequantize",
            quantized_data=from_array(np.ones((1, 1, 3, 3), np.int8)),
            scale=from_array(np.ones(1, np.float16)),
            zero_point=from_array(np.zeros(1, np.int8)),
            axis=0,
        )
        return b.op("conv", x=x(b, 2, 1, 4, 4), weight=b.op("add", x=weight, y=0.0))

    assert legalize(program(build), "m5").lowered.program.main.ops[-1].kind == "conv"


@pytest.mark.parametrize("name", LIMITS)
def test_limit(name: str) -> None:
    chip, passing, refused, words = LIMITS[name]
    legalize(program(passing), chip)
    with pytest.raises(UnsupportedModel, match=words) as caught:
        legalize(program(refused), chip)
    assert caught.value.code == "ANE302"
    assert all(f.fix for f in caught.value.findings)
    assert any(f.where == "net.layer (model.py:5)" for f in caught.value.findings)


def test_a_later_chip_takes_what_an_earlier_refuses() -> None:
    for build in (relu(1, 16385), lambda b: b.op("cos", x=x(b, 3))):
        legalize(program(build), "m4")


def test_all_findings_are_reported() -> None:
    def build(b: Builder) -> Value:
        first = b.op("tan", x=x(b, 3))
        return b.op("acos", x=first)

    with pytest.raises(UnsupportedModel) as caught:
        legalize(program(build), "m4")
    assert [f.op for f in caught.value.findings] == ["tan", "acos"]


def test_unknown_chip() -> None:
    with pytest.raises(UsageError, match="m9"):
        legalize(program(relu(3)), "m9")


def width_slice(*shape: int, begin: int, size: int) -> Build:
    starts, sizes = (0,) * (len(shape) - 1) + (begin,), (*shape[:-1], size)
    return lambda b: b.op("slice_by_size", x=x(b, *shape), begin=starts, size=sizes)


def run(function: Function, array: np.ndarray) -> np.ndarray:
    (result,) = evaluate(function, {"x": array}).values()
    return result


def kinds(result: Legalized) -> list[str]:
    return [op.kind for op in result.lowered.program.main.ops]


def test_width_slices_move_where_the_chip_clamps() -> None:
    built = program(width_slice(3, 8, begin=2, size=4))
    on_m1, on_m4 = legalize(built, "m1"), legalize(built, "m4")
    assert kinds(on_m1) == ["reshape", "slice_by_size", "reshape"]
    assert kinds(on_m4) == ["slice_by_size"]
    array = np.arange(24.0).reshape(3, 8)
    assert np.array_equal(run(on_m1.lowered.program.main, array), array[:, 2:6])
    assert not on_m1.notes


def test_strided_width_slices_move_too() -> None:
    built = program(lambda b: b.op("slice_by_index", x=x(b, 3, 8), begin=(0, 1), end=(3, 8), stride=(1, 2)))
    result = legalize(built, "m2")
    assert kinds(result) == ["reshape", "slice_by_index", "reshape"]
    array = np.arange(24.0).reshape(3, 8)
    assert np.array_equal(run(result.lowered.program.main, array), array[:, 1::2])


def test_slices_without_an_offset_stay() -> None:
    assert kinds(legalize(program(width_slice(3, 8, begin=0, size=4)), "m1")) == ["slice_by_size"]


def test_a_width_slice_of_rank_5_is_noted() -> None:
    built = program(width_slice(1, 1, 1, 3, 8, begin=2, size=4))
    assert kinds(legalize(built, "m1")) == ["slice_by_size"]
    assert any("4094" in note.reason for note in legalize(built, "m1").notes)
    assert not legalize(built, "m4").notes


def test_operands_beyond_the_working_set_are_noted() -> None:
    assert not legalize(program(relu(1024, 1024)), "m4").notes
    assert any("working set" in note.reason for note in legalize(program(relu(1024, 1025)), "m4").notes)


@pytest.mark.parametrize("kind", ["floor", "ceil", "round"])
def test_scalar_factors_of_rounded_values_are_written_in_full_on_e5rt(kind: str) -> None:
    def build(b: Builder) -> Value:
        doubled = b.op("mul", x=b.op(kind, x=x(b, 2, 3)), y=2.0)
        return b.op("mul", x=doubled, y=3.0)

    def factors(path: str) -> list[tuple[int, ...]]:
        ops = legalize(program(build), "m5", path).lowered.program.main.ops
        return [item.type.shape for op in ops for _, item in op.literals()]

    assert factors("e5rt") == [(2, 3), ()]
    assert factors("coreml") == [(), ()]
    function = legalize(program(build), "m5").lowered.program.main
    (result,) = evaluate(function, {"x": np.full((2, 3), 1.5)}).values()
    assert (result == {"floor": 6, "ceil": 12, "round": 12}[kind]).all()
