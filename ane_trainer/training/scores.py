"""Scores beyond loss and accuracy, by torchmetrics: its metrics by name, updated over an evaluation."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch

from ane_trainer.ane.errors import MissingDependency, UsageError
from ane_trainer.training.datasets.description import DataDescription

#: A task -> the module of torchmetrics, the prefix of its classes, and the argument that takes the outputs' number.
_KINDS = {
    "classify": ("classification", "Multiclass", "num_classes"),
    "multilabel": ("classification", "Multilabel", "num_labels"),
    "regress": ("regression", "", ""),
}
_SHORT = {"f1": "f1score", "mae": "meanabsoluteerror", "mse": "meansquarederror", "r2": "r2score"}


class Metric(Protocol):
    """What torchmetrics' metrics can do."""

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Take a batch in."""

    def compute(self) -> Any:
        """The value over all batches since `reset`."""

    def reset(self) -> None:
        """Reset."""


class Scores:
    """Metrics over one evaluation after another: `begin`, `add` for each batch, `found`.

    `scale` is (mean, deviation) of standardised targets [K]: metrics see numbers in the unit of the data.
    """

    def __init__(
        self, metrics: Mapping[str, Metric], scale: tuple[Sequence[float], Sequence[float]] | None = None
    ) -> None:
        self._metrics = dict(metrics)
        for name, metric in self._metrics.items():
            if not all(callable(getattr(metric, each, None)) for each in ("update", "compute", "reset")):
                raise UsageError(
                    f"metrics: {name}: needs update, compute and reset, as torchmetrics' have; got {metric!r}. "
                    "Pass e.g. torchmetrics.F1Score(...).",
                    code="ANE104",
                )
        self._scale = None if scale is None else tuple(torch.tensor(part) for part in scale)

    def begin(self) -> None:
        """Forget earlier batches."""
        for metric in self._metrics.values():
            metric.reset()

    def add(self, output: object, target: object) -> None:
        """Take in the outputs of a batch and their targets. UsageError ANE104 where a metric does not take them."""
        if not self._metrics:
            return
        if not (isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor)):
            raise UsageError(
                "metrics: needs one output and one target; got several. Leave them out.", code="ANE104"
            )
        if self._scale is not None:
            output, target = (part * self._scale[1] + self._scale[0] for part in (output, target))
        for name, metric in self._metrics.items():
            labels = "Multilabel" in type(metric).__name__ or "Binary" in type(metric).__name__
            try:
                metric.update(output, target.int() if labels else target)
            except (RuntimeError, TypeError, ValueError) as error:
                shapes = f"{list(output.shape)} and {list(target.shape)}"
                reason = str(error).splitlines()[0]
                raise UsageError(
                    f"metrics: {name} needs other outputs and targets than {shapes}: {reason}. Choose another metric.",
                    code="ANE104",
                ) from error

    def found(self) -> tuple[tuple[str, float], ...]:
        """Each metric's value by its name. UsageError ANE104 for one that is no single number."""
        return tuple((name, _number(name, metric.compute())) for name, metric in self._metrics.items())


def _number(name: str, value: Any) -> float:
    if isinstance(value, float | int) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        return float(value)
    raise UsageError(
        f"metrics: {name} needs to be one number; got {type(value).__name__}. report.html has curves and tables.",
        code="ANE104",
    )


def make_scores(names: Iterable[str], description: DataDescription) -> Scores | None:
    """The metrics of these names for the data's task: auroc, f1, matthews_corrcoef, r2, ...; None without names.

    MissingDependency without torchmetrics; UsageError ANE104 for a name that it does not have for the task.
    """
    chosen = list(names)
    if not chosen:
        return None
    kind = _KINDS.get(description.task)
    if kind is None:
        raise UsageError(
            f"metrics: needs classes, labels or numbers; got {description.task} data.", code="ANE104"
        )
    try:
        from torchmetrics import classification, regression
    except ImportError:
        raise MissingDependency(
            'metrics: needs torchmetrics; it is not installed. Do: pip install "ane_trainer[metrics]".'
        ) from None
    module, prefix, argument = kind
    known = _metrics_of(
        {"classification": classification, "regression": regression}[module], prefix, argument
    )
    outputs = {argument: description.num_outputs} if argument else {}
    found = {}
    for name in chosen:
        plain = _plain(name)
        made = known.get(_SHORT.get(plain, plain))
        if made is None:
            near = difflib.get_close_matches(plain, known, n=4, cutoff=0.4)
            hint = (
                f"Did you mean {', '.join(near)}?" if near else "For example auroc, f1; of numbers r2, mae."
            )
            text = (
                f"metrics: needs a metric of torchmetrics for {description.task} data; got {name!r}. {hint}"
            )
            raise UsageError(text, code="ANE104")
        found[name] = made(**outputs)
    scale = description.target_mean, description.target_std
    return Scores(found, scale if description.task == "regress" and scale[0] and scale[1] else None)


def _metrics_of(module: object, prefix: str, argument: str) -> dict[str, Callable[..., Metric]]:
    """The classes of a module of torchmetrics that need no more than the number of outputs, by plain name."""
    found = {}
    for name, item in vars(module).items():
        if not inspect.isclass(item) or not name.startswith(prefix):
            continue
        needed = {
            p.name for p in inspect.signature(item).parameters.values()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        }  # fmt: skip
        if needed <= {argument} - {""}:
            found[_plain(name.removeprefix(prefix))] = cast(Callable[..., Metric], item)
    return found


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "").replace("-", "")
