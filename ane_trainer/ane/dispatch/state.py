"""Training state as tensors by name: one format, its version, and its validation.

A step's state (`step/...` in a checkpoint), version 2:

    <parameter>, <buffer>           weights, float32, in the port's shape (rank 0 is [1])
    <parameter>/residual            what the engine's two-number weight holds beyond fp16
    <parameter>/<slot>              a moment of the optimizer (exp_avg, ...), also with /residual
    <parameter>/accumulated         the sum of gradients where batches are accumulated
    step/loss_scale, ...            loss scaling: the scale, its inverse, steps since it moved, whether all fitted
    unit/<parameter>                the power of two that the parameter's gradient is multiplied by
    level/<parameter>               the recent largest magnitude of its gradient in that unit
    unit/step/largest_scale         the loss scale's ceiling
    unit/step/clip_shift            the power of two after clipping, level/... the factor of clipping times it
    optimizer/<number>/<key>        the state of an optimizer that runs on the host; /number: a Python number
    optimizer/group/<number>/<key>  an integer that it counts in a parameter group
    calibration/names, .../sizes    the magnitudes that the program's powers of two were chosen from
    pending                         batches since the last update, where they are accumulated
    counters                        int64 [3]: steps, applied updates, skipped updates
    mask_generator                  uint8: the state of the generator of random draws

The state of the `cpu` device, and of a step in parts, is the module's state_dict under `model/` and the
optimizer's under `optimizer/<number>/<key>`, with mask_generator, and between updates pending and
`gradient/<parameter>`.

Version 1 (ane_trainer 0.1 before checksums) has the same names. What it has besides, `choices`, is the state of
an optimizer that was followed on the engine; it is refused, with the way to go on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ane_trainer.ane.capture.gradients import ACCUMULATED
from ane_trainer.ane.capture.optimizers.rule import RESIDUAL
from ane_trainer.ane.capture.ports import SCALING_STATE
from ane_trainer.ane.capture.scaling import FITS, SCALING
from ane_trainer.ane.capture.step import SHIFT
from ane_trainer.ane.errors import CheckpointError, UsageError
from ane_trainer.ane.stages import Port

#: Of the layout above, and of checkpoint files; raised when older versions could not read newer files.
FORMAT = 2
#: Versions that can be read.
READABLE = (1, 2)

#: Prefixes in a checkpoint: the module's state_dict, the step's state, tensors of callbacks (by class/name).
MODEL, STEP, CALLBACK = "model/", "step/", "callback/"
#: Prefix in a step's state: the optimizer that runs on the host, by parameter number and key.
OPTIMIZER = "optimizer/"

#: State that earlier versions, which kept no levels, kept without the correction for its bias.
_CORRECTED = ("/square_avg", "/sum", "/acc_delta", "/max_exp_avg_sq", "/exp_inf")
_UNIT, _LEVEL, _CALIBRATION = "unit/", "level/", "calibration/"
#: Names of the count of batches since the last update, and of the state of the generator of random draws.
PENDING, GENERATOR = "pending", "mask_generator"
#: Prefix in the state of the `cpu` device: gradients of batches since the last update.
GRADIENT = "gradient/"
_COUNTERS, _FOLLOWED = "counters", "choices"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepState:
    """A step's whole state. `engine` is by port target in the user's units, `host` the host optimizer's."""

    engine: Tensors
    units: Mapping[str, float]
    levels: Mapping[str, float]
    steps: int
    applied_steps: int
    skipped_steps: int
    generator: torch.Tensor
    pending: int | None = None
    host: Tensors = field(default_factory=dict)
    calibration: Tensors = field(default_factory=dict)

    def to_tensors(self) -> Tensors:
        """As the flat dictionary that is stored."""
        found = dict(self.engine)
        found |= {_UNIT + name: torch.tensor(unit) for name, unit in self.units.items()}
        found |= {
            _LEVEL + name: torch.tensor(level, dtype=torch.float64) for name, level in self.levels.items()
        }
        found |= {OPTIMIZER + name: value for name, value in self.host.items()}
        found |= {_CALIBRATION + name: value for name, value in self.calibration.items()}
        if self.pending is not None:
            found[PENDING] = torch.tensor(self.pending)
        found[_COUNTERS] = torch.tensor([self.steps, self.applied_steps, self.skipped_steps])
        found[GENERATOR] = self.generator
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> StepState:
        """The state that `to_tensors` wrote. CheckpointError for entries that are missing or make no sense."""
        faults = _faults_of_scalars(tensors)
        if faults:
            raise incomplete("state", faults)
        special = (_UNIT, _LEVEL, OPTIMIZER, _CALIBRATION)
        names = (_COUNTERS, PENDING, GENERATOR)
        steps, applied, skipped = map(int, tensors[_COUNTERS])
        return cls(
            engine={k: v for k, v in tensors.items() if not k.startswith(special) and k not in names},
            units={name: float(unit) for name, unit in part(tensors, _UNIT).items()},
            levels={name: float(level) for name, level in part(tensors, _LEVEL).items()},
            steps=steps,
            applied_steps=applied,
            skipped_steps=skipped,
            generator=tensors[GENERATOR],
            pending=int(tensors[PENDING]) if PENDING in tensors else None,
            host=part(tensors, OPTIMIZER),
            calibration=part(tensors, _CALIBRATION),
        )

    def check(self, ports: Iterable[Port], units: Collection[str], *, on_host: bool) -> None:
        """CheckpointError if the state is not what a step with these ports and units needs, whole and finite.

        UsageError for the state of an optimizer that was in the other place.
        """
        saved_on_engine = any(name.endswith(f"/{RESIDUAL}") for name in self.engine)
        if saved_on_engine if on_host else self.host:
            here, there = ("host", "engine") if on_host else ("engine", "host")
            raise UsageError(
                f"state: needs an optimizer on the {here}; got a state saved with it on the {there}. "
                f'Compile the step with optimizer_on="{there}".'
            )
        wanted = {port.target: port.shape for port in ports if port.role == "state"}
        required = {SCALING + name for name in (*SCALING_STATE, FITS)}
        faults = [
            f"{name} is missing"
            for name in wanted
            if name not in self.engine and (name in required or not name.startswith(SCALING))
        ]
        faults += [f"{name} belongs to no state of this step" for name in self.engine if name not in wanted]
        faults += [f"{_UNIT}{name} is missing" for name in units if name not in self.units and name != SHIFT]
        for name in wanted.keys() & self.engine.keys():
            faults += _faults_of_tensor(
                name, self.engine[name], wanted[name], infinite=self._may_be_infinite(name)
            )
        faults += faults_of_numbers(self.host)
        if faults:
            raise incomplete("state", faults)

    def _may_be_infinite(self, name: str) -> bool:
        """A sum of gradients that did not fit is dropped at the next update, so it may be anything."""
        fits = self.engine.get(SCALING + FITS)
        return name.endswith(f"/{ACCUMULATED}") and fits is not None and not bool(fits.any())


