"""ANEForge's second format: a property list of native layers, each run on the simulated engine.

A netplist names inputs (batch, channels, height, width), units in order and constants that lie in weight files.
Most layers are one or a few MIL ops (`layers.py`) with the arithmetic of docs/fidelity.md; those that only
move values, and three that no MIL op covers, are computed on arrays. ANEForge 0.4.0 `_bridges/` documents the
layers; what it calls lossless beside a fused form (attention, min-max and local response normalization) is that form
here, bit for bit.
"""

from __future__ import annotations

import plistlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ane_trainer.ane.chips.lookup import op_status
from ane_trainer.ane.errors import Finding, ProgramError, UnsupportedModel
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import TensorType, Value
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator import EngineContext, Plan, prepare
from ane_trainer.interop.aneforge.layers import DIRECT, LAYERS, Half, Unit

Shape = tuple[int, int, int, int]
Entry = Mapping[str, Any]

#: Layer -> the name that the table of ops has for it on the netplist path.
_NAMES = {
    "Sort": "sort",
    "TopK": "topk",
    "DynamicSlice": "dynamic_slice",
    "GlobalArgMinMax": "argmax",
    "ArgMinMax": "argmax",
}


#: Layers of which no form compiles on M5 (ANEForge 0.4.0 `_capabilities.py`), assumed of the other chips.
_REFUSED = {
    "MatrixDecomposition": "the factorization does not compile",
    "Unflatten": "no form of it compiles",
    "Pad": "no spelling of its padding compiles",
    "CropResize": "its plane coefficients do not compile",
    "RingBufferWriter": "it needs several procedures",
    "Reverse": "no netplist reaches it",
    "RCAS": "no netplist reaches it",
}

#: Layers that run on silicon and are not simulated, and what is not known of them.
_NOT_SIMULATED = {
    "RandomGenerator": "no source says which numbers follow from which seed",
    "Resample": "no source gives its parameters; use resize_nearest_neighbor or resize_bilinear",
    "Shape": "no source gives the order and place of its numbers",
}


