"""The command line `ane-trainer`: a table of commands, one parse, one dispatch, exit codes; no logic of its own.

A command is a function in its module of `commands/`, which is imported when the command is typed, so that help,
`--version` and completion stay fast. It returns an `Output`; `--json` and plain text are handled here for all.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TextIO

import typer

from ane_trainer.__version__ import __version__
from ane_trainer.ane.errors import AneTrainerError, EnvironmentFault, Interrupted, UsageError, error_json
from ane_trainer.commands.blame import UserFaults, users_frames
from ane_trainer.utils import finite, setup_logging, with_parameters

_TRAIN, _INSPECT, _MAC = "Train and use models", "Inspect", "Mac only"


class Command(NamedTuple):
    """A command as typed, the group of the help that it is in, its summary, and its module in `commands/`."""

    name: str
    panel: str
    summary: str
    module: str


COMMANDS = (
    Command("train", _TRAIN, "Train a model on a dataset.", "train"),
    Command("finetune", _TRAIN, "Tune a language model on your own text, with an adapter.", "finetune"),
    Command("evaluate", _TRAIN, "Measure a run on its held-out data.", "evaluate"),
    Command("predict", _TRAIN, "Predict with a run's model, its own preprocessing included.", "predict"),
    Command("export", _TRAIN, "Write a run's model, or its training step, for apps.", "export"),
    Command("data list", _TRAIN, "List the known datasets, and which of them are in the cache.", "data"),
    Command("data fetch", _TRAIN, "Download a dataset, verified, so that training works offline.", "data"),
    Command("cache show", _INSPECT, "Show what compiled programs and machine code take on disk.", "cache"),
    Command("cache prune", _INSPECT, "Delete what was not used for longest, down to a size.", "cache"),
    Command("init", _TRAIN, "Write a commented file of all options of `train`.", "init"),
    Command(
        "runs list",
        _TRAIN,
        "List the runs: what was trained, whether it came to its end, and how well.",
        "runs",
    ),
    Command("runs show", _TRAIN, "Show a run: its options, its epochs and its result.", "runs"),
    Command("runs compare", _TRAIN, "Compare runs side by side.", "runs"),
    Command("runs plot", _TRAIN, "Draw a curve of each run into one SVG file.", "runs"),
    Command("runs rm", _TRAIN, "Delete runs with everything in their folders.", "runs"),
    Command("sweep", _TRAIN, "Train with options that Optuna chooses, and compare the results.", "sweep"),
    Command("check", _INSPECT, "Say whether a model trains on a chip, op by op.", "check"),
    Command("debug", _INSPECT, "Find the op where a step departs from full precision.", "debug"),
    Command("estimate", _INSPECT, "Estimate time and energy on the engine.", "estimate"),
    Command("trace", _INSPECT, "Lay one step out in time, for Perfetto, with a roofline.", "trace"),
    Command("bench", _INSPECT, "Time a model's training step on several devices in turn.", "bench"),
    Command("run", _INSPECT, "Run any MIL program on the simulator.", "run"),
    Command(
        "doctor", _INSPECT, "Show what this machine can do, what is missing, and what brings it.", "doctor"
    ),
    Command("placement", _MAC, "Show where Core ML would run an .mlpackage.", "placement"),
    Command(
        "conformance", _MAC, "Compare the engine with the simulator, bit for bit.", "conformance.commands"
    ),
    Command(
        "conformance-read",
        _INSPECT,
        "Turn conformance reports into rows of evidence.",
        "conformance.commands",
    ),
)

#: Commands that only hold others -> what their help says.
GROUPS = {
    "cache": "Show and prune what is kept of earlier compilations.",
    "data": "Fetch datasets, and list what is known and cached.",
    "runs": "List, show, compare, draw and delete runs.",
}

_ABOUT = "Train PyTorch models on the Apple Neural Engine, or anywhere on a simulator of its arithmetic."
_EXIT_CODES = (
    "Exit codes: 0 ok, 1 usage or data, 2 environment, 3 the model does not fit the chip, 4 diverged, "
    "130 interrupted."
)
_STYLE: dict[str, Any] = {
    "rich_markup_mode": "rich",
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 100},
}

#: What typer raises for a wrong command line, by its place in a public class's bases.
_CommandLineError: type[Exception] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ in ("ClickException", "TyperException")
)

Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON object as the last line of standard output.", show_default=False),
]


#: Options whose value may be an empty word.
_MAY_BE_EMPTY = ("--text", "--augment")


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line; errors are printed, the exit code is returned."""
    setup_logging(logging.WARNING)
    words = list(arguments)
    if not words or (len(words) == 1 and words[0] in GROUPS):
        words.append("--help")
    empty = next((i for i, word in enumerate(words) if not word and words[i - 1] not in _MAY_BE_EMPTY), None)
    if empty is not None:
        text = (
            f"command line: word {empty + 1} needs a value; got nothing. Is a variable of the shell not set?"
        )
        return _fail(UsageError(text), words)
    before, warnings.formatwarning = warnings.formatwarning, _warning_line
    try:
        return _run(words)
    except AneTrainerError as error:
        return _fail(error, words)
    except _CommandLineError as error:
        text = str(error.format_message() if hasattr(error, "format_message") else error).rstrip(".")
        text += "" if text.endswith("?") else "."
        return _fail(UsageError(f"command line: {text} See: {_help(words)}"), words)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(Interrupted("stopped before there was anything to save."), words)
    finally:
        warnings.formatwarning = before


