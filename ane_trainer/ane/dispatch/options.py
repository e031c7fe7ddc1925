"""Where a step runs (`Target`) and how it trains (`StepOptions`): each made once, checked, and passed whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral

from ane_trainer.ane.capture.gradients import GradientOptions
from ane_trainer.ane.capture.scaling import LARGEST_SCALE, SMALLEST_SCALE
from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.compiler.blocks import check_blocks
from ane_trainer.ane.dispatch.devices import Session, choose_precision, get_device
from ane_trainer.ane.dispatch.devices.machine import known_chip
from ane_trainer.ane.dispatch.parallel import Exchange
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.stages import Compiled
from ane_trainer.utils import did_you_mean

FIDELITIES = ("exact", "fast")
SYNC_MODES = ("always", "lazy")
OPTIMIZER_PLACES = ("auto", "engine", "host")
FALLBACKS = ("none", "cpu")

#: The device that is plain PyTorch and runs no program.
CPU = "cpu"


@dataclass(frozen=True)
class Target:
    """A device that is here and what it computes; made by `resolve_target`, once.

    `chip` and `fidelity` are None on the `cpu` device, which runs no program. `reason` says why this device;
    `path` is the toolchain whose limits hold; `threads` are the simulator's (None: all).
    """

    device: str
    chip: str | None
    fidelity: str | None
    precision: str
    threads: int | None = None
    reason: str = "as asked for"
    path: str = "e5rt"

    @property
    def name(self) -> str:
        """The device's name."""
        return self.device

    @property
    def runs_programs(self) -> bool:
        """Whether the device runs programs; plain PyTorch does not."""
        return self.device != CPU

    def load(self, compiled: Compiled) -> Session:
        """Load a program on the device."""
        assert self.fidelity is not None
        return get_device(self.device).device.load(compiled, fidelity=self.fidelity, threads=self.threads)

    def placement(self) -> tuple[str, str]:
        """Where programs run, and how that is known."""
        if self.chip is None or self.fidelity is None:
            return "CPU, plain PyTorch", "this device has no other executor"
        return get_device(self.device).device.placement(self.chip, self.fidelity)

    @property
    def headline(self) -> str:
        """What the user reads first: the device, what it computes, and why it was chosen."""
        if self.chip is None:
            return "CPU: plain PyTorch fp32, for comparison; not the engine's arithmetic"
        chip = get_chip(self.chip)
        fast = "" if self.fidelity == "exact" else f", fidelity {self.fidelity}"
        text = f"SIMULATOR of {chip.title} (generation {chip.generation}){fast}"
        if self.device != "sim":
            text = f"{self.device}: {self.placement()[0]}, {self.precision}, program checked for {chip.title}"
        return text if self.reason == "as asked for" else f"{text}   ({self.reason})"


def resolve_target(
    device: str = "auto",
    chip: str = "m4",
    fidelity: str = "exact",
    precision: str = "auto",
    threads: int | None = None,
    path: str = "e5rt",
) -> Target:
    """Check the names and resolve `auto`. Direct dispatch takes the chip of this Mac, whatever `chip` says.

    Raises: UsageError for an unknown name, and for `cpu`, which runs no program; EnvironmentFault for a device
    that this machine does not have.
    """
    found = get_chip(chip)
    if threads is not None and not _is_whole(threads, 1):
        raise UsageError(
            f"threads: needs a whole number from 1 on; got {threads!r}. Leave it out for all cores.",
            code="ANE104",
        )
    if fidelity not in FIDELITIES:
        hint = did_you_mean(fidelity, FIDELITIES)
        raise UsageError(f"fidelity: needs a known name; got {fidelity!r}. {hint}", code="ANE104")
    choice = get_device(device)
    name, reason = choice.device.name, choice.reason
    mac = known_chip() if name.startswith("e5rt") else None
    if mac is not None and mac != found.name:  # a program for another chip may fail or give other results
        reason = f"{reason}; this Mac's chip instead of {found.title}"
        found = get_chip(mac)
    return Target(
        name, found.name, fidelity, choose_precision(choice.device, precision), threads, reason, path
    )


