"""The command line `ane-trainer`: options in, one call of the package, exit code out; no logic of its own."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ane_trainer import core
from ane_trainer.__version__ import __version__
from ane_trainer.ane.errors import AneTrainerError, Interrupted, UsageError
from ane_trainer.commands import bench as benchmark
from ane_trainer.commands import conformance, doctor, inspection
from ane_trainer.commands import run as programs
from ane_trainer.commands.chips import chip_table, chip_values
from ane_trainer.commands.data import dataset_rows, fetch_dataset
from ane_trainer.commands.placement import place_package
from ane_trainer.training.config import TrainConfig, make_config, read_config_file
from ane_trainer.training.report import ConsoleReporter, error_json, headline, summary
from ane_trainer.training.runs import finite
from ane_trainer.utils import setup_logging

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Train PyTorch models on the Apple Neural Engine, or anywhere on a simulator of its arithmetic.",
    epilog="Exit codes: 0 ok, 1 usage or data, 2 environment, 3 the model does not fit the chip, 4 diverged, "
    "130 interrupted.",
)  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Fetch datasets, and list what is known and cached.")
app.add_typer(data_app, name="data")

#: What typer raises for a wrong command line, by its place in a public class's bases.
_CommandLineError: type[Exception] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]
Chip = Annotated[
    str | None, typer.Option(help="Whose arithmetic and limits: m1 ... m6. [m4]", metavar="NAME")
]
Device = Annotated[
    str | None, typer.Option(help="auto, sim, e5rt, coreai, cpu (plain PyTorch fp32). [auto]", metavar="NAME")
]
Fidelity = Annotated[str | None, typer.Option(help="exact or fast. [exact]", metavar="NAME")]
Threads = Annotated[int | None, typer.Option(help="Of the simulator; results do not depend on it. [all]")]
Run = Annotated[str, typer.Argument(help="A run's folder, or `last`.", metavar="RUN")]
Model = Annotated[
    str, typer.Argument(help="mlp, cnn, transformer, or path/to/file.py:ClassName.", metavar="MODEL")
]
Batch = Annotated[int, typer.Option("--batch", "--batch-size", help="Examples a step.")]
Input = Annotated[str, typer.Option("--input", help="Shape of one example, e.g. 1x28x28.", metavar="SHAPE")]
Classes = Annotated[int, typer.Option(help="Outputs of the model.")]
Optimizer = Annotated[str | None, typer.Option(help="adam, adamw or sgd. [adam]", metavar="NAME")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Train PyTorch models on the Apple Neural Engine, or anywhere on a simulator of its arithmetic."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def train(
    dataset: Annotated[
        str | None, typer.Argument(help="mnist, fashion-mnist or digits.", metavar="DATASET")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="mlp, cnn, transformer, or path/to/file.py:ClassName. [mlp]")
    ] = None,
    hidden: Annotated[
        str | None, typer.Option(help="Widths of the mlp's hidden layers, e.g. 512,256. [256]")
    ] = None,
    activation: Annotated[str | None, typer.Option(help="gelu, relu, ... [gelu; cnn: relu]")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data; with --resume: in all. [5]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", "--batch", help="[128]")] = None,
    optimizer: Optimizer = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. [adam, adamw 0.001; sgd 0.05]")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of sgd. [0.9]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="[0]")] = None,
    loss: Annotated[str | None, typer.Option(help="cross_entropy, mse, ... [cross_entropy]")] = None,
    chip: Chip = None,
    device: Device = None,
    fidelity: Fidelity = None,
    precision: Annotated[
        str | None, typer.Option(help="fp16, or fp32 where the device has it. [auto]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and the order of the data. [0]")] = None,
    threads: Threads = None,
    limit: Annotated[
        int | None, typer.Option(help="Use only the first so many examples of each split.")
    ] = None,
    compare_fp32: Annotated[
        bool | None,
        typer.Option("--compare-fp32", help="Train with plain PyTorch too, and show its accuracy."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with these options; options given here win.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the run. [runs/<name>]", metavar="DIR")] = None,
    resume: Annotated[str | None, typer.Option(help="Go on with an interrupted run.", metavar="RUN")] = None,
    as_json: Json = False,
) -> None:
    """Train a model on a dataset, e.g. `ane-trainer train mnist`."""
    options = {
        name: value for name, value in locals().items() if name in _TRAIN_OPTIONS and value is not None
    }
    if hidden is not None:
        options["hidden"] = _integers("--hidden", hidden, ",")
    report = ConsoleReporter(sys.stderr if as_json else sys.stdout)
    if resume is not None:
        _only_with_resume(options, out, config)
        result = core.resume_training(resume, report=report, epochs=epochs)
    else:
        if dataset is None and config is None:
            raise UsageError("train: needs a dataset; got none. Try: ane-trainer train mnist", code="ANE100")
        settings = make_config({**(read_config_file(config) if config else {}), **options})
        result = core.run_training(settings, out=out, report=report)
    print(summary(result, folder=result.details["run"], command=_command()), file=report.stream)
    if as_json:
        _print_json(result.to_json())


_TRAIN_OPTIONS = frozenset(TrainConfig.model_fields) - {"hidden"}


@app.command()
def evaluate(
    run: Run,
    chip: Chip = None,
    device: Device = None,
    fidelity: Fidelity = None,
    threads: Threads = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first so many test examples.")] = None,
    as_json: Json = False,
) -> None:
    """Loss and accuracy of a finished run on its test data, by an inference program."""
    found = core.evaluate_run(run, limit=limit, chip=chip, device=device, fidelity=fidelity, threads=threads)
    if as_json:
        _print_json(found)
        return
    print(headline(found["where"]))
    accuracy = "unknown" if found["test_accuracy"] is None else f"{found['test_accuracy']:.2%}"
    print(f"test accuracy {accuracy}   test loss {found['test_loss']:.4f}   {found['examples']:,} examples")


@app.command()
def predict(
    run: Run,
    input: Annotated[Path | None, typer.Option("--input", help="A .npy file of examples [N, ...].")] = None,
    index: Annotated[int | None, typer.Option(help="A test example by its number.")] = None,
    chip: Chip = None,
    device: Device = None,
    fidelity: Fidelity = None,
    as_json: Json = False,
) -> None:
    """Classes and probabilities that a finished run's model gives for examples."""
    found = core.predict_run(run, index=index, path=input, chip=chip, device=device, fidelity=fidelity)
    if as_json:
        _print_json(found)
        return
    for number, row in enumerate(found["predictions"]):
        truth = "" if found["truth"] is None else f"   truth {found['truth']}"
        print(f"{number}: {row['name']}   probability {max(row['probabilities']):.4f}{truth}")


