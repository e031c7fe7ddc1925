"""`run`: any MIL program on the simulator, with its inputs from files, profile and comparison."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ane_trainer.ane.chips.lookup import PATHS
from ane_trainer.ane.errors import SimulationError, UsageError
from ane_trainer.commands.options import Chip, Fidelity, Output, Threads, show
from ane_trainer.commands.run_report import ProgramRun, port_of
from ane_trainer.commands.subjects import warn_if_refused
from ane_trainer.training.folder.records import unwritable
from ane_trainer.utils import atomic_write

if TYPE_CHECKING:  # the command imports the simulator, and PyTorch with it, only when it runs
    from ane_trainer.ane.mil.program import Function, Value
    from ane_trainer.ane.mil.weights import Array

Feeds = list[dict[str, "Array"]]

#: The range of drawn integers, by dtype.
_WHOLE = {"int8": (-128, 128), "uint8": (0, 256)}

#: The dtypes that an input can have, as NumPy calls them.
_NUMPY = {
    "fp16": "f2", "fp32": "f4", "fp64": "f8", "bool": "?", "int8": "i1", "uint8": "u1", "int16": "i2",
    "uint16": "u2", "int32": "i4", "uint32": "u4", "int64": "i8", "uint64": "u8",
}  # fmt: skip


def run(
    program: Annotated[
        str,
        typer.Argument(help="MIL text (a .mil, or a folder with one) or an .mlpackage.", metavar="PROGRAM"),
    ],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="Once for each input.", metavar="NAME=FILE.npy")
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Draw the inputs that are left out.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    steps: Annotated[int, typer.Option(help="Run so many times; states are kept between.")] = 1,
    chip: Chip = "m4",
    fidelity: Fidelity = "exact",
    path: Annotated[
        str | None,
        typer.Option(
            help="Whose refusals: e5rt, coreml, direct, none (default: by the file).", metavar="NAME"
        ),
    ] = None,
    function: Annotated[str | None, typer.Option(help="Of several (default: main).", metavar="NAME")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for outputs as .npy.", metavar="DIR")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Ranges, overflows, errors by op.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Outputs against double precision.")] = False,
    threads: Threads = None,
) -> Output:
    """Run any MIL program on the simulator.

    For example `ane-trainer run model.mil --random --profile`, or a training step: `ane-trainer run RUNFOLDER`.
    """
    return show(
        run_program(
            program, inputs or (), random=random, seed=seed, chip=chip, fidelity=fidelity, path=path,
            function=function, steps=steps, out=out, with_profile=profile, with_comparison=compare,
            threads=threads,
        )
    )  # fmt: skip


def run_program(
    program: str | Path,
    inputs: Sequence[str] = (),
    *,
    random: bool = False,
    seed: int = 0,
    chip: str = "m4",
    fidelity: str = "exact",
    path: str | None = None,
    function: str | None = None,
    steps: int = 1,
    out: Path | None = None,
    with_profile: bool = False,
    with_comparison: bool = False,
    threads: int | None = None,
) -> ProgramRun:
    """Load a program, feed it, run it `steps` times and write its outputs and states to `out` as `.npy`.

    `inputs` are `name=file.npy`; `random` draws the ones that are left out. `path` is one of `chips.PATHS`,
    "none" for whatever the simulator can run, None for "coreml" (an .mlpackage, a function with states) or
    "e5rt".
    """
    from ane_trainer.ane.mil.loading import load_program
    from ane_trainer.ane.simulator import make_context, prepare, refusal
    from ane_trainer.ane.verify.profiling import compare, function_of, profile

    if steps < 1:
        raise UsageError(f"--steps: needs a number from 1; got {steps}.", code="ANE104")
    files = parse_inputs(inputs)
    loaded = load_program(program)
    chosen = function_of(loaded, function)
    way = _path(path, program, chosen)
    feeds, places = feeds_of(chosen, files, steps, seed if random else None)
    context = make_context(chip, fidelity, threads, way)
    refusal.check(chosen, context.chip, way)
    if way is not None:
        warn_if_refused(chosen, context.chip, way)
    plan = prepare(chosen, context)
    results = [plan.run(step) for step in feeds]
    kept = {v.name: plan.read(v.name) for v in chosen.inputs if v.type.state}
    outputs = {name: _joined([r[name] for r in results]) for name in results[0]}
    options: dict[str, Any] = {
        "chip": chip, "fidelity": fidelity, "threads": threads, "path": way, "function": chosen.name,
    }  # fmt: skip
    found = profile(loaded, feeds, **options) if with_profile else None
    errors = found.outputs if found else compare(loaded, feeds, **options) if with_comparison else None
    types = {v.name: str(v.type) for v in (*chosen.inputs, *chosen.outputs)}
    written = write_arrays(out, outputs, kept)
    return ProgramRun(
        str(program),
        chosen.name,
        len(chosen.ops),
        f"simulator of {context.chip.title}, {fidelity}" + (f", path {way}" if way else ""),
        steps,
        tuple(port_of(n, types[n], _joined([f[n] for f in feeds if n in f]), p) for n, p in places.items()),
        tuple(port_of(n, types[n], a, written.get(n, "")) for n, a in outputs.items()),
        tuple(port_of(n, types[n], a, written.get(f"{n}.state", "")) for n, a in kept.items()),
        found,
        errors if with_comparison else None,
    )


def _path(path: str | None, program: str | Path, function: Function) -> str | None:
    if path is None:
        from_core_ml = Path(program).suffix == ".mlpackage" or any(v.type.state for v in function.inputs)
        return "coreml" if from_core_ml else "e5rt"
    if path != "none" and path not in PATHS:
        raise UsageError(f"--path: needs one of {', '.join(PATHS)}, none; got {path!r}.", code="ANE104")
    return None if path == "none" else path


def parse_inputs(texts: Iterable[str], option: str = "--input") -> dict[str, Path]:
    """`name=file.npy` options as files by name; `UsageError` for another form or a name given twice."""
    files: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or not name or not file or name in files:
            got = f"{name} twice" if name in files else repr(text)
            raise UsageError(
                f"{option}: needs name=file.npy, each name once; got {got}. E.g. {option} x=image.npy",
                code="ANE104",
            )
        files[name] = Path(file)
    return files


def feeds_of(
    function: Function, files: Mapping[str, Path], steps: int = 1, seed: int | None = None
) -> tuple[Feeds, dict[str, str]]:
    """The feeds of each step, and where each input comes from. With a seed, inputs without a file are drawn.

    Random floats are normal with deviation 1, int8 and uint8 take every value, other integers are 0 or 1;
    states start at zero unless given. Raises `SimulationError` with everything that is missing or wrong.
    """
    known = {v.name: v for v in function.inputs}
    wrong = [
        ("SIM102", f"{n}: there is no such input; there are {', '.join(known)}") for n in files.keys() - known
    ]
    arrays: dict[str, Array] = {}
    places: dict[str, str] = {}
    rng = np.random.default_rng(seed)
    for name, value in known.items():
        if value.type.dtype not in _NUMPY:
            wrong.append(("SIM105", f"{name}: needs one of {', '.join(_NUMPY)}; got {value.type.dtype}"))
        elif name in files:
            try:
                arrays[name], places[name] = _fitted(_read(files[name]), value, steps), str(files[name])
            except SimulationError as fault:
                wrong.append((fault.code, f"{name}: {fault.args[0]}"))
        elif value.type.state:
            continue
        elif seed is not None:
            arrays[name] = _drawn(rng, value, steps)
            places[name] = f"random, seed {seed}"
        else:
            wrong.append(("SIM101", f"{name}: needs {value.type}; it is missing"))
    if wrong:
        missing = any(code == "SIM101" for code, _ in wrong)
        text = "; ".join(text for _, text in wrong)
        fix = " Give --input NAME=FILE.npy, or --random." if missing else ""
        raise SimulationError(f"inputs: {text}.{fix}", code=wrong[0][0])
    feeds = []
    for step in range(steps):
        fed = {n: a[step] if a.shape != known[n].type.shape else a for n, a in arrays.items()}
        feeds.append({n: a for n, a in fed.items() if step == 0 or not known[n].type.state})
    return feeds, places


def _read(file: Path) -> Array:
    """One array of a .npy file."""
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as fault:
        reason = (
            fault.strerror if isinstance(fault, OSError) and fault.strerror else "not a .npy array of numbers"
        )
        raise SimulationError(
            f"{file}: needs a .npy file that can be read; {reason}", code="SIM108"
        ) from None
    if not isinstance(found, np.ndarray):
        raise SimulationError(f"{file}: needs a .npy file; got an .npz archive", code="SIM108")
    return found


def _fitted(array: Array, value: Value, steps: int) -> Array:
    """The array in the input's dtype; numbers that the dtype cannot hold as they are meant are refused."""
    dtype, shape = value.type.dtype, value.type.shape
    if array.shape != shape and (value.type.state or steps == 1 or array.shape != (steps, *shape)):
        more = f" or {(steps, *shape)}" if steps > 1 and not value.type.state else ""
        raise SimulationError(f"needs the shape {shape}{more}; got {array.shape}", code="SIM103")
    if dtype.startswith("fp"):
        fits = array.dtype.kind in "fiu"
    elif dtype == "bool":
        fits = array.dtype.kind == "b"
    else:
        limits = np.iinfo(_NUMPY[dtype])
        fits = array.dtype.kind in "iu" and (
            not array.size or (int(array.min()) >= limits.min and int(array.max()) <= limits.max)
        )
    if not fits:
        raise SimulationError(f"needs numbers that {dtype} holds; got {array.dtype}", code="SIM107")
    with np.errstate(over="ignore"):
        return array.astype(_NUMPY[dtype])


