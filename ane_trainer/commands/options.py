"""What commands share: types of options, options made from TrainConfig's fields, and the form of a command's result."""

from __future__ import annotations

import inspect
import re
import textwrap
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Union, cast, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from ane_trainer.ane.errors import UsageError
from ane_trainer.training.config import TrainConfig
from ane_trainer.utils import with_parameters

Chip = Annotated[str, typer.Option(help="Whose arithmetic and limits: m1 ... m6.", metavar="NAME")]
RunChip = Annotated[str | None, typer.Option("--chip", help="Instead of the run's own.", metavar="NAME")]
RunDevice = Annotated[str | None, typer.Option("--device", help="Instead of the run's own.", metavar="NAME")]
RunFidelity = Annotated[
    str | None, typer.Option("--fidelity", help="Instead of the run's own.", metavar="exact|fast")
]
Fidelity = Annotated[str, typer.Option(help="Arithmetic of the simulator.", metavar="exact|fast")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Of the simulator; results do not depend on it (default: all cores)."),
]
Run = Annotated[str, typer.Argument(help="A run's folder, or `last`.", metavar="RUN", show_default=False)]
RunData = Annotated[
    str | None, typer.Option("--data", help="Where the run's data is now, if it was moved.", metavar="PATH")
]
Model = Annotated[
    str, typer.Argument(help="mlp, cnn, transformer, or path/to/file.py:ClassName.", metavar="MODEL")
]
Batch = Annotated[int, typer.Option("--batch", "--batch-size", help="Examples a step.")]
FittingBatch = Annotated[
    int | None,
    typer.Option(
        "--batch", "--batch-size", min=1,
        help="Examples a step (default: 128, fewer of a large model; debug: 8).",
    ),
]  # fmt: skip
Dataset = Annotated[
    str, typer.Option("--dataset", help="Whose shape and classes hold where not given.", metavar="NAME")
]
Input = Annotated[
    str | None, typer.Option("--input", help="Shape of one example, e.g. 1x28x28.", metavar="SHAPE")
]
Classes = Annotated[int | None, typer.Option(help="Outputs of the model.")]
Optimizer = Annotated[str, typer.Option(help="adam, adamw or sgd.", metavar="NAME")]

#: Second spellings of options.
_ALSO = {"batch_size": "--batch"}


@dataclass(frozen=True)
class Output:
    """What a command found: plain values for machines (`--json`), text for people, the exit code."""

    values: Mapping[str, object]
    text: str
    exit_code: int = 0


class _Found(Protocol):
    """A result that can be shown in both ways."""

    def to_json(self) -> dict[str, object]: ...

    def as_text(self) -> str: ...


def show(found: _Found, exit_code: int = 0) -> Output:
    """The output of a result that has both forms itself."""
    return Output(found.to_json(), found.as_text(), exit_code)


