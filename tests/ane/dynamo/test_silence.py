"""What Dynamo leaves to PyTorch is told once, by layer and line, and stands in the report; what it takes is not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ane_trainer.ane.dynamo import report
from ane_trainer.ane.dynamo.report import GraphBreakWarning


class Tagger(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])  # type: ignore[no-any-return]


class Mixed(nn.Linear):
    def forward(self, x: Tensor, adjacency: Any = None) -> Tensor:
        return torch.spmm(adjacency, super().forward(x))


class Loop(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            if x.sum() > 1e9:
                x = x / 2
        return super().forward(x)


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
    "GRU": (Tagger(nn.GRU(8, 8)), (X,)), "LSTM": (Tagger(nn.LSTM(8, 8)), (X,)),
    "sparse": (Mixed(8, 3), (X, torch.eye(6).to_sparse())), "a break in a loop": (Loop(8, 3), (X,)),
}  # fmt: skip


def run(model: nn.Module, args: tuple[Any, ...]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = torch.compile(model, backend="ane", options={"device": "sim"})
        for _ in range(2):
            fast(*args).sum().backward()
    return [str(w.message) for w in caught if issubclass(w.category, GraphBreakWarning)]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_what_no_program_runs_is_told_once(name: str, again: bool) -> None:
    if name == "a break in a loop" and torch.__version__.startswith("2.10."):
        pytest.skip("torch 2.10 gives such a function up without a trace")
    if again:  # the watch outlives a reset of Dynamo
        run(nn.Linear(8, 3), (X,))
        torch._dynamo.reset()
    told = run(*CASES[name])
    assert len(told) == 1
    assert "on the CPU" in told[0]
    assert "on the CPU" in str(report()) or "graph break" in str(report())
    if name in ("GRU", "LSTM"):
        assert name in told[0]


def test_what_programs_run_is_not_told() -> None:
    assert run(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), (X,)) == []
    assert report().on_cpu == []


@torch._dynamo.config.patch(recompile_limit=2)
def test_what_is_compiled_too_often_is_told() -> None:
    """A Python number that changes each call: beyond Dynamo's limit PyTorch runs the function, for which none asks."""
    torch.compiler.reset()

    class Named(nn.Module):
        """Its forward depends on a text."""

        mode = ""

        def forward(self, x: Tensor) -> Tensor:
            return x * len(self.mode)

    model = Named()
    run = torch.compile(model, backend="ane")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for model.mode in ("a", "ab", "abc", "abcd", "abcde"):
            assert torch.allclose(run(torch.ones(3)), torch.full((3,), float(len(model.mode))))
    told = [str(w.message) for w in seen if issubclass(w.category, GraphBreakWarning)]
    assert len(told) == 1, told
    assert "'forward'" in told[0]
    assert "recompile_limit = 2" in told[0]
    assert len(report().on_cpu) == 1
