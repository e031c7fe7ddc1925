"""The programs of 16 small nets as sequences of operations; `python -m tests.ane.golden` writes them down anew.

A line of golden.txt is `net hash count`: of the operations' names and result shapes in order, without numbers. It
tells when a release of torch takes an operation apart in another way, which no other test sees if the result is
about the same. A change that is meant is written down with the command above. Where torch itself changed what it
computes, a line `net@release` holds from that release on (2.15: the gradient of a clamp at its bound is 0, not 1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ane_trainer.ane.capture import capture_training
from ane_trainer.ane.compiler.build import prepare
from ane_trainer.ane.mil.program import Program

GOLDEN = Path(__file__).with_name("golden.txt")
Example = tuple[torch.Tensor, torch.Tensor]
Make = Callable[[], tuple[nn.Module, str, Example]]


class _Applied(nn.Module):
    """`function(self, x)` over modules given by name."""

    def __init__(
        self, function: Callable[[nn.Module, torch.Tensor], torch.Tensor], **parts: nn.Module
    ) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def _classes(*shape: int, classes: int = 5) -> Example:
    return torch.randn(shape), torch.randint(0, classes, (shape[0],))


def _mlp() -> tuple[nn.Module, str, Example]:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)), "cross_entropy", _classes(8, 12)


def _cnn() -> tuple[nn.Module, str, Example]:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, stride=2),
        nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    return net, "cross_entropy", _classes(4, 1, 12, 12)


def _normalize() -> tuple[nn.Module, str, Example]:
    net = _Applied(lambda m, x: m.b(F.normalize(m.a(x), dim=-1)), a=nn.Linear(12, 8), b=nn.Linear(8, 5))
    return net, "cross_entropy", _classes(8, 12)


def _cosine() -> tuple[nn.Module, str, Example]:
    net = _Applied(lambda m, x: F.cosine_similarity(m.a(x), m.b(x)), a=nn.Linear(12, 8), b=nn.Linear(12, 8))
    return net, "mse", (torch.randn(8, 12), torch.rand(8))


def _distance() -> tuple[nn.Module, str, Example]:
    net = _Applied(lambda m, x: F.pairwise_distance(m.a(x), m.b(x)), a=nn.Linear(12, 8), b=nn.Linear(12, 8))
    return net, "l1", (torch.randn(8, 12), torch.rand(8))


def _checkpoint(reentrant: bool, dropout: float) -> Make:
    def make() -> tuple[nn.Module, str, Example]:
        part = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 12))
        net = _Applied(
            lambda m, x: m.b(checkpoint(m.part, m.a(x), use_reentrant=reentrant)),
            a=nn.Linear(12, 12), part=part, b=nn.Linear(12, 5),
        )  # fmt: skip
        return net, "cross_entropy", _classes(8, 12)

    return make


def _dropout() -> tuple[nn.Module, str, Example]:
    net = nn.Sequential(
        nn.Linear(12, 16), nn.Dropout(0.3), nn.Mish(), nn.AlphaDropout(0.2), nn.Linear(16, 5), nn.RReLU()
    )
    return net, "cross_entropy", _classes(8, 12)


def _encoder() -> tuple[nn.Module, str, Example]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
    net = nn.Sequential(
        layer, nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu"), nn.Flatten(), nn.Linear(96, 5)
    )
    return net, "cross_entropy", _classes(4, 6, 16)


def _attention() -> tuple[nn.Module, str, Example]:
    def run(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
        seen, weights = m.a(x, x, x, attn_mask=mask, average_attn_weights=False)
        return m.head((seen + weights.sum((1, 3)).unsqueeze(-1)).flatten(1))

    parts = {
        "a": nn.MultiheadAttention(16, 2, 0.1, add_bias_kv=True, batch_first=True),
        "head": nn.Linear(96, 5),
    }
    return _Applied(run, **parts), "cross_entropy", _classes(4, 6, 16)


def _gumbel() -> tuple[nn.Module, str, Example]:
    net = _Applied(
        lambda m, x: m.b(F.gumbel_softmax(m.a(x), tau=0.5) + F.gumbel_softmax(m.a(x), hard=True)),
        a=nn.Linear(12, 6), b=nn.Linear(6, 5),
    )  # fmt: skip
    return net, "cross_entropy", _classes(8, 12)


def _norms() -> tuple[nn.Module, str, Example]:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.RMSNorm(6),
        nn.LayerNorm([6, 6]), nn.Flatten(), nn.Linear(288, 5), nn.LogSoftmax(1),
    )  # fmt: skip
    return net, "nll", _classes(4, 3, 6, 6)


def _recurrent() -> tuple[nn.Module, str, Example]:
    net = _Applied(
        lambda m, x: m.b(m.gru(m.lstm(x)[0])[0][:, -1]),
        lstm=nn.LSTM(6, 8, 2, dropout=0.2, batch_first=True), gru=nn.GRU(8, 8, batch_first=True), b=nn.Linear(8, 5),
    )  # fmt: skip
    return net, "cross_entropy", _classes(4, 5, 6)


def _packed() -> tuple[nn.Module, str, Example]:
    def run(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        rows = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 4, 3, 2]), batch_first=True)
        padded, _ = nn.utils.rnn.pad_packed_sequence(m.gru(rows)[0], batch_first=True)
        return m.b(padded.mean(1))

    return (
        _Applied(run, gru=nn.GRU(6, 8, batch_first=True), b=nn.Linear(8, 5)),
        "cross_entropy",
        _classes(4, 5, 6),
    )


def _complex() -> tuple[nn.Module, str, Example]:
    filter_ = torch.randn(1, 7, dtype=torch.complex64)
    net = _Applied(
        lambda m, x: m.b(torch.fft.irfft(torch.fft.rfft(m.a(x)) * filter_, n=12)),
        a=nn.Linear(12, 12),
        b=nn.Linear(12, 5),
    )
    return net, "cross_entropy", _classes(8, 12)


def _probabilities() -> tuple[nn.Module, str, Example]:
    return nn.Sequential(nn.Linear(12, 5), nn.Sigmoid()), "bce", (torch.randn(8, 12), torch.rand(8, 5))


def _embedding() -> tuple[nn.Module, str, Example]:
    net = _Applied(
        lambda m, x: m.b(torch.cat([m.a(x).mean(1), m.bag(x)], 1)), a=nn.Embedding(20, 8), bag=nn.EmbeddingBag(20, 8),
        b=nn.Linear(16, 5),
    )  # fmt: skip
    return net, "cross_entropy", (torch.randint(0, 20, (4, 6)), torch.randint(0, 5, (4,)))


NETS: dict[str, Make] = {
    "mlp": _mlp, "cnn": _cnn, "normalize": _normalize, "cosine": _cosine, "distance": _distance,
    "checkpoint": _checkpoint(False, 0.0), "checkpoint-dropout": _checkpoint(False, 0.2),
    "checkpoint-reentrant": _checkpoint(True, 0.2), "dropout": _dropout, "encoder": _encoder,
    "attention": _attention, "gumbel": _gumbel, "norms": _norms, "recurrent": _recurrent, "packed": _packed,
    "complex": _complex, "probabilities": _probabilities, "embedding": _embedding,
}  # fmt: skip


def program(name: str) -> Program:
    """The net's training step for the m4."""
    torch.manual_seed(0)
    model, loss, example = NETS[name]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    capture = capture_training(model.train(), loss, optimizer, example)
    return prepare(capture.captured, "m4", "e5rt", "fp16").program


def fingerprint(name: str) -> str:
    """`hash count` of the program's operations."""
    ops = program(name).main.ops
    text = "\n".join(f"{op.kind} {[str(value.type) for value in op.results]}" for op in ops)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {len(ops)}"


def written() -> dict[str, str]:
    """Net -> fingerprint as golden.txt has them for the installed torch."""
    lines = [line.split(maxsplit=1) for line in GOLDEN.read_text().splitlines()]
    held = sorted((_release(key.partition("@")[2]), key.partition("@")[0], text) for key, text in lines)
    return {name: text for release, name, text in held if release <= _release(torch.__version__)}


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.partition("+")[0].split(".")[:2]) if text else ()


if __name__ == "__main__":
    kept = [line for line in GOLDEN.read_text().splitlines() if "@" in line]
    GOLDEN.write_text("\n".join([*(f"{name} {fingerprint(name)}" for name in NETS), *kept, ""]))