@dataclass(eq=False)
class Netplist:
    """A netplist read and checked, ready to run; plans of its units are kept by the shapes they meet."""

    context: EngineContext
    inputs: dict[str, Shape]
    outputs: dict[str, str]
    constants: dict[str, Array]
    units: tuple[Unit, ...]
    _plans: dict[tuple[str, tuple[tuple[int, ...], ...]], Plan] = field(default_factory=dict)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Half]:
        """Run all units on inputs given flat or in shape (their first elements count); outputs by symbol."""
        values: dict[str, Array] = dict(self.constants)
        for name, shape in self.inputs.items():
            if name not in feeds:
                raise ProgramError(f"netplist: needs input {name}; got {', '.join(feeds)}.", code="MIL101")
            given = np.ascontiguousarray(feeds[name], np.float16).reshape(-1)
            if given.size < (need := int(np.prod(shape))):
                raise ProgramError(
                    f"netplist input {name}: needs {need} values; got {given.size}.", code="MIL101"
                )
            values[name] = given[:need].reshape(shape)
        for unit in self.units:
            values[unit.name] = self._apply(unit, [values[name] for name in unit.inputs])
        return {symbol: values[unit] for symbol, unit in self.outputs.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs, found by a run on zeros."""
        zeros = {name: np.zeros(shape, np.float16) for name, shape in self.inputs.items()}
        return {name: array.shape for name, array in self.run(zeros).items()}

    def _apply(self, unit: Unit, operands: list[Array]) -> Half:
        if unit.type in DIRECT:
            return DIRECT[unit.type](unit, operands)
        key = unit.name, tuple(array.shape for array in operands)
        if key not in self._plans:
            self._plans[key] = self._prepare(unit, operands)
        feeds = {f"x{i}": array for i, array in enumerate(operands)}
        return np.asarray(self._plans[key].run(feeds)["y"], np.float16)

    def _prepare(self, unit: Unit, operands: list[Array]) -> Plan:
        b = Builder()
        values: list[Value] = []
        for i, array in enumerate(operands):
            values.append(b.input(f"x{i}", TensorType("fp16", array.shape)))
        made = LAYERS[unit.type](b, unit, values)
        y = b.op("cast", x=made, dtype="fp16", name="y") if made.type.dtype != "fp16" else made
        if y.name != "y":
            y = b.op("reshape", x=y, shape=y.type.shape, name="y")
        return prepare(b.finish((y,)), self.context)


def read_netplist(plist: bytes, weights: Sequence[bytes], context: EngineContext) -> Netplist:
    """Read a netplist and refuse what the chip does not compile.

    Raises: ProgramError (MIL101) for a list that is not one; UnsupportedModel (ANE302) for a layer that the chip
    refuses or that is not simulated.
    """
    try:
        tree = plistlib.loads(plist)
        (procedure,) = tree["ProcedureList"]
        network = tree[procedure["OperationList"][0]["NetworkName"]]
        inputs = {entry["InputName"]: _input_shape(entry) for entry in procedure["InputList"]}
        units = tuple(_unit(network[name]) for name in network["Units"])
        outputs = {
            entry["OutputName"]: network[entry["OutputName"]]["Bottom"] for entry in procedure["OutputList"]
        }
        constants = {name: _constant(network[name], weights) for name in network.get("Constants", ())}
        constants |= _kernels(network, units, weights)
    except (KeyError, ValueError, TypeError, IndexError, plistlib.InvalidFileException) as fault:
        raise ProgramError(
            f"netplist: needs one procedure with units; got {fault!r}.", code="MIL101"
        ) from fault
    for unit in units:
        _check(unit, context)
    return Netplist(context, inputs, outputs, constants, _with_kernels(units, constants))


def _input_shape(entry: Mapping[str, int]) -> Shape:
    return entry["BatchSize"], entry["InputChannels"], entry["InputHeight"], entry["InputWidth"]


def _unit(entry: Entry) -> Unit:
    params = dict(entry.get("Params", {}))
    params["OutputChannels"] = entry.get("OutputChannels")
    params["NumGroups"] = params.get("NumGroups", entry.get("NumGroups", 1))
    return Unit(entry["Name"], entry["Type"], tuple(entry["Bottom"]), params)


def _constant(entry: Entry, weights: Sequence[bytes]) -> Array:
    shape = tuple(entry[f"Constant{axis}"] for axis in ("BatchSize", "Channels", "Height", "Width"))
    dtype = {"Float16": np.float16, "UInt16": np.uint16, "Int8": np.int8, "UInt8": np.uint8}[
        entry["ConstantType"]
    ]
    data = weights[entry["ConstantIndex"]]
    return np.frombuffer(data, dtype, int(np.prod(shape)), entry["ConstantByteOffset"]).reshape(shape)


def _kernels(network: Entry, units: tuple[Unit, ...], weights: Sequence[bytes]) -> dict[str, Array]:
    """The weights of dense convolutions, by a name of their own: output, input, height, width."""
    found = {}
    for unit in units:
        p = unit.params
        if unit.type == "Conv" and "KernelIndex" in p:
            data = np.frombuffer(weights[p["KernelIndex"]], np.float16, offset=p.get("KernelOffset", 0))
            found[f"{unit.name} kernel"] = data.reshape(
                p["OutputChannels"], -1, p["KernelHeight"], p["KernelWidth"]
            )
    return found


def _with_kernels(units: tuple[Unit, ...], constants: Mapping[str, Array]) -> tuple[Unit, ...]:
    return tuple(
        Unit(u.name, u.type, (*u.inputs, f"{u.name} kernel"), u.params)
        if f"{u.name} kernel" in constants
        else u
        for u in units
    )


def _check(unit: Unit, context: EngineContext) -> None:
    """Refuse what ANEForge 0.4.0 found that the compiler refuses (`_capabilities.py`), and what is not simulated."""
    chip = context.chip
    reason = None
    if unit.type in _REFUSED:
        reason = _REFUSED[unit.type]
    elif unit.type not in LAYERS and unit.type not in DIRECT:
        reason = f"the simulator does not have it: {_NOT_SIMULATED.get(unit.type, 'no layer of this type')}"
    elif (known := _NAMES.get(unit.type)) and op_status(known, chip, "netplist").status == "refused":
        reason = f"{chip.title} does not have it"
    elif unit.type == "TopK" and unit.params["K"] in (3, 4):
        reason = "3 and 4 of the largest do not compile"
    elif unit.type == "LocalResponseNormalization" and unit.params["KernelChannel"] > 15:
        reason = "a window of 16 channels or more does not compile"
    elif unit.type == "MinMaxNormalization" and unit.params["Dimension"] == "Channel":
        reason = "normalization over channels does not compile"
    elif unit.type == "KernelRasterizer" and unit.params["OutputChannels"] != 1:
        reason = "only the identity of one channel compiles"
    elif unit.type == "ScaledElementWise" and unit.params["Type"] == "Sub":
        reason = "a scaled difference does not compile"
    if reason:
        finding = Finding(f"netplist unit {unit.name}", unit.type, f"{reason}.", "Use a form that compiles.")
        raise UnsupportedModel(
            "netplist: needs layers that compile; got one refused.", [finding], code="ANE302"
        )
