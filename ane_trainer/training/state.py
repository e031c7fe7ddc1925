"""The state of a training: what a checkpoint holds, how it is taken up again, and its outcome as values."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import nn

from ane_trainer.ane.capture.losses import get_loss, loss_name
from ane_trainer.ane.capture.scaling import SCALING
from ane_trainer.ane.dispatch import StepOptions, Target
from ane_trainer.ane.dispatch.frozen import quantized_names
from ane_trainer.ane.dispatch.state import MODEL, STEP, faults_of, incomplete, part
from ane_trainer.ane.errors import CheckpointError, Diverged
from ane_trainer.training import energy, engine, loop
from ane_trainer.training.callbacks import Callbacks
from ane_trainer.training.checkpoint import Checkpoint, check_scalars, describe_optimizer
from ane_trainer.training.evaluation import Inference
from ane_trainer.training.folder.results import Epoch, Metrics, Result
from ane_trainer.training.language.lora import LoraOptions, digest, frozen_of, is_adapted
from ane_trainer.training.language.own_loss import make_intake
from ane_trainer.training.loop import Batch, Progress
from ane_trainer.training.steps import Step, put_into_training

Loss = str | Callable[[Any, Any], torch.Tensor]

#: Steps in a row that may be skipped or give a loss that is not finite. Dynamic loss scaling needs up to 15
#: skips to come down from 32768 to 1; more than twice that means that no scale helps.
MAX_BAD_STEPS = 32


class Training:
    """A model in training: where it stands, on which target, with which step. `asked` is what the user named."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        target: Target,
        options: StepOptions,
        asked: Mapping[str, str],
    ) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.target, self.options = target, options
        self.chip, self.fidelity, self.precision = asked["chip"], asked["fidelity"], asked["precision"]
        self.lora: LoraOptions | None = None
        self.seed, self.threads = options.seed or 0, target.threads
        self.history: list[Epoch] = []
        self.progress = Progress()
        self.step: Step | None = None  #: the compiled training step, from the first batch on
        self.seconds_compile = 0.0
        self.max_epochs = 0  #: where `fit` is to end, counted from the very beginning
        self.callbacks = Callbacks()
        self.should_stop = False  #: set by a callback to end training after the epoch
        self.stop_now = False  #: set by a callback to end training after the step
        self._loss = get_loss(loss)
        self._inference = Inference(model, self._loss, target, options.fallback)
        self._intake = make_intake(model, loss)
        self._last: Batch | None = None  # as the step took it
        self._train: Iterable[Batch] = ()  # what `fit` trains on
        self._unseen = False  # none of its batches was looked at yet
        self._pass: Iterable[Batch] | None = None  # the same while a pass over it is under way
        self._data_state: dict[str, object] | None = None
        self._restored: Checkpoint | None = None
        self._metrics: Metrics | None = None
        self._kept: int | None = None  # the epoch whose weights the model ended with, if not the last
        self._digest: str | None = None
        self._at_first: dict[str, torch.Tensor] = {}  # parameters as the model was built, before `restore`

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches of a pass over the training data, if it knows them."""
        return loop.length_of(self._train)

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated: `model`, or an average of it that a callback keeps."""
        return self._inference.model

    def evaluate_with(self, model: nn.Module) -> None:
        """Evaluate and predict with this module from now on; it has `model`'s structure."""
        example, scores = self._inference.example, self._inference.scores
        self._inference = Inference(model, self._loss, self.target, self.options.fallback)
        self._inference.example, self._inference.scores = example, scores

    def finish_with(self, weights: Mapping[str, torch.Tensor], epoch: int) -> None:
        """End training with these weights, those of `epoch`; results are that epoch's."""
        self.sync()
        self.model.load_state_dict(weights)
        self.evaluate_with(self.model)
        self._kept = epoch
        record = self.kept
        if record is not None and record.val_loss is not None:
            self._metrics = Metrics(record.val_loss, record.val_accuracy, 0)

    @property
    def kept(self) -> Epoch | None:
        """The epoch whose weights the model has: the last one, or what a callback ended with."""
        epoch = len(self.history) if self._kept is None else self._kept
        return self.history[epoch - 1] if 0 < epoch <= len(self.history) else None

    @property
    def stop_training(self) -> bool:
        """`should_stop`, by the name that Keras has for it."""
        return self.should_stop

    @stop_training.setter
    def stop_training(self, value: bool) -> None:
        self.should_stop = value

    @property
    def shards(self) -> int | None:
        """Parts that each batch is divided into; None: it is not."""
        return None if self.options.exchange is None else self.options.exchange.shards.count

    def checkpoint(self) -> Checkpoint:
        """Everything that training needs to go on: parameters, the step's state, counters, data position."""
        self.sync()
        tensors = {MODEL + name: value for name, value in self.model.state_dict().items()}
        frozen = frozen_of(self.model) if self.is_adapter else {}
        if self.step is not None:
            tensors |= {STEP + name: value for name, value in self.step.state_dict().items()}
        elif self._restored is not None:
            tensors |= {k: v for k, v in self._restored.tensors.items() if k.startswith(STEP)}
        tensors |= self.callbacks.tensors()
        for name in frozen:
            tensors.pop(MODEL + name, None)
            tensors.pop(STEP + name, None)
        progress = {**asdict(self.progress), "skipped_steps": self._skipped()}
        scalars = {
            "progress": progress,
            "history": [record.to_json() for record in self.history],
            "data": self._position(),
            "loss": loss_name(self.loss),
            "optimizer": describe_optimizer(self.optimizer, self.model),
            "options": self._settings(),
            "program": compiled.fingerprint if (compiled := self.step and self.step.compiled) else None,
            "callbacks": self.callbacks.state_dict(),
        }
        return Checkpoint(tensors, scalars | ({"base": self._base_digest(frozen)} if frozen else {}))

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter is trained; its checkpoints leave out the model that it adapts, which stays as it is."""
        return is_adapted(self.model)

    def _base_digest(self, frozen: Mapping[str, torch.Tensor]) -> str:
        """The checksum of the frozen weights, which do not change while one trainer lives."""
        if self._digest is None:
            self._digest = digest(frozen)
        return self._digest

    def _with_base(self, checkpoint: Checkpoint) -> Checkpoint:
        """An adapter's checkpoint with the weights of the model that it adapts; CheckpointError for another one's."""
        wanted = checkpoint.scalars.get("base")
        if wanted is None:
            return checkpoint
        frozen = frozen_of(self.model)
        if self._base_digest(frozen) != wanted:
            raise CheckpointError(
                "checkpoint: needs the model that the adapter was trained on; got one with other frozen weights. "
                "Load the model as for the first run.",
                code="CKPT106",
            )
        whole = {MODEL + name: value for name, value in frozen.items()}
        if any(name.startswith(STEP) for name in checkpoint.tensors):
            held = quantized_names(self.model)  # constants of the program, no state of the step
            whole |= {
                STEP + n: v.float().reshape(tuple(v.shape) or (1,))
                for n, v in frozen.items()
                if n not in held
            }
        return Checkpoint(whole | checkpoint.tensors, checkpoint.scalars)

    def _position(self) -> dict[str, object] | None:
        """Where the data stands within a pass, if it can tell."""
        if self._pass is None:
            return self._data_state
        return self._pass.state_dict() if hasattr(self._pass, "state_dict") else None

    def _settings(self) -> dict[str, object]:
        """The arguments that make a trainer like this one."""
        gradients = self.options.gradients
        return {
            "device": self.target.device, "chip": self.chip, "fidelity": self.fidelity,
            "precision": self.precision, "seed": self.seed, "threads": self.threads,
            "clip_grad_norm": gradients.clip_norm, "clip_grad_value": gradients.clip_value,
            "accumulate": gradients.accumulate, "optimizer_on": self.options.optimizer_on,
            "fallback": self.options.fallback, "shards": self.shards,
            "blocks": self.options.blocks, "checkpoint": self.options.checkpoint,
            "lora": None if self.lora is None else asdict(self.lora),
        }  # fmt: skip

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`, which must be of the same model and optimizer.

        CheckpointError, before anything changed, for one that is not whole or of another model.
        """
        progress, history = check_scalars(checkpoint.scalars)
        checkpoint = self._with_base(checkpoint)
        self._at_first = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        self.load_weights(part(checkpoint.tensors, MODEL), "checkpoint")
        self.progress, self.history = progress, history
        self._data_state = checkpoint.scalars["data"]
        self.callbacks = Callbacks()
        self.callbacks.load(checkpoint.scalars.get("callbacks", {}), checkpoint.tensors)
        self._restored, self.step, self._pass = checkpoint, None, None
        last = self.history[-1] if self.history else None
        if last is not None and last.val_loss is not None:
            self._metrics = Metrics(last.val_loss, last.val_accuracy, 0)

    @contextlib.contextmanager
    def _as_at_first(self) -> Iterator[None]:
        """Within the block the model has the parameters that it was built with, if a checkpoint was restored.

        A step compiled for them has the very scales of the first run's, whose numbers it goes on with.
        """
        held = dict(self.model.named_parameters())
        kept = {name: held[name].detach().clone() for name in self._at_first}
        _put(held, self._at_first)
        try:
            yield
        finally:
            _put(held, kept)
            self._at_first = {}

    def load_weights(self, state: Mapping[str, torch.Tensor], where: str) -> None:
        """Put a state_dict into the model; CheckpointError if it is of another model, or not finite."""
        wanted = self.model.state_dict()
        names = {name for name, _ in self.model.named_parameters()}
        faults = faults_of(state, wanted, finite=names)
        if any("nan" not in fault for fault in faults):
            shown = ", ".join(faults[:4]) + (f" and {len(faults) - 4} more" if len(faults) > 4 else "")
            raise CheckpointError(
                f"{where}: needs the weights of this model; got those of another one: {shown}. "
                "Build the model as for the first run.",
                code="CKPT106",
            )
        if faults:
            raise incomplete(where, faults)
        self.model.load_state_dict(state)

    def result(self, **details: object) -> Result:
        """What training did so far; `details` override or extend the fields."""
        step, progress = self.step, self.progress
        facts: dict[str, Any] = {
            "dataset": None,
            "model": type(self.model).__name__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "epochs": progress.epoch,
            "steps": progress.steps,
            "weights_epoch": None if self.kept is None else self.kept.epoch,
            "train_loss": self.history[-1].train_loss if self.history else None,
            "test_loss": self._metrics.loss if self._metrics else None,
            "test_accuracy": self._metrics.accuracy if self._metrics else None,
            "device": self.target.name,
            "chip": self.target.chip,
            "fidelity": self.target.fidelity,
            **engine.step_facts(step),
            "skipped_steps": self._skipped(),
            "seconds_total": progress.seconds,
            "seconds_compile": self.seconds_compile,
            "seconds_per_step": progress.seconds_steps / max(progress.steps, 1),
            "placement": step.placement() if step is not None else {},
            "estimate": engine.estimate_of(step, self.target),
            "energy_joules": energy.total([record.energy_joules for record in self.history]),
            "history": tuple(self.history),
        }
        names = {field.name for field in fields(Result)}
        known = {key: value for key, value in details.items() if key in names}
        extra = {key: value for key, value in details.items() if key not in names}
        return Result(**{**facts, **known}, details=extra)

    def release_step(self) -> None:
        """Let go of the compiled step, whose state goes on in the next one, of batches of another form."""
        if self.step is not None:
            put_into_training(self.model)
            self.step.follow()  # a layer that was frozen since then has no state in the next one
            saved = self.checkpoint()
            self._restored = Checkpoint(saved.tensors, saved.scalars | {"program": None})
            self.progress.skipped_steps, self.step = self._skipped(), None
        self._intake = make_intake(self.model, self.loss)

    def sync(self) -> None:
        """Bring the model's parameters and the optimizer's state up to date with the engine's."""
        if self.step is not None:
            self.step.sync()

    def _loss_scale(self) -> float:
        """The present loss scale; before the step is compiled that of the restored state."""
        if self.step is None and self._restored is not None:
            return float(self._restored.tensors.get(f"{STEP}{SCALING}loss_scale", torch.ones(1)))
        return self.step.loss_scale if self.step is not None else 1.0

    def check_finite(self) -> None:
        """Diverged if a parameter is not finite, a loss is nan in plain PyTorch, or an epoch had no good step of many.

        The engine has no nan: of weights that lead to one the last batch tells, on the host.
        """
        wrong = [name for name, value in self.model.named_parameters() if not bool(value.isfinite().all())]
        if wrong:
            raise self._diverged(f"numbers that are not finite in {', '.join(wrong)}")
        progress = self.progress
        steps = progress.steps - progress.steps_before_epoch
        skipped = self._skipped() - progress.skipped_before_epoch
        never = self._skipped() == progress.steps and progress.epoch + 1 >= self.max_epochs
        idle = skipped == steps and (never or steps >= MAX_BAD_STEPS // 2)
        if progress.passed and steps and (idle or not progress.loss_count):
            raise self._diverged(f"an epoch of {steps} steps, all skipped or with a loss not finite")
        if (
            self._last is not None
            and self._intake.counts(*self._last)
            and engine.is_undefined(self.step, *self._last)
        ):
            raise self._diverged("a loss that is nan in plain PyTorch")

    def _diverged(self, what: str, loss: float = math.nan) -> Diverged:
        where = f"train: epoch {self.progress.epoch + 1}, batch {self.progress.batch}"
        health = self.step.health if self.step is not None else {}
        return loop.diverged(where, what, loss, self._loss_scale(), health)

    def _skipped(self) -> int:
        return self.progress.skipped_steps + (self.step.skipped_steps if self.step is not None else 0)


@torch.no_grad()
def _put(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
