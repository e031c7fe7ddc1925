"""What `compile` gave a Keras model, for a training of ours: its loss, its metrics, its optimizer as PyTorch's."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ane_trainer.ane.capture.trace.torch_private import pytree
from ane_trainer.ane.errors import UsageError
from ane_trainer.training.callbacks import Callback
from ane_trainer.training.scores import Scores

if TYPE_CHECKING:
    from ane_trainer.training.trainer import Trainer

#: A Keras model, which has no types of its own; arrays or tensors in any structure; the settings of an optimizer.
KerasModel: TypeAlias = Any
Tree: TypeAlias = Any
Settings: TypeAlias = Mapping[str, Any]

#: Settings of Keras' optimizers without a counterpart, with what they are where they do nothing.
_UNKNOWN = {"clipnorm": None, "use_ema": False, "loss_scale_factor": None}


@dataclass(frozen=True)
class Weighted:
    """Splits the target of a batch, which is (y, weights) where examples are weighted."""

    by_example: bool = False

    def parts(self, target: Tree) -> tuple[Tree, Tree]:
        """y, and the examples' weights [N] or None."""
        return (target[0], target[1]) if self.by_example else (target, None)


class CompiledLoss:
    """The model's own `compute_loss`: what `compile` was given, weights of outputs and penalties of layers included."""

    def __init__(self, model: KerasModel, weighted: Weighted) -> None:
        self._model, self._weighted = model, weighted

    def __call__(self, output: Tree, target: Tree) -> Tree:
        y, weights = self._weighted.parts(target)
        return self._model.compute_loss(None, y, output, sample_weight=weights)

    def examples(self, target: Tree) -> int:
        """Examples of a batch with this target, without copies that fill it up, which have no weight."""
        y, weights = self._weighted.parts(target)
        return len(pytree.tree_leaves(y)[0]) if weights is None else int((weights != 0).sum())


class CompiledMetrics(Scores):
    """The metrics that `compile` was given, over the validation data."""

    def __init__(self, model: KerasModel, weighted: Weighted) -> None:
        super().__init__({})
        self._model, self._weighted = model, weighted
        self._found: dict[str, float] = {}

    def begin(self) -> None:
        """Forget earlier batches."""
        self._model.reset_metrics()
        self._found = {}

    def add(self, output: object, target: object) -> None:
        """Take in the outputs of a batch and their targets."""
        y, weights = self._weighted.parts(target)
        with torch.no_grad():
            found = self._model.compute_metrics(None, y, output, weights)
        self._found = {name: float(value) for name, value in found.items() if name != "loss"}

    def found(self) -> tuple[tuple[str, float], ...]:
        """Each metric's value by its name."""
        return tuple(self._found.items())


class _OnHost(torch.optim.Optimizer):
    """An optimizer of Keras that PyTorch's own differs from; without a rule it runs on the host, in fp32."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float, **settings: object) -> None:
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Tree:
        """One update of every parameter with a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self._move(p.grad, self.state[p], group))

    def _move(self, gradient: torch.Tensor, state: dict[str, torch.Tensor], group: Settings) -> torch.Tensor:
        """What is taken from the parameter."""
        raise NotImplementedError


class KerasRMSprop(_OnHost):
    """RMSprop with epsilon under the root: v = rho v + (1 - rho) g^2, w -= lr g / sqrt(v + epsilon).

    PyTorch has it beside the root, where Keras' 1e-7 would be 3e-4.
    """

    def _move(self, gradient: torch.Tensor, state: dict[str, torch.Tensor], group: Settings) -> torch.Tensor:
        if not state:
            state.update({name: torch.zeros_like(gradient) for name in ("square", "mean", "moved")})
        square = state["square"].lerp_(gradient.square(), 1 - group["rho"])
        if group["centered"]:
            square = square - state["mean"].lerp_(gradient, 1 - group["rho"]).square()
        move = group["lr"] * gradient / (square + group["eps"]).sqrt()
        return torch.as_tensor(state["moved"].mul_(group["momentum"]).add_(move))


class KerasSGD(_OnHost):
    """SGD whose momentum keeps the rates of earlier steps: m = momentum m + lr g, w -= m.

    PyTorch's has the rate of today for all of it, which is the same until the rate changes.
    """

    def _move(self, gradient: torch.Tensor, state: dict[str, torch.Tensor], group: Settings) -> torch.Tensor:
        if not state:
            state["moved"] = torch.zeros_like(gradient)
        move = group["lr"] * gradient
        moved = state["moved"].mul_(group["momentum"]).add_(move)
        return torch.as_tensor(group["momentum"] * moved + move if group["nesterov"] else moved)


