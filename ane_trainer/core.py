"""The training lifecycle: load data, build the model, compile the step once, run the loop, report."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ane_trainer.ane.dispatch import TrainingStep
from ane_trainer.ane.dispatch.parallel import Exchange, find_exchange
from ane_trainer.ane.errors import Diverged, Interrupted, PeerLost, UsageError
from ane_trainer.ane.export import DEFAULT_NAMES, STEP_FORMATS, ExportReport, format_of
from ane_trainer.data import (
    Batches,
    DataDescription,
    DataOptions,
    Splits,
    find_dataset,
    find_known,
    open_data,
)
from ane_trainer.models import build_model
from ane_trainer.training.config import TrainConfig, make_config
from ane_trainer.training.folder.recording import (
    Recorder,
    begun_before,
    check_loss,
    check_origin,
    check_same_data,
    data_of,
    introduce,
    make_callbacks,
    overridden,
    provenance,
    restore_run,
)
from ane_trainer.training.folder.results import Result
from ane_trainer.training.folder.runs import WEIGHTS, RunFolder, Weights, claim_run, open_run, origin_of
from ane_trainer.training.loop import stoppable, with_exit_code
from ane_trainer.training.optimizers import check_trainable, freeze, make_optimizer
from ane_trainer.training.prediction import answers, check_output, generate, inputs_by_index, read_inputs
from ane_trainer.training.reporting.analysis import Seen
from ane_trainer.training.reporting.report import ConsoleReporter, Reporter
from ane_trainer.training.reporting.watching import watchers, write_report
from ane_trainer.training.scores import make_scores
from ane_trainer.training.steps import Step
from ane_trainer.training.trainer import Trainer
from ane_trainer.training.tuning import find_batch_size
from ane_trainer.utils import finite

__all__ = ["Trainer", "evaluate_run", "export_run", "predict_run", "resume_training", "run_training"]


def run_training(
    config: TrainConfig, *, out: str | Path | None = None, report: Reporter | None = None
) -> Result:
    """Load the data, build the model, train, evaluate; leaves everything in a run folder, `details["run"]`.

    Ctrl-C, SIGTERM, SIGHUP: Interrupted, with a checkpoint written. See `Trainer.fit` for what else is refused.
    """
    started = time.perf_counter()
    report = report if report is not None else ConsoleReporter()
    report.activity("reading the data")
    if (begun := begun_before(out)) is not None:
        return resume_training(begun, report=report)
    with stoppable():
        exchange = find_exchange(config.shards)
        splits = _open_in_turn(config, exchange)
        config = _settled(config, splits.description)
        config = config.model_copy(update={"shards": exchange.shards.count if exchange is not None else None})
        found = ""
        if config.batch_size == "auto":
            report.activity("choosing a batch size")
            config, found = _with_batch_size(config, splits)
            splits = open_data(config.dataset, _data_options(config, config.limit))
        trainer = _make_trainer(config, splits.description, report)
        if exchange is not None and not exchange.leads:
            if config.lr == "auto":
                config = _with_learning_rate(config, trainer, splits)
            return _train_alongside(trainer, config, splits)
        model_name = Path(config.model.rpartition(":")[0] or config.model).stem
        with claim_run(out, f"{Path(splits.description.name).stem}-{model_name}") as run:
            trainer.announce()
            if found:
                report.note("batch", found)
            if config.lr == "auto":
                config = _with_learning_rate(config, trainer, splits)
            return _train_run(trainer, run, config, splits, started)


def _with_batch_size(config: TrainConfig, splits: Splits) -> tuple[TrainConfig, str]:
    """The configuration with the batch size that is fastest on the chip, by the cost model, and a line on it."""
    x, y = next(iter(splits.train))

    def make(size: int) -> Step:
        trainer = _make_trainer(config, splits.description, Reporter())
        rows = torch.arange(size) % len(x)
        return trainer.compiled(x[rows], y[rows])

    size, why = find_batch_size(make, splits.train.num_examples)
    return config.model_copy(update={"batch_size": size}), f"{size}: {why}"


def _with_learning_rate(config: TrainConfig, trainer: Trainer, splits: Splits) -> TrainConfig:
    """The configuration, and the trainer, with a learning rate that a sweep found."""
    trainer.report.activity("finding a learning rate")
    found = trainer.find_lr(splits.train)
    for group in trainer.optimizer.param_groups:
        group["lr"] = found.rate
    trainer.report.note("lr", f"{found.rate:.2g}: where the loss fell fastest in {len(found.rates)} steps")
    return config.model_copy(update={"lr": found.rate})


def resume_training(path: str | Path, *, report: Reporter | None = None, **changes: object) -> Result:
    """Go on with an interrupted run, or, with `epochs`, train a finished one until so many in all.

    `changes` are options of `config.RESUMABLE`, and `dataset`: where the run's own data is now. All is read and checked
    before anything of the run is touched.
    """
    started = time.perf_counter()
    report = report if report is not None else ConsoleReporter()
    with stoppable():
        exchange = find_exchange(None)
        run = open_run(path if exchange is None else exchange.share(str(open_run(path).path)))
        given = {name: value for name, value in changes.items() if value is not None}
        config = make_config({**run.read_config().model_dump(), **given})
        world = 1 if exchange is None else exchange.shards.world
        effect = " from here on; bits are those of another number of shards" if config.shards else ""
        if changed := world > (config.shards or 1):
            config = config.model_copy(update={"shards": world})
        follows = exchange is not None and not exchange.leads
        with contextlib.nullcontext() if follows else run.locked():
            held = run.read_checkpoint() if run.holds_training() else None
            if held is not None:
                check_origin(run, config, run.read_description(), origin_of(held[0]))
            with data_of(run, config, f"If it was moved: ane-trainer train NEW-PLACE --resume {run.path}"):
                splits = _open_in_turn(config, exchange)
            check_same_data(run, splits.description)
            config = _settled(config, splits.description)
            model, remark = run.model_source(config.model)
            trainer = _make_trainer(config, splits.description, report, model=model)
            if remark:
                report.note("warning", remark)
            if changed:
                report.note("shards", f"{world}{effect}")
            if held is not None:
                restore_run(trainer, run, config, *held)
            if exchange is not None:
                exchange.share(None)  # all have read the run before it is written to
            if follows:
                return _train_alongside(trainer, config, splits)
            return _train_run(trainer, run, config, splits, started)


def _open_in_turn(config: TrainConfig, exchange: Exchange | None) -> Splits:
    """The data; process 0 fetches what is to be fetched before the others look for it."""
    if exchange is not None and not exchange.leads:
        exchange.share(None)
    splits = open_data(config.dataset, _data_options(config, config.limit))
    if exchange is not None and exchange.leads:
        exchange.share(None)
    return splits


def _train_alongside(trainer: Trainer, config: TrainConfig, splits: Splits) -> Result:
    """Train as process 0 does, without a run folder of its own."""
    val = splits.val if splits.val is not None else splits.test
    trainer.fit(splits.train, config.epochs - trainer.progress.epoch, val, callbacks=make_callbacks(config))
    return trainer.result(dataset=splits.description.name)


def evaluate_run(path: str | Path, *, limit: int | None = None, **options: object) -> dict[str, Any]:
    """Loss, accuracy and scores by class of a run on its data's test part, by an inference program.

    Without a test part it is validation, without that the training part; `split` says which. An interrupted run is
    judged by its last checkpoint (`weights`). `options` (device, chip, fidelity, threads) override the run's; `dataset`
    says where its own data is now.
    """
    trained = _open_trained(path, options)
    trainer, run, config, description = trained.trainer, trained.run, trained.config, trained.description
    held_out = _held_out(run, config, limit)
    started, seen = time.perf_counter(), Seen()
    metrics = trainer.evaluate(held_out, see=seen.add)
    if not math.isfinite(metrics.loss):
        raise Diverged(
            f"{run.path}: needs a loss that is finite; got {metrics.loss:g} on the {held_out.split} data. "
            "Train again with a lower learning rate, or look for outliers in the data.",
            code="ANE401",
        )
    scale = (description.target_mean or (0.0,), description.target_std or (1.0,))
    names, labels = description.class_names, description.task == "multilabel"
    analysis = seen.label_analysis(names) if labels else seen.analysis(names, scale=scale)
    return {
        "run": str(run.path),
        **trained.weights_used(),
        "dataset": config.dataset,
        "model": config.model,
        "split": held_out.split,
        "examples": metrics.examples,
        "test_accuracy": metrics.accuracy,
        "test_loss": metrics.loss,
        "metrics": dict(metrics.scores),
        **({"perplexity": math.exp(min(metrics.loss, 700.0))} if description.kind == "text" else {}),
        "scores": finite(analysis.to_json()) if analysis is not None else None,
        **_where(trainer),
        "seconds": time.perf_counter() - started,
    }


def open_for_step(path: str | Path) -> tuple[Trainer, tuple[Any, Any]]:
    """A silent trainer with a run's weights, and a batch of the data that it was trained on."""
    trained = _open_trained(path, {})
    splits = open_data(trained.config.dataset, _data_options(trained.config, None))
    check_same_data(trained.run, splits.description)
    x, y = next(iter(splits.train))
    return trained.trainer, (x, y)


