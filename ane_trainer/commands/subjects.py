"""Resolve what `check` and its kin are asked about: a model with an example batch and a loss, or a program.

A model comes by name, as `file.py:Class` or `package.module:Class`; a program from a `.mil`, an `.mlpackage`, a
folder that holds one, or a run. Where no example is given, one is made: shapes from `--input`, numbers or tokens by
`--dtype` or by what the model takes, targets by the loss.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ane_trainer.ane.errors import DataError, UsageError
from ane_trainer.commands.batches import FEWEST, check_memory, fitting
from ane_trainer.commands.blame import users_line
from ane_trainer.commands.example_losses import loss_and_target
from ane_trainer.commands.options import sizes_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ane_trainer.ane.capture import StepCapture
    from ane_trainer.ane.capture.losses import Loss
    from ane_trainer.ane.chips.lookup import Chip
    from ane_trainer.ane.dispatch import TrainingStep
    from ane_trainer.ane.dispatch.loading import Subject as Trained
    from ane_trainer.ane.mil.program import Function, Program

#: A batch for which nobody gave a number: USUAL examples, fewer of a large model.
USUAL, USUAL_OR_FEWER = 128, 0

_FLOAT, _INT, _AUTO = "float", "int", "auto"
_FILES = (".mil", ".txt", ".mlpackage", ".mlmodelc")


@dataclass(frozen=True)
class Request:
    """What the command line says of a model: shapes of one example, classes, batch, loss, dtype, optimizer, blocks, and
    arguments of its constructor.

    A `batch` of USUAL_OR_FEWER: as many as this machine runs quickly (`batches.fitting`); `chosen` then says that it is
    less than usual.
    """

    where: str
    shapes: tuple[tuple[int, ...], ...]
    classes: int
    batch: int = USUAL
    loss: str = _AUTO
    dtype: str = _AUTO
    optimizer: str = "adam"
    blocks: str = "auto"
    chosen: str = ""
    arguments: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSubject:
    """A model with an example batch (x, y) and a loss; `x` is a tensor or a tuple of several."""

    name: str
    model: nn.Module
    loss: str | Loss
    example: tuple[object, object]
    request: Request

    def with_batch(self, size: int) -> ModelSubject:
        """The same with the first `size` examples of its batch; itself where it has no more or takes no fewer."""
        if self.request.batch <= size:
            return self
        x, y = self.example
        parts = tuple(part[:size] for part in x) if isinstance(x, tuple) else x[:size]  # type: ignore[index]
        few = replace(self, example=(parts, y[:size]), request=replace(self.request, batch=size))  # type: ignore[index]
        return few if few._runs() else self

    def _runs(self) -> bool:
        """Whether the model takes the batch; it may be written for one size of it."""
        import torch

        from ane_trainer.ane.capture.calibrate import module_mode

        x = self.example[0]
        inputs = x if isinstance(x, tuple) else (x,)
        if not all(isinstance(part, torch.Tensor) for part in inputs):
            return True
        try:
            with (
                torch.random.fork_rng(devices=[]),
                module_mode(self.model, training=False),
                torch.enable_grad(),
            ):
                self.model(*(part.clone() for part in inputs))
        except (AssertionError, RuntimeError, TypeError, IndexError, ValueError):
            return False
        return True

    def trained(self, chip: str) -> Trained:
        """What is trained, with the optimizer that was asked for."""
        from ane_trainer.ane.dispatch.loading import Subject as Trained
        from ane_trainer.training.config import make_config
        from ane_trainer.training.optimizers import make_optimizer

        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UsageError(
                f"{self.request.where}: {self.name} needs parameters to train; it has none. Add a layer, or thaw one.",
                code="ANE104",
            )
        config = make_config(
            {
                "dataset": "mnist",
                "batch_size": self.request.batch,
                "optimizer": self.request.optimizer,
                "chip": chip,
            },
            where=self.request.where,
        )
        return Trained(self.model, self.loss, make_optimizer(config, self.model), self.example)

    def step(
        self, chip: str, path: str = "e5rt", verify: str = "off", capture: StepCapture | None = None
    ) -> TrainingStep:
        """The compiled training step for a chip; `capture`: of this model and batch for another chip."""
        from ane_trainer.ane.dispatch import StepOptions, build_step, resolve_target

        trained = self.trained(chip)
        target = resolve_target("sim", chip, "exact", path=path)
        blocks = int(text) if (text := self.request.blocks).isdecimal() else text
        options = StepOptions(sync="lazy", verify=verify, seed=0, blocks=blocks)
        return build_step(
            self.model, self.loss, trained.optimizer, self.example, target, options, capture=capture
        )


@dataclass(frozen=True)
class ProgramSubject:
    """A program as it lies on disk; `steps`, `epochs` and the folder of the run that it is from, if it is from one."""

    name: str
    program: Program
    steps: int | None = None
    epochs: int | None = None
    run: Path | None = None


def resolve(text: str, request: Request) -> ModelSubject | ProgramSubject:
    """The subject that a command names. UsageError, ProgramError or CheckpointError if there is none."""
    path = Path(text).expanduser()
    if text == "last" or (path / "config.toml").is_file():
        return _run_subject(text)
    if path.suffix in _FILES or (path.is_dir() and not path.name.isidentifier()):
        return _program_subject(path)
    if path.is_dir() and any((path / name).is_file() for name in ("model.mil", "program.mil")):
        return _program_subject(path)
    return _model_subject(text, request)


def route_of(path: str | None, subject: str) -> str:
    """How the subject's program reaches the engine: as given, a file of Core ML's by Core ML, else by e5rt."""
    return path or ("coreml" if Path(subject).suffix in (".mlpackage", ".mlmodelc") else "e5rt")


def shapes_of(
    text: str | None, dataset: str, batch: torch.Tensor | None = None
) -> tuple[tuple[int, ...], ...]:
    """Shapes of one example's inputs: as given, else the batch's, else the dataset's."""
    from ane_trainer.data import find_dataset

    if text is None and batch is not None:
        return (tuple(batch.shape[1:]),)
    if text is None:
        return (tuple(find_dataset(dataset).in_shape),)
    shapes = tuple(
        () if part == "1" and "," in text else sizes_of(part, "x", "--input") for part in text.split(",")
    )
    if any(size < 1 for shape in shapes for size in shape):
        raise UsageError(f"--input: needs sizes of 1 or more; got {text!r}. Correct it.", code="ANE104")
    return shapes


