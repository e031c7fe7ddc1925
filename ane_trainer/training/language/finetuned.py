"""What a run of `finetune` is worth: loss and perplexity on what was held out, answers to questions."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ane_trainer.ane.errors import CheckpointError, UsageError
from ane_trainer.training.config import make_config
from ane_trainer.training.folder.recording import check_same_data
from ane_trainer.training.folder.records import find_run
from ane_trainer.training.folder.runs import open_run
from ane_trainer.training.language.finetune import Job, TuningOptions, prepare, read_tuning
from ane_trainer.training.language.models import answers_of, asked_and_expected
from ane_trainer.training.reporting.report import Reporter

_OPTIONS, _RESULT = "finetune.json", "result.json"


def is_finetuned(path: str | Path) -> bool:
    """Whether the run at `path` was begun by `finetune`."""
    try:
        return (find_run(path) / _OPTIONS).exists()
    except CheckpointError:
        return False


def evaluate_finetuned(path: str | Path, *, limit: int | None = None, **options: object) -> dict[str, Any]:
    """Loss and perplexity of a run on its held-out rows (the training rows where nothing was held out).

    `limit`: of so many rows at most, rounded up to whole batches.
    """
    started = time.perf_counter()
    facts, job, _ = _opened(path, options)
    held_out = job.splits.train if job.splits.val is None else job.splits.val
    batches = itertools.islice(held_out, None if limit is None else -(-limit // held_out.batch_size))
    metrics = job.trainer.evaluate(batches)
    return {
        **facts,
        "split": held_out.split, "examples": metrics.examples, "test_accuracy": None, "test_loss": metrics.loss,
        "perplexity": math.exp(min(metrics.loss, 700.0)), "scores": None,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def answer_finetuned(
    path: str | Path, files: Sequence[str | Path] = (), *, prompt: str | None = None, index: str | int | None = None,
    tokens: int = 48, **options: object,
) -> dict[str, Any]:  # fmt: skip
    """What a run's model answers to a prompt, or to held-out records (7, "0:10", "3,5"), by PyTorch on the host.

    Raises: UsageError ANE108 for files, which a language model does not read.
    """
    if files or (prompt is None) == (index is None):
        raise UsageError(
            "predict: needs --text or --index for a run of finetune. Try: ane-trainer predict last --text QUESTION",
            code="ANE108",
        )
    facts, job, tuning = _opened(path, options)
    asked: list[tuple[Any, str]] = [([{"role": "user", "content": prompt}], "")]
    if index is not None:
        asked = [asked_and_expected(record) for record in _chosen(job.held_out, str(index))]
    records: list[dict[str, object]] = []
    questions = [messages for messages, _ in asked]
    texts = answers_of(job.trainer.model, job.tokenizer, questions, tokens=tokens, chat=tuning.chat)
    for (messages, expected), text in zip(asked, texts, strict=True):
        record: dict[str, object] = {"input": messages[-1]["content"], "text": text}
        records.append(record | ({"truth": expected.strip()} if expected else {}))
    return {**facts, "classes": [], "predictions": records}


def _chosen(records: Any, index: str) -> list[Any]:
    """The held-out records that 7, 0:10 or 3,5 names."""
    try:
        if ":" in index:
            low, _, high = index.partition(":")
            found = list(records[int(low or 0) : int(high) if high else None])
        else:
            found = [records[int(number)] for number in index.split(",")]
    except (ValueError, IndexError):
        found = []
    if not found:
        raise UsageError(
            f"predict: needs an --index within the {len(records)} held-out records, e.g. 0:4; got {index}.",
            code="ANE108",
        )
    return found


def _opened(path: str | Path, options: Mapping[str, object]) -> tuple[dict[str, object], Job, TuningOptions]:
    """What is told of a run, and its model as it was trained last, silent; `options` override the run's."""
    run = open_run(path)
    given = {name: value for name, value in options.items() if value is not None}
    config, tuning = make_config({**run.read_config().model_dump(), **given}), read_tuning(run)
    job = prepare(config, tuning, Reporter())
    check_same_data(run, job.splits.description)
    checkpoint, damage = run.read_checkpoint()
    job.trainer.restore(checkpoint)
    whole = not damage and (run.path / _RESULT).exists()
    target = job.trainer.target
    facts: dict[str, object] = {
        "run": str(run.path), "weights": "weights.safetensors" if whole else "its last checkpoint",
        "dataset": config.dataset, "model": config.model, "device": target.name, "chip": target.chip,
        "fidelity": target.fidelity, "where": target.headline,
    }  # fmt: skip
    return facts | ({"damage": damage} if damage else {}), job, tuning
