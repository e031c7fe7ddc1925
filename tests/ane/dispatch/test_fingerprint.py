"""Writes to tensors are noticed whatever way they take; tensors that were not written to are not named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ane_trainer.ane.dispatch.fingerprint import Fingerprints

WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda t: t.view(-1)[-1].add_(1.0),
    "through .data": lambda t: t.data.clamp_(max=0.5),
    "another memory": lambda t: setattr(t, "data", torch.zeros_like(t)),
    "the smallest step": lambda t: t.data.view(-1)[0:1].copy_(torch.nextafter(t.view(-1)[0:1], torch.tensor(9.0))),
    "other signs": lambda t: t.neg_(),
    "twice as large": lambda t: t.data.mul_(2.0),
    "numbers change places": lambda t: t.data.copy_(t.data.flip(0)),
    "NumPy": lambda t: t.numpy().__setitem__(..., 7.0),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(2,), (5, 7), (64, 33), (4, 6, 8), (16, 8)])
@pytest.mark.parametrize("way", WRITES)
def test_a_write_is_noticed(way: str, shape: tuple[int, ...]) -> None:
    tensors = {
        name: torch.rand(shape, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc")
    }
    prints = Fingerprints(tensors)
    assert prints.changed() == []
    WRITES[way](tensors["b"])
    assert prints.changed() == ["b"]
    prints.note()
    assert prints.changed() == []


def test_tensors_with_gaps_and_of_other_types() -> None:
    table = torch.zeros(4, 4)
    half, flag = torch.zeros(6, dtype=torch.float16), torch.zeros(4, dtype=torch.bool)
    tensors = {"column": table[:, 1], "half": half, "flag": flag}
    prints = Fingerprints(tensors)
    table[:, 0] = 1.0
    assert prints.changed() == []
    table[2, 1] = 1.0
    half[3] = 1.0
    flag[0] = True
    assert prints.changed() == ["column", "half", "flag"]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 127])
def test_the_last_bytes_count(count: int) -> None:
    tensors = {"half": torch.zeros(count, dtype=torch.float16), "flag": torch.zeros(count, dtype=torch.bool)}
    prints = Fingerprints(tensors)
    assert prints.changed() == []
    tensors["half"][-1], tensors["flag"][-1] = 1.0, True
    assert prints.changed() == ["half", "flag"]
    prints.note({"half"})
    assert prints.changed() == ["flag"]


def test_some_are_noted_and_others_stay_as_they_were() -> None:
    tensors = {"a": torch.zeros(40), "b": torch.zeros(8, 6).mT, "c": torch.zeros(5)}
    prints = Fingerprints(tensors)
    for tensor in tensors.values():
        tensor.data.add_(1.0)
    prints.note(("a", "b"))
    assert prints.changed() == ["c"]
    tensors["b"].data = torch.ones(6, 8)  # elsewhere
    prints.note(("b",))
    assert prints.changed() == []


def test_no_tensors() -> None:
    assert Fingerprints({}).changed() == []
