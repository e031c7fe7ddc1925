"""ANEForge's training interfaces on the simulator: every mode converges, and modes that must agree do."""

from __future__ import annotations

from typing import Any

import aneforge as af
import numpy as np
import pytest
from aneforge import autograd
from aneforge._compile import compile_multi

from tests.interop.harness import QUIET, Array, run, values

pytestmark = pytest.mark.filterwarnings(QUIET)

RNG = np.random.default_rng(3)
CENTRES = RNG.standard_normal((3, 6)) * 2
LABELS = RNG.integers(0, 3, 96)
POINTS = (CENTRES[LABELS] + RNG.standard_normal((96, 6)) * 0.5).astype(np.float32)
ONE_HOT = np.eye(3, dtype=np.float32)[LABELS]


def parameters() -> list[Any]:
    draw = np.random.default_rng(0).standard_normal
    return [
        af.parameter((draw((6, 16)) * 0.4).astype(np.float32)),
        af.parameter(np.zeros((1, 16), np.float32)),
        af.parameter((draw((16, 3)) * 0.3).astype(np.float32)),
        af.parameter(np.zeros((1, 3), np.float32)),
    ]


def forward(weights: list[Any], x: Any) -> Any:
    w1, b1, w2, b2 = weights
    return (x @ w1 + b1).relu() @ w2 + b2


MODES = {
    "host": {},
    "on the engine": {"device_optimizer": True},
    "resident": {"resident_state": True},
}


def train(optimizer: str, lr: float, steps: int = 12, **mode: Any) -> tuple[float, list[Array]]:
    weights, x, target = parameters(), af.input((32, 6)), af.input((32, 3))
    objective = af.softmax_cross_entropy(forward(weights, x), target)
    trainer = af.Trainer(objective, weights, lr=lr, loss_scale=256.0, optimizer=optimizer, **mode)
    trainer.set_dataset(x, POINTS, target, ONE_HOT)
    for _ in range(steps):
        trainer.step()
    accuracy = trainer.accuracy(POINTS, LABELS)
    trainer.release()
    return accuracy, [w.attrs["value"] for w in weights]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 0.02), ("sgd", 0.2)])
def test_every_trainer_mode_learns(mode: str, optimizer: str, lr: float) -> None:
    accuracy, _ = train(optimizer, lr, **MODES[mode])
    assert accuracy > 0.95


def test_resident_sgd_equals_the_shuttled_update_bit_for_bit() -> None:
    """The same arithmetic in one program with state on the engine, and in several with state on the host."""
    _, shuttled = train("sgd", 0.2, device_optimizer=True)
    _, resident = train("sgd", 0.2, resident_state=True)
    for a, b in zip(shuttled, resident, strict=True):
        np.testing.assert_array_equal(a, b)


def unrolled(resident: bool) -> tuple[float, list[Array]]:
    weights = parameters()
    xs, ts = [af.input((32, 6)) for _ in range(3)], [af.input((32, 3)) for _ in range(3)]
    data = (POINTS, ONE_HOT)
    trainer = af.UnrolledTrainer(
        weights, forward, "ce", xs, ts, data, lr=0.02, loss_scale=256.0, resident=resident
    )
    for _ in range(4):
        trainer.step()
    accuracy = float((trainer.predict(POINTS).argmax(1) == LABELS).mean())
    trainer.release()
    return accuracy, [w.attrs["value"] for w in weights]


def test_unrolled_steps_with_resident_state_equal_shuttled_ones() -> None:
    accuracy, state = unrolled(True)
    other, shuttled = unrolled(False)
    assert accuracy == other > 0.95
    for a, b in zip(state, shuttled, strict=True):
        np.testing.assert_array_equal(a, b)


def test_unrolled_regression() -> None:
    weights = [af.parameter(np.zeros((6, 3), np.float32))]
    goal = (POINTS @ np.linspace(-0.5, 0.5, 18).reshape(6, 3)).astype(np.float32)
    xs, ts = [af.input((32, 6)) for _ in range(2)], [af.input((32, 3)) for _ in range(2)]
    trainer = af.UnrolledTrainer(
        weights, lambda w, x: x @ w[0], "mse", xs, ts, (POINTS, goal), lr=0.05, loss_scale=16.0
    )
    for _ in range(20):
        trainer.step()
    assert np.abs(trainer.predict(POINTS) - goal).mean() < 0.15
    trainer.release()


