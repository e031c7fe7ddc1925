"""The walk over the FX graph: inputs, constants, rules, refusals, outputs."""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.indices import split
from ane_trainer.ane.compiler.lower.indices.arithmetic import joined
from ane_trainer.ane.compiler.lower.indices.choose import MOST_ROWS, Integers, choose, chosen_by, wrapping
from ane_trainer.ane.compiler.lower.indices.codes import EXACT_INTEGERS
from ane_trainer.ane.compiler.lower.indices.phases import exposed
from ane_trainer.ane.compiler.lower.indices.ranges import integral
from ane_trainer.ane.compiler.lower.indices.results import in_two_numbers
from ane_trainer.ane.compiler.lower.operands import Absent, Encoded, Shape, is_bool, mil_shape
from ane_trainer.ane.compiler.lower.passes.pipeline import run_passes
from ane_trainer.ane.compiler.lower.registry import ACCEPTS, RULES, Refusal
from ane_trainer.ane.compiler.lower.rules.windows import Places
from ane_trainer.ane.errors import Finding, ProgramError, UnsupportedModel
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import MAX_RANK, Function, Op, Program, TensorType, Value, literal
from ane_trainer.ane.stages import PAIR, Alias, Captured, Lowered, Port

_UNFOLDABLE = (torch.Tag.nondeterministic_seeded,)

#: torch refuses these on constants whose strides a rule before them changed; the rules reshape.
_RANDOM = (
    "rand",
    "bernoulli",
    "dropout",
    "multinomial",
    "normal",
    "uniform",
    "exponential",
    "rrelu_with_noise",
    "poisson",
)
#: Their results have as many elements as the data says.
_DATA_SHAPED = ("masked_select", "nonzero", "unique", "bincount")
_VIEWS = tuple(f"aten.{name}" for name in ("view.default", "_unsafe_view.default", "unsqueeze.default",
    "squeeze.default", "squeeze.dim", "squeeze.dims"))  # fmt: skip
#: An operation's name, which torch assembles each time each time.
_name = functools.cache(str)
_RULE_ON_CONSTANTS = ("aten.view.default", "aten._unsafe_view.default")


def lower(captured: Captured, *, dtype: str = "fp16") -> Lowered:
    """The captured step as one MIL program.

    `dtype` is the program's float type: fp16 for the engine; fp32 and fp64 exist to tell a wrong rule from a
    rounding error.

    Raises: UnsupportedModel (ANE301) with one finding per op that has no rule or that its rule refuses.
    """
    ctx = Context(Builder(), dtype)
    integers = choose(captured, dtype)
    _refuse(
        list(_wrapping(captured, integers)), "integers that stay within their type; got {} ops that may not."
    )
    _refuse(
        list(_beyond_two(captured, integers)),
        "whole numbers that two of fp16's hold; got {} inputs of others.",
    )
    inputs, quotients = _declare_inputs(ctx, captured, integers)
    findings, results = list[Finding](), list[object]()
    for node in captured.graph.graph.nodes:
        if node.op == "output":
            results = _flat(node.args[0])
        elif node.op == "get_attr":
            ctx.operands[node] = operator.attrgetter(node.target)(captured.graph)
        elif node.op == "call_function":
            _lower_node(ctx, integers, node, findings)
    for node in results:
        if isinstance(node, Node):
            ctx.operands[node] = _with_numbers(ctx, ctx.operands[node])
    findings += _absent_outputs(ctx, results)
    _refuse(findings, "ops that have a lowering rule; got {} without.")
    _refuse(
        _exposed(captured, EXACT_INTEGERS, math.inf) if dtype == "fp16" else [],
        "numbers that fp16 holds closely enough; got {} ops on others.",
    )
    given = [ctx.operands[r] if isinstance(r, Node) else r for r in results]
    ports, operands = in_two_numbers(captured.outputs, given)
    names = _output_names(inputs, ports)
    values = tuple(_as_output(ctx, operand) for operand in operands)
    function = run_passes(ctx.builder.finish(values))
    function = _name_outputs(function, [names[port.name] for port in ports])
    outputs = tuple(
        replace(port, name=names[port.name], shape=v.type.shape, quotients=names.get(port.quotients, ""))
        for port, v in zip(ports, values, strict=True)
    )
    renamed = {port.name: new.name for port, new in zip(captured.inputs, inputs, strict=True)}
    aliases = tuple(Alias(names[a.output], renamed[a.input]) for a in captured.aliases)
    notes = _exposed(captured, 0.0, EXACT_INTEGERS) if dtype == "fp16" else []
    return Lowered(Program((function,)), (*inputs, *quotients), outputs, aliases, tuple(notes))


