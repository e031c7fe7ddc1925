"""ANEForge's netplist bridge on the simulator: every layer against NumPy, the worker's protocol, what chips refuse."""

from __future__ import annotations

import plistlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aneforge as af
import numpy as np
import pytest
from aneforge import _netplist_worker, dsp, linalg
from aneforge._bridges import _netplist, ane_rank_fused, ane_rearrange_fused, ane_sdpa_fused
from aneforge._compile import NETPLIST_OPS
from scipy import special

from ane_trainer.interop.aneforge import install
from tests.interop.harness import QUIET, Array, Case, run, values

pytestmark = pytest.mark.filterwarnings(QUIET)

ROWS = values(3, 33, seed=1)
MAPS = values(1, 5, 4, 6, seed=2)
POINTS = np.random.default_rng(0).integers(0, 12, (9, 3)).astype(np.float32)


def attention(q: Array, k: Array, v: Array, mask: Array | float = 0.0) -> Array:
    return special.softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5 + mask, -1) @ v


CAUSAL = np.triu(np.full((16, 16), -1e4), 1)
HEADS = tuple(values(1, 3, 16, 8, seed=seed) for seed in (3, 4, 5))
ONE = values(1, 3, 1, 8, seed=6)
HOLES = np.where(np.random.default_rng(1).random((1, 1, 16, 16)) < 0.3, -1e4, 0.0)