def test_a_convolution_learns() -> None:
    rng = np.random.default_rng(1)
    stripes = np.zeros((40, 1, 8, 8), np.float32)
    kinds = np.arange(40) % 2
    stripes[kinds == 0, :, ::2, :] = 1
    stripes[kinds == 1, :, :, ::2] = 1
    stripes += rng.standard_normal(stripes.shape).astype(np.float32) * 0.1
    kernel = af.conv_param((rng.standard_normal((4, 1, 3, 3)) * 0.5).astype(np.float32))
    head = af.parameter((rng.standard_normal((36, 2)) * 0.2).astype(np.float32))

    def classify(weights: list[Any], x: Any) -> Any:
        return af.conv2d(x, weights[0]).relu().avg_pool(2).reshape(x.shape[0], 36) @ weights[1]

    one_hot = np.eye(2, dtype=np.float32)[kinds]
    inputs, targets = [af.input((20, 1, 8, 8))], [af.input((20, 2))]
    trainer = af.UnrolledTrainer(
        [kernel, head], classify, "ce", inputs, targets, (stripes, one_hot), lr=0.02, loss_scale=128.0
    )
    for _ in range(15):
        trainer.step()
    assert (trainer.predict(stripes).argmax(1) == kinds).mean() == 1
    trainer.release()


def numeric_gradient(function: Any, x: Array, seed: Array) -> Array:
    """Central differences of sum(seed * function(x)) in float64."""
    gradient = np.zeros_like(x, np.float64)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x, np.float64)
        step[i] = 1e-4
        gradient[i] = ((function(x + step) - function(x - step)) * seed).sum() / 2e-4
    return gradient


X = values(3, 8)
POSITIVE = values(3, 8, low=0.3, high=2)
GRADIENTS: list[tuple[str, Any, Any, Array, float]] = [
    ("relu", lambda x: x.relu(), lambda x: np.maximum(x, 0), X, 1e-2),
    ("sigmoid", lambda x: x.sigmoid(), lambda x: 1 / (1 + np.exp(-x)), X, 3e-2),
    ("tanh", lambda x: x.tanh(), np.tanh, X, 3e-2),
    ("silu", lambda x: x.silu(), lambda x: x / (1 + np.exp(-x)), X, 4e-2),
    ("exp", lambda x: x.exp(), np.exp, X, 1e-1),
    ("log", lambda x: x.log(), np.log, POSITIVE, 6e-2),
    ("sqrt", lambda x: x.sqrt(), np.sqrt, POSITIVE, 3e-2),
    ("rsqrt", lambda x: x.rsqrt(), lambda x: x**-0.5, POSITIVE, 1e-1),
    ("inverse", lambda x: x.inverse(), lambda x: 1 / x, POSITIVE, 2e-1),
    ("square", lambda x: x.square(), np.square, X, 2e-2),
    ("softmax", lambda x: x.softmax(), lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True), X, 2e-2),
    ("clip", lambda x: x.clip(-1.0, 1.0), lambda x: np.clip(x, -1, 1), X, 1e-2),
    ("abs", lambda x: x.abs(), np.abs, X, 1e-2),
    ("elu", lambda x: x.elu(), lambda x: np.where(x > 0, x, np.expm1(x)), X, 3e-2),
    ("mean", lambda x: x.mean(1), lambda x: x.mean(1, keepdims=True), X, 1e-2),
    ("transpose", lambda x: x.transpose([1, 0]), lambda x: x.T, X, 1e-2),
    ("l2_norm", lambda x: x.l2_norm(), lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True), X, 4e-2),
]


