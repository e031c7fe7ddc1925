"""Tuning a language model: the model's answers before, training with an adapter in a run folder, its answers after.

Beside what every run leaves (`runs`), the folder has `finetune.json` (the options of tuning), `adapter/` in PEFT's
format, or `model/` where all weights are trained.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict, cast

from ane_trainer.ane.errors import CheckpointError, Interrupted
from ane_trainer.training import loop
from ane_trainer.training.config import TrainConfig, make_config
from ane_trainer.training.datasets.splits import VAL_SPLIT, Splits
from ane_trainer.training.folder.recording import (
    Recorder,
    check_origin,
    check_same_data,
    make_callbacks,
    restore_run,
)
from ane_trainer.training.folder.results import Result
from ane_trainer.training.folder.runs import RunFolder, claim_run, open_run, origin_of
from ane_trainer.training.language.defaults import complete
from ane_trainer.training.language.lora import LoraOptions, adapted
from ane_trainer.training.language.models import (
    Record,
    RowOptions,
    Tokenizer,
    answers_of,
    asked_and_expected,
    find_records,
    load_language_model,
    open_rows,
)
from ane_trainer.training.optimizers import freeze, make_optimizer
from ane_trainer.training.reporting.report import Reporter
from ane_trainer.training.trainer import Trainer
from ane_trainer.utils import atomic_write_json, format_count

_OPTIONS, ADAPTER, MODEL = "finetune.json", "adapter", "model"
#: Held-out answers that are shown, and most that are compared with what was expected.
_SHOWN = 3


@dataclass(frozen=True)
class TuningOptions:
    """What tuning has besides the options of every training.

    lora      rank of the adapter; 0: all weights are trained. targets, alpha, dropout, dora, frozen: see
              `LoraOptions`.
    length    tokens of a row; None: as the data needs. packed: rows run on over records; None: of plain texts.
    chat      use the model's chat template. prompts: asked before and after. answers: held-out records that are
              answered before and after, for the share that is right. tokens: of an answer at most.
    """

    lora: int = 8
    targets: str | tuple[str, ...] = "attention"
    alpha: float | None = None
    dropout: float = 0.0
    dora: bool = False
    length: int | None = None
    packed: bool | None = None
    chat: bool = True
    prompts: tuple[str, ...] = ()
    answers: int = 16
    tokens: int = 48
    frozen: str = "fp16"


@dataclass(frozen=True)
class Job:
    """What is tuned, by which options, with its tokenizer, on which rows, and the records that are answered.

    `chosen` has a line on each option that was not given.
    """

    trainer: Trainer
    config: TrainConfig
    chosen: Sequence[str]
    tokenizer: Tokenizer
    splits: Splits
    held_out: Sequence[Record]


def run_finetuning(
    config: TrainConfig, tuning: TuningOptions, *, out: str | Path | None = None, report: Reporter
) -> Result:
    """Tune `config.model` on `config.dataset`; `details` of the result has perplexities, answers and the folder."""
    started = time.perf_counter()
    with loop.interruptible():
        job = prepare(config, tuning, report)
        name = f"{Path(config.dataset).stem}-{Path(config.model).stem}"
        with claim_run(out, name) as run:
            atomic_write_json(run.path / _OPTIONS, asdict(tuning))
            return _tune(job, run, tuning, started)


def resume_finetuning(path: str | Path, *, report: Reporter, **changes: object) -> Result:
    """Go on with an interrupted run, from its last checkpoint; `changes` are options of `config.RESUMABLE`."""
    started = time.perf_counter()
    with loop.interruptible():
        run = open_run(path)
        tuning = read_tuning(run)
        given = {name: value for name, value in changes.items() if value is not None}
        config = make_config({**run.read_config().model_dump(), **given})
        with run.locked():
            job = prepare(config, tuning, report)
            held = run.read_checkpoint()
            check_origin(run, config, run.read_description(), origin_of(held[0]))
            check_same_data(run, job.splits.description)
            restore_run(job.trainer, run, config, *held)
            return _tune(job, run, tuning, started)


def read_tuning(run: RunFolder) -> TuningOptions:
    """A run's options, out of JSON, which has lists for tuples. CheckpointError CKPT101 for another kind of run."""
    make: Callable[..., TuningOptions] = TuningOptions
    try:
        stored = json.loads((run.path / _OPTIONS).read_text(encoding="utf-8"))
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        return make(**plain)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{run.path}: needs a run that `finetune` began; {error}. Use train --resume for others.",
            code="CKPT101",
        ) from None