@app.command()
def export(
    run: Run,
    format: Annotated[
        str, typer.Option(help="mlpackage, aimodel, onnx, torch, step-mlpackage, step-aimodel.")
    ],
    out: Annotated[Path | None, typer.Option(help="The file. [in the run's folder]", metavar="PATH")] = None,
    input: Annotated[
        str, typer.Option("--input", help="image (pixels), tensor, auto.", metavar="KIND")
    ] = "auto",
    weights: Annotated[str, typer.Option(help="Of an mlpackage: fp16, int8, int4.", metavar="KIND")] = "fp16",
    batch: Annotated[int, typer.Option(help="Examples that go in at once.")] = 1,
    examples: Annotated[int, typer.Option(help="Test examples that the file is checked on; 0: all.")] = 1000,
    chip: Chip = None,
    fidelity: Fidelity = None,
    as_json: Json = False,
) -> None:
    """Write a run's model, or its training step, for apps, and check the file by running it again."""
    found = core.export_run(
        run, format, out, input=input, weights=weights, batch=batch, examples=examples or None, chip=chip,
        fidelity=fidelity,
    )  # fmt: skip
    if as_json:
        _print_json(found.to_json())
    else:
        print(found.as_text())


@app.command()
def check(
    model: Model,
    input_shape: Input = "1x28x28",
    classes: Classes = 10,
    batch: Batch = 128,
    optimizer: Optimizer = None,
    chip: Annotated[str, typer.Option(help="One or more, e.g. m1,m4.", metavar="NAMES")] = "m4",
    as_json: Json = False,
) -> int:
    """Will the model train on chip X: op by op, with the reason and the fix. Exit code 3 if not."""
    shape = _integers("--input", input_shape, "x")
    found = inspection.check_model(model, shape, classes, batch, optimizer or "adam", tuple(chip.split(",")))
    if as_json:
        _print_json(found.to_json())
    else:
        print(found.as_text())
    return 0 if found.fits else 3


