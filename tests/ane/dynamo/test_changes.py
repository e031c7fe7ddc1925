"""torch.compile: hooks that come later, integers made of draws, sums that cancel, fills that stand for infinity."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.compiler.lower.registry import RULES
from ane_trainer.ane.dynamo.gradient import Backward
from ane_trainer.ane.dynamo.options import read_options
from ane_trainer.ane.errors import UnsupportedModel, UsageError

SIM = {"device": "sim"}


def doubled_output(module: nn.Module) -> None:
    module.register_forward_hook(lambda _module, _arguments, output: output * 2)


def doubled_input(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _module, arguments: (arguments[0] * 2,))


@pytest.mark.parametrize("hook", [doubled_output, doubled_input])
def test_a_hook_that_is_added_later_is_followed(hook: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(4, 8)
    call = torch.compile(model, backend="ane", options=SIM)
    torch.testing.assert_close(call(x), model(x), rtol=1e-2, atol=5e-3)
    hook(model[0])
    torch.testing.assert_close(call(x), model(x), rtol=1e-2, atol=5e-3)


def test_labels_that_a_drawn_permutation_picks() -> None:
    """mixup: the other labels are the host's, by a permutation that is drawn for the engine as well."""
    torch.manual_seed(0)
    layer, x, y = nn.Linear(8, 4), torch.randn(16, 8), torch.randint(0, 4, (16,))

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        share, order = torch.rand(()), torch.randperm(len(x))
        scores = layer(share * x + (1 - share) * x[order])
        return share * F.cross_entropy(scores, y) + (1 - share) * F.cross_entropy(scores, y[order])

    torch.manual_seed(1)
    want = loss(x, y)
    torch.manual_seed(1)
    got = torch.compile(loss, backend="ane", options=SIM)(x, y)
    torch.testing.assert_close(got, want, rtol=5e-3, atol=0.0)


def test_an_empty_batch_of_a_compiled_loss_is_pytorchs() -> None:
    layer = nn.Linear(8, 4)
    loss = torch.compile(
        lambda x, y: F.cross_entropy(layer(x), y, reduction="sum"), backend="ane", options=SIM
    )
    loss(torch.randn(16, 8), torch.randint(0, 4, (16,)))
    with pytest.warns(UserWarning, match="without elements"):
        assert float(loss(torch.randn(0, 8), torch.zeros(0, dtype=torch.long)).detach()) == 0.0


def test_threads_that_compile_at_the_same_time() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(8 + i, 16), nn.LayerNorm(16), nn.Linear(16, 3)) for i in range(4)]
    wrong: list[object] = []

    def run(number: int) -> None:
        try:
            x = torch.randn(4, 8 + number)
            call = torch.compile(models[number], backend="ane", options=SIM)
            got = torch.autograd.grad(call(x).square().sum(), list(models[number].parameters()))
            want = torch.autograd.grad(models[number](x).square().sum(), list(models[number].parameters()))
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
        except Exception as error:  # noqa: BLE001  (of any kind, in a thread)
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Spans(nn.Module):
    """Two softmaxes over places, whose scores are results, too: each bias moves all scores of one alike."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.scores = nn.Embedding(50, 16), nn.LayerNorm(16), nn.Linear(16, 2)

    def forward(self, ids: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, last = self.scores(self.norm(self.table(ids))).unbind(-1)
        return F.cross_entropy(first, ends[0]) + F.cross_entropy(last, ends[1]), first, last


def test_a_bias_that_cancels_is_no_departure() -> None:
    torch.manual_seed(0)
    call = torch.compile(Spans(), backend="ane", options=SIM)
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        call(torch.randint(0, 50, (4, 12)), torch.randint(0, 12, (2, 4)))[0].backward()


class Filled(nn.Module):
    """Scores with a fill at masked places, which are the result, or of which the least or the largest counts."""

    def __init__(self, fill: float, end: str) -> None:
        super().__init__()
        self.layer, self.fill, self.end = nn.Linear(6, 8), fill, end

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = self.layer(x).masked_fill(mask, self.fill)
        if self.end == "least":
            return scores.amin(1)
        if self.end == "largest":
            start = torch.full((16, 4), self.fill)
            return start.scatter_reduce(1, (torch.arange(8) % 4).expand(16, 8), scores, "amax")
        return scores


@pytest.mark.parametrize(
    ("fill", "end"),
    [(-1e9, ""), (torch.finfo(torch.float32).min, ""), (1e9, "least"), (-1e9, "largest"), (-1e38, "largest")],
)
def test_a_fill_that_stands_for_infinity_is_no_departure(fill: float, end: str) -> None:
    torch.manual_seed(0)
    model, x, mask = Filled(fill, end), torch.randn(16, 6), torch.rand(16, 8) > 0.7
    mask[:, :4] = False
    call = torch.compile(model, backend="ane", options=SIM)
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        got, want = call(x, mask), model(x, mask)
        got.clamp(-100, 100).sum().backward()
    torch.testing.assert_close(got.clamp(-100, 100), want.clamp(-100, 100), rtol=1e-2, atol=5e-3)


def test_a_mask_from_above_in_a_step() -> None:
    """The nearest other row, with 1e12 added to the distance from itself."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(8, 4), torch.randn(16, 8), torch.zeros(16)

    def loss(out: torch.Tensor, _target: torch.Tensor) -> torch.Tensor:
        distances = (out[:, None] - out[None]).square().sum(-1) + torch.eye(len(out)) * 1e12
        return F.relu(9.0 - distances.min(1)[0]).mean() + out.square().mean()

    want = float(loss(model(x), y).detach())
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        step = at.compile_step(
            model, loss, torch.optim.SGD(model.parameters(), lr=0.1), example=(x, y), device="sim"
        )
        assert abs(float(step(x, y)) - want) < 0.01 * want


def test_infinite_values_that_the_forward_kept_are_told() -> None:
    """Gradients that are nan, with words, no error about the user's data."""
    graph, value = torch.fx.Graph(), torch.ones(4)
    kept, given = graph.placeholder("kept"), graph.placeholder("tangents_1")
    product = graph.call_function(torch.ops.aten.mul.Tensor, (given, kept))
    for node in (kept, given, product):
        node.meta["val"] = value
    graph.output((product,))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    backward = Backward(module, read_options(SIM))
    (found,) = backward(torch.full((4,), 3.0), torch.ones(4))
    torch.testing.assert_close(found, torch.full((4,), 3.0))
    with pytest.warns(at.NumericsWarning, match="what was kept of them is infinite"):
        (found,) = backward(torch.full((4,), torch.inf), torch.ones(4))
    assert isinstance(found, torch.Tensor)
    assert bool(found.isnan().all())


def test_a_backward_that_is_refused_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that PyTorch passes on is this package's: backward graphs are compiled outside of Dynamo's frames."""
    layer = nn.Linear(8, 4)
    result = torch.compile(layer, backend="ane", options=SIM)(torch.randn(16, 8))
    monkeypatch.delitem(RULES, "aten.mm.default")
    with pytest.raises(UnsupportedModel, match="no lowering rule"):
        result.sum().backward()


class Worded(nn.Module):
    """A number of a program's own that is read from a word."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.word = nn.Linear(8, 4), ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * len(self.word)


def test_too_many_programs_of_one_graph_are_refused_in_words() -> None:
    model = Worded()
    call = torch.compile(model, backend="ane", options=SIM, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2):
        for model.word in ("a", "bb"):
            call(torch.randn(2, 8))
        model.word = "ccc"
        with pytest.raises(UsageError, match="needs fewer programs of 'forward'"):
            call(torch.randn(2, 8))
