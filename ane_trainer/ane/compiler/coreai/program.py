"""A MIL program as a Core AI program: state as mutable inputs, and its start values as a second function.

Core AI's state is memory that the caller owns and passes with every call. A training step therefore becomes
two functions of one asset: `main` (batch, scalars; state is updated in place) and `initial_state`, whose
outputs are the values that the state starts from, under the states' names.

The program is written through the public authoring API, op by op: the same MIL program that the simulator
runs is what Core AI runs, without a second capture through torch.export (whose converter refuses the ops of
backward passes). Source of the state's form: coreai-torch 0.4.3, which marks a mutable buffer by the argument
attribute `MutableBuffers.buffer_mutation`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ane_trainer.ane.compiler.coreai import tensors
from ane_trainer.ane.compiler.coreai.ops import NUMPY, constant, constant_of, refuse_unknown, translate
from ane_trainer.ane.compiler.coreai.products import keep_products_apart
from ane_trainer.ane.compiler.coreai.runtime import LoadedAsset, make_state, read_state, require
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil.program import Function, Literal, Value
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.stages import Lowered, Port

#: Importing it registers its rules.
assert tensors

MAIN = "main"
INITIAL_STATE = "initial_state"
#: Suffix of a trained parameter's second term in a port's target: `fc.weight/residual`.
_RESIDUAL = "/residual"
_SCALING = "step/"


def build_program(lowered: Lowered, initial: Mapping[str, Array] | None = None, mutable: bool = True) -> Any:
    """A `coreai.authoring.AIProgram` of a lowered step or forward pass.

    `initial` holds arrays by state port; with it the program has the function `initial_state` as well. State
    is updated in place, or, if not `mutable`, given as inputs and returned as outputs.
    Raises: UnsupportedModel (ANE305) for ops without a translation.
    """
    from coreai import authoring as api

    function = keep_products_apart(lowered.program.main)
    refuse_unknown(function)
    module = api.Module.create()
    with module:
        _add_main(api, lowered, function, mutable)
        if initial:
            types = {value.name: value.type for value in function.inputs}
            arrays = {name: np.asarray(a, NUMPY[types[name].dtype]) for name, a in initial.items()}
            _add_constants(api, arrays)
    return api.AIProgram(module)


def program_dtype(function: Function) -> str:
    """The float type that a function computes in: `fp32` or `fp16`."""
    return "fp32" if any(value.type.dtype == "fp32" for value in function.inputs) else "fp16"


def _add_main(api: object, lowered: Lowered, function: Function, mutable: bool) -> None:
    written = {alias.output: alias.input for alias in lowered.aliases}
    guarded = _guarded(lowered.inputs)

    def body(*arguments: object) -> tuple[object, ...]:
        known: dict[Value | Literal, object] = dict(zip(function.inputs, arguments, strict=True))
        for op in function.ops:
            known[op.result] = translate(api, op, lambda item: _operand(known, item))
        values = {v.name: _operand(known, v) for v in function.outputs}
        applied = values.get("applied")
        before = {v.name: known[v] for v in function.inputs}
        for output, state in written.items():
            if applied is not None and state in guarded:
                values[output] = _unless_skipped(api, applied, values[output], before[state])
        return tuple(values[v.name] for v in function.outputs)

    graph = _graph(api, MAIN, body, function.inputs, function.outputs)
    if mutable:
        _mark_state(graph, {state: output for output, state in written.items()})


def _guarded(ports: Iterable[Port]) -> set[str]:
    """State that a skipped step must leave alone: trained parameters and the optimizer's tensors."""
    state = {p.target: p.name for p in ports if p.role == "state"}
    trained = {t.removesuffix(_RESIDUAL) for t in state if t.endswith(_RESIDUAL)}
    return {
        name
        for target, name in state.items()
        if target in trained or ("/" in target and not target.startswith(_SCALING))
    }


def _unless_skipped(api: Any, applied: object, new: object, old: object) -> Any:
    """The old value on a skipped step. The engine needs no such guard: it has no NaN, so 0 * inf is 0."""
    happened = api.broadcasting_greater(applied, np.zeros((), NUMPY[_dtype_of(applied)]))
    return api.broadcasting_where(happened, new, old)


def _dtype_of(value: Any) -> str:
    return "fp32" if "f32" in str(value.type) or "float32" in str(value.type) else "fp16"


def _operand(known: dict[Value | Literal, object], item: Value | Literal) -> Any:
    """The translated value of an argument; a constant is made once."""
    if item not in known and isinstance(item, Literal):
        known[item] = constant(item)
    return known[item]