@app.command()
def estimate(
    model: Model,
    input_shape: Input = "1x28x28",
    classes: Classes = 10,
    batch: Batch = 128,
    optimizer: Optimizer = None,
    chip: Annotated[str, typer.Option(help="m1 ... m6.", metavar="NAME")] = "m4",
    as_json: Json = False,
) -> None:
    """What one training step takes on the engine, by the cost model: time, energy, the dearest ops."""
    shape = _integers("--input", input_shape, "x")
    found = inspection.estimate_model(model, shape, classes, batch, optimizer or "adam", chip)
    if as_json:
        _print_json(found)
    else:
        print(inspection.estimate_text(found))


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="As for `check`.", metavar="MODEL")] = "mlp",
    devices: Annotated[
        str, typer.Option(help="cpu, mps, sim, coreai, e5rt; always beside cpu.", metavar="NAMES")
    ] = "cpu,sim",
    input_shape: Input = "1x28x28",
    classes: Classes = 10,
    batch: Batch = 128,
    optimizer: Optimizer = None,
    chip: Annotated[str, typer.Option(help="m1 ... m6.", metavar="NAME")] = "m4",
    fidelity: Annotated[str, typer.Option(help="exact or fast.", metavar="NAME")] = "exact",
    steps: Annotated[int, typer.Option(help="Timed on each device.")] = 20,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time a model's training step on several devices, in turn, each as a ratio to plain PyTorch."""
    found = benchmark.compare_devices(
        model, _integers("--input", input_shape, "x"), classes, batch, optimizer or "adam", devices.split(","),
        chip=chip, fidelity=fidelity, steps=steps, threads=threads,
    )  # fmt: skip
    if as_json:
        _print_json(found.to_json())
    else:
        print(found.as_text())