def prepare(config: TrainConfig, tuning: TuningOptions, report: Reporter) -> Job:
    """The model with its adapter, the data, and the trainer of both."""
    report.activity("reading the model")
    find_records(config.dataset)  # before minutes go into the model
    model, tokenizer = load_language_model(config.model)
    report.activity("reading the data")
    rows = RowOptions(
        tuning.length, tuning.packed, tuning.chat, VAL_SPLIT if config.val_split is None else config.val_split,
        config.limit, config.examples_a_step, config.seed,
    )  # fmt: skip
    splits, held_out = open_rows(config.dataset, tokenizer, rows)
    parameters = sum(p.numel() for p in model.parameters())
    config, chosen = complete(config, len(splits.train), parameters, adapter=tuning.lora > 0)
    if tuning.lora:
        options = LoraOptions(
            tuning.lora, tuning.targets, tuning.alpha, tuning.dropout, tuning.dora, tuning.frozen
        )
        model = adapted(model, options, config.seed)
    freeze(model, config.freeze)
    trainer = Trainer(
        model, config.loss, make_optimizer(config, model), device=config.device, chip=config.chip,
        fidelity=config.fidelity, precision=config.precision, seed=config.seed, threads=config.threads, report=report,
        clip_grad_norm=config.clip_grad_norm, clip_grad_value=config.clip_grad_value, accumulate=config.accumulate,
        optimizer_on=config.optimizer_on, fallback=config.fallback, blocks=config.blocks,
        checkpoint=config.recompute,
    )  # fmt: skip
    return Job(trainer, config, chosen, tokenizer, splits, held_out)


def _tune(job: Job, run: RunFolder, tuning: TuningOptions, started: float) -> Result:
    """Answers, training, answers; everything into the run's folder."""
    trainer, config, splits = job.trainer, job.config, job.splits
    trainer.announce()
    _introduce(job)
    recorder, answers = Recorder(run, config, splits.description), _Answers(job, tuning)
    resumed = trainer.progress.steps > 0
    first = _read_first(run) if resumed else None
    try:
        if first is None:
            trainer.report.activity("asking the model", "answers")
            first = {"answers": answers.all(), "loss": None}
            if splits.val is not None and not resumed:
                trainer.report.activity("measuring the model", "perplexity")
                first["loss"] = trainer.evaluate(splits.val).loss
            atomic_write_json(run.path / _BEFORE, first)
        trainer.fit(
            splits.train, config.epochs - trainer.progress.epoch, splits.val,
            callbacks=[*make_callbacks(config), recorder],
        )  # fmt: skip
    except KeyboardInterrupt as error:
        if trainer.step is None:
            raise
        recorder.save(trainer)
        stopped = Interrupted(
            f"finetune: stopped at epoch {trainer.progress.epoch + 1}, batch {trainer.progress.batch}; checkpoint in "
            f"{run.path}. Go on: ane-trainer finetune --resume {run.path}"
        )
        stopped.exit_code = 128 + (error.args[0] if error.args else signal.SIGINT)
        raise stopped from None
    trainer.report.activity("asking the model", "answers")
    details = _outcome(job, run, first, answers.all())
    result = trainer.result(
        dataset=splits.description.name,
        model=config.model,
        seconds_total=time.perf_counter() - started,
        **details,
    )
    run.write_result(result.to_json())
    trainer.report.close()
    return result


_BEFORE = "before.json"


class _Before(TypedDict):
    """What was measured before training began: answers, and the loss on what is held out."""

    answers: list[dict[str, str]]
    loss: float | None