def _drawn(rng: np.random.Generator, value: Value, steps: int) -> Array:
    """Random numbers for an input, new ones for each step."""
    dtype = value.type.dtype
    shape = value.type.shape if steps == 1 else (steps, *value.type.shape)
    if dtype.startswith("fp"):
        return rng.standard_normal(shape).astype(_NUMPY[dtype])
    return rng.integers(*_WHOLE.get(dtype, (0, 2)), shape).astype(_NUMPY[dtype])


def _joined(arrays: Sequence[Array]) -> Array:
    """One step's array as it is, several stacked."""
    return arrays[0] if len(arrays) == 1 else np.stack(arrays)


def write_arrays(
    out: Path | None, outputs: Mapping[str, Array], states: Mapping[str, Array]
) -> dict[str, str]:
    """Write each array to a file in `out` (None: nowhere); the files by port (states as `NAME.state`).

    Characters that are not safe in a file's name become underscores.
    """
    written: dict[str, str] = {}
    if out is None:
        return written
    for name, array in {**outputs, **{f"{n}.state": a for n, a in states.items()}}.items():
        plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".") or "_"
        file = out / f"{plain}.npy"
        number = 2
        while str(file) in written.values():
            file, number = out / f"{plain}_{number}.npy", number + 1
        content = io.BytesIO()
        np.save(content, array)
        try:
            atomic_write(file, content.getvalue())
        except OSError as fault:
            raise unwritable(out, fault) from None
        written[name] = str(file)
    return written
