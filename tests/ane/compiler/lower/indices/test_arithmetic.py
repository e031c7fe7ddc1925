"""Integers beyond 2048 that a model computes: exact against torch's int64, or refused with the place."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.compiler.lower import lower
from ane_trainer.ane.errors import UnsupportedModel
from ane_trainer.ane.simulator import simulate
from ane_trainer.ane.stages import PAIR
from tests.ane.compiler.lower.harness import captured

T = torch.tensor([[0, 1, 1023, 1024, 2047], [2048, 5000, 7416, 9999, 3], [6000, 31, 32, 8191, 4097]])
CODES = torch.arange(64)


def run(functions: Sequence[Callable[[Tensor], Tensor]], values: Tensor) -> list[np.ndarray]:
    """The outputs of one program on the simulated engine, with the integers sent as the dispatch sends them."""
    found = captured(lambda t: [function(t) for function in functions], [values])
    bounds = (float(values.min()), float(values.max()))
    program = lower(replace(found, inputs=(replace(found.inputs[0], bounds=bounds),)))
    first = program.inputs[0]
    feeds = {first.name: values.numpy().astype(np.float16)}
    if first.index_encoding == "split":
        parts = (values % PAIR, torch.div(values, PAIR, rounding_mode="floor"))
        names = (first.name, first.quotients)
        feeds = {n: p.numpy().astype(np.float16) for n, p in zip(names, parts, strict=True)}
    outputs = simulate(program.program, feeds, chip="m4")
    return [np.asarray(outputs[port.name], np.float64) for port in program.outputs]


def hits(t: Tensor, modulus: int = 64) -> Tensor:
    """Which of 64 codes the integers are, as a look-up sees it."""
    return (t.unsqueeze(-1) % modulus == CODES).float()


def near(t: Tensor) -> Tensor:
    """Integers of which fp16 rounds several to one, of both signs."""
    return torch.cat((t, t[:, 1:3] - 1, 4096 - t), 1)


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "sort": lambda t: hits(near(t).sort(1).values),
    "sort descending": lambda t: hits(near(t).sort(0, descending=True).values),
    "argsort": lambda t: near(t).argsort(dim=1, stable=True).float(),
    "topk": lambda t: hits(near(t).topk(3, 1).values) + near(t).topk(3, 1).indices.unsqueeze(-1),
    "least": lambda t: hits(near(t).topk(2, 1, largest=False).values),
    "kthvalue": lambda t: hits(near(t).kthvalue(3, 1).values),
    "median": lambda t: hits(near(t).median(1).values),
    "amax": lambda t: hits(near(t).amax((0, 1)) - t),
    "amin": lambda t: hits(near(t).amin(1, keepdim=True) + t),
    "max of all": lambda t: hits(near(t).max() - t),
    "min of all": lambda t: hits(near(t).min() - t),
    "max": lambda t: hits(near(t).max(1).values) + near(t).max(1).indices.unsqueeze(-1),
    "min": lambda t: hits(near(t).min(0).values) + near(t).min(0).indices.unsqueeze(-1),
    "argmax": lambda t: near(t).argmax(1).float(),
    "argmin of all": lambda t: near(t).argmin().float(),
    "cummax": lambda t: hits(near(t).cummax(1).values) + near(t).cummax(1).indices.unsqueeze(-1),
    "cummin": lambda t: hits(near(t).cummin(0).values),
    "fmod": lambda t: hits(torch.fmod(4096 - t, 53) + 53),
    "truncated": lambda t: hits(torch.div(4096 - t, 31, rounding_mode="trunc") + 200),
    "add": lambda t: hits((t + 1000) % 997, 997),
    "add tensors": lambda t: hits(t + t),
    "sub": lambda t: hits(t - 3000),
    "negative": lambda t: hits(-t),
    "rsub": lambda t: hits(20000 - t),
    "mul": lambda t: hits(t * 31, 61),
    "mul large": lambda t: hits(t * 101, 1009),
    "square": lambda t: hits((t // 8) * (t // 8), 1013),
    "mul negative": lambda t: hits((t - 5000) * 7, 53),
    "div by 16": lambda t: hits(t // 16 % 500, 500),
    "div by 7": lambda t: hits(t // 7),
    "div by 1000": lambda t: hits(t // 1000),
    "div by 3000": lambda t: hits(t // 3000),
    "div by 4096": lambda t: hits(t // 4096),
    "div of negative": lambda t: hits((t - 7000) // 300),
    "mod 3": lambda t: hits(t % 3),
    "mod 500": lambda t: hits(t % 500, 500),
    "mod 2500": lambda t: hits(t % 2500, 61),
    "mod of negative": lambda t: hits((t - 9000) % 1021, 1021),
    "cumsum": lambda t: hits(t.cumsum(1), 251),
    "cumsum of rows": lambda t: hits(t.cumsum(0), 251),
    "sum": lambda t: hits(t.sum(1), 251),
    "sum of all": lambda t: hits(t.sum().reshape(1), 251),
    "where": lambda t: hits(torch.where(t > 3000, t, t + 5), 127),
    "less": lambda t: (t < 5000).float(),
    "compared": lambda t: (t.unsqueeze(2) >= t.unsqueeze(1)).float(),
    "clamp": lambda t: hits(t.clamp(40, 6001), 59),
    "maximum": lambda t: hits(torch.maximum(t, t.flip(1)), 59),
    "abs": lambda t: hits((t - 4000).abs(), 59),
    "xor": lambda t: hits(t ^ 0x155),
    "and": lambda t: hits((t & 0xFF0) // 16),
    "or": lambda t: hits(t | 5, 127),
    "shift": lambda t: hits((t >> 5) + (t << 2), 127),
    "to float and back": lambda t: t.float() / 100,
}  # fmt: skip


def test_equals_torch() -> None:
    for (name, function), got in zip(CASES.items(), run(list(CASES.values()), T), strict=True):
        wanted = function(T).double().numpy()
        if name == "to float and back":
            np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=1.5e-3)
        else:
            np.testing.assert_array_equal(got.reshape(wanted.shape), wanted, name)


def test_division_of_small_integers_is_exact() -> None:
    """An engine's quotient of 6 and 3 may be just below 2: floor would make it 1."""
    values, divisors = torch.arange(0, 2049), (3, 7, 10, 100, 997, 1000, 1024, 2047)
    functions = [lambda t, d=d: torch.stack([t // d, t % d]).float() for d in divisors]
    for divisor, got in zip(divisors, run(functions, values), strict=True):
        np.testing.assert_array_equal(got, torch.stack([values // divisor, values % divisor]).numpy())


def test_a_mask_of_many_elements_is_counted() -> None:
    mask = torch.rand(9, 701, generator=torch.Generator().manual_seed(0)) > 0.3
    found = captured(lambda m: ((m > 0.5).sum() % 1000 == torch.arange(1000)).float(), [mask.float()])
    program = lower(found)
    (result,) = simulate(
        program.program, {program.inputs[0].name: mask.numpy().astype(np.float16)}, chip="m4"
    ).values()
    assert np.asarray(result, np.float64).nonzero()[0].tolist() == [int(mask.sum()) % 1000]


def test_products_beyond_two_million_are_refused_with_the_place() -> None:
    with pytest.raises(UnsupportedModel, match="needs integers below 2097152; these can reach"):
        run([lambda t: hits(t * t * t)], T)


class Hashed(nn.Module):
    """Rows of a table by a hash, as recommender models look them up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(997, 4), nn.Linear(4, 3)

    def forward(self, t: Tensor) -> Tensor:
        found: Tensor = self.head(self.table((t * 7 + 1000) % 997).sum(1))
        return found


def hashed() -> tuple[Hashed, Hashed, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Hashed()
    return model, copy.deepcopy(model), torch.randint(0, 9000, (8, 3)), torch.randint(0, 3, (8,))


def test_a_step_looks_hashed_rows_up() -> None:
    model, twin, t, y = hashed()
    step = at.compile_step(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.5), (t, y), fidelity="fast"
    )
    loss = F.cross_entropy(twin(t), y)
    loss.backward()
    torch.testing.assert_close(step(t, y), loss.detach(), rtol=2e-3, atol=0)
    step.sync()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        assert float((mine - theirs + 0.5 * theirs.grad).detach().norm()) < 0.01 * float(theirs.grad.norm())


def test_torch_compile_looks_hashed_rows_up() -> None:
    model, twin, t, y = hashed()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="ane", options={"device": "sim", "fidelity": "fast"})
    F.cross_entropy(compiled(t), y).backward()
    F.cross_entropy(twin(t), y).backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.02, atol=2e-3)


def test_torch_compile_compares_integers_that_fp16_lacks() -> None:
    torch._dynamo.reset()
    t = torch.arange(9000, 9008).repeat(2, 1)
    compiled = torch.compile(
        lambda t, x: (t[:, :, None] == t[:, None, :]).sum(-1) * x, backend="ane", options={"device": "sim"}
    )
    assert compiled(t, torch.ones(2, 8)).tolist() == [[1.0] * 8] * 2


class Clock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 3)

    def forward(self, t: Tensor) -> Tensor:
        found: Tensor = self.head(torch.sin(t[:, None] * torch.tensor([0.02, 0.01])))
        return found


@pytest.mark.parametrize("whole", [False, True])
def test_angles_of_large_times_are_refused_with_the_line_and_of_smaller_ones_taken(whole: bool) -> None:
    model, y = Clock(), torch.randint(0, 3, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    small, large = (
        torch.tensor([2100.0, 2301.0, 17.0, 8001.0]),
        torch.tensor([2100.0, 60_001.0, 17.0, 40_001.0]),
    )
    times = (small.long(), large.long()) if whole else (small, large)
    at.compile_step(model, "cross_entropy", optimizer, (times[0], y), fidelity="fast")
    with pytest.raises(
        UnsupportedModel, match=r"test_arithmetic.py:\d+.*sin.*rounds by up to 0.2.*Compute it"
    ):
        at.compile_step(model, "cross_entropy", optimizer, (times[1], y), fidelity="fast")


class Field(nn.Module):
    """Positions under sines of growing frequency, as radiance fields encode them."""

    def __init__(self, octaves: int) -> None:
        super().__init__()
        self.octaves, self.head = octaves, nn.Linear(octaves, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.sin(x[:, None] * (2.0 ** torch.arange(self.octaves) * torch.pi)))
        return found


@pytest.mark.parametrize("exactly", [False, True])
def test_small_numbers_whose_rounding_grows_before_a_sine_are_told(exactly: bool) -> None:
    """Where fp16 holds the positions exactly there is nothing to tell; with six octaves neither."""
    x, y = torch.arange(4) / 4 + (0.0 if exactly else 0.1), torch.randint(0, 3, (4,))
    told = {}
    for octaves in (6, 10):
        model = Field(octaves)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            at.compile_step(model, "cross_entropy", optimizer, (x, y), fidelity="fast")
        told[octaves] = [str(w.message) for w in seen if "rounds by up to" in str(w.message)]
    assert told[6] == []
    assert len(told[10]) == (0 if exactly else 1)
    assert exactly or re.search(
        r"test_arithmetic.py:\d+.*sin.*numbers of x.*Compute it beforehand", told[10][0]
    )