@app.command(name="run")
def run_mil(
    program: Annotated[
        str, typer.Argument(help="MIL text (a .mil, or a folder with model.mil), or an .mlpackage.")
    ],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="Once for each input.", metavar="NAME=FILE.npy")
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Draw the inputs that are left out.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    steps: Annotated[int, typer.Option(help="Run so many times; states are kept between.")] = 1,
    chip: Annotated[str, typer.Option(help="m1 ... m6.", metavar="NAME")] = "m4",
    fidelity: Annotated[str, typer.Option(help="exact or fast.", metavar="NAME")] = "exact",
    path: Annotated[
        str | None,
        typer.Option(help="Whose refusals: e5rt, coreml, direct, none. [by the file]", metavar="NAME"),
    ] = None,
    function: Annotated[str | None, typer.Option(help="[main]", metavar="NAME")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for outputs as .npy.", metavar="DIR")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Ranges, overflows, errors by op.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Outputs against double precision.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run any MIL program on the simulator, e.g. `ane-trainer run model.mil --random --profile`."""
    found = programs.run_program(
        program, inputs or (), random=random, seed=seed, chip=chip, fidelity=fidelity, path=path,
        function=function, steps=steps, out=out, with_profile=profile, with_comparison=compare,
        threads=threads,
    )  # fmt: skip
    if as_json:
        _print_json(found.to_json())
    else:
        print(found.as_text())


@app.command(name="doctor")
def doctor_command(
    chips: Annotated[bool, typer.Option("--chips", help="Print the table of chips instead.")] = False,
    as_json: Json = False,
) -> int:
    """What this machine can do, what is missing, and what brings it. Exit code 1: cannot train; 2: degraded."""
    if chips:
        if as_json:
            _print_json({"chips": chip_values()})
        else:
            print(chip_table())
        return 0
    checks = doctor.examine()
    if as_json:
        _print_json(doctor.as_json(checks))
    else:
        print(doctor.as_text(checks))
    return doctor.exit_code(checks)


@app.command()
def placement(
    package: Annotated[Path, typer.Argument(help="An .mlpackage.", metavar="MODEL.mlpackage")],
    as_json: Json = False,
) -> None:
    """Where Core ML would run an .mlpackage, op by op counted; unknown where the system does not tell."""
    found = place_package(package)
    if as_json:
        _print_json(found.to_json())
    else:
        print(found.as_text())


@app.command(name="conformance")
def conformance_command(
    device: Annotated[str, typer.Option(help="e5rt, e5rt-pingpong, coreai or sim.", metavar="NAME")] = "e5rt",
    chip: Annotated[str | None, typer.Option(help="m1 ... m6. [this Mac's, else m4]", metavar="NAME")] = None,
    fidelity: Annotated[str, typer.Option(help="Of --device sim: exact or fast.", metavar="NAME")] = "exact",
    threads: Threads = None,
    only: Annotated[
        str, typer.Option(help="Only cases whose family or name holds this.", metavar="TEXT")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Report. [conformance-CHIP-DEVICE.json]", metavar="FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a fixed set of programs on the engine and on the simulator, compare bit for bit, write a report."""
    reporter = ConsoleReporter(sys.stderr)
    found, path = conformance.run(device, chip, fidelity, threads, only=only, out=out, report=reporter)
    if as_json:
        _print_json(found)
        return
    print(conformance.as_text(found))
    print(
        f"report   {path}" + ("" if device == "sim" else "   (one line; send it in an issue of the project)")
    )


@app.command(name="conformance-read")
def conformance_read(
    reports: Annotated[
        list[Path], typer.Argument(help="Files that `conformance` wrote.", metavar="REPORT...")
    ],
    into: Annotated[
        Path | None,
        typer.Option(help="CSV to add the rows to: ane_trainer/ane/data/conformance.csv.", metavar="FILE"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Evidence rows of conformance reports: which case came out bit for bit on which chip."""
    rows, added = conformance.read(reports, into)
    if as_json:
        _print_json({"rows": [asdict(row) for row in rows], "added": added})
        return
    print(conformance.rows_as_text(rows))
    if into is not None:
        print(f"{added} new rows in {into}; then: python -m docs._generate.fidelity > docs/fidelity.md")


@data_app.command("list")
def data_list(as_json: Json = False) -> None:
    """The known datasets, and which of them are in the cache."""
    rows = dataset_rows()
    if as_json:
        _print_json({"datasets": rows})
        return
    for row in rows:
        print(f"{row['name']:<15}{row['status']:<12}{row['folder']}")


@data_app.command("fetch")
def data_fetch(
    dataset: Annotated[str, typer.Argument(help="mnist, fashion-mnist or digits.", metavar="DATASET")],
    root: Annotated[
        Path | None, typer.Option(help="Folder for the files. [the user's cache]", metavar="DIR")
    ] = None,
    as_json: Json = False,
) -> None:
    """Download a dataset, verified, so that training works offline."""
    found = fetch_dataset(dataset, root)
    if as_json:
        _print_json(found)
    else:
        print(f"{found['name']}: verified, from {found['source']}; in {found['folder']}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run the command line and exit with the documented code."""
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line; errors are printed, the exit code is returned."""
    setup_logging(logging.WARNING)
    try:
        code = app(args=list(arguments), prog_name="ane-trainer", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except AneTrainerError as error:
        return _fail(error, arguments)
    except _CommandLineError as error:
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        return _fail(UsageError(f"command line: {text} See: ane-trainer --help"), arguments)
    except KeyboardInterrupt:
        return _fail(Interrupted("stopped before there was anything to save."), arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(error: AneTrainerError, arguments: Sequence[str]) -> int:
    print(error, file=sys.stderr)
    if "--json" in arguments:
        _print_json(error_json(error))
    return error.exit_code


def _print_json(value: Any) -> None:
    print(json.dumps(finite(value)), flush=True)


def _integers(option: str, text: str, separator: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(separator))
    except ValueError:
        raise UsageError(
            f"{option}: needs whole numbers with {separator!r} between; got {text!r}. E.g. 28{separator}28.",
            code="ANE104",
        ) from None


def _only_with_resume(options: dict[str, Any], out: Path | None, config: Path | None) -> None:
    """A resumed run keeps its options; only --epochs may change."""
    others = sorted({*options, *(["out"] if out else []), *(["config"] if config else [])} - {"epochs"})
    if others:
        raise UsageError(
            f"train: --resume keeps the run's options; got {', '.join(others)} as well. "
            "Leave them out, or start a new run.",
            code="ANE107",
        )


def _command() -> str:
    """How the user can type this program: by name where it is on the path, else as it was called."""
    if Path(sys.argv[0]).name == "__main__.py":
        return "python -m ane_trainer"
    return "ane-trainer" if shutil.which("ane-trainer") else sys.argv[0]
