"""A draw of the hunt: a model, its batches, and what surrounds it; by number."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tests.hunt import further, kinds, models, more, surroundings
from tests.hunt.models import Drawn, Family, draw_model
from tests.hunt.surroundings import Loss


@dataclass(frozen=True)
class Setup:
    """One draw. `batches`: a batch for each step; `change` happens before the last, or (`often`) before each but the
    first.

    `door`: the whole step is compiled ("step"), or torch.compile takes the model ("model"), with its loss ("loss").
    """

    number: int
    drawn: Drawn
    loss_name: str
    loss: Loss
    optimizer: str
    options: Mapping[str, object]
    change: str
    batches: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    door: str = "step"
    often: bool = False

    def __str__(self) -> str:
        more = " ".join(f"{k}={v}" for k, v in self.options.items())
        return (
            f"{self.number}: {self.drawn.text} | {self.loss_name} | {self.optimizer} | {more} | "
            f"{len(self.batches)} steps | {self.change}"
            + (" often" if self.often else "")
            + ("" if self.door == "step" else f" | torch.compile of {self.door}")
        )


@dataclass(frozen=True)
class Space:
    """What is drawn from: families of models, each with how often; losses on numbers, shares, classes; and the rest.

    `varied`: how often later batches are of another scale, or shorter, and changes happen before each step.
    """

    families: Mapping[str, Family]
    shares: Sequence[int]
    losses: tuple[Mapping[str, Loss], Mapping[str, Loss], Mapping[str, Loss]]
    optimizers: Sequence[str]
    changes: Sequence[str]
    compiled: float = 0.0
    varied: float = 0.0


def draw(number: int) -> Setup:
    """The set-up with this number, of the space that it begins in (`SPACES`)."""
    space = next(space for first, space in SPACES.items() if number >= first)
    rng = random.Random(f"hunt {number}")
    torch.manual_seed(number)
    wild = rng.random() < 0.35
    drawn, x, output = _valid(rng, wild, space)
    losses = _losses(rng, drawn, output, space)
    name = rng.choice(list(losses))
    size = 10 ** rng.uniform(-3, 3.5) if wild and rng.random() < 0.5 else 1.0
    optimizer = rng.choice(list(space.optimizers))
    steps = rng.choice((1, 1, 2, 3, 4))
    change = rng.choice(list(space.changes)) if steps > 1 and rng.random() < 0.6 else "none"
    options: dict[str, object] = {
        "chip": rng.choice(("m1", "m4", "m5")),
        "fidelity": rng.choice(("exact", "fast")),
    }
    extra = rng.random()
    if extra < 0.12:
        options["clip_grad_norm"] = 10 ** rng.uniform(-4, 1)
    elif extra < 0.18:
        options["clip_grad_value"] = 10 ** rng.uniform(-4, 0)
    elif extra < 0.26 and steps > 1:
        options["accumulate"] = 2
        steps = 4
    door = "step" if rng.random() >= space.compiled else rng.choice(("model", "loss"))
    kind = space.losses.index(losses)
    batches = [(x, _target(kind, output, size))]
    for _ in range(steps - 1):
        batches.append((drawn.inputs(), _target(kind, output, size)))
    often = bool(space.varied) and rng.random() < space.varied
    if space.varied:
        batches = [batches[0], *(_varied(rng, space, door, *batch) for batch in batches[1:])]
    return Setup(number, drawn, name, losses[name], optimizer, options, change, tuple(batches), door, often)


def _varied(
    rng: random.Random, space: Space, door: str, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch, at times of another scale, or (where the user keeps the loop) shorter."""
    if rng.random() < space.varied:
        factor = 10 ** rng.uniform(-1.5, 1.5)
        x = x * factor if x.is_floating_point() else x
        y = y * factor if y.is_floating_point() and rng.random() < 0.3 else y
    if rng.random() < space.varied and door != "step" and len(x) > 3:
        x, y = x[: len(x) // 2 + 1], y[: len(x) // 2 + 1]
    return x, y


def _valid(rng: random.Random, wild: bool, space: Space) -> tuple[Drawn, torch.Tensor, torch.Tensor]:
    """A model that PyTorch runs, an input and its output; a draw that it refuses (a kernel wider than the picture) is
    drawn again."""
    for _ in range(TRIES):
        drawn = draw_model(rng, wild, space.families, space.shares)
        x = drawn.inputs()
        try:
            with torch.no_grad():
                return drawn, x, copy.deepcopy(drawn.model)(x)
        except (RuntimeError, ValueError) as error:
            refused = error
    raise AssertionError(f"{TRIES} models that PyTorch does not run; the last: {refused}") from refused


def _losses(rng: random.Random, drawn: Drawn, output: torch.Tensor, space: Space) -> Mapping[str, Loss]:
    numbers, shares, classes = space.losses
    if drawn.text.startswith("long") or drawn.kind == "image":
        return rng.choice((numbers, numbers, shares))
    return rng.choice((numbers, shares, classes, classes))


def _target(kind: int, output: torch.Tensor, size: float) -> torch.Tensor:
    if kind == 2:
        y = torch.randint(0, output.shape[-1], output.shape[:-1])
        y.flatten()[0] = 1
        return y
    if kind == 1:
        return (torch.rand(output.shape) > 0.5).float()
    y = torch.randn(output.shape) * size
    y.flatten()[0] = size
    return y


#: Models drawn for a set-up before the generator counts as broken.
TRIES = 20
#: Numbers from here on draw of the wider space; those before it of the first one, so that they stay what they were.
WIDE, WIDEST, SMALL = 100_000, 200_000, 300_000
NARROW = Space(
    models.FAMILIES, models.SHARES, (surroundings.NUMBERS, surroundings.SHARES, surroundings.CLASSES),
    list(surroundings.OPTIMIZERS), list(surroundings.CHANGES),
)  # fmt: skip
BROAD = Space(
    kinds.FAMILIES, kinds.SHARES, (more.NUMBERS, more.SHARES, more.CLASSES), list(more.OPTIMIZERS),
    list(more.CHANGES), 0.2,
)  # fmt: skip
FURTHER = Space(
    further.FAMILIES, further.SHARES, (more.NUMBERS, more.SHARES, more.CLASSES), list(further.OPTIMIZERS),
    list(further.CHANGES), 0.25, 0.3,
)  # fmt: skip
#: Families whose models compile in about half a second.
_QUICK = {
    "table": 25, "written": 30, "parametrized": 4, "signal": 8, "bags": 5, "integers": 4, "codes": 5, "masked": 22,
    "stateful": 8,
}  # fmt: skip
QUICK = dataclasses.replace(
    FURTHER,
    families={name: further.FAMILIES[name] for name in _QUICK},
    shares=tuple(_QUICK.values()),
    compiled=0.1,
)
#: By first number, the last first.
SPACES: Mapping[int, Space] = {SMALL: QUICK, WIDEST: FURTHER, WIDE: BROAD, 0: NARROW}
