"""What `finetune` takes for options that were not given: by the number of rows, and the size of the model.

Learning rates are the best of sweeps over LoRA adapters in tinker-cookbook (`hyperparam_utils.get_lr`: 1e-3 for models
of 1 to 4 thousand million parameters, 3e-4 for most larger ones), and a tenth of these for all weights ("LoRA Without
Regret", Thinking Machines). SmolLM2-135M itself was tuned with 1e-3 (alignment-handbook, `recipes/smollm2`). Updates:
an adapter's second factor begins at 0, and the first tens of updates only open it.
"""

from __future__ import annotations

from collections.abc import Mapping

from ane_trainer.ane.errors import UsageError
from ane_trainer.training.config import DEFAULT_LR, TrainConfig
from ane_trainer.utils import format_count

#: What differs from `train` whatever the data is.
DEFAULTS: Mapping[str, object] = {
    "optimizer": "adamw", "batch_size": 4, "loss": "model", "clip_grad_norm": 1.0,
}  # fmt: skip
#: Updates that a training has, if so many passes over the data are enough for them.
UPDATES, _MOST_EPOCHS = 100, 10
#: Learning rate of an adapter, and of one for a model of more parameters than this; all weights: a share of that.
_RATE, _RATE_OF_LARGE, _LARGE, _ALL_WEIGHTS = 1e-3, 3e-4, 4_000_000_000, 0.1
#: The help of options whose defaults these are.
HELP: Mapping[str, str] = {
    "epochs": f"Passes over the data; with --resume: in all (default: as many as make {UPDATES} updates, at most "
    f"{_MOST_EPOCHS}).",
    "batch_size": f"Rows a step (default: {DEFAULTS['batch_size']}).",
    "optimizer": f"How weights are updated (default: {DEFAULTS['optimizer']}).",
    "lr": f"Learning rate (default: {_RATE:g}, {_RATE_OF_LARGE:g} for more than {format_count(_LARGE)} parameters; "
    f"--lora 0: a tenth; sgd: {DEFAULT_LR['sgd']:g}).",
    "clip_grad_norm": "Scale all gradients together down to this norm (default: "
    f"{DEFAULTS['clip_grad_norm']:g}).",
}  # fmt: skip


def check_found(config: TrainConfig) -> None:
    """UsageError ANE104 for options that `train` finds by trying, and `finetune` does not."""
    for name in ("lr", "batch_size"):
        if getattr(config, name) == "auto":
            option = name.replace("_", "-")
            raise UsageError(
                f"finetune: {option} needs a number; got 'auto'. Leave --{option} out for the default.",
                code="ANE104",
            )


def complete(
    config: TrainConfig, batches: int, parameters: int, adapter: bool
) -> tuple[TrainConfig, list[str]]:
    """The configuration with epochs and learning rate, and a line on each that was not given.

    `batches` make a pass over the data; `parameters` are the model's, `adapter`: whether only an adapter is trained.
    """
    found: dict[str, object] = {}
    lines = []
    updates = max(1, batches // config.accumulate)
    if "epochs" not in config.model_fields_set:
        epochs = found["epochs"] = min(_MOST_EPOCHS, -(-UPDATES // updates))
        why = (
            f"at least {UPDATES} are wanted"
            if epochs * updates >= UPDATES
            else "more passes are learned by heart"
        )
        lines.append(
            f"{epochs} {'epoch' if epochs == 1 else 'epochs'} of {updates:,} updates: {why} (--epochs)"
        )
    if config.lr is None and config.optimizer != "sgd":
        rate = (_RATE if parameters <= _LARGE else _RATE_OF_LARGE) * (1.0 if adapter else _ALL_WEIGHTS)
        found["lr"] = rate
        subject = "an adapter of" if adapter else "all of"
        lines.append(f"lr {rate:g}, usual for {subject} {format_count(parameters)} parameters (--lr)")
    return config.model_copy(update=found), lines