def predict_run(
    run: str | Path, paths: Sequence[str | Path] = (), *, index: str | int | None = None, prompt: str | None = None,
    limit: int | None = None, tokens: int = 200, temperature: float = 0.0, **options: object,
) -> dict[str, Any]:  # fmt: skip
    """What a run's model says of new examples, prepared as in training: `predictions`, a record each.

    paths    image files, folders of images, CSV or Parquet tables, .npy arrays (bytes are pixels).
    index    held-out examples of the run's own data: 7, "0:10", "3,5"; `limit`: the first so many.
    prompt   of a text model: it goes on for `tokens` tokens, at `temperature`.
    """
    if sum((bool(paths), index is not None, prompt is not None)) != 1:
        raise UsageError(
            "predict: needs one of files, --index and --text. Try: ane-trainer predict last --index 0:10",
            code="ANE108",
        )
    trained = _open_trained(run, options)
    trainer, folder, config, description = trained.trainer, trained.run, trained.config, trained.description
    records: list[dict[str, Any]] = []
    if prompt is not None:
        if description.kind != "text":
            raise UsageError(
                f"predict: --text needs a run on text; got {description.kind} data.", code="ANE108"
            )
        text = generate(trainer.predict, prompt, description, tokens=tokens, temperature=temperature,
                        seed=config.seed)  # fmt: skip
        records.append({"input": prompt, "text": text})
    parts = (part for path in paths for part in read_inputs(Path(path).expanduser(), description))
    if index is not None:
        parts = (inputs_by_index(_held_out(folder, config), str(index)) for _ in range(1))
    for part in parts:
        if limit is not None:
            part = part.first(limit - len(records))
        records += answers(check_output(trainer.predict(part.x)), part, description)
        if limit is not None and len(records) >= limit:
            break
    return {
        "run": str(folder.path),
        **trained.weights_used(),
        **_where(trainer),
        "classes": list(description.class_names),
        "predictions": records,
    }


