"""The optimizers that a configuration can name, as torch.optim objects, and the parameters that they train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from ane_trainer.ane.capture.trace.torch_private import optimizers_without_dynamo
from ane_trainer.ane.dispatch.parameters import check_placed
from ane_trainer.ane.errors import UsageError
from ane_trainer.training.config import TrainConfig
from ane_trainer.utils import did_you_mean

_CLASSES: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def check_trainable(model: nn.Module, where: str = "model") -> None:
    """UsageError ANE103 for a model without parameters to train, or whose parameters hold no numbers yet."""
    check_placed(model, where)
    named = dict(model.named_parameters())
    if not named:
        got, fix = "a model without any", "Register layers as attributes (self.layer = ...)."
    elif not any(p.requires_grad for p in named.values()):
        got, fix = "all frozen", "Set requires_grad of those that are to learn."
    else:
        return
    raise UsageError(f"{where}: needs parameters with numbers to train; got {got}. {fix}", code="ANE103")


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The configured optimizer over the parameters of the model that are not frozen."""
    options: dict[str, object] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        options["momentum"] = config.momentum
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise UsageError(
            f"{type(model).__name__}.parameters(): needs parameters to train; got none. Leave it to nn.Module.",
            code="ANE103",
        )
    with optimizers_without_dynamo():
        return _CLASSES[config.optimizer](trained, **options)


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Keep parameters as they are: those whose name, or module's name, matches a pattern (`conv*`, `head`).

    Returns their names. UsageError for a pattern without a match, and if nothing would be left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = set()
    for pattern in patterns:
        found = {n for n in names if any(fnmatchcase(part, pattern) for part in _places(n))}
        if not found:
            raise UsageError(
                f"freeze: needs a parameter's name; got {pattern!r}. {did_you_mean(pattern, names)}",
                code="ANE104",
            )
        frozen |= found
    if frozen and frozen == set(names):
        raise UsageError(
            "freeze: needs parameters that are left to train; got all. Leave some out.", code="ANE104"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen and parameter.requires_grad)
    return sorted(frozen)


def _places(name: str) -> list[str]:
    """The parameter's name and those of the modules around it: a.b.weight, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
