"""Activations, normalisations, shape changes, reductions, attention: value and gradient against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ane_trainer.ane.stages import Lowered
from tests.ane.compiler.lower.harness import check, gradients, normal

Function = Callable[..., torch.Tensor]

ACTIVATIONS = (
    "relu", "gelu", "silu", "sigmoid", "tanh", "elu", "selu", "celu", "leaky_relu", "hardtanh", "hardswish",
    "hardsigmoid", "softplus", "mish", "relu6", "softsign", "tanhshrink", "hardshrink", "softshrink",
    "logsigmoid", "glu",
)  # fmt: skip

UNARY: dict[str, Function] = {
    "softplus_beta": lambda x: F.softplus(x, 2.0, 1.0),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(0),
    "pow": lambda x: x.abs().pow(2.5) + x.pow(3) + x.pow(-2),
    "clamp": lambda x: x.clamp(-0.5, 0.7) + x.clamp(min=0.1),
    "remainder": lambda x: torch.remainder(x, 0.7) + torch.fmod(x, 0.4),
    "trig": lambda x: x.sin() + x.cos() + x.atan() + x.tan(),
    "hyperbolic": lambda x: x.sinh() + x.cosh() + x.asinh(),
    "log": lambda x: x.abs().log() + x.abs().log1p() + x.abs().log2() + x.abs().sqrt(),
    "var": lambda x: x.var(1) + x.std(1) + x.var(1, unbiased=False),
    "prod": lambda x: x.prod(1),
    "cumsum": lambda x: x.cumsum(1),
    "amax": lambda x: x.amax(1) + x.max(1)[0] + x.min(1).values,
    "norms": lambda x: x.norm(dim=1) + x.norm(p=1, dim=1) + x.norm(p=float("inf"), dim=1),
    "roll": lambda x: x.roll((1, -2), (0, 1)) + x.flip(1),
    "slices": lambda x: x[:, 1::2] * x[:, :1] + x[1:2, -1],
    "select_cat": lambda x: torch.cat([x[0], x.mean(0)]) * torch.stack([x[1], x[2]]).reshape(-1),
    "split": lambda x: x.chunk(3, 1)[1] * x.split([1, 5], 1)[0],
    "repeat": lambda x: x.repeat(2, 1) + x.expand(2, 4, 6).reshape(8, 6),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
    "tril": lambda x: x.tril() + x.triu(1),
    "where": lambda x: torch.where(x > 0.1, x, x * 2) + x.masked_fill(x < 0, 0.0),
    "round": lambda x: (x * 4).round() + x.floor() + x.trunc(),
    "interleave": lambda x: x.repeat_interleave(2, 1),
    "unfold": lambda x: x[None, None].expand(2, 3, 4, 6).contiguous().reshape(2, 3, 4, 6).sum((0, 1)),
    "diagonal": lambda x: x.diagonal(),
    "windows": lambda x: x.unfold(1, 3, 2),
    "sort": lambda x: x.sort(1)[0] + x.topk(6, 1)[0] + x.median(1, keepdim=True)[0],
    "angle": lambda x: torch.atan2(x, x.flip(0)) + torch.hypot(x, x.flip(1)),
    "distances": lambda x: torch.cdist(x, 2 * x.detach() + 0.1),
}

IMAGES: dict[str, Function] = {
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest_size": lambda x: F.interpolate(x, size=(7, 9)),
    "bilinear": lambda x: F.interpolate(x, size=(7, 9), mode="bilinear"),
    "bilinear_corners": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, size=(7, 9), mode="bicubic"),
    "nearest_exact": lambda x: F.interpolate(x, size=(7, 9), mode="nearest-exact"),
    "reflect": lambda x: F.pad(x, (1, 2, 2, 0), mode="reflect"),
    "replicate": lambda x: F.pad(x, (1, 2, 2, 0), mode="replicate"),
    "circular": lambda x: F.pad(x, (1, 2, 2, 0), mode="circular"),
    "im2col": lambda x: F.unfold(x, 3, padding=1, stride=2, dilation=2),
    "mean": lambda x: x.mean((2, 3)),
}

NORMS: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "batch": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), ((4, 3, 5, 5), (3,), (3,))),
    "batch1d": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), ((6, 3), (3,), (3,))),
    "layer": (lambda x, w, b: F.layer_norm(x, (5,), w, b), ((4, 3, 5), (5,), (5,))),
    "layer2": (lambda x, w, b: F.layer_norm(x, (3, 5), w, b), ((4, 3, 5), (3, 5), (3, 5))),
    "group": (lambda x, w, b: F.group_norm(x, 2, w, b), ((4, 6, 5, 3), (6,), (6,))),
    "instance": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), ((4, 6, 5, 3), (6,), (6,))),
    "rms": (lambda x, w: F.rms_norm(x, (5,), w), ((4, 3, 5), (5,))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    check(gradients(getattr(F, name)), [normal(4, 6) * 3])


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    check(gradients(UNARY[name]), [normal(4, 6)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    check(gradients(IMAGES[name]), [normal(2, 8, 4, 6)])


@pytest.mark.parametrize("name", NORMS)
def test_normalisation(name: str) -> None:
    function, shapes = NORMS[name]
    check(gradients(function), [normal(*shape, seed=i) for i, shape in enumerate(shapes)], atol=1e-5)


def test_batch_norm_updates_its_statistics() -> None:
    def layer(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> list[torch.Tensor]:
        mean, var = mean.clone(), var.clone()
        y = F.batch_norm(x, mean, var, training=True, momentum=0.3)
        return [y, mean, var]

    check(layer, [normal(4, 3, 5, 5), normal(3, seed=1), normal(3, seed=2).abs()], atol=1e-5)


def test_batch_norm_in_evaluation() -> None:
    layer = gradients(lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b), of=(0, 1, 2))
    check(layer, [normal(4, 3, 5), normal(3), normal(3, seed=1), normal(3, seed=2), normal(3, seed=3).abs()])


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal: bool) -> None:
    q, k, v = (normal(2, 2, 5, 4, seed=i) for i in range(3))
    check(gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)), [q, k, v])


def test_attention_with_a_mask_that_is_an_input() -> None:
    q, k, v = (normal(2, 2, 5, 4, seed=i) for i in range(3))
    mask = normal(5, 5) > -0.5
    mask[:, 0] = True
    layer = gradients(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m))
    check(layer, [q, k, v, mask])


def test_lstm_is_unrolled() -> None:
    def layer(x: torch.Tensor, wi: torch.Tensor, wh: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros(1, 2, 4, dtype=x.dtype)
        return torch.lstm(x, (zero, zero), [wi, wh], False, 1, 0.0, False, False, True)[0]

    check(gradients(layer), [normal(2, 3, 5), normal(16, 5, seed=1), normal(16, 4, seed=2)])


PRODUCTS: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, ((4, 5), (3, 5), (3,))),
    "linear3": (F.linear, ((2, 4, 5), (3, 5), (3,))),
    "bmm": (torch.bmm, ((2, 3, 4), (2, 4, 5))),
    "broadcast": (torch.matmul, ((2, 3, 4, 5), (5, 6))),
    "mv": (torch.mv, ((3, 4), (4,))),
    "dot": (torch.dot, ((4,), (4,))),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), ((2, 3, 4), (2, 5, 4))),
    "bilinear": (F.bilinear, ((2, 3), (2, 4), (5, 3, 4), (5,))),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), ((3,), (2, 4), (4, 3))),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    function, shapes = PRODUCTS[name]
    check(gradients(function), [normal(*shape, seed=i) for i, shape in enumerate(shapes)], atol=1e-5)


BINARY: dict[str, Function] = {
    "arithmetic": lambda x, y: (x + 2 * y) * (x - y) / (y.abs() + 1) + 3 - x / 8,
    "extrema": lambda x, y: torch.maximum(x, y) + torch.minimum(x, 0.5 * y),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.3) + torch.addcdiv(x, y, x.abs() + 1, value=2.0),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3) + torch.lerp(x, y, x),
    "logic": lambda x, y: ((x > 0) & (y > 0) | ~(x > y)).to(x.dtype) * x + ((x > 0) ^ (y > 0)).to(x.dtype),
    "rsub": lambda x, y: 1 - x + torch.rsub(x, y, alpha=2),
    "scalars": lambda x, y: x.mean() * y + y.sum(),
}


@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str) -> None:
    check(gradients(BINARY[name]), [normal(4, 6), normal(4, 6, seed=1)])


def test_arguments_of_the_extrema() -> None:
    x = normal(4, 6)
    check(lambda x: [x.topk(3, 1)[1], x.argsort(0, descending=True), x.median()], [x])
    check(lambda x: [x.argmax(1), x.argmin(0), x.max(1)[1], x.argmax(), (x > 0).any(1), (x > 9).all()], [x])


def test_outputs_that_are_inputs_or_constants() -> None:
    def layer(x: torch.Tensor) -> list[Any]:
        return [x, x.reshape(-1), torch.arange(3.0), x * 1, torch.zeros(())]

    check(layer, [normal(2, 2)])


def kinds(program: Lowered) -> set[str]:
    return {op.kind for op in program.program.main.ops}


def test_the_gradient_of_silu_takes_the_sigmoid_of_the_forward() -> None:
    program = check(gradients(F.silu), [normal(4, 6)])
    assert "exp" not in kinds(program)
    assert sum(op.kind == "sigmoid" for op in program.program.main.ops) == 1


@pytest.mark.parametrize("extents", [(24,), (24, 20), (24, 3, 5)], ids=["1d", "2d", "3d"])
def test_upsampling_by_whole_factors_repeats(extents: tuple[int, ...]) -> None:
    x = normal(2, 3, *extents)
    program = check(lambda x: F.interpolate(x, scale_factor=2), [x])
    assert not kinds(program) & {"matmul", "concat"}
    check(gradients(lambda x: F.interpolate(x, scale_factor=2)), [x])


def test_upsampling_by_another_factor_looks_up() -> None:
    program = check(lambda x: F.interpolate(x, size=(36, 31)), [normal(2, 3, 24, 20)])
    assert "matmul" in kinds(program)
    check(gradients(lambda x: F.interpolate(x, scale_factor=1.5)), [normal(1, 2, 5, 7)])


@pytest.mark.parametrize("chip", ["m1", "m4"])
@pytest.mark.parametrize(
    ("function", "low", "high"),
    [
        (F.softplus, -11.0, 3.0),
        (F.logsigmoid, -3.0, 11.0),
        (torch.log1p, -0.9, 3.0),
        (torch.log1p, -1e-3, 1e-3),
    ],
)
def test_logarithms_near_one_keep_small_results(
    function: Callable[[torch.Tensor], torch.Tensor], low: float, high: float, chip: str
) -> None:
    """The tables, and the sum with 1, are 0 there."""
    x = torch.linspace(low, high, 200)
    found = torch.compile(function, backend="ane", options={"device": "sim", "chip": chip})(x)
    torch.testing.assert_close(found, function(x), rtol=0.012, atol=2e-6)
    torch._dynamo.reset()
