"""Whole numbers beyond fp16 in the batch: fed as floats where only floats read them, exact or refused elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.dynamo import ane


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()  # which gives up one function that was compiled eight times


class Reading(nn.Module):
    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read, self.layer = read, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.read(x))  # type: ignore[no-any-return]


def losses(door: str, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if door == "compile_step":
        step = at.compile_step(model, "mse", optimizer, batches[0], device="sim")
        return [float(step(x, y)) for x, y in batches]
    fast = model if door == "torch" else torch.compile(model, backend=ane, options={"device": "sim"})
    found = []
    for x, y in batches:
        loss = F.mse_loss(fast(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def batches(low: int, high: int, dtype: torch.dtype = torch.int64) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randint(low, high, (16, 4), dtype=dtype), torch.randn(16, 3)) for _ in range(3)]


READS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "a share of two million": (lambda x: x.float() / 1e6, 2_000_000),
    "a share of a billion": (lambda x: (x.reshape(-1, 2, 2).float() / 1e9).flatten(1), 1_700_000_000),
    "hours and days of minutes": (lambda x: torch.sin(x // 60 % 24 * 0.26) + (x // 1440 % 7) / 7.0, 525_600),
    "a slow sine": (lambda x: torch.cos(x.float() * 0.01), 4_000),
}


@pytest.mark.parametrize("door", ["compile_step", "torch.compile"])
@pytest.mark.parametrize("name", READS)
def test_whole_numbers_are_read_as_pytorch_reads_them(name: str, door: str) -> None:
    read, most = READS[name]
    given, model = batches(0, most), Reading(read)
    expected = losses("torch", copy.deepcopy(model), given)
    assert losses(door, model, given) == pytest.approx(expected, rel=0.01)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], list[tuple[Tensor, Tensor]], str]] = {
    "seconds": (
        lambda x: (x // 3600 % 24).float(), batches(1_600_000_000, 1_700_000_000),
        r"test_whole.py:\d+\): aten.div.* exactly, up to 1[67]\d{8}; needs them below 2097152. Subtract an origin",
    ),
    "a fast sine": (
        lambda x: torch.sin(x.float()), batches(0, 30_000),
        r"test_whole.py:\d+\): aten.sin.* rounds by up to .* Compute it beforehand",
    ),
    "bytes that wrap": (
        lambda x: (x + 200).float() / 255, batches(0, 256, torch.uint8),
        r"test_whole.py:\d+\): aten.add.* may leave 0 ... 255.* Convert to int64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("door", ["compile_step", "torch.compile"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_line(name: str, door: str) -> None:
    read, given, words = REFUSED[name]
    if (name, door) == ("bytes that wrap", "torch.compile"):  # the host computes those
        model = Reading(read)
        expected = losses("torch", copy.deepcopy(model), given)
        assert losses(door, model, given) == pytest.approx(expected, rel=0.01)
        return
    with pytest.raises(Exception, match=words):
        losses(door, Reading(read), given)


def test_bytes_that_do_not_wrap_are_added() -> None:
    given, model = batches(0, 50, torch.uint8), Reading(lambda x: (x + 200).float() / 255)
    expected = losses("torch", copy.deepcopy(model), given)
    assert losses("compile_step", model, given) == pytest.approx(expected, rel=0.01)


NEAR: dict[str, tuple[Callable[[Tensor], Tensor], float, float, bool]] = {
    "seconds, float64": (lambda x: (x - 1.6e9).float() / 1e6, 1.6e9, 1e6, True),
    "prices": (lambda x: ((x - x.mean(0)) / x.std(0)).float(), 1e5, 50.0, True),
    "temperatures": (lambda x: ((x - x.mean(0)) / x.std(0)).float(), 900.0, 50.0, False),
    "large and wide": (lambda x: (x - 1000.0).float() / 1e5, 1000.0, 1e5, False),
}


@pytest.mark.parametrize("door", ["compile_step", "torch.compile"])
@pytest.mark.parametrize("name", NEAR)
def test_inputs_near_what_is_taken_from_them_are_told(
    name: str, door: str, recwarn: pytest.WarningsRecorder
) -> None:
    read, origin, deviation, told = NEAR[name]
    torch.manual_seed(0)
    x = origin + deviation * torch.randn(16, 4, dtype=torch.float64)
    losses(door, Reading(read), [(x, torch.randn(16, 3))])
    texts = [str(w.message) for w in recwarn if "Subtract an origin" in str(w.message)]
    assert bool(texts) is told
    assert all("test_whole.py" in text for text in texts)
