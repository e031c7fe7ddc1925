"""Activations computed again in the backward pass: the same bits in less memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from ane_trainer.ane.capture.gradients import GradientOptions
from ane_trainer.ane.dispatch import StepOptions, TrainingStep
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.simulator import make_context, prepare
from ane_trainer.ane.simulator.schedule import folded_factors
from tests.ane.dispatch.test_blocks import QUIET, Batch, Layers, assert_same, built, pictures, resnet, tokens


def train_both(
    make: Callable[[], nn.Module], batches: list[Batch], options: StepOptions, blocks: str | int
) -> tuple[TrainingStep, TrainingStep]:
    """A step that keeps its activations and one that does not, on the same batches: the same bits."""
    (kept_model, kept), (model, again) = (
        built(make, batches[0], blocks, replace(options, checkpoint=checkpoint))
        for checkpoint in (False, True)
    )
    for x, y in batches:
        assert float(kept(x, y)) == float(again(x, y))
    for left, right in zip(kept_model.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(left, right)
    assert_same(kept, again)
    assert len(again.program.main.ops) > len(kept.program.main.ops)
    assert again.applied_steps == kept.applied_steps > 0
    return kept, again


def shared_bytes(step: TrainingStep) -> int:
    """What the simulator needs for values that are not state."""
    plan = prepare(step.program.main, make_context("m4", threads=1))
    return sum(block.nbytes for block in plan.shared)


def test_a_transformer_with_dropout_clipping_and_accumulation() -> None:
    options = replace(QUIET, gradients=GradientOptions(clip_norm=0.5, accumulate=2))
    kept, again = train_both(lambda: Layers(2), tokens(4), options, 1)
    assert len(again.programs) == len(kept.programs)


def test_a_resnet_with_running_statistics() -> None:
    train_both(lambda: resnet(2), pictures(3), QUIET, 1)


class Twice(nn.Module):
    """A sum that is read twice in the forward pass, and in the backward pass only behind its factor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.linear(x)
        total = inner.sum(-1, keepdim=True)
        return inner * (total * 0.3).sigmoid() + total


class Across(nn.Module):
    """A sum whose factor is in the next layer, where the backward pass reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear((x * 0.3).sigmoid()).sum(-1, keepdim=True)


@pytest.mark.parametrize(("layer", "width"), [(Twice, 8), (Across, 1)])
def test_a_factor_is_merged_with_its_sum_where_it_was_before(layer: type[nn.Module], width: int) -> None:
    make = lambda: nn.Sequential(nn.Sequential(layer(), layer(), layer()), nn.Linear(width, 4))  # noqa: E731
    torch.manual_seed(0)
    batches = [(torch.randn(16, width), torch.randint(0, 4, (16,))) for _ in range(2)]
    kept, again = train_both(make, batches, QUIET, "off")
    assert folded_factors(again.program.main) == folded_factors(kept.program.main)


def test_activations_take_the_memory_of_one_layer() -> None:
    torch.manual_seed(0)
    batch = torch.randint(0, 16, (8, 32)), torch.randint(0, 4, (8,))
    sizes = []
    for layers in (2, 6):
        _, kept = built(lambda layers=layers: Layers(layers, 32), batch, "off", QUIET)  # type: ignore[misc]
        _, again = built(
            lambda layers=layers: Layers(layers, 32),
            batch,
            "off",
            replace(QUIET, checkpoint=True),  # type: ignore[misc]
        )
        sizes.append((shared_bytes(kept), shared_bytes(again)))
    (kept_2, again_2), (kept_6, again_6) = sizes
    assert kept_6 > 2 * kept_2
    assert again_6 < 1.6 * again_2
    assert again_6 < kept_6 / 2


def test_a_path_is_not_meant() -> None:
    with pytest.raises(UsageError, match="resume"):
        replace(QUIET, checkpoint="runs/last")  # type: ignore[arg-type]
