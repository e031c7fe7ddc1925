"""From a trained model to an exported, checked file: what `Trainer.export` and the command line do."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ane_trainer.__version__ import __version__
from ane_trainer.ane.capture.optimizers.rule import RESIDUAL
from ane_trainer.ane.compiler.lower import lower
from ane_trainer.ane.dispatch import TrainingStep
from ane_trainer.ane.dispatch.loading import captured_in_fp32
from ane_trainer.ane.errors import DataError, UsageError
from ane_trainer.ane.export import (
    UNVERIFIED,
    ExportOptions,
    ExportReport,
    Signature,
    SingleStep,
    export_inference,
    export_step,
    in_fp32,
)
from ane_trainer.ane.export.driving import driving
from ane_trainer.ane.export.freeze import Deployed
from ane_trainer.ane.export.report import size_bytes
from ane_trainer.ane.export.step import changing, with_constants
from ane_trainer.ane.export.swift import recorded_run, write_app, write_predictor

INPUTS = ("auto", "image", "tensor")
#: Steps that an exported training step is run for.
CHECKED_STEPS = 20


def export_model(
    model: nn.Module,
    path: str | Path,
    format: str,
    data: Iterable[object],
    options: ExportOptions,
    *,
    classes: bool,
) -> ExportReport:
    """Write the model for inference and run the file on the first `options.examples` of `data`.

    An image as input needs data with `mean` and `std`. `classes`: the outputs are scores of the data's
    `class_names`.
    """
    if options.batch < 1 or options.examples < 1:
        raise UsageError(
            f"export: needs a batch and examples of at least 1; got {options.batch}, {options.examples}.",
            code="ANE116",
        )
    x, y = _first_examples(data, options.examples)
    names = tuple(getattr(data, "class_names", ())) if classes else ()
    tokens = not x.is_floating_point()
    scale = _normalisation(data, options.input)
    signature = Signature(tuple(x.shape[1:]), options.batch, scale, names, tokens)
    texts = {"description": f"{type(model).__name__}, trained with ane_trainer", "version": __version__}
    labels = y if isinstance(y, torch.Tensor) and y.dim() == 1 and not y.is_floating_point() else None
    return export_inference(model, path, format, signature, x.float(), labels, replace(options, texts=texts))


def export_training(
    step: TrainingStep, optimizer: torch.optim.Optimizer, path: str | Path, format: str,
    data: Iterable[Any], options: ExportOptions,
) -> ExportReport:  # fmt: skip
    """Write a compiled step with its present state and run the file for 20 steps on batches of `data`."""
    single = in_fp32(format, options.weights)
    batches = list(itertools.islice(iter(data), CHECKED_STEPS))
    if not batches:
        raise DataError("export: needs at least one batch; got none. Pass data.", code="DATA104")
    chosen = [batches[i % len(batches)] for i in range(CHECKED_STEPS)]
    feeds = [step.feeds(x, y, ahead=i) for i, (x, y) in enumerate(chosen)]
    about = about_step(step, optimizer)
    _check_scalars(step, about)
    found = _in_fp32(step) if single else None
    return export_step(step.compiled, step.port_state(), feeds, path, format, options, about, found)


def _check_scalars(step: TrainingStep, about: Mapping[str, Any]) -> None:
    """Raises: UsageError ANE116 for numbers that follow from what the model counted, which no formula tells."""
    counted = [
        p.target for p in step.compiled.inputs if p.role == "scalar" and p.target not in about["scalars"]
    ]
    if counted:
        raise UsageError(
            f"export: needs a step whose numbers follow from the optimizer; got {', '.join(counted)}, which the model "
            "counts. Give batch norms a momentum, and the model no counters that its forward reads.",
            code="ANE116",
        )


def _in_fp32(step: TrainingStep) -> SingleStep:
    """The step as fp32 computes it, and its present state, whole in the first terms: fp32 needs no second ones."""
    step.sync()
    units, loaded = step.host_side
    units_now = {**loaded.capture.units, **units.named()}
    captured = captured_in_fp32(step.subject, step.options, loaded.capture, units_now)
    lowered = lower(captured, dtype="fp32")
    lowered = replace(lowered, inputs=loaded.mirror.scaled(lowered.inputs))
    state = {name: np.asarray(array, np.float32) for name, array in step.port_state().items()}
    ports, tensors = {p.target: p for p in lowered.inputs if p.role == "state"}, loaded.mirror.tensors
    for target in ports.keys() & tensors.keys():
        port, second = ports[target], ports.get(f"{target}/{RESIDUAL}")
        state[port.name] = (tensors[target].detach().float() * port.scale).reshape(port.shape).numpy()
        if second is not None:
            state[second.name] = np.zeros(second.shape, np.float32)
    return with_constants(lowered, state)


def export_app(
    step: TrainingStep, optimizer: torch.optim.Optimizer, model: nn.Module, folder: str | Path,
    data: Iterable[Any], options: ExportOptions,
) -> ExportReport:  # fmt: skip
    """Write a Swift package that trains on with the step: `export_training` in the form io, and what surrounds it."""
    batches = list(itertools.islice(iter(data), CHECKED_STEPS))
    with tempfile.TemporaryDirectory() as place:
        package = Path(place) / "step.mlpackage"
        report = export_training(
            step, optimizer, package, "step-mlpackage", batches, replace(options, state="io")
        )
        x, y = batches[0]
        state, chip = step.port_state(), step.compiled.chip
        recorded = recorded_run(step, batches)
        write_app(Path(folder), package, state, step.feeds(x, y), chip, recorded)
    x = x if isinstance(x, torch.Tensor) else torch.as_tensor(x)
    signature = Signature(tuple(x.shape[1:]), 1, None, (), not x.is_floating_point())
    ports = {p.target: p.name for p in step.compiled.inputs if p.role == "state" and "/" not in p.target}
    travels = set(changing(step.compiled.legalized.lowered))
    names = {target: port for target, port in ports.items() if port in travels}
    fixed = {target: state[port] for target, port in ports.items()}
    write_predictor(Path(folder), Deployed(model, signature), signature, names, fixed)
    return replace(
        report,
        path=Path(folder),
        format="app",
        size_bytes=size_bytes(Path(folder)),
        unverified=UNVERIFIED["app"],
    )


def about_step(step: TrainingStep, optimizer: torch.optim.Optimizer) -> Mapping[str, object]:
    """The metadata that an app needs to feed the step."""
    units, loaded = step.host_side
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    return {
        "description": f"A training step with {type(optimizer).__name__}, by ane_trainer",
        "version": __version__,
        "applied_steps": step.applied_steps,
        "optimizer": {"name": type(optimizer).__name__, **{k: v for k, v in settings.items() if _plain(v)}},
        "next_scalars": step.scalars(),
        "loss_unit": loaded.loss_unit,
        "steps": step.steps,
        **driving(units, step.gradient_options, loaded.mirror),
    }


def _plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str, tuple, list))


def _normalisation(data: Iterable[object], input: str) -> tuple[float, float] | None:
    if input not in INPUTS:
        raise UsageError(
            f"input: needs one of {', '.join(INPUTS)}; got {input!r}. Choose one.", code="ANE115"
        )
    mean, std = getattr(data, "mean", None), getattr(data, "std", None)
    known = mean is not None and std is not None
    if input == "image" and not known:
        raise UsageError(
            'input: "image" needs data with mean and std; got data without. Use "tensor".', code="ANE115"
        )
    return (float(mean), float(std)) if known and input != "tensor" else None  # type: ignore[arg-type]


def _first_examples(data: Iterable[Any], count: int) -> tuple[torch.Tensor, Any]:
    xs, ys, found = [], [], 0
    for x, y in data:
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            raise DataError(
                "export: needs batches of one tensor and one target; got a structure.", code="DATA105"
            )
        xs.append(x)
        ys.append(y)
        found += len(x)
        if found >= count:
            break
    if not xs:
        raise DataError("export: needs at least one batch; got none. Pass data.", code="DATA104")
    return torch.cat(xs)[:count], torch.cat(ys)[:count]