def export_run(
    path: str | Path, format: str, out: str | Path | None = None, *, input: str = "auto",
    weights: str = "fp16", batch: int = 1, examples: int | None = None, **options: object,
) -> ExportReport:  # fmt: skip
    """Write a finished run's model, or its training step, as a file (`out`; by default in its folder), checked on its
    dataset's test split. `options` override those of the run.
    """
    kind, as_run = format_of(out or "", format), open_run(path).read_config()
    if kind in STEP_FORMATS and as_run.device == "cpu":
        raise UsageError(
            f"{path}: needs a run trained by programs; got device cpu. Use --device sim.", code="ANE116"
        )
    device = "sim" if kind in STEP_FORMATS or as_run.device == "cpu" else as_run.device
    trained = _open_trained(
        path, {"device": device, "precision": "auto"} | {k: v for k, v in options.items() if v is not None}
    )
    trainer, run, config = trained.trainer, trained.run, trained.config
    if trained.weights.damage:
        warnings.warn(
            f"the weights are those of {trained.weights.file}: {trained.weights.damage}", stacklevel=2
        )
    elif trained.weights.file != WEIGHTS:
        text = f"the weights are those of {trained.weights.file}: the run has not come to its end"
        warnings.warn(text, stacklevel=2)
    target = Path(out) if out is not None else run.path / DEFAULT_NAMES[kind]
    if kind in STEP_FORMATS:
        trainer.restore(run.read_checkpoint()[0])
        data = open_data(config.dataset, _data_options(config, config.limit)).train
    else:
        data = _held_out(run, config)
    count = data.num_examples if examples is None else examples
    return trainer.export(target, kind, data=data, input=input, weights=weights, batch=batch, examples=count)