def table(rows: Sequence[Sequence[str]], left: Iterable[int]) -> list[str]:
    """Rows with their columns side by side; those in `left` begin at the left, the others end at the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = set(left)
    return [
        "  ".join(c.ljust(w) if i in sides else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        .rstrip()
        for r in rows
    ]  # fmt: skip


#: Columns a line, label and all, may have before a gap for it to count as a label.
_LABEL = 24


def wrapped(text: str, width: int) -> str:
    """Lines of prose that are longer than `width` over several, below what stands behind their label; tables stay."""
    lines: list[str] = []
    for line in text.split("\n"):
        gaps = [match.end() for match in re.finditer(r"(?<=\S) {2,}", line)]
        if len(line) <= width or len(gaps) > 2:
            lines.append(line)
            continue
        start = len(line) - len(line.lstrip())
        indent = max([gap for gap in gaps if gap <= _LABEL], default=start + 4)
        lines += textwrap.wrap(
            line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)


def weights_note(found: Mapping[str, object]) -> list[str]:
    """A line about the weights of a run that has not come to its end, and one about what is wrong with a file."""
    lines = [f"note     the run has not come to its end; these are the weights of {found['weights']}"]
    lines = [] if found["weights"] == "weights.safetensors" else lines
    return lines + [f"warning  {found['damage']}" for _ in range("damage" in found)]


def takes_train_options(
    function: Callable[..., Output], without: Collection[str] = (), told: Mapping[str, str] = {}
) -> Callable[..., Output]:
    """`function` with an option for each field of TrainConfig; those given arrive as the mapping `options`.

    Name, type, default, help (the field's description) and help panel (`json_schema_extra={"panel": ...}`) come
    from the field, so that a new field is a new option. Values are checked by TrainConfig alone. `told`: the help
    of options whose defaults are the command's own.
    """
    own = inspect.signature(function, eval_str=True)
    fields = {name: field for name, field in TrainConfig.model_fields.items() if name not in own.parameters}

    def command(**arguments: object) -> Output:
        options = {name: arguments.pop(name) for name in fields if name not in without}
        return function(**arguments, options={n: v for n, v in options.items() if v is not None and v != []})

    derived = [
        _parameter(name, field, told.get(name)) for name, field in fields.items() if name not in without
    ]
    rest = [value for name, value in own.parameters.items() if name != "options"]
    keywords = [value.replace(kind=inspect.Parameter.KEYWORD_ONLY) for value in rest]
    return with_parameters(command, [*keywords[:1], *derived, *keywords[1:]], like=function)


def _parameter(name: str, field: FieldInfo, told: str | None) -> inspect.Parameter:
    """The command's keyword for a field; None: not given. Numbers stay text, as typed, until TrainConfig reads them."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    kind, metavar = _kind(field.annotation)
    flags = [f"--{name.replace('_', '-')}", *filter(None, [_ALSO.get(name)])]
    if kind is bool and field.default is True:
        flags[0] += f"/--no-{name.replace('_', '-')}"
    unsaid = field.default is None or field.default is False or field.default in ((), {})
    default = "" if unsaid else f" (default: {_plain(field.default)})"
    option = typer.Option(
        *flags, help=told or f"{field.description or ''}{default}", metavar=metavar,
        rich_help_panel=str(extra.get("panel", "Training")),
    )  # fmt: skip
    annotation: object = Annotated[cast(object, kind | None), option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(annotation: Any) -> tuple[Any, str | None]:
    """What the command line takes for a field's type, and the word for its value in the help."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not types.NoneType)
    if annotation is bool:
        return bool, None
    if get_origin(annotation) is Literal:
        words = "|".join(map(str, get_args(annotation)))
        return str, words if len(words) <= 24 else "NAME"
    if get_origin(annotation) in (dict, Mapping):
        return list[str], "NAME=VALUE"
    if get_origin(annotation) in (tuple, list):
        return str, "NAME,..." if get_args(annotation)[0] is str else "N,N,..."
    return str, {int: "N", float: "X"}.get(annotation, "NAME")


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def sizes_of(text: str, separator: str, option: str) -> tuple[int, ...]:
    """Whole numbers with `separator` between, as in 1x28x28. UsageError (ANE104) for anything else."""
    try:
        sizes = tuple(int(part) for part in text.split(separator))
        if any(abs(size) >= 2**31 for size in sizes):
            raise ValueError
        return sizes
    except ValueError:
        raise UsageError(
            f"{option}: needs whole numbers below 2^31 with {separator!r} between; got {text!r}. E.g. 28{separator}28.",
            code="ANE104",
        ) from None


def example_sizes(
    dataset: str, shape: str | None, classes: int | None, where: str
) -> tuple[tuple[int, ...], int]:
    """Shape of one example and number of classes: as given, else those of the dataset."""
    from ane_trainer.data import find_dataset

    info = find_dataset(dataset)
    in_shape = sizes_of(shape, "x", "--input") if shape is not None else info.in_shape
    count = classes if classes is not None else len(info.class_names)
    if count < 1 or any(size < 1 for size in in_shape):
        raise UsageError(
            f"{where}: needs positive sizes for --input and --classes. Correct them.", code="ANE104"
        )
    return tuple(in_shape), count
