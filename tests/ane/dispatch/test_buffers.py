"""Buffers that the forward changes follow PyTorch's: assigned, counted, averaged over all batches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.dynamo import ane
from ane_trainer.ane.errors import UnsupportedModel


class Tracking(nn.Module):
    """A running mean by assignment, a schedule over a step counter, a flag, batch norms of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.cumulative, self.twice = nn.BatchNorm1d(6, momentum=None), nn.BatchNorm1d(6)
        self.stateless = nn.BatchNorm1d(3, affine=False, track_running_stats=False)
        self.register_buffer("mean", torch.ones(6))
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("seen", torch.tensor(False))
        self.register_buffer("samples", torch.tensor([7], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(F.relu(self.twice(self.cumulative(self.first(x)))))
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        self.largest.copy_(torch.maximum(self.largest, x.detach().amax()))
        self.seen.fill_(True)
        self.samples += x.shape[0]
        x = (x - self.mean) * torch.exp(-self.steps.float() / 4)
        self.steps += 1
        return self.stateless(self.second(x))


def test_buffers_follow_torchs() -> None:
    torch.manual_seed(0)
    model = Tracking()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02) for m in (model, twin)]
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    step = at.compile_step(model, "cross_entropy", optimizers[0], (x, y), fidelity="fast")
    assert model.cumulative.momentum is None
    for _ in range(4):
        x = torch.randn(8, 5) * 2 + 1
        loss = step(x, y)
        expected = F.cross_entropy(twin(x), y)
        optimizers[1].zero_grad()
        expected.backward()
        optimizers[1].step()
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-2)
    for (name, mine), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(
            mine, theirs, rtol=5e-3, atol=5e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_counters_wait_for_lazy_synchronization() -> None:
    torch.manual_seed(0)
    model = Tracking()
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    step = at.compile_step(model, "cross_entropy", optimizer, (x, y), fidelity="fast", sync="lazy")
    for _ in range(3):
        step(x, y)
    assert int(model.steps) == 0
    step.sync()
    assert (int(model.steps), int(model.samples), int(model.twice.num_batches_tracked)) == (3, 31, 6)


class Unkept(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 2), kind
        self.register_buffer("state", torch.zeros(3), persistent=False)
        self.register_buffer("histogram", torch.zeros(4, dtype=torch.long))
        self.register_buffer("ready", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "state":
            self.state = x.detach().mean(0)
        if self.kind == "histogram":
            self.histogram += 1
        if self.kind == "ready" and self.ready.item() == 0:
            self.ready.fill_(1)
        return self.layer(x + self.state)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("state", r"state: buffer: is changed .* Register it with persistent=True"),
        ("histogram", r"histogram: buffer: holds 4 integers"),
        ("ready", r"reads a tensor's value .* Run the model once before"),
    ],
)
def test_what_is_not_kept_is_refused(kind: str, message: str) -> None:
    model = Unkept(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 3), torch.zeros(4, 2)
    with pytest.raises(UnsupportedModel, match=message):
        at.compile_step(model, "mse", optimizer, (x, y), fidelity="fast")
    if kind == "ready":
        model(x)  # the first call has set the flag
        at.compile_step(model, "mse", optimizer, (x, y), fidelity="fast")