def _data_options(config: TrainConfig, limit: int | None) -> DataOptions:
    """How a run's data is read, with so many held-out examples at most."""
    return DataOptions(
        config.examples_a_step, config.seed, target=config.target or (), task=config.task, val_split=config.val_split,
        test_split=config.test_split, size=config.size, channels=config.channels, context=config.context,
        tokens=config.tokens, augment=config.augment or (), limit=(config.limit, limit),
        drop_last={"auto": None, "train": False, "drop": True}[config.last_batch],
    )  # fmt: skip


def _settled(config: TrainConfig, description: DataDescription) -> TrainConfig:
    """The configuration with what the data decides written out, and paths that hold from any folder."""
    prefix = "hf:" if config.dataset.startswith("hf:") else ""
    path, colon, function = config.dataset.removeprefix("hf:"), "", ""
    if ".py:" in path:
        path, colon, function = path.rpartition(":")
    here = Path(path).expanduser().resolve()
    check_loss(config, description)
    is_path = find_known(config.dataset) is None and here.exists()
    return config.model_copy(
        update={
            "dataset": f"{prefix}{here}{colon}{function}" if is_path else config.dataset,
            "model": description.default_model if config.model == "auto" else config.model,
            "loss": description.default_loss if config.loss == "auto" else config.loss,
        }
    ).resolved()


def _held_out(run: RunFolder, config: TrainConfig, limit: int | None = None) -> Batches:
    with data_of(run, config, "If it was moved, say where it is: --data PATH"):
        splits = open_data(config.dataset, _data_options(config, limit))
    check_same_data(run, splits.description)
    return splits.held_out


def _where(trainer: Trainer) -> dict[str, object]:
    device = trainer.target
    return {"device": device.name, "chip": device.chip, "fidelity": device.fidelity, "where": device.headline}


@dataclass(frozen=True)
class _Trained:
    """A run opened for use: a silent trainer with its weights, its options and its data's description."""

    trainer: Trainer
    run: RunFolder
    config: TrainConfig
    description: DataDescription
    weights: Weights

    def weights_used(self) -> dict[str, str]:
        """Which file the weights are from, and what is wrong with a newer one."""
        damage = self.weights.damage
        return {"weights": self.weights.file, **({"damage": damage} if damage else {})}


def _open_trained(path: str | Path, options: Mapping[str, object]) -> _Trained:
    """A run, finished or not, whose files are as training left them."""
    run = open_run(path)
    config = run.read_config()
    description, weights = _description_of(run, config), run.read_weights()
    check_origin(run, config, description, weights.origin)
    config = overridden(run, config, options)
    trainer = _run_trainer(run, config, description)
    trainer.load_weights(weights.state, str(run.path))
    return _Trained(trainer, run, config, description, weights)


def _description_of(run: RunFolder, config: TrainConfig) -> DataDescription:
    """What the run keeps about its data; runs of older versions are on known datasets."""
    return run.read_description() or find_dataset(config.dataset).describe()


def _make_trainer(
    config: TrainConfig, description: DataDescription, report: Reporter, device: str | None = None,
    model: str | None = None,
) -> Trainer:  # fmt: skip
    """The configured model and optimizer in a trainer. `model`: where its file is now."""
    options = config.model_options()
    net = build_model(
        model or config.model, description.in_shape, description.num_outputs, seed=config.seed, **options
    )
    check_trainable(net, f"model {config.model}")
    freeze(net, config.freeze)
    return Trainer(
        net,
        config.loss,
        make_optimizer(config, net),
        device=device or config.device,
        chip=config.chip,
        fidelity=config.fidelity,
        precision="auto" if device == "cpu" else config.precision,
        seed=config.seed,
        threads=config.threads,
        report=report,
        clip_grad_norm=config.clip_grad_norm,
        clip_grad_value=config.clip_grad_value,
        accumulate=config.accumulate,
        optimizer_on=config.optimizer_on,
        fallback=config.fallback,
        shards=0 if device == "cpu" else config.shards,
        metrics=make_scores(config.metrics, description),
        blocks=config.blocks,
        checkpoint=config.recompute,
    )


