"""One training step as one pure function of (state, batch, scalars), traced into a `Captured`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ane_trainer.ane.capture.batches import Structure, program_form, tensors_of
from ane_trainer.ane.capture.buffers import (
    BufferChanges,
    check_counters,
    find_changes,
    forwarded,
    kept,
    newest_statistics,
    tell_of_stalls,
)
from ane_trainer.ane.capture.calibrate import Calibration, call_loss, call_model, copies, loss_of
from ane_trainer.ane.capture.gradients import (
    FLOORS,
    LIMITS,
    UNIT_SCALE,
    UNITS,
    GradientOptions,
    accumulate,
    clip_norm,
    clip_values,
    entry,
    gradient_scalars,
    of_size,
)
from ane_trainer.ane.capture.hidden import calibrate_hidden
from ane_trainer.ane.capture.losses import Loss, get_loss, loss_name
from ane_trainer.ane.capture.optimizers.rule import LEAST_ROOTS, Rule, Update
from ane_trainer.ane.capture.optimizers.table import plain, port_name, rule_for, scalar_values, uneven_groups
from ane_trainer.ane.capture.outside import nothing_outside, refuse_gradient_hooks
from ane_trainer.ane.capture.parts import ALL_FIT, PARTIAL, PEAKS, finish_divided, finish_whole, partial_ports
from ane_trainer.ane.capture.ports import (
    SCALING_STATE,
    Parameter,
    batch_ports,
    find_parameters,
    float_buffers,
    identifier,
    parameter_ports,
    scaling_ports,
    unique,
    units_by_group,
)
from ane_trainer.ane.capture.randomness import HostRandomMode, bounds, draw
from ane_trainer.ane.capture.range.calibration import Magnitudes
from ane_trainer.ane.capture.range.degrees import undo_loss_scale
from ane_trainer.ane.capture.rewrites.decompositions import decomposition_table
from ane_trainer.ane.capture.scaling import (
    HEALTH,
    LARGEST_SCALE,
    OVERFLOW,
    SCALING,
    all_below,
    gradient_peaks,
    next_scale,
)
from ane_trainer.ane.capture.slow_buffers import Carried, carry_slow_buffers
from ane_trainer.ane.capture.trace.sources import (
    Place,
    SourceMode,
    follow_backward,
    loss_place,
    watch_modules,
)
from ane_trainer.ane.capture.trace.tracer import trace
from ane_trainer.ane.capture.unit_bounds import (
    LARGEST_SHIFT,
    clipping_shift,
    largest_shift,
    least_gradient,
    unit_bounds,
)
from ane_trainer.ane.capture.update import next_state, slots_of
from ane_trainer.ane.capture.written import as_written, refuse_trained
from ane_trainer.ane.stages import Captured, Port

Tensors = dict[str, torch.Tensor]

#: Suffix of the targets of results that are gradients.
GRADIENT = "gradient"
#: Keys among the units: the largest loss scale, and the power of two after clipping.
CEILING, SHIFT = "step/largest_scale", "step/clip_shift"


@dataclass(frozen=True)
class StepCapture:
    """A captured step, the loss scale to start from and the gradient units (parameter -> power of two).

    `values(batch)` are those of the inputs in a first step, in full precision; `calibration` the magnitudes that its
    powers of two were chosen from. `update`: the second part of a step that is divided at its gradients. `guarded`:
    that of the graph. `witness`: loss and norms of gradients in plain PyTorch, if no random draw counts (`calibrate`).
    """

    source: Callable[[], Captured] = field(repr=False, compare=False)
    loss_scale: float
    units: Mapping[str, float]
    rule: Rule
    parameters: tuple[Parameter, ...]
    changes: BufferChanges = field(default_factory=BufferChanges)
    values: Callable[[tuple[object, object]], Tensors] = field(
        default=lambda batch: {}, repr=False, compare=False
    )
    update: Captured | None = None
    calibration: Magnitudes = field(default_factory=dict, repr=False)
    guarded: tuple[str, ...] = ()
    witness: tuple[float, ...] = ()

    @functools.cached_property
    def captured(self) -> Captured:
        """The graph; of a step that was recalled from the disk captured now, with the same units and magnitudes."""
        return self.source()


@dataclass(frozen=True)
class CaptureOptions:
    """How a step is captured. `units` are those of an earlier capture, to continue its state bit for bit; by
    default they are chosen. `precision` is what the program will be lowered to, "fp16" or "fp32". The range pass
    looks at the example and at `calibrate_on`, more batches of its shape, or takes the magnitudes of an earlier one.
    `divided`: as two parts (`parts`).
    """

    gradients: GradientOptions = field(default_factory=GradientOptions)
    loss_scale: float | str = "auto"
    precision: str = "fp16"
    units: Mapping[str, float] | None = None
    calibrate_on: Sequence[tuple[object, object]] = ()
    calibration: Magnitudes = field(default_factory=dict)
    divided: bool = False


@dataclass(frozen=True)
class _Plan:
    """Everything the traced function needs besides tensors."""

    model: torch.nn.Module
    loss: Loss
    loss_text: str
    optimizer: torch.optim.Optimizer
    rule: Rule
    parameters: tuple[Parameter, ...]
    buffers: tuple[str, ...]
    structure: Structure
    state: tuple[Port, ...]
    batch: tuple[Port, ...]
    draws: tuple[Port, ...]
    scalars: tuple[Port, ...]
    gradients: GradientOptions
    least_root: float
    changes: BufferChanges
    divided: bool = False
    ceiling: float = LARGEST_SCALE
    written: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (*self.state, *self.batch, *self.draws, *self.scalars)


def capture_training(
    model: torch.nn.Module,
    loss: str | Loss,
    optimizer: torch.optim.Optimizer,
    example: tuple[object, object],
    options: CaptureOptions | None = None,
) -> StepCapture:
    """Capture forward, loss, backward and update of one step; see `capture_step`.

    Raises: UnsupportedModel for an optimizer that is to run on the engine and has no rule.
    """
    options, example = options or CaptureOptions(), (program_form(example[0]), program_form(example[1]))
    units = options.units or {}
    rule = rule_for(optimizer, options.gradients.on_host)
    found = find_parameters(model, optimizer)
    refuse_gradient_hooks(model)
    with (
        forwarded(model) as final,
        nothing_outside(model, loss, lambda: loss_of(model, get_loss(loss), example)),
    ):
        calibration, moved = calibrate_hidden(model, get_loss(loss), found, example, optimizer)
    changes = find_changes(model, final)
    if options.gradients.on_host:
        refuse_trained(p.name for p in found if p.trained and p.name in calibration.written)
    clip = options.gradients
    parameters = tuple(_with_unit(p, rule, optimizer, calibration, units, clip) for p in found)
    plan = _plan(model, loss, optimizer, example, parameters, calibration, changes, options)
    scale = calibration.loss_scale() if options.loss_scale == "auto" else float(options.loss_scale)
    plan = dataclasses.replace(plan, ceiling=units.get(CEILING, max(scale, calibration.ceiling())))
    outputs: list[Port] = []
    place = Place()
    function = _function(plan, place, outputs)
    graph = trace(function, _example_inputs(plan, example), decomposition_table(), place, own=True)
    undo_loss_scale(graph.graph, plan.inputs)
    check_counters(model, changes, example, functools.partial(loss_of, model, get_loss(loss)))
    shift = units.get(
        SHIFT, clipping_shift(options.gradients, calibration, largest_shift(rule, optimizer, parameters, {}))
    )
    chosen = {p.name: p.unit for p in parameters if p.trained} | {CEILING: plan.ceiling, SHIFT: shift}
    values = functools.partial(_calibration_inputs, plan, scale)
    carried, fed, examples = Carried(plan.inputs, outputs), Tensors(), list[Tensors]()
    if options.precision == "fp16":
        fed = values(example)
        if not options.divided:
            carried = carry_slow_buffers(graph, plan.inputs, outputs, fed, model)
        tell_of_stalls(model, final, carried.targets, lambda: loss_of(model, get_loss(loss), example))
        seen = fed, *map(values, options.calibrate_on), *_moved(plan, fed, moved)
        examples = [carried.values(inputs) for inputs in seen]
    update, sizes = None, options.calibration
    if options.divided:
        captured, update = finish_divided(graph, plan.inputs, outputs, examples)
    else:
        later = carried.later(fed) if carried.states else []
        inputs, outputs = carried.inputs, carried.outputs
        captured, sizes = finish_whole(graph, inputs, outputs, examples, sizes, plan.buffers, later)
    first = lambda batch: carried.values(values(batch))  # noqa: E731
    return StepCapture(
        lambda: captured, scale, chosen, rule, parameters, changes, first, update, sizes, captured.guarded,
        calibration.witness,
    )  # fmt: skip


def _plan(
    model: torch.nn.Module,
    loss: str | Loss,
    optimizer: torch.optim.Optimizer,
    example: tuple[object, object],
    parameters: tuple[Parameter, ...],
    calibration: Calibration,
    changes: BufferChanges,
    options: CaptureOptions,
) -> _Plan:
    groups, gradients = optimizer.param_groups, options.gradients
    rule = rule_for(optimizer, gradients.on_host)
    state: list[Port] = []
    for p in parameters:
        state += parameter_ports(p, rule, None if p.group is None else groups[p.group], gradients)
    buffers = float_buffers(model)
    state += [Port(identifier(n), tuple(b.shape) or (1,), "state", n) for n, b in buffers.items()]
    state += scaling_ports(gradients)
    batch = batch_ports(example[0], "x") + batch_ports(example[1], "y")
    draws = [
        Port(f"mask_{i}", m.shape, "batch", m.target, bounds=bounds(m))
        for i, m in enumerate(calibration.draws)
    ]
    units = units_by_group(parameters, len(groups))
    late = uneven_groups(optimizer, rule)  # with numbers for each of their parameters
    lags = [list(range(len(own))) if i in late else [0] * len(own) for i, own in enumerate(units)]
    sizes = {n: len(v) for n, v in scalar_values(optimizer, rule, len(parameters) + 1, units, lags).items()}
    trained = [p.unit for p in parameters if p.trained]
    if trained:
        sizes |= {n: len(v) for n, v in gradient_scalars(gradients, trained, 1.0, last=True).items()}
        sizes |= {LIMITS: len(trained), FLOORS: len(trained)}
    scalars = [Port(identifier(name), (size,), "scalar", name) for name, size in sizes.items()]
    scalars += changes.scalars()
    ports = unique([*scalars, *batch, *draws, *state])
    count = [len(scalars), len(scalars) + len(batch), len(scalars) + len(batch) + len(draws)]
    return _Plan(
        model, get_loss(loss), loss_name(loss), optimizer, rule, parameters, tuple(buffers),
        Structure.of(example), tuple(ports[count[2] :]), tuple(ports[count[0] : count[1]]),
        tuple(ports[count[1] : count[2]]), tuple(ports[: count[0]]), gradients, LEAST_ROOTS[options.precision],
        changes, options.divided, written=calibration.written,
    )  # fmt: skip


def _with_unit(
    parameter: Parameter,
    rule: Rule,
    optimizer: torch.optim.Optimizer,
    calibration: Calibration,
    units: Mapping[str, float],
    clip: GradientOptions,
) -> Parameter:
    """The parameter with its gradient's unit; one that the loss does not reach counts as frozen.

    Coupled weight decay is added behind the clipping, to a gradient times a shift: the unit leaves room for it there.
    """
    if parameter.group is None or parameter.name not in calibration.peaks:
        return dataclasses.replace(parameter, group=None)
    group = plain(optimizer.param_groups[parameter.group])
    least = least_gradient(parameter, rule, group) * clipping_shift(clip, calibration, LARGEST_SHIFT)
    unit = calibration.unit(parameter.name, unit_bounds(rule, group), least, clip.most)
    return dataclasses.replace(parameter, unit=units.get(parameter.name, unit))


def _example_inputs(plan: _Plan, example: tuple[object, object], others: float = 1.0) -> Tensors:
    """Copies of weights, buffers and batch; state that the model does not have is full of `others`."""
    values = {p.name: p.tensor.detach() for p in plan.parameters} | float_buffers(plan.model)
    inputs = {}
    for port in plan.state:
        known = values.get(port.target)
        full = torch.zeros if others == 0.0 else torch.ones
        inputs[port.name] = full(port.shape) if known is None else known.float().reshape(port.shape).clone()
    for port, leaf in zip(plan.batch, tensors_of(example), strict=True):
        inputs[port.name] = (leaf.float() if leaf.is_floating_point() else leaf).reshape(port.shape).clone()
    inputs |= {p.name: torch.ones(p.shape) for p in (*plan.draws, *plan.scalars)}
    counts = plan.changes.host_values(plan.model, 0)
    inputs |= {p.name: torch.tensor(counts[p.target]) for p in plan.scalars if p.target in counts}
    return inputs


def _calibration_inputs(plan: _Plan, scale: float, batch: tuple[object, object]) -> Tensors:
    """What the first step is fed: weights and buffers as they are, no moments, this batch and loss scale."""
    inputs = _example_inputs(plan, batch, 0.0)
    scaling = {"loss_scale": scale, "loss_scale_inverse": 1.0 / scale}
    inputs |= {
        p.name: torch.full(p.shape, v)
        for p in plan.state
        for k, v in scaling.items()
        if p.target == SCALING + k
    }
    generator = torch.Generator().manual_seed(0)
    return inputs | {p.name: draw(p.target, p.shape, generator) for p in plan.draws}


def _moved(plan: _Plan, inputs: Tensors, moved: Mapping[str, torch.Tensor]) -> list[Tensors]:
    """The inputs with parameters as after some updates, where there are any (`hidden`)."""
    ports = {port.name: moved[port.target] for port in plan.state if port.target in moved}
    return [inputs | ports] if ports else []


def _function(plan: _Plan, place: Place, outputs: list[Port]) -> Any:
    """The step over the values of `plan.inputs`; fills `outputs` with the ports of its results."""

    groups = plan.optimizer.param_groups

    def run_step(*values: torch.Tensor) -> list[torch.Tensor]:
        named = dict(zip((p.name for p in plan.inputs), values, strict=True))
        state = {p.target: named[p.name] for p in plan.state}
        value, scaled, buffers = _differentiate(plan, place, named, state)
        place.text = "loss scaling"
        inverse = state[f"{SCALING}loss_scale_inverse"]
        gradients, changes, checks = process_gradients(plan, place, named, state, scaled)
        new_state: Tensors = {**kept(state, buffers, checks.batch), **changes}
        gate = checks.fits * named["last"] if plan.gradients.accumulate > 1 else checks.fits
        gated = _gated_scalars(plan, named, gate)
        slots = slots_of((p.name for p in plan.parameters), state)
        for p in plan.parameters:
            if p.name in scaled and not plan.gradients.on_host:
                place.text = f"optimizer {type(plan.optimizer).__name__} ({p.name})"
                own = as_written(state[p.name], new_state.get(p.name), slots[p.name])
                u = Update(
                    own[0], gradients[p.name], own[1], gated[p.name], groups[p.group or 0], plan.least_root
                )
                new = next_state(plan.rule, u, p.group, place)
                new_state |= {p.name + slot: value for slot, value in new.items()}
        place.text = "loss scaling"
        scale, _, good = (state[SCALING + name] for name in SCALING_STATE)
        following = next_scale(scale, inverse, good, checks.scaled, plan.ceiling)
        new_state |= {SCALING + n: v for n, v in zip(SCALING_STATE, following, strict=True)}
        results = {"loss": value.reshape(1), "applied": checks.fits}
        if checks.health is not None:
            results[HEALTH] = checks.health
        changed = [p for p in plan.state if p.target in new_state]
        outputs[:] = [Port(name, tuple(v.shape), "result", name) for name, v in results.items()]
        read = [p for p in plan.parameters if p.name in gradients] if plan.gradients.on_host else []
        outputs.extend(_gradient_port(p, gradients[p.name]) for p in read)
        outputs.extend(Port(f"{p.name}_next", p.shape, "state", p.target, p.scale) for p in changed)
        found = [*results.values(), *(gradients[p.name] for p in read)]
        found += [_in_shape(new_state[p.target], p.shape) for p in changed]
        if plan.divided and checks.peaks is not None:
            partial = {f"{n}/{PARTIAL}": v for n, v in (*checks.gradients.items(), *buffers.items())}
            partial |= {PEAKS: checks.peaks, ALL_FIT: checks.scaled}
            outputs.extend(partial_ports(partial))
            found += [partial[p.target].reshape(p.shape) for p in outputs[len(found) :]]
        return found

    return run_step


def _differentiate(
    plan: _Plan, place: Place, named: Tensors, state: Tensors
) -> tuple[torch.Tensor, Tensors, Tensors]:
    """(loss, scaled gradients by parameter, new buffers)."""
    values = {p.name: state[p.name].reshape(p.tensor.shape) for p in plan.parameters}
    values |= {name: values[name].clone() for name in plan.written}
    trained = {p.name: values[p.name].detach().requires_grad_() for p in plan.parameters if p.trained}
    shapes = {name: b.shape for name, b in float_buffers(plan.model, dense=False).items()}
    buffers = {name: state[name].reshape(shapes[name]).clone() for name in plan.buffers}
    x, y = plan.structure.filled([named[p.name] for p in plan.batch])
    draws = [named[p.name] for p in plan.draws]
    sent = {p.target: named[p.name] for p in plan.scalars}
    others = copies(plan.model) | plan.changes.stand_ins(plan.model, sent)
    held = {**others, **values, **trained, **buffers}
    with torch.enable_grad(), watch_modules(plan.model) as stack:
        describe = stack.here
        with HostRandomMode(draws), SourceMode(lambda: describe(), place):
            with newest_statistics(plan.model, plan.changes), forwarded(plan.model) as final:
                output = call_model(plan.model, held, x)
            buffers |= {n: final[n].detach().reshape(shapes[n]) for n in buffers if n in final}
            buffers |= plan.changes.averages(state, buffers, sent)
            describe = lambda: loss_place(plan.loss_text)  # noqa: E731
            value = call_loss(plan.loss, output, y, plan.model, held)
        buffers |= {name: held[name].detach().clone() for name in plan.written}
        follow_backward(value, place)
        seed = state[f"{SCALING}loss_scale"].reshape(value.shape)
        gradients = torch.autograd.grad(value, list(trained.values()), seed)
    return value.detach(), dict(zip(trained, gradients, strict=True)), buffers


def _gated_scalars(plan: _Plan, named: Tensors, ok: torch.Tensor) -> dict[str, Tensors]:
    """For each parameter its scalars by name, the gated ones times `ok`."""
    groups = plan.optimizer.param_groups
    members = [[p.name for p in plan.parameters if p.group == number] for number in range(len(groups))]
    result: dict[str, Tensors] = {name: {} for own in members for name in own}
    for number, (group, own) in enumerate(zip(groups, members, strict=True)):
        if not own:  # all of it is frozen: there are no ports
            continue
        shared = plan.rule.scalars(plain(group), 1)
        for name in (*shared, *plan.rule.unit_scalars(plain(group), 1, 1.0)):
            value = named[port_name(name, number, len(groups))]
            value = value * ok if name in plan.rule.gated else value
            for place, parameter in enumerate(own):
                each = value if len(value) == 1 else value[place : place + 1]
                result[parameter][name] = each
    return result


@dataclass(frozen=True)
class _Checks:
    """[1] each, 1.0 or 0.0: whether the scaled gradients fit, all of the batch, all since the last update.

    `gradients` are those of the batch in their units, `peaks` the largest magnitude of each.
    """

    scaled: torch.Tensor
    batch: torch.Tensor
    fits: torch.Tensor
    health: torch.Tensor | None
    gradients: Tensors = field(default_factory=dict)
    peaks: torch.Tensor | None = None


def process_gradients(
    plan: _Plan, place: Place, named: Tensors, state: Tensors, scaled: Tensors
) -> tuple[Tensors, Tensors, _Checks]:
    """(gradients in their units, accumulated and clipped; new state; whether they fit)."""
    if not scaled:
        one = torch.ones(1)
        return {}, {}, _Checks(one, one, one, None)
    options = plan.gradients
    peaks = gradient_peaks(list(scaled.values()))
    ok = all_below(torch.cat(peaks), OVERFLOW)
    factors = named[UNITS] * (state[f"{SCALING}loss_scale_inverse"] * UNIT_SCALE)
    own = torch.cat([peak * entry(factors, i) for i, peak in enumerate(peaks)])
    own = torch.minimum(own, named["clip_value"]) if options.clips_each else own
    within = (own < named[LIMITS]) & (own >= named[FLOORS])
    batch = fits = ok * within.to(torch.float32).amin().reshape(1)
    gradients = {n: g.reshape(state[n].shape) * entry(factors, i) for i, (n, g) in enumerate(scaled.items())}
    health, of_batch = [own, ok], gradients
    changes: Tensors = {}
    if options.accumulate > 1:
        place.text = "gradient accumulation"
        gradients, changes, fits = accumulate(gradients, state, options, batch, named["last"])
    place.text = "gradient clipping"
    if options.clip_value is not None:
        gradients = clip_values(gradients, named["clip_value"])
    if options.clip_norm is not None:
        ports = (named[name] for name in ("clip_common", "clip_norm", "clip_shift"))
        sums = own if options.accumulate == 1 else torch.cat(gradient_peaks(list(gradients.values())))
        gradients, factor = clip_norm(gradients, *ports)
        near = of_size(sums, factor.reshape(1), named, options)
        health += [factor.reshape(1), near]
        changes = {n: torch.where(near > 0, new, state[n]) for n, new in changes.items()}
        batch, fits = batch * near, fits * near
    return gradients, changes, _Checks(ok, batch, fits, torch.cat(health), of_batch, own)


def _in_shape(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The value in a shape; no view of it where it has that, since each would be replaced in a list of all results."""
    return value if tuple(value.shape) == shape else value.reshape(shape)


def _gradient_port(p: Parameter, gradient: torch.Tensor) -> Port:
    target = f"{p.name}/{GRADIENT}"
    return Port(identifier(target), tuple(gradient.shape), "result", target, p.unit)