def _refuse(findings: list[Finding], needs: str) -> None:
    """Raises: UnsupportedModel (ANE301) if there are findings."""
    if findings:
        raise UnsupportedModel(f"model: needs {needs.format(len(findings))}", findings, code="ANE301")


def _wrapping(captured: Captured, integers: Integers) -> Iterator[Finding]:
    """Arithmetic that PyTorch does modulo 256 or 65,536."""
    for node, (low, high) in wrapping(captured, integers):
        yield Finding(
            where(node), str(node.target), f"may leave {low:.0f} ... {high:.0f}, beyond which PyTorch wraps around.",
            "Convert to int64 or float before (x.long(), x.float()).",
        )  # fmt: skip


def _beyond_two(captured: Captured, integers: Integers) -> Iterator[Finding]:
    """Inputs of whole numbers that are read exactly and whose example is beyond two numbers."""
    placeholders = [n for n in captured.graph.graph.nodes if n.op == "placeholder"]
    for node, port in zip(placeholders, captured.inputs, strict=True):
        if integers.inputs.get(node) != "split" or port.bounds is None:
            continue
        largest = max(-port.bounds[0], port.bounds[1])
        if largest >= MOST_ROWS:
            user = next((u for u in node.users if u.meta.get("ane_source")), node)
            yield Finding(
                where(user), str(user.target), f"reads whole numbers of {port.target or port.name} exactly, up to "
                f"{largest:.0f}; needs them below {MOST_ROWS}.",
                "Subtract an origin or divide before you pass them, in int64, or pass what is read of them.",
            )  # fmt: skip


def _exposed(captured: Captured, least: float, most: float) -> list[Finding]:
    """Ops that the rounding of inputs of such a size reaches in full, see `indices.phases`."""
    return [
        Finding(
            where(node), str(node.target),
            f"reads numbers of {place} that fp16 rounds by up to {error:.2g}, which this op does not bear.",
            "Compute it beforehand and pass the result as an input, or scale the numbers down.",
        )
        for node, place, error in exposed(captured, least, most)
    ]  # fmt: skip


def _absent_outputs(ctx: Context, results: Sequence[object]) -> list[Finding]:
    """Results that a rule left out and the graph returns."""
    found = [(r, ctx.operands[r]) for r in results if isinstance(r, Node)]
    return [Finding(where(r), str(r.target), o.reason, o.fix) for r, o in found if isinstance(o, Absent)]


def where(node: Node) -> str:
    """The place to name in a message: the user's module and line as capture recorded it, else the node."""
    return str(node.meta.get("ane_source") or f"node {node.name}")


def _declare_inputs(
    ctx: Context, captured: Captured, integers: Integers
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """The captured ports, and those that hold the quotients of integers in two numbers."""
    placeholders = [n for n in captured.graph.graph.nodes if n.op == "placeholder"]
    ports, quotients = [], []
    for node, port in zip(placeholders, captured.inputs, strict=True):
        tensor = node.meta["val"]
        border = TensorType(ctx.dtype, _at_border(mil_shape(tensor)))
        value = ctx.builder.input(_identifier(port.name), border)
        parts, encoding = [value], integers.inputs.get(node, "none")
        if encoding == "split":
            parts.append(ctx.builder.input(f"{value.name}_high", border))
            high = parts[1].name
            quotients.append(Port(high, border.shape, "batch", f"{port.target}#high"))
            port = replace(port, quotients=high)
        taken = integers.taken(node) if node in integers.inputs else None
        chosen = chosen_by(node) if port.role == "batch" and integral(tensor) else None
        port = replace(port, name=value.name, shape=border.shape, bounds=taken, chosen=chosen)
        ports.append(replace(port, index_encoding=encoding))
        whole = [ctx.reshape(part, mil_shape(tensor)) for part in parts]
        if encoding != "none":
            encoded = Encoded(tuple(w for w in whole if isinstance(w, Value)), encoding)
            ctx.operands[node] = encoded
            if node in integers.floats:
                ctx.wide[node] = encoded
                ends = (ctx.mul(p, f * port.scale) for p, f in zip(encoded.parts, (1.0, PAIR), strict=True))
                ctx.operands[node] = ctx.add(*ends)
        else:
            ctx.operands[node] = ctx.boolean_of_01(whole[0]) if tensor.dtype == torch.bool else whole[0]
    return tuple(ports), tuple(quotients)


def _output_names(inputs: Sequence[Port], outputs: Sequence[Port]) -> dict[str, str]:
    """MIL names of the outputs, none of which is an input's."""
    taken, names = {port.name for port in inputs}, {}
    for port in outputs:
        name = _identifier(port.name)
        while name in taken:
            name += "_out"
        taken.add(name)
        names[port.name] = name
    return names


def _identifier(name: str) -> str:
    clean = re.sub(r"\W", "_", name, flags=re.ASCII)
    return clean if clean[:1].isalpha() or clean[:1] == "_" else f"v_{clean}"


def _flat(value: object) -> list[object]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]