def _run_trainer(run: RunFolder, config: TrainConfig, description: DataDescription) -> Trainer:
    """A silent trainer of a run's model, built from the run's own copy of its file, for this process alone."""
    model, remark = run.model_source(config.model)
    if remark:
        warnings.warn(remark, stacklevel=3)
    return _make_trainer(config.model_copy(update={"shards": 0}), description, Reporter(), model=model)


def _train_run(
    trainer: Trainer, run: RunFolder, config: TrainConfig, splits: Splits, started: float
) -> Result:
    """Train to the end, recorded in the run's folder; write program, weights, result."""
    before = trainer.progress.seconds
    trainer.announce()
    introduce(trainer, config, splits)
    val = splits.val if splits.val is not None else splits.test
    recorder = Recorder(run, config, splits.description)
    trainer.report = watchers(trainer.report, run.path, config.log, config.model_dump())
    try:
        callbacks = [*make_callbacks(config), recorder]
        trainer.fit(splits.train, config.epochs - trainer.progress.epoch, val, callbacks=callbacks)
        tested = _test(trainer, splits)
        seconds = before + time.perf_counter() - started
        reference = _train_reference(config, splits, trainer.report) if config.compare_fp32 else None
    except PeerLost as error:
        if trainer.step is None:
            raise
        recorder.save(trainer)
        raise PeerLost(f"{error} ane-trainer train --resume {run.path}") from None
    except KeyboardInterrupt as error:
        if trainer.step is None:  # nothing was trained since the last checkpoint
            raise
        recorder.save(trainer)
        with contextlib.suppress(KeyboardInterrupt):
            write_report(run.path, step=trainer.step)
        stopped = Interrupted(
            f"train: stopped at epoch {trainer.progress.epoch + 1}, batch {trainer.progress.batch}; "
            f"checkpoint in {run.path}. Go on: ane-trainer train --resume {run.path}"
        )
        raise with_exit_code(stopped, error) from None
    if trainer.step is not None and (compiled := trainer.step.compiled) is not None:
        run.write_program(compiled.text, compiled.weights)
        for name, part in trainer.step.parts() if isinstance(trainer.step, TrainingStep) else ():
            run.write_program(part.text, part.weights, name)
    run.write_weights(trainer.model.state_dict(), recorder.origin)
    result = trainer.result(
        dataset=splits.description.name,
        model=config.model,
        **tested,
        seconds_total=seconds,
        fp32_reference=reference.test_accuracy if reference else None,
        **provenance(config, run, reference),
    )
    run.write_result(result.to_json())
    trainer.report.activity("writing report.html", "report")
    with contextlib.suppress(KeyboardInterrupt):  # the run is whole without it
        write_report(run.path, trainer.predict, splits.held_out, trainer.step)
    trainer.report.close()
    return result


def _test(trainer: Trainer, splits: Splits) -> dict[str, object]:
    """Test loss and accuracy for the result; the test part is looked at once, unless it is all there is."""
    if splits.test is None:
        return {"test_loss": None, "test_accuracy": None}
    if splits.val is None:
        return {}
    metrics = trainer.evaluate(splits.test)
    return {"test_loss": metrics.loss, "test_accuracy": metrics.accuracy}


def _train_reference(config: TrainConfig, splits: Splits, report: Reporter) -> Result:
    """The same model, seed and batches with plain PyTorch in fp32."""
    report.note("fp32", "the same training with plain PyTorch, for comparison")
    report.activity("training with plain PyTorch", "fp32")
    splits.train.set_epoch(0)
    trainer = _make_trainer(config, splits.description, Reporter(), device="cpu")
    val = splits.test if splits.test is not None else splits.val
    return trainer.fit(splits.train, config.epochs, val, callbacks=make_callbacks(config))
