"""ANEForge's decoders on the simulator: logits as NumPy's, the same tokens by every way of decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from aneforge import llm, speculative
from scipy import special

from tests.interop.harness import QUIET, Array

pytestmark = pytest.mark.filterwarnings(QUIET)

DIM, HEADS, KV, FFN, VOCAB = 32, 4, 2, 64, 61
PROMPT = [3, 14, 15, 9, 26, 5]


def config(**options: Any) -> llm.LlamaConfig:
    return llm.LlamaConfig(
        dim=DIM, n_layers=2, n_heads=HEADS, n_kv_heads=KV, ffn_dim=FFN, vocab=VOCAB, **options
    )


def weights(seed: int, *, experts: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    def layer() -> dict[str, Array]:
        wide = KV * DIM // HEADS
        common = {
            "wq": draw(DIM, DIM), "wk": draw(wide, DIM), "wv": draw(wide, DIM), "wo": draw(DIM, DIM),
            "attn_norm": 1 + 0.1 * draw(DIM), "mlp_norm": 1 + 0.1 * draw(DIM),
        }  # fmt: skip
        if experts:
            return common | {
                "router": 3 * draw(experts, DIM), "wgate_exps": draw(experts, FFN, DIM),
                "wup_exps": draw(experts, FFN, DIM), "wdown_exps": draw(experts, FFN, DIM),
            }  # fmt: skip
        return common | {"wgate": draw(FFN, DIM), "wup": draw(FFN, DIM), "wdown": draw(DIM, FFN)}

    return {
        "embed": draw(VOCAB, DIM) * 4, "lm_head": draw(VOCAB, DIM) * 4, "final_norm": 1 + 0.1 * draw(DIM),
        "layers": [layer(), layer()],
    }  # fmt: skip


def norm(x: Array, gamma: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gamma


def turned(x: Array) -> Array:
    """Rotary positions, the halves of a head as pairs."""
    cos, sin = (np.asarray(t, np.float64) for t in llm.rope_tables(x.shape[1], x.shape[2]))
    low, high = np.split(x, 2, -1)
    return x * cos + np.concatenate([-high, low], -1) * sin


def attended(x: Array, w: dict[str, Array]) -> Array:
    def heads(t: Array, count: int) -> Array:
        return t.reshape(len(x), count, -1).transpose(1, 0, 2)

    normal = norm(x, w["attn_norm"])
    q = turned(heads(normal @ w["wq"].T, HEADS))
    k, v = turned(heads(normal @ w["wk"].T, KV)), heads(normal @ w["wv"].T, KV)
    k, v = (np.repeat(t, HEADS // KV, 0) for t in (k, v))
    scores = q @ k.transpose(0, 2, 1) / q.shape[-1] ** 0.5 + np.triu(np.full((len(x), len(x)), -1e4), 1)
    return x + (special.softmax(scores, -1) @ v).transpose(1, 0, 2).reshape(len(x), DIM) @ w["wo"].T


def silu(x: Array) -> Array:
    return x * special.expit(x)


def fed_forward(x: Array, w: dict[str, Array], chosen: int) -> Array:
    normal = norm(x, w["mlp_norm"])
    if "router" not in w:
        return x + (silu(normal @ w["wgate"].T) * (normal @ w["wup"].T)) @ w["wdown"].T
    share = special.softmax(normal @ w["router"].T, -1)
    share = np.where(share >= np.sort(share, -1)[:, -chosen, None], share, 0)
    share = share / share.sum(-1, keepdims=True)
    gate, up = (np.einsum("td,efd->etf", normal, w[name]) for name in ("wgate_exps", "wup_exps"))
    return x + np.einsum("etf,efd,te->td", silu(gate) * up, w["wdown_exps"], share)


def logits(w: dict[str, Any], tokens: list[int], chosen: int = 0) -> Array:
    x = w["embed"][tokens].astype(np.float64)
    for layer in w["layers"]:
        x = fed_forward(attended(x, layer), layer, chosen)
    return norm(x, w["final_norm"])[-1] @ w["lm_head"].T


@pytest.mark.parametrize(
    ("compress", "bound"), [(None, 0.03), ("int8", 0.03), ("blockwise", 0.04), ("int4", 0.04)]
)
def test_prefill_gives_numpys_logits(compress: str | None, bound: float) -> None:
    w = weights(0)
    model = llm.LlamaPrefill(config(), w, compress=compress)
    got, want = model.prefill(PROMPT)[0], logits(w, PROMPT)
    model.release()
    assert np.linalg.norm(got - want) < bound * np.linalg.norm(want)
    assert got.argmax() == want.argmax()


def test_every_way_of_decoding_gives_the_same_tokens() -> None:
    model = llm.LlamaPrefill(config(), weights(1))
    times: dict[str, list[float]] = {}
    want = model.generate(PROMPT, 6, on_stage=lambda name, s: times.setdefault(name, []).append(s))
    assert set(times) == {"embedding", "layers", "step", "lm_head", "sample"}
    assert min(map(min, times.values())) > 0
    assert model.generate(PROMPT, 6) == want  # the cache is cleared
    assert model.generate(PROMPT, 6, batched_prefill=False) == want
    assert model.generate(PROMPT, 6, prefill_pad=9) == want
    assert model.generate(PROMPT, 6, ane_lm_head=False) == want
    model.release()
    model._chunk_bytes = 1  # a program for each layer
    assert model.generate(PROMPT, 6) == want
    model.release()


def test_speculative_decoding_is_exact() -> None:
    target, draft = llm.LlamaPrefill(config(), weights(1)), llm.LlamaPrefill(config(), weights(2))
    want = target.generate(PROMPT, 6, max_len=20)
    assert speculative.spec_generate(target, draft, PROMPT, 6, max_len=20, n_draft=2) == want
    target.release()
    draft.release()


def test_mixture_of_experts() -> None:
    w = weights(3, experts=4)
    cfg = config(
        layers=[llm.LayerSpec(mlp="moe")] * 2, extra={"n_experts": 4, "n_experts_per_tok": 2}
    )  # fmt: skip
    model = llm.LlamaPrefill(cfg, w)
    got, want = model.prefill(PROMPT)[0], logits(w, PROMPT, 2)
    assert np.linalg.norm(got - want) < 0.04 * np.linalg.norm(want)
    assert model.generate(PROMPT, 3) == model.generate(PROMPT, 3, batched_prefill=False)
    model.release()