def _add_constants(api: Any, arrays: Mapping[str, Array]) -> None:
    def body() -> tuple[object, ...]:
        return tuple(map(constant_of, arrays.values()))

    specs = [api.TensorSpec(a.shape, a.dtype.type, name=name) for name, a in arrays.items()]
    _decorate(api, INITIAL_STATE, body, {}, specs)


def _graph(api: Any, name: str, body: object, inputs: Sequence[Value], outputs: Sequence[Value]) -> Any:
    def spec(value: Value) -> Any:
        return api.TensorSpec(value.type.shape, NUMPY[value.type.dtype], name=value.name)

    return _decorate(api, name, body, {v.name: spec(v) for v in inputs}, [spec(v) for v in outputs])


def _decorate(api: Any, name: str, body: Any, inputs: Mapping[str, object], outputs: Sequence[object]) -> Any:
    """Give `body` the annotated signature that `coreai.authoring.graph` reads, and build the graph."""

    def function(*arguments: object) -> tuple[object, ...]:
        return tuple(body(*arguments))

    from coreai.authoring.operation import Value as CoreAIValue

    kinds = {key: Annotated[CoreAIValue, spec] for key, spec in inputs.items()}
    result = tuple[tuple(Annotated[CoreAIValue, spec] for spec in outputs)]  # type: ignore[misc, valid-type]
    parameters = [inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD) for key in kinds]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {**kinds, "return": result}
    return api.graph(function, provided_name=name)


def _mark_state(graph: Any, written: Mapping[str, str]) -> None:
    """Make arguments mutable: state name -> the output that is written back into it."""
    from coreai._compiler.ir import ArrayAttr, DictAttr, StringAttr

    operation = graph._callable  # the authoring facade has no public way to declare state (1.0.0b3)
    attributes = []
    for argument in operation.arg_attrs:
        entries = {named.name: named.attr for named in argument}
        name = entries["coreai.name"].value
        if name in written:
            entries["MutableBuffers.buffer_mutation"] = StringAttr.get(written[name])
        attributes.append(DictAttr.get(entries))
    operation.arg_attrs = ArrayAttr.get(attributes)


def save_asset(
    path: str | Path,
    lowered: Lowered,
    initial: Mapping[str, Array] | None = None,
    metadata: Mapping[str, Any] | None = None,
    mutable: bool = True,
) -> Path:
    """Write a program as `.aimodel`; replaces an older one.

    `initial` holds the state's values by port, kept in the function `initial_state`; the state is updated in
    place, or, if not `mutable`, an input and an output. `metadata`: `description`,
    `author`, `license`, and anything else as custom JSON values.
    Raises: MissingDependency without the extra `coreai`; UnsupportedModel for ops without a translation.
    """
    require()
    from coreai.runtime import AIModelAssetMetadata

    target = Path(path)
    if target.suffix != ".aimodel":
        raise UsageError(f"{target}: needs a name that ends in .aimodel. Rename it.", code="ANE111")
    described = AIModelAssetMetadata()
    for key, value in (metadata or {}).items():
        if key in ("author", "license"):
            setattr(described, key, value)
        elif key == "description":
            described.model_description = value
        else:
            described.set_custom(key, value)
    build_program(lowered, initial, mutable).save_asset(target, described)
    return target


class Asset:
    """An opened `.aimodel` with its state in memory: what an app does with such a file.

    `run(inputs)` updates the state; `state()` copies it out. Arrays have the program's dtype.
    """

    def __init__(self, path: str | Path) -> None:
        self._loaded = LoadedAsset(Path(path))
        self.ports = self._loaded.describe(MAIN)
        self._state: dict[str, object] = {}
        if INITIAL_STATE in self._loaded.functions:
            values = self._loaded.call(INITIAL_STATE, {})
            self._fixed = {name: v for name, v in values.items() if name not in self.ports["states"]}
            self._state = {name: make_state(v) for name, v in values.items() if name in self.ports["states"]}
        else:
            self._fixed = {}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One call of `main`."""
        return self._loaded.call(MAIN, {**self._fixed, **inputs}, self._state)

    def state(self) -> dict[str, Array]:
        """A copy of every state, the unchanging ones included."""
        return {**self._fixed, **{name: np.array(read_state(value)) for name, value in self._state.items()}}

    def close(self) -> None:
        """Release the model."""
        self._loaded.close()


def open_asset(path: str | Path) -> Asset:
    """Open an `.aimodel` that `save_asset` wrote, with the state it was saved with.

    Raises: MissingDependency without the extra `coreai`; UsageError if there is no such asset.
    """
    require()
    if not (Path(path) / "main.mlirb").is_file():
        raise UsageError(f"{path}: needs an .aimodel folder; got none. Export one first.", code="ANE112")
    return Asset(path)