@pytest.mark.parametrize(
    ("name", "graph", "function", "x", "tolerance"), GRADIENTS, ids=[g[0] for g in GRADIENTS]
)
def test_gradients_agree_with_differences(
    name: str, graph: Any, function: Any, x: Array, tolerance: float
) -> None:
    parameter = af.parameter(x)
    out = graph(parameter)
    seed_value = values(*out.shape, seed=7)
    seed = af.input(out.shape)
    gradient = autograd.backward_from(seed, out, [parameter])[parameter]
    net = compile_multi([gradient])
    feeds = {id(parameter): x, id(seed): seed_value}
    (got,) = net(*(feeds[id(t)] for t in net.input_tensors)).values()
    net.release()
    want = numeric_gradient(function, x.astype(np.float64), seed_value)
    assert np.abs(got - want).max() < tolerance


def test_gradients_of_products_norms_and_attention() -> None:
    """A pre-norm attention block: the loss falls, so every rule of it has the right sign and size."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return af.parameter((rng.standard_normal(shape) * 0.3).astype(np.float32))

    weights = [draw(8, 8) for _ in range(4)] + [
        af.parameter(np.ones((1, 8), np.float32)),
        af.parameter(np.zeros((1, 8), np.float32)),
    ]
    wq, wk, wv, wo, gamma, beta = weights
    x, goal = af.input((6, 8)), af.input((6, 8))
    normal = x.layer_norm(gamma, beta)

    def heads(t):
        return t.reshape(6, 2, 4).transpose([1, 0, 2])

    q, k, v = heads(normal @ wq), heads(normal @ wk), heads(normal @ wv)
    mixed = ((q @ k.transpose([0, 2, 1])) * 0.5).softmax(-1) @ v
    out = x + mixed.transpose([1, 0, 2]).reshape(6, 8) @ wo
    data = {x: values(6, 8), goal: values(6, 8, seed=5, low=-0.5, high=0.5)}
    trainer = af.Trainer(
        af.mse(out, goal),
        weights,
        lr=0.02,
        loss_scale=64.0,
        data_inputs=data,
        optimizer="adam",
        resident_state=True,
    )
    first = trainer.loss()
    for _ in range(40):
        trainer.step()
    assert trainer.loss() < 0.25 * first
    trainer.release()


def test_checkpointed_stack_equals_the_whole_program() -> None:
    layers = [[values(8, 8, seed=i, low=-0.4, high=0.4), values(1, 8, seed=9 + i)] for i in range(3)]

    def layer(p, x):
        return (x @ p[0] + p[1]).tanh()

    stack = af.CheckpointedStack(layer, layers[0], (4, 8))
    x0, g_out = values(4, 8, seed=20), values(4, 8, seed=21)
    out, checkpoints = stack.forward(layers, x0)
    gradients, g_in = stack.backward(layers, checkpoints, g_out)
    stack.release()
    x, seed = af.input((4, 8)), af.input((4, 8))
    weights = [[af.parameter(w) for w in lp] for lp in layers]
    y = x
    for lp in weights:
        y = layer(lp, y)
    flat = [w for lp in weights for w in lp]
    whole = autograd.backward_from(seed, y, [*flat, x])
    net = compile_multi([y, *(whole[w] for w in flat), whole[x]])
    feeds = {id(x): x0, id(seed): g_out, **{id(w): w.attrs["value"] for w in flat}}
    results = list(net(*(feeds[id(t)] for t in net.input_tensors)).values())
    net.release()
    for got, want in zip([out, *(g for lp in gradients for g in lp), g_in], results, strict=True):
        np.testing.assert_array_equal(got.reshape(want.shape), want)


def test_group_norm_and_small_cnn_of_the_model_zoo() -> None:
    x = values(2, 8, 4, 4)
    gamma, beta = np.ones(8, np.float32), np.zeros(8, np.float32)
    got = run(
        lambda t: af.group_norm_train(
            t, af.graph._const(gamma.reshape(1, 8, 1, 1)), af.graph._const(beta.reshape(1, 8, 1, 1)), 2
        ),
        x,
    )
    grouped = x.reshape(2, 2, -1)
    want = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got.reshape(2, 2, -1), want, atol=2e-2)
