"""Frozen weights in 8 and 4 bits: the program decodes what PyTorch computes with, and nothing else changes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import ane_trainer as at
from ane_trainer.ane.dispatch.frozen import (
    frozen_constants,
    palette,
    palettize,
    quantize_frozen,
    quantized_names,
)
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil.program import Function, Program
from ane_trainer.ane.simulator import simulate

OPS = {"int8": "constexpr_affine_dequantize", "int4": "constexpr_lut_to_dense"}


class Adapted(nn.Module):
    """A frozen layer with a low-rank path beside it, behind a frozen table and before a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.base = nn.Linear(32, 48)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 48, bias=False)
        self.head = nn.Linear(48, 10)
        for module in (self.table, self.base):
            module.requires_grad_(False)
        nn.init.zeros_(self.up.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids).mean(1)
        return self.head(torch.relu(self.base(x) + self.up(self.down(x))))


def adapted(kind: str) -> tuple[Adapted, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model, ids, y = Adapted(), torch.randint(0, 40, (16, 6)), torch.randint(0, 10, (16,))
    assert quantize_frozen(model, kind) == 2
    return model, ids, y


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_steps_are_those_of_pytorch_on_the_dequantized_weights(kind: str) -> None:
    model, ids, y = adapted(kind)
    plain = copy.deepcopy(model)
    step = at.compile_step(
        model, "cross_entropy", torch.optim.SGD(trained(model), lr=0.1), example=(ids, y), device="sim"
    )
    found = [op for op in step.program.main.ops if op.kind.startswith("constexpr")]
    assert [op.kind for op in found] == [OPS[kind]] * 2
    assert not {"table.weight", "base.weight"} & {p.target for p in step.compiled.inputs}
    optimizer = torch.optim.SGD(trained(plain), lr=0.1)
    for _ in range(5):
        loss = nn.functional.cross_entropy(plain(ids), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert float(step(ids, y)) == pytest.approx(float(loss.detach()), rel=3e-3)
    assert step.agreement is not None
    assert step.agreement.update < 0.01
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-3)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_engine_decodes_the_modules_values(kind: str) -> None:
    model, _, _ = adapted(kind)
    from ane_trainer.ane.capture.ports import Parameter

    op = frozen_constants([Parameter("base.weight", model.base.weight)])["base.weight"]
    program = Program((Function("main", (), (op,), op.results),))
    (decoded,) = simulate(program, {}, chip="m4").values()
    assert np.abs(decoded - model.base.weight.numpy()).max() <= 2.0**-11 * float(
        model.base.weight.abs().max()
    )
    if kind == "int4":
        assert np.array_equal(decoded, model.base.weight.numpy())
        assert all(len(np.unique(row)) <= 16 for row in decoded)


@pytest.mark.parametrize(("kind", "bits"), [("fp16", 16.0), ("int8", 9.5), ("int4", 12.5)])
def test_memory_is_that_of_the_stored_bits(kind: str, bits: float) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(128, 128) for _ in range(2)]
    layers[0].requires_grad_(False)
    model = nn.Sequential(*layers)
    quantize_frozen(model, kind)
    x = torch.randn(4, 128)
    options = {"example": (x, x), "device": "sim", "verify": "off"}
    step = at.compile_step(model, "mse", torch.optim.SGD(trained(model), lr=0.1), **options)
    rest = (
        sum(p.numel() for p in layers[1].parameters()) * 2 * 4
    )  # weights and residuals, as inputs and outputs
    assert step.cost().memory_bytes - rest < 128 * 128 * bits / 8 + 6000


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantizing_again_changes_nothing(kind: str) -> None:
    model, _, _ = adapted(kind)
    before = copy.deepcopy(model.state_dict())
    fresh = Adapted()
    fresh.load_state_dict(before)
    assert quantize_frozen(model, kind) == 0
    if kind == "int8":  # also where it is not known that it was done
        quantize_frozen(fresh, kind)
        assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())
    assert quantized_names(model) == {"table.weight", "base.weight"}


def test_palettes_are_near_and_exact() -> None:
    torch.manual_seed(0)
    rows = torch.randn(8, 300)
    near = palettize(rows)
    assert float((near - rows).norm() / rows.norm()) < 0.13  # the best 16 levels of a normal variable: 0.10
    indices, colors = palette(near)  # type: ignore[misc]
    assert np.array_equal(np.take_along_axis(colors, indices.astype(np.int64), 1), near.numpy())
    assert palette(rows) is None
    same, one = palette(torch.full((2, 5), 0.5))  # type: ignore[misc]
    assert (one[np.arange(2)[:, None], same] == 0.5).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_changed_weights_are_refused(kind: str) -> None:
    model, ids, y = adapted(kind)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    step = at.compile_step(model, "cross_entropy", optimizer, example=(ids, y), device="sim", verify="off")
    step(ids, y)
    with torch.no_grad():
        model.base.weight[0, 0] += 0.37
    with pytest.raises(UsageError, match=r"base\.weight: needs to stay") as error:
        step(ids, y)
    assert error.value.code == "ANE133"
    with pytest.raises(UsageError, match=r"base\.weight: needs the values that quantizing"):
        at.compile_step(model, "cross_entropy", optimizer, example=(ids, y), device="sim", verify="off")


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="int8"):
        quantize_frozen(Adapted(), "nf4")
