"""What the engine refuses to run on a chip by a path, as the op table has it.

Only the ops of a program are looked at; sizes and ranks are the business of `legalize`. Work that a compiler
folds (an op without a runtime operand) is not held against a program.
"""

from __future__ import annotations

from ane_trainer.ane.chips.lookup import Chip, op_status
from ane_trainer.ane.errors import Finding, UnsupportedModel
from ane_trainer.ane.mil.program import Function, Op, Value

#: Core ML spells one op as three in the published sweep.
_GELU = {
    "EXACT": "gelu_exact",
    "TANH_APPROXIMATION": "gelu_tanh_approx",
    "SIGMOID_APPROXIMATION": "gelu_sigmoid_approx",
}

#: Ops the simulator cannot run on any path: their results are not a function of the program's inputs.
RANDOM = frozenset(["random_bernoulli", "random_categorical", "random_normal", "random_uniform"])


def refused_ops(function: Function, chip: Chip, path: str | None) -> tuple[Finding, ...]:
    """Why the engine of `chip` does not run `function` by `path`: one finding an op; random ops on every
    path.

        `path` None asks only for what the simulator itself cannot run.
    """
    folded: set[str] = set()
    findings = []
    for op in function.ops:
        if op.kind in RANDOM:
            findings.append(
                _finding(op, "the engine has no published random numbers", "Pass them in as an input.")
            )
            continue
        if all(v.name in folded for v in op.operands()):
            folded.update(v.name for v in op.results)
            continue
        reason = None if path is None else _reason(function, op, chip, path)
        if reason is not None:
            findings.append(
                _finding(op, reason, "Express it by ops the engine has, or simulate without a path.")
            )
    return tuple(findings)


def check(function: Function, chip: Chip, path: str | None) -> None:
    """Raise `UnsupportedModel` with every finding of `refused_ops`."""
    findings = refused_ops(function, chip, path)
    if findings:
        where = f"{chip.title} by the path {path}" if path else "the simulator"
        raise UnsupportedModel(f"simulate: {where} needs other ops; got {len(findings)} refused.", findings)


def _finding(op: Op, reason: str, fix: str) -> Finding:
    return Finding(op.source or op.name, op.kind, reason + ".", fix)


def _reason(function: Function, op: Op, chip: Chip, path: str) -> str | None:
    if op.kind == "cast" and _is_image_port(function, op):
        return None
    kind = op.kind
    if kind == "gelu":
        mode = op.arg("mode")
        kind = _GELU.get(str(getattr(mode, "data", "EXACT")), kind)
    status = op_status(kind, chip, path)
    if status.status != "refused":
        return None
    return f"refused on {chip.title} by the path {path} ({status.evidence}; {status.source})"


def _is_image_port(function: Function, op: Op) -> bool:
    """A cast that brings a uint8 input into fp16, or one that changes nothing: ANEForge emits and runs
    these.
    """
    x = op.arg("x")
    if not isinstance(x, Value):
        return False
    into_half = op.result.type.dtype == "fp16"
    return into_half and (x.type.dtype == "fp16" or (x.type.dtype == "uint8" and x in function.inputs))