def classes_of(count: int | None, dataset: str) -> int:
    """Outputs of the model: as given, else the dataset's classes."""
    from ane_trainer.data import find_dataset

    return count if count is not None else len(find_dataset(dataset).class_names)


def _run_subject(text: str) -> ProgramSubject:
    from ane_trainer.ane.mil.loading import load_program
    from ane_trainer.training.folder.runs import open_run

    run = open_run(text)
    steps, epochs = None, run.read_config().epochs
    if run.has_result():
        result = json.loads((run.path / "result.json").read_text(encoding="utf-8"))
        steps = result.get("steps")
    return ProgramSubject(str(run.path), load_program(run.path), steps, epochs, run.path)


def warn_if_refused(function: Function, chip: Chip, path: str) -> None:
    """Warn of a program on disk that the engine of a chip does not take by this path: sizes, axes, ops."""
    from ane_trainer.ane.compiler.legalize import Target, refusals

    found = refusals(function, Target(chip, path))
    if found:
        more = "" if len(found) == 1 else f" ({len(found)} such findings)"
        warnings.warn(
            f"{chip.title} does not take this program by the path {path}: {found[0].where}: {found[0].reason}{more} "
            "See: ane-trainer check",
            stacklevel=2,
        )


def _program_subject(path: Path) -> ProgramSubject:
    from ane_trainer.ane.mil.loading import load_program

    return ProgramSubject(str(path), load_program(path))


def _model_subject(text: str, request: Request) -> ModelSubject:
    import torch

    from ane_trainer.ane.capture.calibrate import module_mode
    from ane_trainer.models import build_model
    from ane_trainer.utils import seeded

    if request.batch < 0 or request.classes < 1:
        raise UsageError(
            f"{request.where}: needs sizes of 1 or more for --batch and --classes. Correct them.",
            code="ANE104",
        )
    with seeded(0):
        shape = request.shapes[0] or (1,)
        model = build_model(text, shape, request.classes, seed=0, **request.arguments)  # type: ignore[arg-type]
        _check_count(text, model, request)
        if request.batch == USUAL_OR_FEWER:
            with torch.random.fork_rng(devices=[]), module_mode(model, training=False):
                x, _ = _example_inputs(text, model, replace(request, batch=FEWEST))
                size = fitting(model, x, USUAL)
            words = "" if size == USUAL else f"more take long on this machine; --batch {USUAL} asks for more"
            request = replace(request, batch=size, chosen=words)
        check_memory(
            request, text, model, USUAL, lambda n: _example_inputs(text, model, replace(request, batch=n))[0]
        )
        x, output = _example_inputs(text, model, request)
        if torch.is_tensor(output) and output.numel() == 0:
            raise DataError(
                f"{request.where}: {text} needs outputs; got an empty tensor, {list(output.shape)}. "
                "Correct its forward.",
                code="DATA105",
            )
        loss, y = loss_and_target(text, output, x, request)
    return ModelSubject(text, model, loss, (x, y), request)


