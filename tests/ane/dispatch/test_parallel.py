"""Steps in shards: close to one program, the same bits however processes share them, and what is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ane_trainer.ane.capture.gradients import GradientOptions
from ane_trainer.ane.dispatch import StepOptions, TrainingStep, build_step, resolve_target
from ane_trainer.ane.dispatch.parallel import Exchange, Shards, digest_of
from ane_trainer.ane.errors import DataError, NumericsWarning, UsageError

TARGET = resolve_target("sim", threads=1)
ROWS = 32


def make(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), *extra, nn.ReLU(), nn.Linear(16, 4))


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(count, ROWS, 12, generator=generator), torch.randn(12, 4, generator=generator)
    return [(part, (part @ w).argmax(1)) for part in x]


def step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, shards: Shards, loss: object = "cross_entropy",
    gradients: GradientOptions = GradientOptions(),  # noqa: B008  (immutable)
    place: str = "auto",
) -> TrainingStep:  # fmt: skip
    exchange = Exchange(shards) if shards.count > 1 else None
    options = StepOptions(gradients, place, seed=0, exchange=exchange)
    return build_step(model, loss, optimizer, batches(1)[0], TARGET, options)  # type: ignore[arg-type]


def trained(
    count: int, steps: int = 12, **options: object
) -> tuple[list[torch.Tensor], list[float], TrainingStep]:
    model = make()
    start = [p.detach().clone() for p in model.parameters()]
    sgd, p = (
        "gradients" in options,
        model.parameters(),
    )  # Adam's first steps are signs: of clipping they show nothing
    optimizer = torch.optim.SGD(p, lr=0.1, momentum=0.9) if sgd else torch.optim.Adam(p, lr=1e-2)
    step = step_of(model, optimizer, Shards(count), **options)  # type: ignore[arg-type]
    losses = [float(step(x, y)) for x, y in batches(steps)]
    return [p.detach() - s for p, s in zip(model.parameters(), start, strict=True)], losses, step


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradients": GradientOptions(clip_norm=0.1)},
        {"gradients": GradientOptions(accumulate=2)},
        {"place": "host"},
    ],
    ids=["plain", "clipped", "accumulated", "host"],
)
def test_shards_train_as_the_whole_batch_does(options: dict[str, object]) -> None:
    whole, whole_losses, _ = trained(1, **options)
    for count in (2, 4) if not options else (2,):
        moved, losses, step = trained(count, **options)
        assert step.skipped_steps == 0
        assert np.allclose(losses, whole_losses, rtol=2e-3)
        for a, b in zip(moved, whole, strict=True):
            assert float((a - b).norm() / b.norm()) < 0.01


def test_the_two_programs_are_the_one_divided() -> None:
    _, _, whole = trained(1, 1)
    _, _, divided = trained(2, 1)
    assert sum(len(p.program.main.ops) for p in divided.programs) <= len(whole.program.main.ops) + 4
    assert len(whole.programs) == 1
    assert (divided.dispatches_per_step, whole.dispatches_per_step) == (3, 1)
    assert {p.target for p in divided._loaded.inputs} == {p.target for p in whole._loaded.inputs}
    assert divided.agreement is not None
    assert divided.agreement.agrees


def test_a_state_goes_on_in_another_number_of_shards() -> None:
    _, _, four = trained(4, 3)
    model = make()
    one = step_of(model, torch.optim.Adam(model.parameters(), lr=1e-2), Shards(1))
    one.load_state_dict(four.state_dict())
    x, y = batches(4)[3]
    assert float(one(x, y)) == pytest.approx(float(four(x, y)), rel=2e-3)
    assert one.applied_steps == four.applied_steps == 4


class Alone(Exchange):
    """One of several processes whose part of the exchange is done by hand."""

    def sum(self, values: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        sums.append(values.copy())
        return values

    def largest(self, values: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return values

    def broadcast(self, model: nn.Module) -> None:
        """All have the same."""


sums: list[np.ndarray] = []  # type: ignore[type-arg]


def test_sums_are_the_same_bits_however_processes_share_the_shards() -> None:
    found = []
    for world in (1, 2, 4):
        sums.clear()
        for rank in range(world):
            model = make()
            optimizer = torch.optim.Adam(model.parameters())
            options = StepOptions(seed=0, verify="off", exchange=Alone(Shards(4, rank, world)))
            step = build_step(model, "cross_entropy", optimizer, batches(1)[0], TARGET, options)
            step(*batches(1)[0])
        parts = sums[::-1] if world == 4 else sums  # in any order
        found.append(np.sum(parts, axis=0))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_an_overflow_in_one_shard_skips_the_update_of_all() -> None:
    model = make()
    step = step_of(model, torch.optim.SGD(model.parameters(), lr=0.1), Shards(2))
    x, y = batches(1)[0]
    step(x, y)
    before = digest_of(model)
    spoiled = x.clone()
    spoiled[ROWS // 2 :] = 6e4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericsWarning)
        step(spoiled, y)
    assert step.skipped_steps == 1
    assert digest_of(model) == before
    step(x, y)
    assert digest_of(model) != before


def test_running_statistics_are_the_mean_of_the_shards() -> None:
    model = make(nn.BatchNorm1d(16))
    x, y = batches(1)[0]
    with pytest.warns(NumericsWarning, match="DistributedDataParallel"):
        step = step_of(model, torch.optim.SGD(model.parameters(), lr=0.1), Shards(4))
    witness = make(nn.BatchNorm1d(16))
    means = [witness[0](part).mean(0) for part in x.chunk(4)]
    step(x, y)
    norm = model[1]
    assert torch.allclose(norm.running_mean, 0.1 * torch.stack(means).mean(0), atol=1e-3)
    assert int(norm.num_batches_tracked) == 1


@pytest.mark.parametrize(("count", "world"), [(4, 1), (4, 2), (4, 3), (5, 2), (3, 3)])
def test_every_shard_has_one_process(count: int, world: int) -> None:
    owned = [number for rank in range(world) for number in Shards(count, rank, world).own]
    assert owned == list(range(count))


def test_refusals() -> None:
    with pytest.raises(UsageError, match="at least one for each of 3 processes; got 2"):
        Shards(2, 0, 3)
    with pytest.raises(UsageError, match="multiple of 3") as refused:
        step_of(make(), torch.optim.SGD(make().parameters(), lr=0.1), Shards(3))
    assert refused.value.code == "ANE104"
    assert [len(x) for x, _ in Shards(4).of(batches(1)[0])] == [8, 8, 8, 8]
    with pytest.raises(DataError, match="same batch") as differing:
        Exchange.refuse_different(2.0, 1.0, "the same batch")
    assert differing.value.code == "DATA118"


def test_a_loss_that_sums_is_refused_and_a_mean_passes() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="mean over examples") as refused:
        step_of(model, optimizer, Shards(2), lambda out, y: F.cross_entropy(out, y, reduction="sum"))
    assert refused.value.code == "ANE132"
    step_of(model, optimizer, Shards(2), lambda out, y: F.cross_entropy(out, y, reduction="sum") / len(y))
