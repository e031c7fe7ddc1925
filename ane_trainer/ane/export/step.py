"""Exports of the training step itself, so that an app can go on training: `.aimodel` and `.mlpackage`.

The state of a step is weights, moments, counters and scaling. It travels in one of three forms:

    io      state is an input and an output: main(w, x, y, rate) -> (loss, w_next); the caller feeds it back
    state   state is updated in place: main(w: state, x, y, rate) -> loss
    both    `main` as io, and `stateful` beside it (mlpackage)

Core ML's compiler for the Neural Engine refuses programs with state on current macOS (onnxsim #1435 on an M4,
coremltools #2553 and #2631), while the same step with plain inputs and outputs was placed there whole
(onnxsim #1402: 110 of 110 ops, #1443: 352 of 352): so io is the default. `initial_state` returns the values
that the state starts from, by the state's names. The manifest beside the file says what each port is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ane_trainer.ane.compiler.coreai import INITIAL_STATE, MAIN, open_asset, save_asset
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.export.freeze import bind_inputs, map_values
from ane_trainer.ane.export.manifest import manifest, read_manifest, write_manifest
from ane_trainer.ane.export.package import Description, write_package
from ane_trainer.ane.export.report import largest_difference
from ane_trainer.ane.mil.loading import load_program
from ane_trainer.ane.mil.program import Function, Op, Program, TensorType, Value
from ane_trainer.ane.mil.weights import Array, from_array
from ane_trainer.ane.simulator import make_context, prepare
from ane_trainer.ane.stages import Lowered

Arrays = Mapping[str, Array]

FORMS = ("io", "state", "both")
#: The function with states in place, where `main` passes them.
STATEFUL = "stateful"


def changing(lowered: Lowered) -> tuple[str, ...]:
    """Inputs that a step updates, in order."""
    written = {alias.input for alias in lowered.aliases}
    return tuple(v.name for v in lowered.program.main.inputs if v.name in written)


def fixed_as_constants(lowered: Lowered, state: Arrays) -> Lowered:
    """The step with its unchanging state (frozen parameters, constant buffers) as constants."""
    names = {p.name for p in lowered.inputs if p.role == "state"} - set(changing(lowered))
    function = bind_inputs(lowered.program.main, {name: state[name] for name in names})
    inputs = tuple(port for port in lowered.inputs if port.name not in names)
    return replace(lowered, program=Program((function,)), inputs=inputs)


@dataclass(frozen=True)
class SingleStep:
    """A step as one program, what never changes in it as constants, and the state that it starts from, by port."""

    lowered: Lowered
    start: Arrays


def with_constants(lowered: Lowered, state: Arrays) -> SingleStep:
    """The step with the state that it changes, of `state`; what stays is in the program."""
    ready = fixed_as_constants(lowered, state)
    return SingleStep(ready, {name: state[name] for name in changing(ready)})


def write_step_aimodel(path: Path, step: SingleStep, about: Mapping[str, object], form: str) -> Path:
    """The step as a Core AI asset, its state mutable (`state`) or passed (`io`).

    Raises: UsageError for the form `both`: an asset has one function `main`.
    """
    if form == "both":
        raise UsageError(
            "state: needs io or state for an .aimodel; got both. Choose one of them.", code="ANE116"
        )
    write_manifest(path, manifest(step.lowered, form, about))
    return save_asset(path, step.lowered, step.start, about, mutable=form == "state")


def write_step_mlpackage(
    path: Path, lowered: Lowered, state: Arrays, about: Mapping[str, object], form: str
) -> Path:
    """The step as a Core ML package in fp16: io runs from iOS 16 on, states need iOS 18, macOS 15."""
    step = with_constants(lowered, state)
    ready = step.lowered
    plain = replace(ready.program.main, name=MAIN)
    functions = {
        "io": (plain,),
        "state": (stateful(ready, MAIN),),
        "both": (plain, stateful(ready, STATEFUL)),
    }[form]
    first = _initial(plain.opset, step.start)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    description = Description(summary=texts.pop("description", ""), metadata=texts)
    write_manifest(path, manifest(ready, form, about))
    return write_package(path, Program((*functions, first)), description)


def stateful(lowered: Lowered, name: str) -> Function:
    """The step with states instead of aliased inputs.

    before: main(w, x) -> (loss, w_next)           with the alias (w_next, w)
    after:  main(w: state, x) -> loss              w_read = read_state(w); ...; coreml_update_state(w, w_next)
    """
    function = lowered.program.main
    written = {alias.output: alias.input for alias in lowered.aliases}
    states = {v.name: v for v in function.inputs if v.name in written.values()}

    def read(value: Value) -> Value:
        return replace(value, name=f"{value.name}_read") if value.name in states else value

    held = {key: Value(key, TensorType(v.type.dtype, v.type.shape, state=True)) for key, v in states.items()}
    body = map_values(function, read)
    reads = tuple(Op("read_state", (("input", held[key]),), (read(v),)) for key, v in states.items())
    writes = tuple(
        Op(
            "coreml_update_state",
            (("state", held[written[v.name]]), ("value", read(v))),
            (Value(f"{written[v.name]}_kept", v.type),),
        )
        for v in function.outputs
        if v.name in written
    )
    inputs = tuple(held.get(v.name, v) for v in function.inputs)
    outputs = tuple(v for v in body.outputs if v.name not in written)
    return replace(body, name=name, inputs=inputs, ops=(*reads, *body.ops, *writes), outputs=outputs)


def _initial(opset: str, arrays: Arrays) -> Function:
    """A function without inputs that returns constants."""
    ops = tuple(
        Op(
            "identity",
            (("x", from_array(a, name=f"{name}_value")),),
            (Value(name, TensorType("fp16", a.shape)),),
        )
        for name, a in arrays.items()
    )
    return Function(INITIAL_STATE, (), ops, tuple(op.result for op in ops), opset)


def replay_mlpackage(
    path: Path, feeds: Sequence[Arrays], chip: str, fidelity: str
) -> tuple[dict[str, Array], list[float]]:
    """(state, losses) after running the package that `write_step_mlpackage` wrote, on the simulator."""
    program, context = load_program(path), make_context(chip, fidelity)
    functions = {function.name: function for function in program.functions}
    first = prepare(functions[INITIAL_STATE], context).run({})
    plan = prepare(functions[MAIN], context)
    aliases = read_manifest(path)["aliases"]
    if not any(value.type.state for value in functions[MAIN].inputs):
        return feed_back(lambda feed: plan.run(dict(feed)), first, aliases, feeds)
    for name, value in first.items():
        plan.write(name, value)
    losses = [float(plan.run(dict(feed))["loss"][0]) for feed in feeds]
    return {name: plan.read(name) for name in first}, losses


def replay_aimodel(path: Path, feeds: Sequence[Arrays]) -> tuple[dict[str, Array], list[float]]:
    """(state, losses) after running the asset that `write_step_aimodel` wrote, on Apple's runtime."""
    asset = open_asset(path)
    try:
        if not asset.ports["states"]:
            return feed_back(asset.run, asset.state(), read_manifest(path)["aliases"], feeds)
        losses = [float(asset.run(feed)["loss"][0]) for feed in feeds]
        return {name: np.array(asset.state()[name]) for name in asset.ports["states"]}, losses
    finally:
        asset.close()


def feed_back(
    run: Callable[[Arrays], Arrays], first: Arrays, aliases: Mapping[str, str], feeds: Sequence[Arrays]
) -> tuple[dict[str, Array], list[float]]:
    """Run a step in the form io: each output that is an alias becomes the input of the next call."""
    state, losses = {name: np.array(value) for name, value in first.items()}, []
    for feed in feeds:
        results = run({**state, **feed})
        losses.append(float(results["loss"][0]))
        state = {name: np.array(results[output]) for output, name in aliases.items()}
    return state, losses


def replay_beside(
    run: Callable[[Arrays], Arrays], path: Path, feeds: Sequence[Arrays]
) -> tuple[dict[str, Array], list[float]]:
    """`feed_back` from the state and by the aliases that lie beside a step's file."""
    from safetensors.numpy import load_file

    return feed_back(run, load_file(path.with_suffix(".safetensors")), read_manifest(path)["aliases"], feeds)


def state_difference(a: Arrays, b: Arrays) -> float:
    """The largest difference of any number of two states; infinite if they do not have the same tensors."""
    if set(a) != set(b):
        return float("inf")
    return max((largest_difference(a[name], b[name]) for name in a), default=0.0)