def _check_count(name: str, model: nn.Module, request: Request) -> None:
    """Refuse another number of inputs than forward takes."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is p.empty for p in positional)
    most = len(positional)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        most = max(most, len(request.shapes))
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if not most:  # it may take them as `**features`
        named += [f"**{p.name}" for p in parameters if p.kind is p.VAR_KEYWORD]
    if named:
        raise UsageError(
            f"{request.where}: {name} needs {' and '.join(named)} by keyword, which a batch does not bring. "
            "Give it a default, or wrap the model in one whose forward passes it.",
            code="ANE104",
        )
    if not least <= len(request.shapes) <= most:
        names = ", ".join(p.name for p in positional[: max(least, 1)])
        raise UsageError(
            f"{request.where}: {name} needs {least} inputs ({names}); got the shapes of {len(request.shapes)}. "
            f"Give one shape for each: --input {','.join(['3x32x32', '10', '10'][:least]) or '10'}.",
            code="ANE104",
        )


def _example_inputs(
    name: str, model: nn.Module, request: Request
) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], object]:
    """Random inputs that the model takes, and its output for them."""
    import torch

    from ane_trainer.ane.dispatch.parameters import check_placed

    kinds = _dtypes(request)
    faults: list[str] = []
    line = ""
    for kind in kinds:
        x = tuple(_random(shape, dtype, request.batch, model) for shape, dtype in kind)
        try:
            with torch.enable_grad(), warnings.catch_warnings():  # a forward may ask for derivatives
                warnings.simplefilter("ignore")  # of attempts; the step's own are told when it is captured
                output = _detached(model(*(part.clone() for part in x)))
        except (RuntimeError, TypeError, IndexError, ValueError) as fault:
            faults.append(f"{', '.join(dtype for _, dtype in kind)}: {_said(fault)}")
            line = line or users_line(fault)
            continue
        if not torch.is_tensor(output) and ":" not in request.loss:
            raise UsageError(
                f"{request.where}: {name} needs to return one tensor; got {_described(output)}. Return the one that "
                "the loss takes, or name a function (output, target) -> loss: --loss file.py:function.",
                code="ANE104",
            )
        if isinstance(output, torch.Tensor) and not output.ndim:
            raise UsageError(
                f"{request.where}: {name} needs to return an output for each example; got one number for the batch. "
                "Leave the loss out of forward, and name it: --loss mse, --loss file.py:function.",
                code="ANE104",
            )
        return (x if len(x) > 1 else x[0]), output
    if any(p.device.type != "cpu" for p in model.parameters()):
        check_placed(model, f"{request.where}: {name}")
    raise DataError(
        f"{request.where}: {name} does not run on examples of shape {' and '.join(map(str, request.shapes))} "
        f"({'; '.join([*faults, *filter(None, [line])])}). {_remedy(faults)}",
        code="DATA105",
    )


def _remedy(faults: Sequence[str]) -> str:
    """What to give or change where no example runs."""
    if all("data type 'str'" in fault for fault in faults):  # what a tensor says to `batch["x"]`
        return "An input is indexed by a name: wrap the model in one whose forward takes tensors and makes the dict."
    return "Give --input, --dtype int for tokens, and --batch if the model takes one size alone."


def _said(fault: Exception) -> str:
    """The line of an exception that says what is wrong; of Keras' the one behind the line that names the call."""
    lines = [line for line in re.sub("\x1b[^m]*m", "", str(fault)).splitlines() if line.strip()]
    named = len(lines) > 1 and lines[0].startswith("Exception encountered when calling")
    return lines[named] if lines else type(fault).__name__


def _detached(output: object) -> object:
    """The tensors of an output without what they are made of."""
    import torch

    from ane_trainer.ane.capture.trace.torch_private import pytree

    def plain(leaf: object) -> object:
        return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(plain, output)


def _described(output: object) -> str:
    """What a model returned instead of a tensor: its kind, and what it holds."""
    from collections.abc import Mapping

    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"{kind} of {', '.join(map(str, output))}"
    if isinstance(output, (tuple, list)):
        return f"{kind} of {len(output)}"
    return kind


def _dtypes(request: Request) -> list[list[tuple[tuple[int, ...], str]]]:
    """Dtypes to try for each input, in order."""
    given = request.dtype.split(",")
    if any(word not in (_FLOAT, _INT, _AUTO) for word in given) or len(given) not in (1, len(request.shapes)):
        raise UsageError(
            f"--dtype: needs float, int or auto, for all inputs or one for each; got {request.dtype!r}. Correct it.",
            code="ANE104",
        )
    words = given * len(request.shapes) if len(given) == 1 else given
    choices: list[list[tuple[tuple[int, ...], str]]] = [[]]
    for shape, word in zip(request.shapes, words, strict=True):
        options = (_FLOAT, _INT) if word == _AUTO else (word,)
        choices = [[*found, (shape, option)] for found in choices for option in options]
    return sorted(choices, key=lambda found: sum(dtype == _INT for _, dtype in found))


def _vocabulary(model: nn.Module) -> int:
    from torch import nn

    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return min(sizes, default=2)


def _random(shape: Sequence[int], dtype: str, batch: int, model: nn.Module) -> torch.Tensor:
    """Tokens, or numbers; of the model's type where all its parameters have sixteen bits."""
    import torch

    if dtype == _INT:
        return torch.randint(_vocabulary(model), (batch, *shape))
    types = {parameter.dtype for parameter in model.parameters()}
    half = types.pop() if len(types) == 1 else torch.float32
    return torch.randn(batch, *shape).to(half if half in (torch.float16, torch.bfloat16) else torch.float32)