class Counting(nn.Module):
    """Reads a counter as a place, a remainder, a comparison and a share; `grow` says what follows it."""

    def __init__(self, start: int, grow: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.grow = nn.Linear(4, 3), grow
        self.register_buffer("steps", torch.tensor(start))
        self.register_buffer("memory", torch.zeros(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        h = torch.where(self.steps % 2 == 0, h * 2, h) * torch.where(self.steps > 5002, 0.5, 1.0)
        self.memory.index_copy_(0, (self.steps % 4).reshape(1), h.detach().mean(0, keepdim=True))
        h = h * torch.clamp(self.steps.float() / 10000, max=1.0) + self.memory.sum(0)
        self.steps.copy_(self.grow(self.steps, x))
        return h


@pytest.mark.parametrize("start", [0, 5000])
def test_counters_of_any_size_are_read_exactly(start: int) -> None:
    torch.manual_seed(0)
    model = Counting(start, lambda steps, x: steps + 1)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    batches = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(5)]
    step = at.compile_step(model, "cross_entropy", optimizers[0], batches[0], fidelity="fast")
    for x, y in batches:
        optimizers[1].zero_grad()
        loss = F.cross_entropy(twin(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizers[1].step()
        assert step(x, y) == pytest.approx(float(loss.detach()), rel=0.01, abs=1e-3)
    step.sync()
    assert int(model.steps) == start + 5
    torch.testing.assert_close(model.memory, twin.memory, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize(
    "grow",
    [lambda steps, x: (steps + 4) % 32, lambda steps, x: 1 - steps, lambda steps, x: steps + (x > 0).sum()],
)
def test_a_counter_that_grows_unevenly_is_refused(grow: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, example = Counting(0, grow), (torch.randn(8, 4), torch.randint(0, 3, (8,)))
    with pytest.raises(UnsupportedModel, match="steps: counter: grows by"):
        at.compile_step(model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), example)


def test_a_buffer_that_no_step_writes_to_keeps_its_bits() -> None:
    """A table that is read only: the engine has it rounded, the module does not."""

    class Scheduled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.register_buffer("kept", torch.linspace(0.9999, 0.98, 100).cumprod(0))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x) * self.kept[t][:, None]

    model = Scheduled()
    before, example = (
        model.kept.clone(),
        ((torch.randn(5, 4), torch.randint(0, 100, (5,))), torch.randn(5, 3)),
    )
    step = at.compile_step(model, "mse", torch.optim.SGD(model.parameters(), lr=0.1), example)
    step(*example)
    step.sync()
    state = step.state_dict()
    step.load_state_dict(state)
    assert torch.equal(model.kept, before)
    model.kept.fill_(0.5)  # and another model's is brought by a checkpoint
    step.load_state_dict(state)
    torch.testing.assert_close(model.kept, before, rtol=1e-3, atol=0.0)


class Growing(nn.Module):
    """A float buffer of `start` to which each forward adds `change`, in a way that shows no sum."""

    def __init__(self, start: float, change: float) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(3, 2), change
        self.register_buffer("count", torch.tensor([start]))

    def forward(self, x: Tensor) -> Tensor:
        self.count.copy_((self.count * 4 + self.change * 4) / 4)
        return self.linear(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("start", "change", "told"),
    [
        (5000.0, 1.0, True),
        (2500.0, 1.0, True),
        (1000.0, 1e-3, True),
        (2000.0, 1.0, False),
        (1000.0, 4.0, False),
    ],
)
def test_a_float_buffer_that_grows_by_less_than_fp16_resolves_is_told(
    start: float, change: float, told: bool, recwarn: pytest.WarningsRecorder
) -> None:
    model = Growing(start, change)
    at.compile_step(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), device="sim",
        example=(torch.randn(4, 3), torch.arange(4) % 2), verify="off",
    )  # fmt: skip
    texts = [str(w.message) for w in recwarn if issubclass(w.category, at.NumericsWarning)]
    assert [text for text in texts if text.startswith("count: ")] == texts
    assert bool(texts) is told


class Averaging(nn.Module):
    """Averages that move by a thousandth, counts beyond 2048, and a variance over all samples so far."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 4), nn.BatchNorm1d(4, momentum=0.003)
        self.register_buffer("teacher", torch.randn(4, 8))
        self.register_buffer("count", torch.tensor(2045.0))
        self.register_buffer("seen", torch.tensor(1e-4))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.count += 1
            self.teacher.mul_(0.999).add_(self.layer.weight, alpha=0.001)
            mean, variance, total = x.mean(0), x.var(0, unbiased=False), self.seen + len(x)
            moved = mean - self.mean
            squares = self.variance * self.seen + variance * len(x) + moved**2 * self.seen * len(x) / total
            self.mean.add_(moved * len(x) / total)
            self.variance.copy_(squares / total)
            self.seen.copy_(total)
        x = (x - self.mean) / torch.sqrt(self.variance + 1e-8)
        return self.norm(self.layer(x)) + F.linear(x, self.teacher) * (self.count / 4000)


@pytest.mark.parametrize("door", ["compile_step", "torch.compile"])
def test_averages_and_counts_move_by_less_than_fp16_resolves(door: str) -> None:
    torch.manual_seed(0)
    model = Averaging()
    twin, start = copy.deepcopy(model), copy.deepcopy(dict(model.named_buffers()))
    own, theirs = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, twin))
    batches = [(torch.randn(16, 8) * 3 + 5, torch.randn(16, 4)) for _ in range(12)]
    if door == "compile_step":
        step = at.compile_step(model, "mse", own, batches[0], device="sim")
    else:
        fast = torch.compile(model, backend=ane, options={"device": "sim", "chip": "m4"})
    for x, y in batches:
        loss = F.mse_loss(twin(x), y)
        theirs.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        theirs.step()
        if door == "compile_step":
            got = float(step(x, y))
        else:
            value = F.mse_loss(fast(x), y)
            own.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            own.step()
            got = float(value.detach())
        assert got == pytest.approx(float(loss.detach()), rel=0.01)
    for name, theirs_now in twin.named_buffers():
        moved, wanted = (m.float() - start[name] for m in (dict(model.named_buffers())[name], theirs_now))
        assert float((moved - wanted).norm()) < 0.02 * float(wanted.norm()), name


class Masked(nn.Module):
    """An encoder layer beside a buffer that the forward writes to: its views are of permuted values."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        self.mean.mul_(0.99).add_(x.detach().mean((0, 1)), alpha=0.01)
        return self.head((x - self.mean).mean(1))  # type: ignore[no-any-return]


def test_slow_buffers_of_attention() -> None:
    torch.manual_seed(0)
    model, x, y = Masked(), torch.randn(4, 5, 8), torch.arange(4) % 3
    step = at.compile_step(model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), (x, y))
    step(x, y)
    assert step.agreement is not None
    assert step.agreement.agrees


def test_vectors_that_each_forward_makes_anew_are_not_told() -> None:
    """A power iteration that has converged changes them by less than fp16 resolves, and loses nothing by it."""
    torch.manual_seed(0)
    model = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
    x = torch.randn(8, 6)
    for _ in range(8):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        at.compile_step(
            model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), device="sim",
            example=(x, torch.arange(8)), verify="off",
        )  # fmt: skip
