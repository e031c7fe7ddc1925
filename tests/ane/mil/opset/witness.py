"""coremltools' own type inference for one operation, as a witness for ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from ane_trainer.ane.mil.program import Arg, Literal, TensorType, Value
from ane_trainer.ane.mil.weights import to_array

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import coremltools as ct
    from coremltools.converters.mil.mil import Block, Function, Program, get_new_symbol, types
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    logging.disable(logging.NOTSET)

del Block, Program, get_new_symbol

OPSET = ct.target.iOS18
_SUB_BYTE = {"int4": "np_int4_dtype", "uint1": "np_uint1_dtype", "uint2": "np_uint2_dtype",
             "uint3": "np_uint3_dtype", "uint4": "np_uint4_dtype", "uint6": "np_uint6_dtype"}  # fmt: skip
_BUILTIN = {"uint1": types.uint1, "uint2": types.uint2, "uint3": types.uint3, "uint4": types.uint4,
            "uint6": types.uint6, "int4": types.int4}  # fmt: skip


def coreml_types(kind: str, args: Mapping[str, Arg]) -> tuple[TensorType, ...] | str:
    """The result types of an operation, or the reason why coremltools refuses it."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return _types(kind, args)


def coreml_params(kind: str) -> dict[str, bool] | None:
    """Parameter name -> whether it may be left out, in coremltools' newest version of the op."""
    definition = _definition(kind)
    if definition is None:
        return None
    return {name: spec.optional for name, spec in definition.input_spec.input_types.items()}


def _definition(kind: str) -> Any:
    versions = SSAOpRegistry.core_ops.get(kind)
    if versions is None:
        return SSAOpRegistry.dialect_ops.get(kind)
    return versions.get(OPSET)


def _types(kind: str, args: Mapping[str, Arg]) -> tuple[TensorType, ...] | str:
    inputs: dict[str, Any] = {}
    for name, argument in args.items():
        for i, item in enumerate(argument if isinstance(argument, tuple) else (argument,)):
            if isinstance(item, Value):
                inputs[f"{name}_{i}"] = _placeholder(item.type)
    try:
        with Function(inputs, opset_version=OPSET) as function:
            given = {name: _argument(function, name, argument) for name, argument in args.items()}
            results = getattr(mb, kind)(**given)
    except Exception as fault:  # noqa: BLE001  (whatever coremltools raises is its refusal)
        return f"{type(fault).__name__}: {fault}"
    several = results if isinstance(results, (tuple, list)) else (results,)
    return tuple(TensorType(_dtype(r), tuple(int(n) for n in r.shape)) for r in several)


def _placeholder(type_: TensorType) -> Any:
    builtin = types.string_to_builtin(type_.dtype)
    if type_.state:
        return mb.state_tensor_placeholder(shape=type_.shape, dtype=builtin)
    return mb.placeholder(shape=type_.shape, dtype=builtin, allow_rank0_input=True)


def _argument(function: Any, name: str, argument: Arg) -> Any:
    items = [
        _constant(item) if isinstance(item, Literal) else function.inputs[f"{name}_{i}"]
        for i, item in enumerate(argument if isinstance(argument, tuple) else (argument,))
    ]
    return tuple(items) if isinstance(argument, tuple) else items[0]


def _constant(literal: Literal) -> Any:
    array = to_array(literal)
    if literal.type.dtype in _SUB_BYTE:
        array = array.astype(types.nptype_from_builtin(_BUILTIN[literal.type.dtype]))
    if literal.type.dtype == "string":
        return str(array)
    return array[()] if array.ndim == 0 else np.array(array)


def _dtype(var: Any) -> str:
    return str(types.builtin_to_string(var.dtype))