class KerasRate(Callback):
    """Hands on the learning rate of a Keras optimizer, as a schedule or a callback sets it, and counts its steps.

    Keras' epsilon of Adam stands beside the root of the second moment before its bias is taken out, PyTorch's behind:
    1e-7 is 3e-6 there in the first step. Keras keeps m = momentum m + lr g, PyTorch's SGD b = momentum b + g and takes
    lr b: where the rate changes, b is scaled so that lr b stays m.
    """

    def __init__(self, own: KerasModel, optimizer: torch.optim.Optimizer) -> None:
        self._own, self._optimizer = own, optimizer

    def on_train_batch_start(self, trainer: Trainer) -> None:
        rate, groups = float(self._own.learning_rate), self._optimizer.param_groups
        if isinstance(self._optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            for group in groups:
                bias = 1.0 - group["betas"][1] ** (int(self._own.iterations) + 1)
                group["eps"] = self._own.epsilon / math.sqrt(bias)
        before = groups[0]["lr"]
        if rate == before:
            return
        if isinstance(self._optimizer, torch.optim.SGD) and groups[0]["momentum"]:
            trainer.sync()
            for state in self._optimizer.state.values():
                if state.get("momentum_buffer") is not None:
                    state["momentum_buffer"].mul_(before / rate if rate else 1.0)
        for group in groups:
            group["lr"] = rate

    def on_train_batch_end(self, trainer: Trainer, loss: float) -> None:
        self._own._iterations.assign_add(1)  # `iterations` is a quotient where gradients accumulate


@dataclass(frozen=True)
class CompiledOptimizer:
    """A Keras optimizer as PyTorch's, and the trainer's options that belong to it."""

    own: KerasModel
    optimizer: torch.optim.Optimizer
    options: Mapping[str, object]


#: PyTorch's optimizer for each of Keras' that was trained with, and the settings that it was made of.
_MADE: weakref.WeakKeyDictionary[KerasModel, tuple[torch.optim.Optimizer, Settings]] = (
    weakref.WeakKeyDictionary()
)


def optimizer_of_keras(model: KerasModel) -> CompiledOptimizer:
    """Of a compiled Keras model. UsageError ANE104 for optimizers and settings without a counterpart."""
    own = getattr(model, "optimizer", None)
    if own is None:
        raise UsageError(
            "fit_keras: needs a compiled model; got one without optimizer and loss. Call model.compile(...) first.",
            code="ANE104",
        )
    settings = own.get_config()
    kind = type(own).__name__
    made = _KINDS.get(kind)
    odd = [name for name, idle in _UNKNOWN.items() if settings.get(name) not in (idle, None)]
    if kind == "SGD" and settings["weight_decay"] and settings["momentum"]:
        odd.append("weight_decay beside momentum")
    if made is None or odd:
        raise UsageError(
            f"fit_keras: needs an optimizer that PyTorch has, too: {', '.join(_KINDS)}; got {kind}"
            f"{' with ' + ', '.join(odd) if odd else ''}. Use one of these, or Trainer(model, loss, optimizer).",
            code="ANE104",
        )
    known = {
        "clip_grad_norm": settings.get("global_clipnorm"),
        "clip_grad_value": settings.get("clipvalue"),
        "accumulate": settings.get("gradient_accumulation_steps"),
    }
    options = {name: value for name, value in known.items() if value is not None}
    parameters = [v.value for v in model.trainable_variables]
    fixed = {name: value for name, value in settings.items() if name != "learning_rate"}
    optimizer, before = _MADE.get(own, (None, {}))
    held = [] if optimizer is None else optimizer.param_groups[0]["params"]
    if optimizer is None or before != fixed or list(map(id, held)) != list(map(id, parameters)):
        optimizer = made(parameters, float(own.learning_rate), settings)
        _MADE[own] = optimizer, fixed
    return CompiledOptimizer(own, optimizer, options)


def _adam(parameters: Iterable[torch.Tensor], rate: float, of: Settings) -> torch.optim.Optimizer:
    decay = of["weight_decay"] or 0.0
    kind = torch.optim.AdamW if decay else torch.optim.Adam
    betas = of["beta_1"], of["beta_2"]
    return kind(parameters, rate, betas=betas, eps=of["epsilon"], amsgrad=of["amsgrad"], weight_decay=decay)


def _plain(kind: Callable[..., torch.optim.Optimizer], **names: str) -> Callable[..., torch.optim.Optimizer]:
    """An optimizer whose settings have the names here on the left and Keras' on the right; none decays weights."""

    def made(parameters: Iterable[torch.Tensor], rate: float, of: Settings) -> torch.optim.Optimizer:
        if of["weight_decay"]:
            raise UsageError(
                f"fit_keras: needs {kind.__name__} without weight_decay; got {of['weight_decay']:g}. Use AdamW.",
                code="ANE104",
            )
        found = {name: of[its] for name, its in names.items()}
        if "beta_1" in of:
            found["betas"] = of["beta_1"], of["beta_2"]
        return kind(parameters, rate, **found)

    return made


def _sgd(parameters: Iterable[torch.Tensor], rate: float, of: Settings) -> torch.optim.Optimizer:
    momentum, nesterov = of["momentum"], of["nesterov"] and of["momentum"] > 0
    if momentum and isinstance(of["learning_rate"], dict):
        return KerasSGD(parameters, rate, momentum=momentum, nesterov=nesterov)
    decay = of["weight_decay"] or 0.0
    return torch.optim.SGD(parameters, rate, momentum=momentum, nesterov=nesterov, weight_decay=decay)


def _nadam(parameters: Iterable[torch.Tensor], rate: float, of: Settings) -> torch.optim.Optimizer:
    """Keras' momentum grows by 0.96^step, PyTorch's by 0.96^(step * momentum_decay)."""
    betas = of["beta_1"], of["beta_2"]
    return torch.optim.NAdam(parameters, rate, betas=betas, eps=of["epsilon"], momentum_decay=1.0)


#: Keras' optimizers by their class, from the parameters, the rate and the configuration.
_KINDS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": _adam, "AdamW": _adam, "SGD": _sgd,
    "RMSprop": _plain(KerasRMSprop, rho="rho", momentum="momentum", eps="epsilon", centered="centered"),
    "Adagrad": _plain(torch.optim.Adagrad, initial_accumulator_value="initial_accumulator_value", eps="epsilon"),
    "Adadelta": _plain(torch.optim.Adadelta, rho="rho", eps="epsilon"),
    "Adamax": _plain(torch.optim.Adamax, eps="epsilon"),
    "Nadam": _nadam,
}  # fmt: skip
