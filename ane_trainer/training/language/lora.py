"""Adapters by PEFT: a model with LoRA, its adapter as PEFT writes it, and the model with the adapter merged in."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from ane_trainer.ane.dispatch.frozen import quantize_frozen
from ane_trainer.ane.errors import MissingDependency, UsageError
from ane_trainer.training.optimizers import check_trainable
from ane_trainer.utils import seeded

#: Makes an optimizer of the parameters that are trained.
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

#: The projections of attention, by the names that common models give them.
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_key_value", "c_attn", "query",
              "key", "value", "q_lin", "k_lin", "v_lin", "out_lin", "Wqkv")  # fmt: skip


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters: weights W become W + alpha / rank * B A, of which only A and B are trained.

    rank     of B A.
    targets  "attention" (the projections of attention), "all-linear", or names of modules as PEFT takes them.
    alpha    the scale of the adapters; None: twice the rank.
    dropout  of what goes into the adapters, in training.
    dora     train the weights' magnitudes apart (weight-decomposed adapters).
    frozen   what the base's weights are kept in: "fp16", "int8" or "int4" (a palette of 16 for each row), as constants
             of the program. The model gets the values that these stand for.
    """

    rank: int = 8
    targets: str | tuple[str, ...] = "attention"
    alpha: float | None = None
    dropout: float = 0.0
    dora: bool = False
    frozen: str = "fp16"

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str):  # JSON has lists
            object.__setattr__(self, "targets", tuple(self.targets))

    def config(self, model: nn.Module) -> object:
        """PEFT's configuration for a model. UsageError ANE104 for options out of range, or targets not in it."""
        if self.rank < 1 or not 0.0 <= self.dropout < 1.0:
            raise UsageError(
                f"lora: needs a rank of at least 1 and dropout from 0 to below 1; got {self.rank} and "
                f"{self.dropout:g}. Change them.",
                code="ANE104",
            )
        peft = _peft()
        task = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return peft.LoraConfig(
            r=self.rank, lora_alpha=alpha, lora_dropout=self.dropout, use_dora=self.dora, task_type=task,
            target_modules=self._targets(model),
        )  # fmt: skip

    def _targets(self, model: nn.Module) -> str | list[str]:
        if self.targets == "all-linear" and hasattr(model, "config"):
            return self.targets
        leaves = {name: module for name, module in model.named_modules() if not any(module.children())}
        ends = {name.rpartition(".")[2] for name in leaves}
        if self.targets == "all-linear":
            return sorted(name for name, module in leaves.items() if isinstance(module, nn.Linear))
        wanted = _ATTENTION if self.targets == "attention" else self.targets
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        found = [n for n in names if n in ends or any(path == n or path.endswith(f".{n}") for path in leaves)]
        missing = [] if self.targets == "attention" else [name for name in names if name not in found]
        if missing or not found:
            got = ", ".join(missing) or "a model without these names of attention's projections"
            raise UsageError(
                f"lora: needs targets that the model has, e.g. {', '.join(sorted(_linear(leaves))[:6])}; got {got}. "
                'Name some, or take targets="all-linear".',
                code="ANE104",
            )
        return found


def _linear(leaves: Mapping[str, nn.Module]) -> set[str]:
    return {name.rpartition(".")[2] for name, module in leaves.items() if isinstance(module, nn.Linear)}


def adapted(model: nn.Module, options: object, seed: int) -> nn.Module:
    """The model with an adapter by PEFT, whose first values are a function of `seed`; one with an adapter stays.

    `options`: LoraOptions, or a configuration of PEFT.
    """
    peft = _peft()
    if is_adapted(model):
        return model
    config = options.config(model) if isinstance(options, LoraOptions) else options
    if not isinstance(config, peft.PeftConfig):
        raise UsageError(
            f"lora: needs LoraOptions or a configuration of peft; got {type(options).__name__}. Pass one of these.",
            code="ANE104",
        )
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name of before
        found: nn.Module = peft.get_peft_model(model, config)
    if isinstance(options, LoraOptions):
        quantize_frozen(found, options.frozen)
    return found


def is_adapted(model: nn.Module) -> bool:
    """Whether it is a model of PEFT."""
    return any(kind.__module__.startswith("peft.") for kind in type(model).__mro__)


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapter alone, in PEFT's own format. UsageError ANE116 for a model without one."""
    if not is_adapted(model):
        raise UsageError(
            f"save_adapter: needs a model with an adapter; got {type(model).__name__}. "
            "Train with lora=LoraOptions(), or a model of peft.",
            code="ANE116",
        )
    path = Path(folder)
    model.save_pretrained(str(path))  # type: ignore[operator]
    return path


def merged(model: nn.Module) -> nn.Module:
    """A copy of the model with its adapter added to its weights: a module as it was before, without PEFT.

    UsageError ANE116 for a model without an adapter, and for one whose adapter is not weights (prefix tuning).
    """
    whole = copy.deepcopy(model) if is_adapted(model) else None
    merge = getattr(getattr(whole, "base_model", None), "merge_and_unload", None)
    if merge is None:
        raise UsageError(
            f"merge: needs a model whose adapter adds to its weights; got {type(model).__name__}. "
            "Use save_adapter, or train with LoRA.",
            code="ANE116",
        )
    found: nn.Module = merge()
    return found


def frozen_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the base that an adapter's training leaves as they are, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}


def own_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state_dict, of one with an adapter without the base."""
    frozen = frozen_of(model) if is_adapted(model) else {}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A checksum of tensors: which base an adapter was trained on."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def optimizer_of(
    model: nn.Module, optimizer: torch.optim.Optimizer | MakeOptimizer | None
) -> torch.optim.Optimizer:
    """The optimizer that was given, made of the parameters that are trained, or Adam of these.

    UsageError ANE104 for one that holds none of an adapter's parameters, and for what is no optimizer.
    """
    if optimizer is None:
        check_trainable(model)
        trained = (
            [p for p in model.parameters() if p.requires_grad] if is_adapted(model) else model.parameters()
        )
        return torch.optim.Adam(trained, lr=1e-3)
    if not isinstance(optimizer, torch.optim.Optimizer):
        if not callable(optimizer):
            raise UsageError(
                f"optimizer: needs one of torch.optim's; got {optimizer!r}. Pass e.g. "
                "torch.optim.Adam(model.parameters(), lr=1e-3).",
                code="ANE104",
            )
        return optimizer([p for p in model.parameters() if p.requires_grad])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if is_adapted(model) and not any(id(p) in held for p in model.parameters() if p.requires_grad):
        raise UsageError(
            "lora: needs an optimizer of the adapter's parameters; got one of the model's, which stay as they are. "
            "Pass a function that makes it: optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-4).",
            code="ANE104",
        )
    return optimizer


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise MissingDependency(
            f"lora: needs peft ({error}). Install it: pip install 'ane_trainer[lm]'.", code="ANE201"
        ) from None
    return peft