def part(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def incomplete(where: str, faults: Iterable[str]) -> CheckpointError:
    """The error for a state that is not whole; names at most six faults."""
    found = sorted(faults)
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return CheckpointError(
        f"{where}: needs every entry that training goes on from, whole and finite; got: "
        f"{', '.join(found[:6])}{more}. Go on from an older checkpoint, or train again.",
        code="CKPT107",
    )


def faults_of(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], *, finite: Collection[str]
) -> list[str]:
    """How `found` differs from a state_dict in names, shapes and kinds of number; nan, and inf in `finite`."""
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is not of this model" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        like = wanted[name]
        if found[name].is_floating_point() != like.is_floating_point():
            faults.append(f"{name} has dtype {found[name].dtype}, not {like.dtype}")
        else:
            faults += _faults_of_tensor(name, found[name], tuple(like.shape), infinite=name not in finite)
    return faults


def faults_of_numbers(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The entries with numbers that are nan or inf."""
    return [
        fault
        for name, value in tensors.items()
        for fault in _faults_of_tensor(name, value, tuple(value.shape), infinite=False)
    ]


def faults_of_generator(state: torch.Tensor) -> list[str]:
    """What is wrong with the state of a generator of random draws."""
    like = torch.Generator().get_state()
    fits = state.dtype == like.dtype and state.shape == like.shape
    return [] if fits else [f"{GENERATOR} is no state of torch's generator"]


def _faults_of_tensor(name: str, value: torch.Tensor, shape: tuple[int, ...], *, infinite: bool) -> list[str]:
    if tuple(value.shape) != shape:
        return [f"{name} has shape {list(value.shape)}, not {list(shape)}"]
    if not value.is_floating_point():
        return []
    wrong = int((value.isnan() if infinite else ~value.isfinite()).sum())
    return [f"{name} has {wrong} numbers that are nan{'' if infinite else ' or inf'}"] if wrong else []


def _faults_of_scalars(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What is wrong with counters, generator, units and loss scaling."""
    if _FOLLOWED in tensors:
        raise CheckpointError(
            "state: needs an optimizer with a rule or on the host; got one that an earlier version followed on "
            "the engine. Take over its weights: read the checkpoint's `model/` tensors into the model, and train on.",
            code="CKPT108",
        )
    uncorrected = [n for n in tensors if n.endswith(_CORRECTED) and not n.startswith(OPTIMIZER)]
    if uncorrected and not part(tensors, _LEVEL):
        raise CheckpointError(
            f"state: needs means of squares corrected for their bias; got those of an earlier version "
            f"({uncorrected[0]}). Take over its weights: read the checkpoint's `model/` tensors into the model, and "
            "train on.",
            code="CKPT108",
        )
    faults = [f"{name} is missing" for name in (_COUNTERS, GENERATOR) if name not in tensors]
    counters = tensors.get(_COUNTERS, torch.zeros(3, dtype=torch.int64))
    if tuple(counters.shape) != (3,) or counters.is_floating_point() or bool((counters < 0).any()):
        faults.append(f"{_COUNTERS} are not three counts")
    if GENERATOR in tensors:
        faults += faults_of_generator(tensors[GENERATOR])
    pending = tensors.get(PENDING, torch.tensor(0))
    if pending.numel() != 1 or pending.is_floating_point() or int(pending) < 0:
        faults.append(f"{PENDING} is no count")
    scales = {name: tensors[SCALING + name] for name in SCALING_STATE[:2] if SCALING + name in tensors}
    for name, value in {**part(tensors, _UNIT), **scales}.items():
        if value.numel() != 1 or not _is_power_of_two(float(value)):
            faults.append(f"the scale {name} is no power of two")
    return faults


def _is_power_of_two(value: float) -> bool:
    return math.isfinite(value) and value > 0.0 and math.frexp(value)[0] == 0.5
