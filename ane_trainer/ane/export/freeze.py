"""A trained model as one inference program: weights constant, pixels or tensors in, probabilities out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ane_trainer.ane.capture import capture_forward
from ane_trainer.ane.compiler.lower import lower
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, Program, Value, literal
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.stages import Captured, Lowered

#: The largest pixel value of an image input.
PIXEL_MAX = 255.0


@dataclass(frozen=True)
class Signature:
    """What goes in and out of an exported model.

    `shape` is one example's, `batch` how many go in at once. With `normalise` = (mean, std) the input is
    pixels 0 to 255 and the model normalises them as training did; without, it is the tensor that training
    fed.
    `class_names`: the outputs' names; the output is then their probabilities, else what the model returns.
    `tokens`: the model takes whole numbers; the file takes them as floats, which all formats have.
    """

    shape: tuple[int, ...]
    batch: int = 1
    normalise: tuple[float, float] | None = None
    class_names: tuple[str, ...] = ()
    tokens: bool = False

    @property
    def input_name(self) -> str:
        return "image" if self.normalise else "x"

    @property
    def output_name(self) -> str:
        return "probabilities" if self.class_names else "output"

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.shape)


class Deployed(nn.Module):
    """The model between its preprocessing and its softmax, in evaluation mode."""

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.model, self.softmax = model, bool(signature.class_names)
        mean, std = signature.normalise or (0.0, 1.0)
        self.scale = 1.0 / (PIXEL_MAX * std) if signature.normalise else None
        self.shift = -mean / std
        self.tokens = signature.tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs [N, ...] for inputs [N, ...]."""
        if self.scale is not None:
            x = x * self.scale + self.shift
        if self.tokens:
            x = x.to(torch.int64)
        y: torch.Tensor = self.model(x)
        return y.softmax(-1) if self.softmax else y


def to_input(x: torch.Tensor, signature: Signature) -> torch.Tensor:
    """Normalised examples as the exported model takes them: pixels where it normalises itself."""
    if signature.normalise is None:
        return x
    mean, std = signature.normalise
    return ((x * std + mean) * PIXEL_MAX).round()


def freeze(model: nn.Module, signature: Signature, precision: str = "fp16") -> Lowered:
    """The inference program with constant weights; its ports have the signature's names.

    Raises: UnsupportedModel for ops without a rule.
    """
    example = torch.zeros(signature.batch_shape, dtype=torch.int64 if signature.tokens else torch.float32)
    captured = capture_forward(Deployed(model, signature), example)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    lowered = lower(
        _constant(captured, {f"model.{n}": t.detach() for n, t in tensors.items()}), dtype=precision
    )
    if lowered.inputs[0].index_encoding != "none":
        raise UsageError(
            "export: needs whole numbers up to 2048, which a program's fp16 input holds; this model looks up a longer "
            "table. Export it as onnx or torch.",
            code="ANE116",
        )
    names = {lowered.inputs[0].name: signature.input_name, lowered.outputs[0].name: signature.output_name}
    return rename(lowered, names)


def _constant(captured: Captured, tensors: Mapping[str, torch.Tensor]) -> Captured:
    """The graph with state inputs as constants, so that the lowering folds them and uses `conv`."""
    graph = captured.graph
    nodes = {node.name: node for node in graph.graph.nodes if node.op == "placeholder"}
    kept = []
    for port, node in zip(captured.inputs, nodes.values(), strict=True):
        if port.role != "state":
            kept.append(port)
            continue
        graph.register_buffer(f"constant_{port.name}", tensors[port.target].float().reshape(port.shape))
        with graph.graph.inserting_before(node):
            constant = graph.graph.get_attr(f"constant_{port.name}")
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        graph.graph.erase_node(node)
    graph.recompile()
    return replace(captured, inputs=tuple(kept))


def rename(lowered: Lowered, names: Mapping[str, str]) -> Lowered:
    """The program with inputs and results called otherwise; a name that is taken moves out of the way."""
    function = lowered.program.main
    wanted = set(names.values())

    def named(value: Value) -> Value:
        new = names.get(value.name, f"{value.name}_" if value.name in wanted else value.name)
        return replace(value, name=new)

    return replace(
        lowered,
        program=Program((map_values(function, named),)),
        inputs=tuple(replace(p, name=names.get(p.name, p.name)) for p in lowered.inputs),
        outputs=tuple(replace(p, name=names.get(p.name, p.name)) for p in lowered.outputs),
    )


def single_precision_border(function: Function, names: frozenset[str]) -> Function:
    """The function with fp32 inputs and results of these names, cast to and from fp16 at once.

    Core ML's images enter as fp32, and its `classify` takes fp32 probabilities.
    """

    def inside(value: Value) -> Value:
        return replace(value, name=f"{value.name}_fp16") if value.name in names else value

    def outside(value: Value) -> Value:
        return Value(value.name, replace(value.type, dtype="fp32")) if value.name in names else value

    core = map_values(function, inside)
    entering = tuple(
        Op("cast", (("x", outside(v)), ("dtype", literal("fp16", "string"))), (inside(v),))
        for v in function.inputs
        if v.name in names
    )
    leaving = tuple(
        Op("cast", (("x", inside(v)), ("dtype", literal("fp32", "string"))), (outside(v),))
        for v in function.outputs
        if v.name in names
    )
    return replace(
        core,
        inputs=tuple(map(outside, function.inputs)),
        ops=(*entering, *core.ops, *leaving),
        outputs=tuple(map(outside, function.outputs)),
    )


def map_values(function: Function, change: object) -> Function:
    """The function with every value replaced by `change(value)`; ops may also get a literal for one."""
    assert callable(change)

    def argument(arg: Arg) -> Arg:
        if isinstance(arg, tuple):
            return tuple(change(item) if isinstance(item, Value) else item for item in arg)
        return change(arg) if isinstance(arg, Value) else arg

    ops = tuple(
        replace(op, args=tuple((k, argument(a)) for k, a in op.args), results=tuple(map(change, op.results)))
        for op in function.ops
    )
    return replace(
        function,
        inputs=tuple(map(change, function.inputs)),
        ops=ops,
        outputs=tuple(map(change, function.outputs)),
    )


def bind_inputs(function: Function, arrays: Mapping[str, NDArray[np.generic]]) -> Function:
    """The function with some inputs as constants."""
    constants = {
        v.name: from_array(arrays[v.name], dtype=v.type.dtype, name=v.name)
        for v in function.inputs
        if v.name in arrays
    }

    def argument(arg: Arg) -> Arg:
        if isinstance(arg, tuple):
            return tuple(_bound(item, constants) for item in arg)
        return _bound(arg, constants)

    ops = tuple(
        Op(op.kind, tuple((k, argument(a)) for k, a in op.args), op.results, op.source) for op in function.ops
    )
    inputs = tuple(v for v in function.inputs if v.name not in constants)
    return replace(function, inputs=inputs, ops=ops)


def _bound(item: Value | Literal, constants: Mapping[str, Literal]) -> Value | Literal:
    return constants.get(item.name, item) if isinstance(item, Value) else item