def _read_first(run: RunFolder) -> _Before | None:
    """What was measured before training began, of a run that goes on; None if that is not known."""
    try:
        found = json.loads((run.path / _BEFORE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cast(_Before, found) if isinstance(found, dict) and {"answers", "loss"} <= found.keys() else None


def _outcome(job: Job, run: RunFolder, first: _Before, after: list[dict[str, str]]) -> dict[str, object]:
    """What the result has besides every training's; writes the adapter, or the model."""
    trainer = job.trainer
    trainer.sync()
    if trainer.is_adapter:
        saved = trainer.save_adapter(run.path / ADAPTER)
    else:
        saved = run.path / MODEL
        trainer.model.save_pretrained(str(saved))  # type: ignore[operator]
        job.tokenizer.save_pretrained(str(saved))
    kept = None if trainer.kept is None else trainer.kept.val_loss
    answers = [{**then, "after": now["answer"]} for then, now in zip(first["answers"], after, strict=False)]
    return {
        "run": str(run.path), "saved": str(saved), "answers": answers,
        "perplexity_before": _perplexity(first["loss"]), "perplexity": _perplexity(kept),
        "right_before": _right(first["answers"]), "right": _right(after),
    }  # fmt: skip


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))


def _right(answers: Sequence[Mapping[str, str]]) -> float | None:
    """The share of held-out answers that are exactly what was expected; None without any."""
    known = [entry for entry in answers if entry.get("expected")]
    return sum(e["answer"] == e["expected"] for e in known) / len(known) if known else None


class _Answers:
    """The prompts and held-out records that are asked, and the model's answers to them."""

    def __init__(self, job: Job, tuning: TuningOptions) -> None:
        self._job, self._tuning, self._held_out = job, tuning, job.held_out[: tuning.answers]

    def all(self) -> list[dict[str, str]]:
        """A record each: prompt, expected (empty for a prompt of one's own), answer."""
        trainer = self._job.trainer
        trainer.sync()
        tuning = self._tuning
        asked: list[tuple[list[dict[str, str]], str]] = [
            ([{"role": "user", "content": prompt}], "") for prompt in tuning.prompts
        ]
        asked += [asked_and_expected(record) for record in self._held_out]
        questions = [messages for messages, _ in asked]
        texts = answers_of(
            trainer.model, self._job.tokenizer, questions, tokens=tuning.tokens, chat=tuning.chat
        )
        return [
            {"prompt": messages[-1]["content"], "expected": expected.strip(), "answer": text}
            for (messages, expected), text in zip(asked, texts, strict=True)
        ]


def _introduce(job: Job) -> None:
    trainer, config = job.trainer, job.config
    note, described = trainer.report.note, job.splits.description
    counts = " / ".join(f"{count:,} {split}" for split, count in described.examples.items())
    note("data", f"{described.name}  {counts} rows of {described.in_shape[0]} tokens")
    for text in described.notes:
        note("data", text)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in trainer.model.parameters())
    note(
        "model",
        f"{config.model}  {format_count(whole)} parameters, {format_count(trained)} trained   {config.optimizer} lr "
        f"{config.learning_rate:g}   batch {config.batch_size}   seed {config.seed}",
    )
    for text in job.chosen:
        note("chosen", text)


def outcome_lines(result: Result) -> list[str]:
    """The summary's lines on perplexity, right answers, and samples before and after."""
    details, lines = result.details, []
    then, now = details["perplexity_before"], details["perplexity"]
    if now is not None:
        lines.append(f"perplexity {now:.3f}" + (f"   (before {then:.3f})" if then is not None else ""))
    if details["right"] is not None:
        lines.append(
            f"right answers, held out: {details['right']:.0%}   (before {details['right_before']:.0%})"
        )
    for entry in details["answers"][:_SHOWN]:
        lines += [f"  asked   {_short(entry['prompt'])}", f"  before  {_short(entry['answer'])}",
                  f"  after   {_short(entry['after'])}"]  # fmt: skip
        if entry["expected"]:
            lines.append(f"  wanted  {_short(entry['expected'])}")
    return [*lines, f"saved {details['saved']}"]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 96 else f"{line[:93]}..."
