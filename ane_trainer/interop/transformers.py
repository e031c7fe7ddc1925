"""Hugging Face's `Trainer` on the engine: in a script, only the line that imports it changes.

    from ane_trainer.interop.transformers import AutoModelForCausalLM, Trainer, TrainingArguments

Every name is transformers' own but `Trainer` and `TrainingArguments`, which train the model by `torch.compile` with the
backend "ane": forward and backward in programs, the optimizer on the host, checkpoints as ever.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch
from torch import nn

from ane_trainer.ane.errors import MissingDependency
from ane_trainer.interop.lengths import PROGRAMS, common_multiple

try:
    transformers = importlib.import_module("transformers")
except ImportError:
    raise MissingDependency(
        "transformers: needs the package; got none. Do: pip install transformers accelerate."
    ) from None

__all__ = ["Trainer", "TrainingArguments"]

_log = transformers.logging.get_logger(__name__)


def __getattr__(name: str) -> object:
    return getattr(transformers, name)


class TrainingArguments(transformers.TrainingArguments):  # type: ignore[misc, name-defined]
    """transformers' arguments for tensors on the host; without bf16 and fp16: programs have numbers of their own."""

    def __post_init__(self) -> None:
        settle(self)
        super().__post_init__()


class Trainer(transformers.Trainer):  # type: ignore[misc, name-defined]
    """transformers' `Trainer`, its model compiled in place for the engine or the simulator.

    ane_options  of the backend: chip, device, fidelity, ... (docs/pytorch.md).

    Weights in half precision are trained in single. A collator that pads each batch to its longest sequence pads to one
    of LENGTHS lengths instead, which changes no loss: each shape is a program of its own.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: object = None,
        *others: object,
        ane_options: Mapping[str, object] | None = None,
        **named: object,
    ) -> None:
        self._options = {"recompile_limit": PROGRAMS, **(ane_options or {})}
        args = TrainingArguments("tmp_trainer") if args is None else args
        if not isinstance(args, TrainingArguments):
            settle(args)
            vars(args)["mixed_precision"] = "no"
            vars(args).pop("_setup_devices", None)  # found before it was said that tensors are on the host
            getattr(args, "device")  # noqa: B009  (finds it again, before an Accelerator relies on it)
        super().__init__(self._compiled(model) if model is not None else None, args, *others, **named)
        self._pad_to_few_lengths()

    def call_model_init(self, trial: object = None) -> nn.Module:
        """A new model of `model_init`, compiled."""
        return self._compiled(super().call_model_init(trial))

    def _compiled(self, model: nn.Module) -> nn.Module:
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
            _log.warning("ane_trainer: the weights come in half precision, and are trained in float32")
            model.float()
        model.compile(backend="ane", options=self._options)
        return model

    def _pad_to_few_lengths(self) -> None:
        if getattr(self.data_collator, "pad_to_multiple_of", 0) is not None:
            return  # it does not pad, or was told to what
        held_out = self.eval_dataset
        parts = held_out.values() if isinstance(held_out, Mapping) else [held_out]
        given = [part for part in (self.train_dataset, *parts) if part is not None]
        multiple = common_multiple(given)
        self.data_collator.pad_to_multiple_of = multiple
        _log.warning(f"ane_trainer: batches are padded to multiples of {multiple}: each length is a program")


def settle(args: object) -> None:
    """Let tensors be on the host, in single precision around the programs."""
    options = vars(args)
    options["use_cpu"] = True
    for name in ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"):
        if options.get(name):
            options[name] = False
            _log.warning(f"ane_trainer: {name} is left out: programs compute with the engine's numbers")
