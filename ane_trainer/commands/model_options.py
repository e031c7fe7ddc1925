"""The options that `check`, `estimate`, `debug` and `trace` share, in one place, and the subject that they name."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

import typer

from ane_trainer.commands.options import Classes, Dataset, FittingBatch, Optimizer, Output
from ane_trainer.commands.subjects import (
    USUAL_OR_FEWER,
    ModelSubject,
    ProgramSubject,
    Request,
    classes_of,
    resolve,
    route_of,
    shapes_of,
)
from ane_trainer.utils import with_parameters

if TYPE_CHECKING:
    import torch

Subject = Annotated[
    str,
    typer.Argument(
        help="mlp, cnn, transformer, gpt, path/to/file.py:Class, package.module:Class, a run, a .mil or .mlpackage.",
        metavar="SUBJECT",
    ),
]
Shapes = Annotated[
    str | None,
    typer.Option(
        "--input", help="Shape of one example, e.g. 1x28x28; of several inputs 3x32x32,10.", metavar="SHAPE"
    ),
]
LossName = Annotated[
    str,
    typer.Option(
        "--loss", help="cross_entropy, mse, ..., file.py:function; auto goes by the output.", metavar="NAME"
    ),
]
Blocks = Annotated[
    str,
    typer.Option("--blocks", help="Layers in one program: a number, off, or auto.", metavar="N|off|auto"),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="Of the inputs; auto tries numbers, then tokens.", metavar="float|int|auto"),
]
Route = Annotated[
    str | None,
    typer.Option(
        "--path",
        help="How programs reach the engine (default: e5rt, of an .mlpackage coreml).",
        metavar="e5rt|direct|coreml",
    ),
]
ModelArgument = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        help="Argument of the model's constructor, as often as needed, e.g. width=16.",
        metavar="NAME=VALUE",
    ),
]
Chips = Annotated[str, typer.Option("--chip", help="One or more, e.g. m1,m4.", metavar="NAMES")]


@dataclass(frozen=True)
class Asked:
    """What a command is asked about, as typed."""

    subject: Subject
    dataset: Dataset = "mnist"
    input_shape: Shapes = None
    classes: Classes = None
    batch: FittingBatch = None
    loss: LossName = "auto"
    dtype: Dtype = "auto"
    optimizer: Optimizer = "adam"
    model_arg: ModelArgument = None
    path: Route = None

    @property
    def route(self) -> str:
        """How programs reach the engine."""
        return route_of(self.path, self.subject)

    def resolved(
        self, where: str, blocks: str = "auto", usual: int = USUAL_OR_FEWER, x: torch.Tensor | None = None
    ) -> ModelSubject | ProgramSubject:
        """The subject, for the command `where`; `usual`: a batch where none is given, `x`: inputs with the shape."""
        count = classes_of(self.classes, self.dataset)
        shapes = shapes_of(self.input_shape, self.dataset, x)
        size = usual if self.batch is None else self.batch
        request = Request(where, shapes, count, size, self.loss, self.dtype, self.optimizer, blocks,
                          arguments=self._arguments(where))  # fmt: skip
        found = resolve(self.subject, request)
        if isinstance(found, ProgramSubject) and (unused := self._of_models()):
            warnings.warn(
                f"{where}: {self.subject} is a program, which has its own shapes and loss; "
                f"{' and '.join(unused)} {'changes' if len(unused) == 1 else 'change'} nothing.",
                stacklevel=2,
            )
        return found

    def _of_models(self) -> list[str]:
        """The options given that only a model takes."""
        usual = {field.name: field.default for field in fields(self)}
        flags = {"input_shape": "--input", "model_arg": "--model-arg"}
        names = ("input_shape", "classes", "batch", "loss", "dtype", "optimizer", "model_arg")
        return [flags.get(name, f"--{name}") for name in names if getattr(self, name) != usual[name]]

    def _arguments(self, where: str) -> dict[str, object]:
        from ane_trainer.training.config import make_config

        if not self.model_arg:
            return {}
        return dict(make_config({"dataset": "mnist", "model_arg": self.model_arg}, where=where).model_arg)


def takes_subject(function: Callable[..., Output]) -> Callable[..., Output]:
    """`function`, whose first parameter is an `Asked`, as a command with the options of that in front of its own."""
    shared = inspect.signature(Asked, eval_str=True).parameters
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

    def command(**arguments: object) -> Output:
        asked = Asked(**{name: arguments.pop(name) for name in shared})  # type: ignore[arg-type]
        return function(asked, **arguments)

    both = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*shared.values(), *own)]
    return with_parameters(command, both, like=function)


def names_of(chips: str) -> list[str]:
    """Chips as typed, each once."""
    return list(dict.fromkeys(name.strip() for name in chips.split(",")))