def blocks_first(x: Array, r: int) -> Array:
    """TensorFlow's space to depth."""
    n, c, h, w = x.shape
    return (
        x.reshape(n, c, h // r, r, w // r, r)
        .transpose(0, 3, 5, 1, 2, 4)
        .reshape(n, c * r * r, h // r, w // r)
    )


def furthest(points: Array, k: int) -> Array:
    chosen = [0]
    while len(chosen) < k:
        away = np.min([np.linalg.norm(points - points[i], axis=1) for i in chosen], 0)
        chosen.append(int(np.argmax(away)))
    return points[chosen]


def correlation(x: Array, t: Array) -> Array:
    windows = np.lib.stride_tricks.sliding_window_view(x, t.shape)
    return np.einsum("ijuv,uv->ij", windows, t)


exact: dict[str, Any] = {"relative": 0.0, "absolute": 0.0}
BLOCKS = values(1, 4, 4, 6, seed=7)
CASES = [
    Case("argmax", lambda x: x.argmax(1), (ROWS,), lambda x: x.argmax(1)[:, None], **exact),
    Case("argmax columns", lambda x: x.argmax(0), (ROWS,), lambda x: x.argmax(0)[None], **exact),
    Case("argmax in a net", lambda x: (x * 2.0).argmax(1).adds(1.0), (ROWS,), lambda x: x.argmax(1)[:, None] + 1,
         **exact),
    Case("topk", lambda x: af.topk(x, 5), (ROWS,), lambda x: -np.sort(-x, 1)[:, :5], **exact),
    Case("topk smallest", lambda x: af.topk(x, 2, largest=False), (ROWS,), lambda x: np.sort(x, 1)[:, :2], **exact),
    Case("sort", af.sort, (ROWS,), lambda x: np.sort(x, 1), **exact),
    Case("sort indices", lambda x: af.sort(x, True, True), (ROWS,), lambda x: np.argsort(-x, 1, "stable"), **exact),
    Case("sdpa", af.sdpa, HEADS, attention),
    Case("sdpa causal", lambda *t: af.sdpa(*t, is_causal=True), HEADS, lambda *t: attention(*t, CAUSAL)),
    Case("sdpa masked", lambda q, k, v, m: af.sdpa(q, k, v, attn_mask=m), (*HEADS, HOLES), attention),
    Case("sdpa decode", af.sdpa, (ONE, *HEADS[1:]), attention),
    Case("sdpa decode masked", lambda q, k, v, m: af.sdpa(q, k, v, attn_mask=m), (ONE, *HEADS[1:], HOLES[:, :, :1]),
         attention),
    Case("cross product", af.cross_product, (values(3), values(3, seed=1)), np.cross),
    Case("cross correlation", af.cross_correlation, (values(7, 9), values(3, 2)), correlation, 4e-3, 4e-3),
    Case("cost volume", lambda a, r: af.cost_volume(a, r, 2), (values(5), values(8)),
         lambda a, r: np.stack([abs(a - r[d : d + 5]) for d in range(3)])),
    Case("fps", lambda p: af.fps(p, 4), (POINTS,), lambda p: furthest(p, 4), **exact),
    Case("radius search", lambda p, c: af.radius_search(p, c, 5.0), (POINTS, POINTS[:2]),
         lambda p, c: np.linalg.norm(p[:, None] - c[None], axis=-1) <= 5.0, **exact),
    Case("minmax width", af.minmax_norm, (MAPS,),
         lambda x: (x - x.min(3, keepdims=True)) / (np.ptp(x, 3, keepdims=True) + 1e-4)),
    Case("minmax height", lambda x: af.minmax_norm(x, "Height"), (MAPS,),
         lambda x: (x - x.min(2, keepdims=True)) / (np.ptp(x, 2, keepdims=True) + 1e-4)),
    Case("space to channel", lambda x: af.space_to_channel(x, 2), (BLOCKS,), lambda x: blocks_first(x, 2), **exact),
    Case("channel to space", lambda x: af.channel_to_space(af.space_to_channel(x, 2), 2), (BLOCKS,), lambda x: x,
         **exact),
    Case("space to batch", lambda x: af.space_to_batch(x, 2, 3), (BLOCKS,),
         lambda x: np.concatenate([x[:, :, i::2, j::3] for i in range(2) for j in range(3)]), **exact),
    Case("batch to space", lambda x: af.batch_to_space(af.space_to_batch(x, 2, 3), 2, 3), (BLOCKS,), lambda x: x,
         **exact),
    Case("flatten", af.flatten, (MAPS[0],), np.ravel, **exact),
    Case("input view", lambda x: af.input_view(x, 2, 3), (ROWS[0],), lambda x: x[2:5], **exact),
    Case("dynamic slice", lambda x: af.dynamic_slice(x, 1), (ROWS[0, :4],), lambda x: x[1:3], **exact),
    Case("scaled elementwise", lambda x, z: af.scaled_elementwise(x, z, "Max", 2.0), (ROWS[0], ROWS[1]),
         lambda x, z: 2 * np.maximum(x, z), **exact),
    Case("scaled product", lambda x, z: af.scaled_elementwise(x, z, "Mult"), (ROWS[0], ROWS[1]), np.multiply),
]  # fmt: skip


def windowed(x: Array) -> Array:
    """ANEForge's `lrn`: a channel window of the size of the channels, clipped at the borders."""
    c = x.shape[1]
    squares = np.pad(x**2, ((0, 0), (c // 2, (c - 1) // 2), (0, 0), (0, 0)))
    return x / (1 + sum(squares[:, i : i + c] for i in range(c))) ** 0.75


CASES.append(Case("lrn", af.lrn, (MAPS,), windowed, 1e-2, 5e-3))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_numpy(case: Case) -> None:
    case.check()


def test_every_bridge_op_has_a_case() -> None:
    covered = set().union(*(case.ops() for case in CASES))
    assert set(NETPLIST_OPS) - covered == set()


@pytest.mark.parametrize("op", ["sdpa", "argmax", "topk"])
def test_worker_and_bridge_give_the_same_bits(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, operands = {
        "sdpa": (af.sdpa, HEADS),
        "argmax": (lambda x: x.argmax(1), (ROWS,)),
        "topk": (lambda x: af.topk(x, 5), (ROWS,)),
    }[op]
    by_worker = run(graph, *operands)
    monkeypatch.setenv("ANEFORGE_NETPLIST_WORKER", "0")
    np.testing.assert_array_equal(run(graph, *operands), by_worker)


X, Z = np.array([1.5, -2.0, 0.25, 3.0]), np.array([0.5, -2.0, 4.0, -1.0])
SQUARE = np.arange(16.0).reshape(4, 4) / 4

#: Programs that ANEForge's author of netplists knows: inputs, what NumPy says, how far off.
AUTHORED: dict[str, tuple[dict[str, Array], Any, float]] = {
    "relu": ({"x": X}, np.maximum(X, 0), 0), "sigmoid": ({"x": X}, special.expit(X), 4e-3),
    "gelu": ({"x": X}, X * special.ndtr(X), 8e-3), "tanh": ({"x": X}, np.tanh(X), 2e-3),
    "sqrt": ({"x": abs(X)}, np.sqrt(abs(X)), 2e-3), "rsqrt": ({"x": abs(X)}, abs(X) ** -0.5, 4e-3),
    "exp2": ({"x": X}, 2**X, 2e-2), "log2": ({"x": abs(X)}, np.log2(abs(X)), 1e-2), "inv": ({"x": X}, 1 / X, 1e-2),
    "sin": ({"x": X}, np.sin(X), 2e-3), "cos": ({"x": X}, np.cos(X), 2e-3), "ceil": ({"x": X}, np.ceil(X), 0),
    "floor": ({"x": X}, np.floor(X), 0), "round": ({"x": X + 0.2}, np.round(X + 0.2), 0),
    "abs": ({"x": X}, abs(X), 0), "add": ({"x": X, "z": Z}, X + Z, 0), "mul": ({"x": X, "z": Z}, X * Z, 0),
    "sub": ({"x": X, "z": Z}, X - Z, 0), "min": ({"x": X, "z": Z}, np.minimum(X, Z), 0),
    "max": ({"x": X, "z": Z}, np.maximum(X, Z), 0), "greater": ({"x": X, "z": Z}, X > Z, 0),
    "less": ({"x": X, "z": Z}, X < Z, 0), "equal": ({"x": X, "z": Z}, X == Z, 0),
    "not_equal": ({"x": X, "z": Z}, X != Z, 0), "less_equal": ({"x": X, "z": Z}, X <= Z, 0),
    "greater_equal": ({"x": X, "z": Z}, X >= Z, 0), "elu": ({"x": X}, np.where(X > 0, X, np.expm1(X)), 4e-3),
    "leaky_relu": ({"x": X}, np.where(X > 0, X, 0.01 * X), 1e-4), "relu6": ({"x": 3 * X}, np.clip(3 * X, 0, 6), 0),
    "clamped_relu": ({"x": X}, np.clip(X, 0.125, 6), 0), "prelu": ({"x": X}, np.where(X > 0, X, X / 8), 0),
    "silu": ({"x": X}, X * special.expit(X), 1e-2), "softsign": ({"x": X}, X / (1 + abs(X)), 1e-2),
    "thresholded_relu": ({"x": X + 0.25}, np.where(X > 0, X + 0.25, 0), 0),
    "hard_sigmoid": ({"x": X}, np.clip(0.2 * X + 0.5, 0, 1), 1e-3),
    "hard_swish": ({"x": X}, X * np.clip(X + 3, 0, 6) / 6, 2e-3), "div": ({"x": X, "z": Z}, X / Z, 2e-2),
    "floor_div": ({"x": X + 0.1, "z": Z}, np.floor((X + 0.1) / Z), 0), "softmax": ({"x": X}, special.softmax(X), 2e-3),
    "maxpool2x2": ({"x": SQUARE}, [5 / 4, 7 / 4, 13 / 4, 15 / 4], 0),
    "avgpool2x2": ({"x": SQUARE}, [2.5 / 4, 4.5 / 4, 10.5 / 4, 12.5 / 4], 1e-3), "reduce_sum": ({"x": X}, X.sum(), 0),
    "reduce_mean": ({"x": X}, X.mean(), 1e-3), "reduce_max": ({"x": X}, X.max(), 0),
    "reduce_min": ({"x": X}, X.min(), 0), "slice": ({"x": X}, X[1:3], 0),
    "upsample_nearest": ({"x": X}, X.reshape(2, 2).repeat(2, 0).repeat(2, 1), 0),
    "concat": ({"x": X, "z": Z}, np.concatenate([X, Z]), 0), "reshape": ({"x": X}, X, 0),
    "transpose": ({"x": X}, X.reshape(2, 2).T, 0), "matmul": ({"a": SQUARE, "x": X}, SQUARE @ X, 1e-2),
    "conv1x1": ({"x": X}, 2 * X, 0), "add_relu": ({"x": X, "z": Z}, np.maximum(X + Z, 0), 0),
    "conv_relu": ({"x": X}, np.maximum(2 * X, 0), 0),
    "conv_add_relu": ({"x": X, "z": Z}, np.maximum(2 * X + Z, 0), 0),
    "relu_chain": ({"x": X}, np.maximum(X, 0), 0), "conv_chain": ({"x": X}, 2 * X, 0),
    "add_const": ({"x": X}, X + 1, 0), "broadcast_const_add": ({"x": X}, X + 1, 0),
    "fill_like_as_broadcast_add": ({"x": X}, X + 1, 0), "gather_const_indices": ({"x": X}, X, 0),
    "dynamic_slice_const_f16": ({"x": X}, X[1:3], 0), "dynamic_slice_broadcast_const_f16": ({"x": X}, X[1:3], 0),
    "goc_scalar_scale_bias": ({"x": X}, 2 * (X + 1), 0),
    "fps_radius_search": ({"points": POINTS[:4].T}, None, 0),
}  # fmt: skip


@pytest.mark.parametrize("op", AUTHORED)
def test_authored_netplists(op: str, tmp_path: Path) -> None:
    feeds, want, bound = AUTHORED[op]
    _netplist.write_model(op, tmp_path)
    for name, array in feeds.items():
        array.astype(np.float16).tofile(tmp_path / name)
    _netplist.invoke_netplist(
        _netplist.ensure_invoker("sdpa_invoker"), tmp_path / "net.plist", weights=sorted(tmp_path.glob("weights.*")),
        inputs=[(name, tmp_path / name) for name in feeds], outputs=[("y", tmp_path / "y")],
    )  # fmt: skip
    got = np.fromfile(tmp_path / "y", np.float16)
    if want is not None:
        np.testing.assert_allclose(got, np.ravel(want), rtol=bound, atol=bound)


def authored(folder: Path, op: str, layer: str | None = None, **options: Any) -> dict[str, Any]:
    """Run what ANEForge authors for an op, its first unit of another layer if one is named."""
    _netplist.write_model(op, folder, **options)
    path = folder / "net.plist"
    tree = plistlib.loads(path.read_bytes())
    network = tree[tree["Networks"][0]]
    if layer:
        network[network["Units"][0]]["Type"] = layer
        path.write_bytes(plistlib.dumps(tree))
    (folder / "x").write_bytes(np.arange(36, dtype=np.float16).tobytes())
    invoker = _netplist.ensure_invoker("sdpa_invoker")
    done = _netplist.invoke_netplist(
        invoker, path, inputs=[("x", folder / "x")], outputs=[("y", folder / "y")]
    )
    return dict(done)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("MatrixDecomposition", "the factorization does not compile"),
        ("Unflatten", "no form of it compiles"),
        ("RandomGenerator", "does not have it: no source says which numbers"),
        ("Resample", "does not have it: no source gives its parameters"),
        ("Shape", "does not have it: no source gives the order"),
        ("NoSuchLayer", "does not have it: no layer of this type"),
    ],
)
def test_layers_that_do_not_run_say_whether_the_engine_has_them(
    layer: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=f"{layer}.*{reason}"):
        authored(tmp_path, "relu", layer)


def test_the_rasterizer_is_the_identity_of_one_channel(tmp_path: Path) -> None:
    authored(tmp_path, "kernel_rasterizer", width=6, height=6)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "y", np.float16), np.arange(36))
    with pytest.raises(RuntimeError, match="only the identity of one channel compiles"):
        authored(tmp_path, "kernel_rasterizer", width=6, height=6, output_channels=9)
    with pytest.raises(RuntimeError, match="needs one channel"):
        authored(tmp_path, "kernel_rasterizer", width=3, height=4, channels=3)


@pytest.mark.parametrize(
    ("refused", "passes"),
    [
        (lambda: ane_rank_fused.topk(ROWS, 3), lambda: ane_rank_fused.topk(ROWS, 5)),
        (lambda: ane_rank_fused.topk(ROWS, 4), lambda: ane_rank_fused.topk(ROWS, 2)),
    ],
)
def test_what_the_compiler_refuses(refused: Callable[[], object], passes: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="compile failed"):
        refused()
    passes()


def test_sorting_needs_the_texture_engine() -> None:
    install("m1", threads=1)
    with pytest.raises(RuntimeError, match="M1 does not have it"):
        ane_rank_fused.sort(ROWS)
    install("m2", threads=1)
    assert ane_rank_fused.sort(ROWS).shape == ROWS.shape


def test_sort_moves_all_channels_by_one() -> None:
    got = ane_rank_fused.sort(ROWS, key_lane=1, descending=True)
    np.testing.assert_array_equal(got, ROWS[:, np.argsort(-ROWS[1], kind="stable")])


def test_native_rearrangements() -> None:
    np.testing.assert_array_equal(
        ane_rearrange_fused.pixel_shuffle(ane_rearrange_fused.pixel_unshuffle(BLOCKS, 2), 2), BLOCKS
    )


def worker() -> Any:
    return _netplist_worker.build_worker("argmax", ROWS.shape, {"axis": 1})


def test_the_worker_answers_batches_and_ends() -> None:
    process, _ = worker()
    one, two = process.eval_batch([[ROWS], [-ROWS]])
    np.testing.assert_array_equal(one[0], ROWS.argmax(1))
    np.testing.assert_array_equal(two[0], ROWS.argmin(1))
    with pytest.raises(ValueError, match="expects 1"):
        process.eval([ROWS, ROWS])
    process.release()
    assert process._proc.poll() == 0
    with pytest.raises(RuntimeError, match="has exited"):
        process.eval([ROWS])


def test_a_process_that_someone_plays_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def played(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, '{"status": "ok", "played": true}\n', "")

    monkeypatch.setattr(subprocess, "run", played)
    assert _netplist.invoke_netplist(_netplist.ensure_invoker("rank_invoker"), tmp_path / "none")["played"]


def test_the_invoker_is_a_program_of_its_own(tmp_path: Path) -> None:
    _netplist.write_model("add", tmp_path)
    for name, array in (("x", X), ("z", Z)):
        array.astype(np.float16).tofile(tmp_path / name)
    command = [_netplist.ensure_invoker("sdpa_invoker"), "--net-plist", tmp_path / "net.plist"]
    command += [
        "--input",
        f"x={tmp_path / 'x'}",
        "--input",
        f"z={tmp_path / 'z'}",
        "--output",
        f"y={tmp_path / 'y'}",
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert '"status": "ok"' in done.stdout
    np.testing.assert_array_equal(np.fromfile(tmp_path / "y", np.float16), X + Z)


def test_attention_by_hand_with_and_without_the_largest_subtracted() -> None:
    q, k, v = (x.astype(np.float16) for x in HEADS)
    want = attention(*HEADS)
    for subtract in (True, False):
        got = ane_sdpa_fused.sdpa_fused(q, k, v, subtract_max=subtract)
        np.testing.assert_allclose(got, want, atol=6e-3)


def test_linear_algebra_that_pivots() -> None:
    rng = np.random.default_rng(0)
    a = (rng.standard_normal((6, 6)) + np.diag([3, -3, 3, 3, -3, 3])).astype(np.float16).astype(np.float32)
    b = rng.standard_normal(6).astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(linalg.solve(a, b), np.linalg.solve(a, b), atol=2e-2)
    np.testing.assert_allclose(linalg.inv(a), np.linalg.inv(a), atol=2e-2)
    np.testing.assert_allclose(linalg.det(a), np.linalg.det(a), rtol=2e-2)


def test_correlation_by_the_bridge() -> None:
    x, t = values(40), values(8)
    want = np.correlate(x, t, "valid")
    np.testing.assert_allclose(dsp.correlate(x, t), want, atol=2e-2)
