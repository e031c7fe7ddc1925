"""Runs a function in double precision: each op's meaning on the values before it, states kept between runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ane_trainer.ane.errors import ProgramError, SimulationError
from ane_trainer.ane.mil.opset import bind
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, Value
from ane_trainer.ane.mil.semantics.registry import MEANINGS, literal_array, wide_dtype
from ane_trainer.ane.mil.weights import Array

_STATE_OPS = ("read_state", "write_state", "coreml_update_state")


@dataclass(frozen=True)
class Trace:
    """One run: every value of the function by name (inputs too), and the states after it."""

    values: dict[str, Array]
    states: dict[str, Array]


def evaluate(
    function: Function, feeds: Mapping[str, Array], states: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """The outputs by name: float64 for floats, int64 for integers, bool for bool; see `trace`."""
    values = trace(function, feeds, states).values
    return {value.name: values[value.name] for value in function.outputs}


def trace(function: Function, feeds: Mapping[str, Array], states: Mapping[str, Array] | None = None) -> Trace:
    """Every value that `function` computes from `feeds` in double precision.

    States start as `states` has them, else at zero. Raises `SimulationError` for a missing or misshapen
    input and for an op without a meaning (random numbers).
    """
    values: dict[str, Array] = {}
    held: dict[str, Array] = {}
    for value in function.inputs:
        source = {**(states or {}), **feeds}.get(value.name) if value.type.state else feeds.get(value.name)
        if source is None and value.type.state:
            source = np.zeros(value.type.shape)
        array = _input(value.name, source, value.type.shape, value.type.dtype)
        (held if value.type.state else values)[value.name] = array
    with np.errstate(all="ignore"):
        for op in function.ops:
            if op.kind in _STATE_OPS:
                _state_op(op, values, held)
                continue
            results = apply(op, values.__getitem__)
            values.update(zip((v.name for v in op.results), results, strict=True))
    return Trace(values, held)


def _input(name: str, source: object, shape: tuple[int, ...], dtype: str) -> Array:
    if source is None:
        raise SimulationError(f"reference: needs the input {name}; it is missing.", code="SIM101")
    array: Array = np.asarray(source).astype(wide_dtype(dtype))
    if array.shape != shape:
        raise SimulationError(f"reference: {name} needs the shape {shape}; got {array.shape}.", code="SIM103")
    return array


def apply(op: Op, value_of: Callable[[str], Array]) -> tuple[Array, ...]:
    """One op's results; `value_of` gives the values that it reads, widened, by name.

    Raises `SimulationError` for an op without a meaning, `ProgramError` where a result has not the shape
    that the op declares.
    """
    function = MEANINGS.get(op.kind)
    if function is None:
        raise SimulationError(f"{op.name}: {op.kind} has no meaning in double precision.", code="SIM104")
    call = bind(op.kind, dict(op.args))
    operands = [_operand(op.arg(param.name), value_of) for param in call.op.params if param.role != "const"]
    with np.errstate(all="ignore"):
        found = function(call, *operands)
    results: list[Array] = []
    for value, result in zip(op.results, found if isinstance(found, tuple) else (found,), strict=True):
        array = np.asarray(result)
        if array.shape != value.type.shape:
            raise ProgramError(
                f"{op.name}: {op.kind} needs the declared shape {value.type.shape}; got {array.shape}.",
                code="MIL101",
            )
        results.append(array.astype(wide_dtype(value.type.dtype), copy=False))
    return tuple(results)


def _operand(argument: Arg | None, value_of: Callable[[str], Array]) -> Any:
    if argument is None:
        return None
    if isinstance(argument, tuple):
        return tuple(_operand(item, value_of) for item in argument)
    return literal_array(argument) if isinstance(argument, Literal) else value_of(argument.name)


def _state_op(op: Op, values: dict[str, Array], held: dict[str, Array]) -> None:
    """Reads or writes a state."""
    given = dict(op.args)
    state = given.get("input", given.get("state"))
    assert isinstance(state, Value)
    if op.kind != "read_state":
        held[state.name] = _operand(
            given["data" if op.kind == "write_state" else "value"], values.__getitem__
        )
    for result in op.results:
        values[result.name] = held[state.name]