def _is_whole(value: object, lowest: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= lowest


@dataclass(frozen=True)
class StepOptions:
    """What a training step does besides forward, loss, backward and update; checked when made.

    optimizer_on  "engine", "host" (fp32 in PyTorch), or "auto": the engine where it has a rule.
    fallback      "none": refuse what does not fit the chip; "cpu": run those parts on the CPU.
    loss_scale    where dynamic loss scaling starts: a power of two from 1/64 to 32768, or "auto".
    sync          "always": the module's parameters follow after every step; "lazy": on `sync()`.
    seed          of the random draws (dropout); None: torch's own generator draws them.
    verify        "first": compare the first step with fp32 (`step.agreement`); a number: each so many steps, too;
                  "off".
    calibrate_on  more batches that the range pass looks at, besides the example.
    exchange      of a step whose batches are divided into shards (`parallel`); None: one program.
    blocks        how many blocks, modules that repeat, are one program; "off": the whole step is one; "auto": divided
                  where the whole step would be longer than what is known to compile for the chip.
    checkpoint    compute what lies within blocks again in the backward pass, in the place of keeping it.

    Raises: UsageError for values out of range.
    """

    gradients: GradientOptions = field(default_factory=GradientOptions)
    optimizer_on: str = "auto"
    fallback: str = "none"
    loss_scale: float | str = "auto"
    sync: str = "always"
    seed: int | None = None
    verify: str | int = "first"
    calibrate_on: Sequence[tuple[object, object]] = ()
    exchange: Exchange | None = None
    blocks: str | int = "auto"
    checkpoint: bool = False

    def __post_init__(self) -> None:
        known = (
            ("sync", SYNC_MODES), ("optimizer_on", OPTIMIZER_PLACES), ("fallback", FALLBACKS),
        )  # fmt: skip
        for name, values in known:
            if getattr(self, name) not in values:
                raise UsageError(
                    f"{name}: needs {' or '.join(values)}; got {getattr(self, name)!r}. Choose one of them.",
                    code="ANE104",
                )
        _check_scale(self.loss_scale)
        check_blocks(self.blocks)
        if not isinstance(self.checkpoint, bool):
            raise UsageError(
                f"checkpoint: needs True or False; got {self.checkpoint!r}. `Trainer.resume` goes on from a file.",
                code="ANE104",
            )
        if self.seed is not None and not _is_whole(self.seed, 0):
            raise UsageError(
                f"seed: needs a whole number from 0 on; got {self.seed!r}. Choose one.", code="ANE104"
            )
        if self.verify not in ("first", "off") and not _is_whole(self.verify, 1):
            raise UsageError(
                f'verify: needs "first", "off" or a number of steps; got {self.verify!r}. Choose one of them.',
                code="ANE104",
            )

    def verifies(self, step: int, unlike: bool = False) -> bool:
        """Whether step number `step`, from 0, is compared with fp32; `unlike`: its numbers are of another size."""
        if self.verify == "off":
            return False
        return step == 0 or unlike or (not isinstance(self.verify, str) and step % self.verify == 0)

    @property
    def shards(self) -> int:
        """Parts that a batch is divided into."""
        return 1 if self.exchange is None else self.exchange.shards.count

    def parts(self, x: object, y: object) -> Sequence[tuple[object, object]]:
        """The batch as programs take it: whole, or its shards."""
        return [(x, y)] if self.exchange is None else self.exchange.shards.of((x, y))

    def with_optimizer_on_host(self) -> StepOptions:
        """The same, the gradients being results that the host's optimizer reads."""
        return dataclasses.replace(self, gradients=dataclasses.replace(self.gradients, on_host=True))


def _check_scale(scale: float | str) -> None:
    if scale == "auto":
        return
    power = isinstance(scale, (int, float)) and scale > 0 and math.log2(scale).is_integer()
    if not power or not SMALLEST_SCALE <= float(scale) <= LARGEST_SCALE:
        raise UsageError(
            f'loss_scale: needs "auto" or a power of two from {SMALLEST_SCALE:g} to {LARGEST_SCALE:g}; '
            f"got {scale!r}. Choose one of them.",
            code="ANE104",
        )
