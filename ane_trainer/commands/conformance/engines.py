"""Devices as calls `(program, inputs) -> outputs`, and whole training steps on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import nn

from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.compiler.build import compile_program
from ane_trainer.ane.compiler.legalize import Target, refusals
from ane_trainer.ane.dispatch.devices import get_device
from ane_trainer.ane.errors import UnsupportedModel
from ane_trainer.ane.mil.program import Program
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.stages import Compiled, Legalized, Lowered, Port
from ane_trainer.training.engine import compile_step

Outputs = dict[str, Array]

#: Steps of each training case.
STEPS = 3


class DeviceEngine:
    """One device running programs for one chip; every program is loaded, run once and released."""

    def __init__(self, device: str, chip: str, fidelity: str = "exact", threads: int | None = None) -> None:
        self.device, self.chip, self.fidelity, self.threads = device, get_chip(chip).name, fidelity, threads
        self._device = get_device(device).device

    def __call__(self, program: Program, feeds: Mapping[str, Array]) -> Outputs:
        """Run as it is, without the rewrites that go around a chip's limits."""
        session = self._device.load(
            as_compiled(program, self.chip), fidelity=self.fidelity, threads=self.threads
        )
        try:
            return dict(session.run(feeds))
        finally:
            session.close()

    def train(self, name: str) -> Outputs:
        """Losses, and the final state by its sorted names, of one of `MODELS` after `STEPS` steps."""
        model, optimizer, batches = make_training(name)
        step = compile_step(
            model, "cross_entropy", optimizer, batches[0], chip=self.chip, device=self.device,
            fidelity=self.fidelity, threads=self.threads, sync="lazy", precision="fp16",
        )  # fmt: skip
        losses = [float(step(x, y)) for x, y in batches]
        state = step.state_dict()
        step.close()
        of_the_host = ("counters", "mask_generator", "unit/", "calibration/")
        kept = [k for k in sorted(state) if not k.startswith(of_the_host)]
        flat = np.concatenate([state[name].numpy().ravel() for name in kept])
        return {"losses": np.array(losses, np.float32), "state": flat}


def check(program: Program, chip: str) -> None:
    """Raises: UnsupportedModel (ANE302) if the chip's tables say that the e5rt path refuses the program."""
    found = refusals(program.main, Target(get_chip(chip), "e5rt"))
    if found:
        raise UnsupportedModel(f"program: needs what {chip} accepts (e5rt).", found, code="ANE302")


def as_compiled(program: Program, chip: str) -> Compiled:
    """A program without state as a device loads it."""
    inputs = tuple(Port(v.name, v.type.shape, "batch") for v in program.main.inputs)
    outputs = tuple(Port(v.name, v.type.shape, "result") for v in program.main.outputs)
    return compile_program(Legalized(Lowered(program, inputs, outputs, ()), chip, "e5rt"), cache=False)


class _Block(nn.Module):
    """One transformer layer and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.output = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.output(self.layer(x).mean(1))
        return out


Make = tuple[
    Callable[[], nn.Module], Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer], tuple[int, ...]
]

#: Training cases: name -> model, optimizer, shape of one example.
MODELS: dict[str, Make] = {
    "mlp adam": (
        lambda: nn.Sequential(nn.Linear(36, 24), nn.GELU(), nn.Linear(24, 4)),
        lambda p: torch.optim.Adam(p, lr=2e-3), (36,),
    ),
    "cnn sgd": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(36, 4),
        ),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), (1, 6, 6),
    ),
    "transformer adamw": (_Block, lambda p: torch.optim.AdamW(p, lr=1e-3), (6, 16)),
}  # fmt: skip


def make_training(
    name: str,
) -> tuple[nn.Module, torch.optim.Optimizer, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Model, optimizer and batches; numbers come from sines, which no version of a library changes."""
    make, optimizer, shape = MODELS[name]
    model = make()
    with torch.no_grad():
        for seed, (label, parameter) in enumerate(model.named_parameters()):
            if label.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim > 1:
                parameter.copy_(_waves(parameter.shape, seed) / parameter[0].numel() ** 0.5)
    batches = []
    for step in range(STEPS):
        x = _waves((8, *shape), 100 + step)
        batches.append((x, (torch.arange(8) + step) % 4))
    return model.train(), optimizer(model.parameters()), batches


def _waves(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers from -1 to 1 on a grid of 2^-8, from integer arithmetic."""
    count = int(np.prod(shape))
    numbers = ((np.arange(count) + 1) * 7919 * (2 * seed + 1) + seed * 104729) % 65521 % 513 - 256
    return torch.from_numpy((numbers / 256).astype(np.float32).reshape(shape))