def _lower_node(ctx: Context, integers: Integers, node: Node, findings: list[Finding]) -> None:
    """Compute one node's operand, or add a finding and a placeholder so that the walk goes on."""
    ctx.node, ctx.builder.source = node, node.meta.get("ane_source")
    arguments = torch.fx.node.map_arg(node.args, lambda n: ctx.operands[n])
    keywords = torch.fx.node.map_arg(node.kwargs, lambda n: ctx.operands[n])
    if node.target is operator.getitem:
        source: Any = arguments
        ctx.operands[node] = source[0][source[1]]
        return
    name = _name(node.target)
    if isinstance(ctx.meta, torch.Tensor) and 0 in ctx.meta.shape:  # nothing to compute; `cat` leaves it out
        ctx.operands[node] = torch.zeros(tuple(ctx.meta.shape), dtype=ctx.meta.dtype)
        return
    try:
        if _foldable(node, arguments, keywords):
            assert callable(node.target)
            ctx.operands[node] = _on_cpu(node.target, arguments, keywords)
            return
        rule = RULES.get(name)
        if rule is None:
            raise Refusal(*_no_rule(name))
        if arguments and isinstance(arguments[0], Places) and name in _VIEWS:
            ctx.operands[node] = arguments[0].viewed(ctx.shape)
            return
        if name not in ACCEPTS["absent"]:
            arguments = _with_numbers(ctx, arguments)
        absent = next((leaf for leaf in _flat(arguments) if isinstance(leaf, Absent)), None)
        if absent is not None and name not in ACCEPTS["absent"]:
            raise Refusal(absent.reason, absent.fix)
        _check_static(ctx)
        keywords = _without_placement(keywords)
        if split.concerns(integers, node, _flat(arguments)):
            result = split.lower(ctx, integers, rule, list(arguments), keywords)
        else:
            result = rule(ctx, *arguments, **keywords)
        ctx.operands[node] = _checked(ctx, result)
    except Refusal as refusal:
        findings.append(Finding(where(node), name, refusal.reason, refusal.fix))
    except ProgramError as error:
        findings.append(Finding(where(node), name, f"its lowering is refused by a type rule: {error}", ""))
    if node not in ctx.operands:
        ctx.operands[node] = _placeholders(ctx, ctx.meta)


def _with_numbers(ctx: Context, argument: object) -> Any:
    """Indices of poolings as numbers, where there are few enough."""
    if isinstance(argument, Places):
        numbers = argument.numbers(ctx)
        return argument if numbers is None else numbers
    if isinstance(argument, (list, tuple)):
        return type(argument)(_with_numbers(ctx, item) for item in argument)
    return argument


def _no_rule(name: str) -> tuple[str, str]:
    if any(word in name for word in _RANDOM):
        return (
            "draws random numbers inside the step, which the engine cannot repeat from a seed.",
            "Use nn.Dropout, or draw the numbers outside and pass them as an input.",
        )
    if any(word in name for word in _DATA_SHAPED):
        return (
            "gives a shape that depends on data.",
            "Keep the shape: torch.where, masked_fill, or a product with the mask.",
        )
    return (
        "has no lowering rule.",
        "Use another op, or register a rule with ane_trainer.ane.compiler.lower.lowering.",
    )


def _foldable(node: Node, arguments: object, keywords: Any) -> bool:
    if _name(node.target) in _RULE_ON_CONSTANTS:
        return False
    leaves = _flat(arguments) + _flat(list(keywords.values()))
    tags = getattr(node.target, "tags", ())
    return not any(isinstance(leaf, (Value, Absent, Encoded)) for leaf in leaves) and not any(
        t in tags for t in _UNFOLDABLE
    )


