"""Reads what ANEForge's compiler wrote (MIL text, weights beside it) and says why a chip would refuse it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ane_trainer.ane.chips.lookup import Chip, Limit
from ane_trainer.ane.compiler.legalize import Target, refusals
from ane_trainer.ane.errors import Finding, ProgramError, UnsupportedModel
from ane_trainer.ane.mil.program import Function, Program, Value
from ane_trainer.ane.mil.text.parser import parse_program
from ane_trainer.ane.simulator import KERNELS
from ane_trainer.ane.simulator.schedule import VIEWS
from ane_trainer.interop.aneforge.compiling import compiled, refused

#: Ops that tables of single ops call refused although whole programs with them run on silicon.
_RUNS_ANYWAY = {
    "cast": "uint8 image inputs are cast in the program (ANEForge image_input)",
    "constexpr_blockwise_shift_scale": "folds to fp16 before A15 (ANEForge _targets.native_streams)",
}

#: Largest extent of a transposed tensor, by the first engine generation that has it (ANEForge 0.4.0
#: `_targets._LIMITS`, measured on A14 and A16): far beyond what tables of single tensors give.
_TRANSPOSED = {16: 2**24 - 1, 13: 2**23 - 1}

#: Limits of the compiler that ANEForge 0.4.0 does not meet on its path (M5, `graph._check_kw`: "kernel height
#: is unconstrained").
_UNBOUNDED = ("conv_kernel_height",)

#: Dtypes that a port may have on e5rt (ANEForge runtime; bool only inside programs).
_PORT_DTYPES = ("fp16", "uint8", "int8")


@dataclass(frozen=True)
class _Measured(Target):
    """A target without the limits that ANEForge measured to be none."""

    def limit(self, name: str) -> Limit | None:
        return None if name in _UNBOUNDED else super().limit(name)


class ModelFolder(Mapping[str, bytes]):
    """The files beside a MIL text, by the paths that the text names (`@model_path/weights.bin`)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._read: dict[Path, bytes] = {}

    def __getitem__(self, name: str) -> bytes:
        path = (self._folder / name.removeprefix("@model_path/")).resolve()
        if not path.is_relative_to(self._folder) or not path.is_file():
            raise KeyError(name)
        if path not in self._read:
            self._read[path] = path.read_bytes()
        return self._read[path]

    def __iter__(self) -> Iterator[str]:
        return (str(path.relative_to(self._folder)) for path in self._folder.rglob("*") if path.is_file())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def read_program(mil_path: Path) -> Program:
    """The program that macOS's compiler makes of a folder that ANEForge wrote.

    Raises: ProgramError or OSError when it cannot be read.
    """
    text = _plain(mil_path.read_text(encoding="utf-8"))
    return compiled(parse_program(text, ModelFolder(mil_path.parent)))


#: A negation in ANEForge's text, and a declaration of a name as a tensor of floats.
_NOT, _FLOATS = re.compile(r"= logical_not\(x = (\w+)\)"), r"tensor<fp16, \[[^\]]*\]> {}\b"


def _plain(text: str) -> str:
    """The text with negations of floats as the comparison that they are.

    before: tensor<bool, [4]> n = logical_not(x = t);        t is fp16
    after:  tensor<bool, [4]> n = equal(x = t, y = fp16(0));

    MIL's type rules (coremltools) give `logical_not` bool alone. ANEForge 0.4.0 writes it of any tensor, and its sweep
    of M5 calls the op reachable; that the compiler takes floats, and what it makes of them, is assumed.
    """

    def compared(match: re.Match[str]) -> str:
        floats = re.search(_FLOATS.format(match[1]), text)
        return f"= equal(x = {match[1]}, y = fp16(0x0p+0))" if floats else match[0]

    return _NOT.sub(compared, text)


def check(program: Program, chip: Chip) -> None:
    """Refuse what `chip` refuses on the e5rt path, and what the simulator cannot run.

    Raises: UnsupportedModel (ANE302) with all reasons; ProgramError (MIL101) for a program without work.
    """
    function = program.main
    if not function.ops:
        raise ProgramError("program: needs at least one operation; got none.", code="MIL101")
    target = _Measured(chip, "e5rt")
    wide = _transposed(function, chip)
    found = [f for f in refusals(function, target) if f.op not in _RUNS_ANYWAY and f.where not in wide]
    found += [*refused(function), *_ports(function), *_kernels(function)]
    if found:
        summary = f"program: needs what {chip.title} accepts (e5rt); got {len(found)} refusals."
        raise UnsupportedModel(summary, found, code="ANE302")


def _transposed(function: Function, chip: Chip) -> frozenset[str]:
    """Where findings about extents do not count: transposes, and the inputs that they read."""
    most = next(value for first, value in _TRANSPOSED.items() if chip.generation_number >= first)
    inputs = {value.name for value in function.inputs}
    places = set()
    for op in function.ops:
        if op.kind == "transpose" and max(op.result.type.shape, default=1) <= most:
            places.add(op.source or f"op {op.name}")
            places.update(f"input {value.name}" for value in op.operands() if value.name in inputs)
    return frozenset(places)


def _ports(function: Function) -> Iterator[Finding]:
    for kind, values in (("input", function.inputs), ("output", function.outputs)):
        for value in values:
            if value.type.dtype not in _PORT_DTYPES:
                reason = f"needs {' or '.join(_PORT_DTYPES[:2])}; got {value.type}."
                yield Finding(f"{kind} {value.name}", kind, reason, "Select or cast inside the program.")


def _kernels(function: Function) -> Iterator[Finding]:
    for kind in dict.fromkeys(op.kind for op in function.ops):
        if kind not in KERNELS and kind not in VIEWS and kind != "const":
            yield Finding("simulator", kind, "the simulator has no kernel for it.", "")


def port(values: tuple[Value, ...], name: str) -> Value | None:
    """The input or output called `name`."""
    return next((value for value in values if value.name == name), None)