_python_form = warnings.formatwarning


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning for people as one line; what is for programmers (deprecations) as Python shows it."""
    if issubclass(category, UserWarning):
        return f"{_shown(f'warning  {message}', sys.stderr)}\n"
    return _python_form(message, category, filename, lineno, line)


def _run(words: list[str]) -> int:
    app = build_app(words)
    with UserFaults():
        code = app(args=words, prog_name="ane-trainer", standalone_mode=False)
    sys.stdout.flush()
    return code if isinstance(code, int) else 0


def build_app(words: Sequence[str]) -> typer.Typer:
    """The parser, with the options of the commands among `words` (or being completed); of others the summary."""
    typed = {
        *words,
        *os.environ.get("_TYPER_COMPLETE_ARGS", "").split(),
        *os.environ.get("COMP_WORDS", "").split(),
    }
    app = typer.Typer(help=_ABOUT, epilog=_EXIT_CODES, **_STYLE)
    app.callback(invoke_without_command=True)(_root)
    groups: dict[str, typer.Typer] = {}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group and group not in groups:
            groups[group] = typer.Typer(help=GROUPS[group], **_STYLE)
            app.add_typer(groups[group], name=group, rich_help_panel=command.panel)
        loaded = command.name.split()[0] in typed
        parent, panel = (groups[group], None) if group else (app, command.panel)
        register = parent.command(name, help=None if loaded else command.summary, rich_help_panel=panel)
        register(_load(command) if loaded else _summary_only)
    return app


def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _summary_only() -> None:
    """Stands for a command that was not typed."""


def _load(command: Command) -> Callable[..., int]:
    """The command's function, with `--json`, as typer takes it."""
    module = importlib.import_module(f"ane_trainer.commands.{command.module}")
    function = getattr(module, command.name.replace(" ", "_").replace("-", "_"))
    parameters = dict(inspect.signature(function, eval_str=True).parameters)
    told = parameters.pop("as_json", None) is not None

    def run(as_json: bool, **arguments: object) -> int:
        _check_finite(arguments)
        try:
            output = function(**arguments, **({"as_json": as_json} if told else {}))
            print(
                json.dumps(finite(output.values)) if as_json else _shown(output.text, sys.stdout), flush=True
            )
        except KeyboardInterrupt:  # typer would make a silent exit of it, and of the next one
            raise Interrupted("stopped before there was anything to save.") from None
        except BrokenPipeError:  # the reader, for example `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (OSError, MemoryError, RuntimeError) as error:
            if users_frames(error, error.__traceback__):  # told with the user's lines
                raise
            raise _of_the_machine(error) from None
        return int(output.exit_code)

    json_option = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    return with_parameters(run, [*parameters.values(), json_option], like=function)


def _shown(text: str, stream: TextIO) -> str:
    """A text as it is for a file or a pipe; for a terminal as wide as that."""
    from ane_trainer.commands.options import wrapped

    return wrapped(text, shutil.get_terminal_size().columns) if stream.isatty() else text


def _check_finite(arguments: Mapping[str, object]) -> None:
    """Raises: UsageError (ANE104) for an option that is nan or infinite."""
    for name, value in arguments.items():
        if isinstance(value, float) and not math.isfinite(value):
            text = f"--{name.replace('_', '-')}: needs a finite number; got {value}. Give another."
            raise UsageError(text, code="ANE104")


def _of_the_machine(error: Exception) -> Exception:
    """What no file or no memory is there for, as an error with a code; anything else as it is."""
    if isinstance(error, OSError) and error.filename is None:
        text = f"this machine: {error.strerror or error}. Look for what it lacks: space, open files, memory, rights."
        return EnvironmentFault(text, code="ANE204")
    if isinstance(error, OSError) and error.strerror:
        place = Path(os.fsdecode(error.filename))
        where = place.parent if place.suffix == ".tmp" else place
        text = f"{where}: needs a place that can be read or written; {error.strerror}. Choose another."
        return EnvironmentFault(text, code="ANE204")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return EnvironmentFault(
            "memory: needs more than this machine has left. Make the model, the batch or the input smaller.",
            code="ANE211",
        )
    return error


def _help(words: Sequence[str]) -> str:
    """The command line that shows the help of what was typed."""
    known = [*GROUPS, *(command.name for command in COMMANDS)]
    for count in (2, 1):
        if " ".join(words[:count]) in known:
            return f"ane-trainer {' '.join(words[:count])} --help"
    return "ane-trainer --help"


def _fail(error: AneTrainerError, words: Sequence[str]) -> int:
    print(_shown(str(error), sys.stderr), file=sys.stderr)
    if "--json" in words:
        print(json.dumps(finite(error_json(error))), flush=True)
    return error.exit_code
