"""Legalize: check a lowered program op by op against what a chip accepts; collect every refusal.

The limits come from `chips.py` (the strictest claim that applies), so each refusal can name its source.
What is legal but deserves attention becomes a note. Two rewrites are done here because they depend on chip and
path: last-axis slices with an offset, where the chip's crop unit clamps (see `move_width_slices`), and scalar
factors that the path's compiler would lose (see `spread_factors`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ane_trainer.ane.chips.lookup import Chip, Limit, get_chip, known_chips, limit, op_status
from ane_trainer.ane.chips.work import constant_bytes
from ane_trainer.ane.errors import Finding, UnsupportedModel
from ane_trainer.ane.mil.opset import Call, bind, family
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, Program, TensorType, Value, literal
from ane_trainer.ane.stages import Legalized, Lowered

#: Limits of an extent by its position from the right: width, height, channels, then depth or batch.
_AXES = ("width", "height", "channels")


@dataclass(frozen=True)
class Target:
    """The chip and path that a program is checked for; `constant` names the values that no input reaches."""

    chip: Chip
    path: str
    constant: frozenset[str] = frozenset()

    def limit(self, name: str) -> Limit | None:
        return limit(self.chip, name, self.path)

    def exceeds(self, name: str, value: float) -> str | None:
        """`at most 16384 elements (source)` when `value` breaks the limit; None when it holds or is unknown."""
        row = self.limit(name)
        if row is None or (value <= row.value if row.bound == "max" else value >= row.value):
            return None
        word = "at most" if row.bound == "max" else "at least"
        return f"{word} {row.value:g} {row.unit} on {self.chip.title} ({row.evidence.source})"


Check = Callable[[Op, Target], Iterator[tuple[str, str]]]


def legalize(lowered: Lowered, chip: str, path: str = "e5rt") -> Legalized:
    """The program as `chip` takes it on `path`, with notes.

    Raises: UnsupportedModel (ANE302) with every op that the chip refuses, its place, the reason and a fix;
    UsageError for an unknown chip or path.
    """
    target = Target(get_chip(chip), path)
    ready = rewritten(lowered, chip, path)
    function = ready.program.main
    findings = refusals(function, target)
    if findings:
        count = len(findings)
        ops = "op" if count == 1 else "ops"
        needs = f"ops and shapes that {target.chip.title} accepts ({path})"
        summary = f"model: needs {needs}; got {count} refused {ops}."
        raise UnsupportedModel(summary, findings, code="ANE302")
    return Legalized(ready, target.chip.name, path, tuple(notes(function, target)))


def rewritten(lowered: Lowered, chip: str, path: str) -> Lowered:
    """The program with what chip and path need written in another way; checked is nothing."""
    target = Target(get_chip(chip), path)
    function = spread_factors(move_width_slices(lowered.program.main, target), target)
    program = Program((function,), lowered.program.version, lowered.program.attributes)
    return replace(lowered, program=program)


def refusals(function: Function, target: Target) -> list[Finding]:
    """Every reason why the chip refuses the function as it is, in program order."""
    target = replace(target, constant=_constant(function))
    return [*_inputs(function, target), *_ops(function, target), *_program(function, target)]


def _constant(function: Function) -> frozenset[str]:
    """Values made of constants only, such as a weight that `constexpr_*` decodes."""
    known: set[str] = set()
    for op in function.ops:
        if all(value.name in known for value in op.operands()):
            known.update(result.name for result in op.results)
    return frozenset(known)


def _where(op: Op) -> str:
    return op.source or f"op {op.name}"


def _inputs(function: Function, target: Target) -> Iterator[Finding]:
    for value in function.inputs:
        for reason, fix in _shape(value.type, target):
            yield Finding(f"input {value.name}", "input", reason, fix)


def _instead(kind: str, target: Target) -> str:
    """The way out of an op that a chip refuses: the first later chip that is known to run it, or other ops."""
    first = _first_later(target.chip, lambda chip: op_status(kind, chip, target.path).status in _RUNS)
    if first is None:
        return "Replace the layer that needs it."
    return f"{first.title} runs it; for {target.chip.title} replace the layer that needs it."


def _less(name: str, extent: int, target: Target) -> str:
    """The way out of an axis that is too long: the size that the chip takes, and the first later chip that takes it."""
    row = target.limit(name)
    most = "" if row is None else f" of {row.value:g} or less"
    fix = f"Make it an axis{most}: a narrower layer, or a smaller batch where it is the batch."
    first = _first_later(target.chip, lambda chip: not replace(target, chip=chip).exceeds(name, extent))
    return fix if first is None else f"{fix} {first.title} takes it."


def _first_later(chip: Chip, takes: Callable[[Chip], bool]) -> Chip | None:
    later = (c for c in map(get_chip, known_chips()) if c.generation_number > chip.generation_number)
    return next(filter(takes, later), None)


#: What the tables say of an op that a chip runs.
_RUNS = ("native", "reachable")


def _ops(function: Function, target: Target) -> Iterator[Finding]:
    for op in function.ops:
        support = op_status(op.kind, target.chip, target.path)
        if support.status == "refused":
            reason = f"the engine refuses this op ({support.evidence}; {support.source})."
            yield Finding(_where(op), op.kind, reason, _instead(op.kind, target))
        seen: set[str] = set()
        for check in (_shapes, *(_CHECKS.get(op.kind) or _CHECKS.get(family(op.kind), ()))):
            for reason, fix in check(op, target):
                if reason not in seen:
                    seen.add(reason)
                    yield Finding(_where(op), op.kind, reason, fix)


def _program(function: Function, target: Target) -> Iterator[Finding]:
    total = constant_bytes(function)
    bound = target.exceeds("program_bytes", total)
    if bound:
        yield Finding("program", "constants", f"needs {bound}; got {total} bytes.", "Pass weights as inputs.")


def _shape(type_: TensorType, target: Target) -> Iterator[tuple[str, str]]:
    """Rank, empty axes, and the extent of each axis."""
    bound = target.exceeds("rank", type_.rank)
    if bound:
        yield f"needs {bound}; got rank {type_.rank} ({type_}).", "Merge axes with a reshape."
    for i, extent in enumerate(reversed(type_.shape)):
        if target.exceeds("min_dimension", extent):
            yield f"needs non-empty tensors; got {type_}.", "Remove the empty tensor."
        name = _AXES[i] if i < len(_AXES) else "depth" if type_.rank == 5 and i == 3 else "batch"
        bound = target.exceeds(name, extent)
        if bound:
            yield f"needs a {name} of {bound}; got {extent} in {type_}.", _less(name, extent, target)


def _shapes(op: Op, target: Target) -> Iterator[tuple[str, str]]:
    for value in op.results:
        yield from _shape(value.type, target)
    for name, item in op.literals():
        if name in ("x", "y", "a", "b", "weight", "values", "val"):
            yield from _shape(item.type, target)


def _call(op: Op) -> Call:
    return bind(op.kind, dict(op.args))


def _matmul(op: Op, target: Target) -> Iterator[tuple[str, str]]:
    call = _call(op)
    x, y = call.type("x"), call.type("y")
    bound = target.exceeds("matmul_rank", max(x.rank, y.rank))
    if bound:
        yield f"needs {bound}; got {x} and {y}.", "Merge leading axes with a reshape."
    inner = x.shape[-2 if call.flag("transpose_x") else -1]
    bound = target.exceeds("matmul_contraction", inner)
    if bound:
        yield (
            f"needs a contraction of {bound}; got {inner} from {x} and {y}.",
            "Split the product and add the parts.",
        )
    outer = max(op.result.type.shape[-2:])
    bound = target.exceeds("matmul_outputs", outer)
    if bound:
        fix = _less("matmul_outputs", outer, target)
        yield f"needs rows and columns of {bound}; got {outer} in {op.result.type}.", fix


def _conv(op: Op, target: Target) -> Iterator[tuple[str, str]]:
    call = _call(op)
    x, weight = call.type("x"), call.type("weight")
    bound = target.exceeds("conv_rank", x.rank)
    if bound:
        yield f"needs {bound}; got {x}.", "Use 2-d convolutions."
    for name, extent in zip(("width", "height", "depth"), reversed(weight.shape[2:]), strict=False):
        bound = target.exceeds(f"conv_kernel_{name}", extent)
        if bound:
            yield f"needs a kernel {name} of {bound}; got {extent} in {weight}.", "Stack smaller kernels."
    kernel = op.arg("weight")
    if isinstance(kernel, Value) and kernel.name not in target.constant:
        bound = target.exceeds("conv_dynamic_weight_batch", x.shape[0])
        if bound:
            yield (
                f"a weight that is not constant needs a batch of {bound}; got {x}.",
                "Lower it as slices and matmul.",
            )
    for name, values in (
        ("conv_stride", _given(call, "strides")),
        ("conv_groups", (call.integer("groups"),)),
    ):
        bound = target.exceeds(name, max(values))
        if bound:
            yield f"{name.split('_')[1]} needs {bound}; got {max(values)}.", "Use a smaller one."


def _given(call: Call, name: str) -> tuple[int, ...]:
    return call.integers(name) if call.has(name) else (1,)


def _pool(op: Op, target: Target) -> Iterator[tuple[str, str]]:
    window = max(_call(op).integers("kernel_sizes"))
    bound = target.exceeds("max_pool_window" if op.kind == "max_pool" else "pool_window", window)
    if bound:
        yield (
            f"needs a window of {bound}; got {window}.",
            "Pool twice with smaller windows, or use a mean over the axes.",
        )


def _transpose(op: Op, target: Target) -> Iterator[tuple[str, str]]:
    largest = max(op.result.type.shape)
    bound = target.exceeds("transpose_extent", largest)
    if bound:
        fix = _less("transpose_extent", largest, target)
        yield f"needs axes of {bound}; got {largest} in {op.result.type}.", fix


def _arg_reduce(op: Op, target: Target) -> Iterator[tuple[str, str]]:
    call = _call(op)
    extent = call.type("x").shape[call.integer("axis")]
    bound = target.exceeds("arg_reduce_axis", extent)
    if bound:
        yield f"needs an axis of {bound}; got {extent}.", "Reduce in two steps."


#: Checks by op kind, or by family.
_CHECKS: dict[str, tuple[Check, ...]] = {
    "matmul": (_matmul,),
    "conv": (_conv,),
    "conv_transpose": (_conv,),
    "transpose": (_transpose,),
    "pooling": (_pool,),
    "arg_reduction": (_arg_reduce,),
}


def notes(function: Function, target: Target) -> Iterator[Finding]:
    """What the chip accepts but a user may want to know: unknown ops, remaining clamped slices, memory, depth."""
    unknown: dict[str, Op] = {}
    for op in function.ops:
        if op_status(op.kind, target.chip, target.path).status == "unknown":
            unknown.setdefault(op.kind, op)
        if target.chip.width_slice_clamp is not None and width_offset(op):
            clamp = target.chip.width_slice_clamp
            reason = f"a last-axis slice with an offset turns magnitudes above {clamp:g} into inf."
            yield Finding(_where(op), op.kind, reason, "Slice another axis.")
    for kind, op in unknown.items():
        yield Finding(
            _where(op), kind, f"no source says whether {target.chip.title} runs it ({target.path}).", ""
        )
    yield from _memory_note(function, target)
    bound = target.exceeds("program_layers", len(function.ops))
    if bound:
        yield Finding("program", "depth", f"{len(function.ops)} ops; known to compile: {bound}.", "")


def _memory_note(function: Function, target: Target) -> Iterator[Finding]:
    row = target.limit("operand_working_set")
    if row is None:
        return
    large = [
        op for op in function.ops if any(v.type.nbytes > row.value for v in (*op.results, *op.operands()))
    ]
    if large:
        worst = max(large, key=lambda op: max(v.type.nbytes for v in (*op.results, *op.operands())))
        peak = max(v.type.nbytes for v in (*worst.results, *worst.operands()))
        size, most = f"{row.value / 2**20:g} MiB", f"{peak / 2**20:.1f} MiB"
        reason = f"{len(large)} ops have an operand beyond the {size} working set; the largest has {most}."
        yield Finding(_where(worst), worst.kind, reason, "It is streamed in parts, which costs bandwidth.")


def width_offset(op: Op) -> bool:
    """Whether an op slices the last axis from an offset other than 0 (and the axis is longer than 1)."""
    if op.kind not in ("slice_by_size", "slice_by_index"):
        return False
    call = _call(op)
    if call.type("x").rank == 0 or call.type("x").shape[-1] == 1:
        return False
    masked = call.has("begin_mask") and bool(_flags(call, "begin_mask")[-1])
    return not masked and call.integers("begin")[-1] != 0


def _flags(call: Call, name: str) -> tuple[object, ...]:
    value = call.const(name)
    return value if isinstance(value, tuple) else (value,)


def move_width_slices(function: Function, target: Target) -> Function:
    """On chips whose crop unit clamps (before A16, ANEForge numeric_cliffs), slice one axis further left:

        slice_by_size(x [.., n], begin [.., b], size [.., s])
     -> reshape(x, [.., n, 1]); slice_by_size(begin [.., b, 0], size [.., s, 1]); reshape([.., s])

    The unit computes 16 times the value in fp16 for an offset on the last axis only: magnitudes above 4094
    become inf there. Rank 5 has no axis to spare and keeps its slice, with a note.
    """
    if target.chip.width_slice_clamp is None:
        return function
    names = {v.name for v in function.inputs} | {r.name for op in function.ops for r in op.results}
    ops: list[Op] = []
    for op in function.ops:
        if (op.kind == "slice_by_size" and width_offset(op) and _call(op).type("x").rank < 5) or (
            op.kind == "slice_by_index" and width_offset(op) and _simple_index(op)
        ):
            ops += _moved(op, names)
        else:
            ops.append(op)
    return replace(function, ops=tuple(ops))


def _simple_index(op: Op) -> bool:
    """A strided slice of rank below 5 without masks."""
    call = _call(op)
    masks = any(call.has(m) for m in ("begin_mask", "end_mask", "squeeze_mask"))
    return call.type("x").rank < 5 and not masks and all(e >= 0 for e in call.integers("end"))


def _moved(op: Op, names: set[str]) -> list[Op]:
    call = _call(op)
    x, result = call.type("x"), op.result.type
    wide = Value(_fresh(f"{op.name}_wide", names), TensorType(x.dtype, (*x.shape, 1)))
    part = Value(_fresh(f"{op.name}_part", names), TensorType(x.dtype, (*result.shape, 1)))
    extra = {"begin": 0, "size": 1, "end": 1, "stride": 1}
    sliced: list[tuple[str, Arg]] = [("x", wide)]
    for name, argument in op.args[1:]:
        assert isinstance(argument, Literal)
        sliced.append((name, literal([*call.integers(name), extra[name]], "int32")))
    return [
        Op(
            "reshape",
            (("x", op.args[0][1]), ("shape", literal(list(wide.type.shape), "int32"))),
            (wide,),
            op.source,
        ),
        Op(op.kind, tuple(sliced), (part,), op.source),
        Op("reshape", (("x", part), ("shape", literal(list(result.shape), "int32"))), op.results, op.source),
    ]


def spread_factors(function: Function, target: Target) -> Function:
    """On e5rt, write a scalar factor of a rounded value in full:

        mul(floor(x), 2.0) -> mul(floor(x), [2.0, ..])

    The compiler folds a scalar factor into the `floor`, `ceil` or `round` before it, whose kernel drops it: the
    product is lost without a word. A factor of full shape stays (ANEForge issue 112, M5, macOS 26.5).
    """
    rounded = {op.result.name for op in function.ops if op.kind in ("floor", "ceil", "round")}
    if target.path != "e5rt" or not rounded:
        return function
    return replace(
        function, ops=tuple(_spread(op, rounded) if op.kind == "mul" else op for op in function.ops)
    )


def _spread(op: Op, rounded: set[str]) -> Op:
    """The product with its scalar factor written in full, if its other operand is rounded."""
    if not any(value.name in rounded for value in op.operands()):
        return op
    full = op.result.type
    args = tuple(
        (name, Literal(full, arg.data * full.size))
        if isinstance(arg, Literal) and arg.type.size == 1 and isinstance(arg.data, bytes)
        else (name, arg)
        for name, arg in op.args
    )
    return replace(op, args=args)


def _fresh(name: str, names: set[str]) -> str:
    while name in names:
        name += "_"
    names.add(name)
    return name
