"""How good outputs are: confusion matrix, precision, recall and F1 by class; errors of a regression; perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.training.datasets.description import DataDescription


@dataclass(frozen=True)
class ClassScore:
    """One class or label. precision: share of right answers among those given; recall: among those due.

    A ratio whose denominator is 0 is 0, as in scikit-learn.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int


def class_scores(confusion_CC: NDArray[np.int64], names: tuple[str, ...]) -> list[ClassScore]:
    """Scores by class of a confusion matrix: row = true class, column = answer."""
    right, given, due = np.diag(confusion_CC), confusion_CC.sum(axis=0), confusion_CC.sum(axis=1)
    return [
        _score(name, int(a), int(b), int(c)) for name, a, b, c in zip(names, right, given, due, strict=True)
    ]


def _score(name: str, right: int, given: int, due: int) -> ClassScore:
    precision, recall = right / given if given else 0.0, right / due if due else 0.0
    total = given + due
    return ClassScore(name, precision, recall, 2 * right / total if total else 0.0, due)


class Scores:
    """Collects outputs and targets batch by batch; `to_json` is what the task's scores are."""

    def __init__(self, description: DataDescription) -> None:
        self.description = description
        count = description.num_outputs
        self.confusion_CC = np.zeros((count, count), np.int64) if description.task == "classify" else None
        self._right_given_due = np.zeros((3, count), np.int64)
        self._errors: list[NDArray[np.float64]] = []
        self._truth: list[NDArray[np.float64]] = []
        self._log_likelihood, self._tokens = 0.0, 0

    def add(self, output: Any, y: Any) -> None:
        """A batch's outputs and targets, in the forms that the task has."""
        if not isinstance(output, torch.Tensor) or not isinstance(y, torch.Tensor):
            return
        task = self.description.task
        if task == "classify" and self.confusion_CC is not None and output.dim() == 2:
            truth = y.argmax(dim=1) if y.dim() == 2 else y
            np.add.at(self.confusion_CC, (truth.numpy(), output.argmax(dim=1).numpy()), 1)
        elif task == "multilabel":
            answer, due = output.numpy() > 0, y.numpy() > 0.5
            self._right_given_due += np.stack([(answer & due).sum(0), answer.sum(0), due.sum(0)])
        elif task == "regress":
            mean, std = np.array(self.description.target_mean), np.array(self.description.target_std)
            self._errors.append((output.numpy() - y.numpy()) * std)
            self._truth.append(y.numpy() * std + mean)
        elif task == "next-token":
            log_p = output.float().log_softmax(dim=1).gather(1, y[:, None]).double()
            self._log_likelihood += float(log_p.sum())
            self._tokens += y.numel()

    def to_json(self) -> dict[str, Any]:
        """The scores as plain values; what the task has not is absent."""
        task = self.description.task
        if self.confusion_CC is not None and self.confusion_CC.any():
            scores = class_scores(self.confusion_CC, self.description.class_names)
            return {"classes": [vars(score) for score in scores], "confusion": self.confusion_CC.tolist(),
                    **_means(scores)}  # fmt: skip
        if task == "multilabel":
            columns = zip(self.description.class_names, *self._right_given_due.tolist(), strict=True)
            scores = [_score(*column) for column in columns]
            return {"classes": [vars(score) for score in scores], **_means(scores)}
        if task == "regress" and self._errors:
            return self._regression()
        if task == "next-token" and self._tokens:
            return {
                "perplexity": math.exp(min(-self._log_likelihood / self._tokens, 700.0)),
                "tokens": self._tokens,
            }
        return {}

    def _regression(self) -> dict[str, Any]:
        errors, truth = np.concatenate(self._errors), np.concatenate(self._truth)
        squares, spread = (errors**2).sum(axis=0), ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
        rows = [
            {
                "name": name,
                "mean_absolute_error": float(np.abs(errors[:, k]).mean()),
                "root_mean_square_error": float(np.sqrt((errors[:, k] ** 2).mean())),
                "r2": float(1 - squares[k] / spread[k]) if spread[k] else None,
            }
            for k, name in enumerate(self.description.class_names)
        ]
        return {"targets": rows}


def _means(scores: list[ClassScore]) -> dict[str, float]:
    """The plain means over the classes."""
    count = max(len(scores), 1)
    return {
        "macro_precision": sum(score.precision for score in scores) / count,
        "macro_recall": sum(score.recall for score in scores) / count,
        "macro_f1": sum(score.f1 for score in scores) / count,
    }


def scores_table(found: dict[str, Any]) -> str:
    """The scores of `Scores.to_json` as lines for a terminal; "" if there are none."""
    if "classes" in found:
        names = [score["name"] for score in found["classes"]]
        width = min(max(map(len, [*names, "class"])), 32)
        lines = [f"{'class':<{width}}  precision  recall     F1  examples"]
        lines += [
            f"{score['name'][:width]:<{width}}  {score['precision']:9.2%} {score['recall']:7.2%} {score['f1']:6.3f}"
            f"  {score['support']:8,}"
            for score in found["classes"]
        ]
        mean = (found["macro_precision"], found["macro_recall"], found["macro_f1"])
        return "\n".join([*lines, f"{'mean':<{width}}  {mean[0]:9.2%} {mean[1]:7.2%} {mean[2]:6.3f}"])
    if "targets" in found:
        return "\n".join(
            f"{row['name']}: mean absolute error {row['mean_absolute_error']:.6g}, root mean square error "
            f"{row['root_mean_square_error']:.6g}, R2 {'unknown' if row['r2'] is None else format(row['r2'], '.4f')}"
            for row in found["targets"]
        )
    return (
        f"perplexity {found['perplexity']:.3f} over {found['tokens']:,} tokens"
        if "perplexity" in found
        else ""
    )