def _on_cpu(target: Callable[..., object], arguments: Any, keywords: Any) -> Any:
    if "device" in keywords:
        keywords = {**keywords, "device": torch.device("cpu")}
    return target(*arguments, **keywords)


def _without_placement(keywords: Any) -> dict[str, Any]:
    return {
        k: v
        for k, v in keywords.items()
        if k not in ("device", "layout", "pin_memory", "memory_format", "non_blocking")
    }


def _check_static(ctx: Context) -> None:
    for tensor in _flat(ctx.meta):
        shape = getattr(tensor, "shape", ())
        if not all(isinstance(n, int) for n in shape):
            raise ctx.refuse(f"needs static shapes; got {tuple(shape)}.", "Compile once per batch size.")
        if 0 in shape:
            raise ctx.refuse(f"needs non-empty tensors; got {tuple(shape)}.", "Remove the empty tensor.")


def _checked(ctx: Context, result: object) -> Any:
    """The rule's result, its shapes and kinds compared with what torch computes."""
    if isinstance(result, (tuple, list)):
        return [_checked_one(ctx, r, m) for r, m in zip(result, ctx.meta, strict=True)]
    return _checked_one(ctx, result, ctx.meta)


def _checked_one(ctx: Context, result: object, meta: Any) -> Any:
    if isinstance(result, Encoded):
        return result.each(lambda part: _checked_one(ctx, part, meta))
    if not isinstance(result, Value):
        return result
    if result.type.shape != mil_shape(meta):
        raise ProgramError(
            f"{ctx.node}: needs the shape {mil_shape(meta)}; got {result.type.shape}.", code="MIL103"
        )
    return ctx.boolean(result) if meta.dtype == torch.bool else ctx.number(result)


def _placeholders(ctx: Context, meta: object) -> Any:
    if isinstance(meta, (tuple, list)):
        return [_placeholders(ctx, m) for m in meta]
    return ctx.placeholder(meta) if isinstance(meta, torch.Tensor) else meta


def _as_output(ctx: Context, operand: Any) -> Value:
    """A numeric value: booleans leave as 1 and 0, constants as `const`."""
    ctx.builder.source = None
    if isinstance(operand, torch.Tensor):
        operand = operand.double()
    result = ctx.value(ctx.number(joined(ctx, operand)))
    assert not is_bool(result)
    return ctx.value(ctx.reshape(result, _at_border(result.type.shape)))


def _at_border(shape: Shape) -> Shape:
    """A port's shape: the axes in front that the engine has not are merged into one."""
    front = len(shape) - MAX_RANK + 1
    return (math.prod(shape[:front]), *shape[front:]) if front > 1 else shape


def _name_outputs(function: Function, names: Sequence[str]) -> Function:
    """Give the outputs their port names.

    An output that is an input, or that is given twice, becomes `mul(x, 1)`: programs that pass an input
    through crash the engine's compiler (ANEForge `_compile`), and each port needs a value of its own.
    """
    new: dict[Value, Value] = {}
    extra: list[Op] = []
    outputs: list[Value] = []
    inputs = set(function.inputs)
    for value, name in zip(function.outputs, names, strict=True):
        renamed = Value(name, value.type)
        if value in inputs or value in new:
            one = literal(1.0, value.type.dtype)
            extra.append(Op("mul", (("x", value), ("y", one)), (renamed,)))
        else:
            new[value] = renamed
        outputs.append(renamed)
    used = {v.name for v in outputs}
    for op in function.ops:
        for result in op.results:
            if result not in new and result.name in used:
                new[result] = Value(f"{result.name}_inner", result.type)
    return _substitute(replace(function, ops=(*function.ops, *extra), outputs=tuple(outputs)), new)


def _substitute(function: Function, new: dict[Value, Value]) -> Function:
    def swap(argument: object) -> Any:
        if isinstance(argument, tuple):
            return tuple(swap(item) for item in argument)
        return new.get(argument, argument) if isinstance(argument, Value) else argument

    ops = tuple(
        replace(
            op, args=tuple((k, swap(a)) for k, a in op.args), results=tuple(new.get(r, r) for r in op.results)
        )
        for op in function.ops
    )
    return replace(function, ops=ops)
