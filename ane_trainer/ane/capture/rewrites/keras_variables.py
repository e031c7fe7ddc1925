"""Keras 3 layers on the torch backend inside a model: their variables, and calls with other values for them.

Keras layers do not read the parameters that PyTorch sees in them but variables of their own, so calling one
on other tensors takes Keras' stateless scope. Variables that are not trained (batch norm's statistics, seeds)
are parameters to PyTorch; here they count as buffers. Nothing is imported: without Keras there are none.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from ane_trainer.ane.capture.trace.torch_private import pytree

M = TypeVar("M", bound=torch.nn.Module)


def keras_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The variables that are not trained, by the name of the parameter that PyTorch sees in their place."""
    return {name: v.value for name, v in _variables(model).items() if not v.trainable}


def has_layers(model: torch.nn.Module) -> bool:
    """Whether there are Keras layers in it, which deep copies do not always keep, or cannot make."""
    return any(map(_is_layer, model.modules()))


def training_argument(model: torch.nn.Module) -> dict[str, bool]:
    """{"training": ...} for a Keras model, which does not look at PyTorch's mode."""
    if _is_layer(model) and getattr(model, "_call_has_training_arg", False):
        return {"training": model.training}
    return {}


def own_signature(model: torch.nn.Module) -> inspect.Signature | None:
    """The inputs that a Keras model's `call` takes; None for a module of PyTorch, whose `forward` says it."""
    if not _is_layer(model):
        return None
    signature = inspect.signature(model.call)  # type: ignore[arg-type]
    inputs = [p for name, p in signature.parameters.items() if name not in ("training", "mask")]
    return signature.replace(parameters=inputs)


@contextlib.contextmanager
def both_branches(knows: Callable[[torch.Tensor], bool] | None) -> Iterator[None]:
    """`keras.ops.cond` on a tensor that `knows` denies takes both branches, and `where` chooses between them.

    So Keras' hinge losses ask of their labels whether they are 0 and 1.
    """
    core = sys.modules.get("keras.src.backend.torch.core")
    if core is None or knows is None:
        yield
        return
    names = vars(core)
    plain = names["cond"]

    def cond(test: object, yes: Callable[[], object], no: Callable[[], object]) -> object:
        if not isinstance(test, torch.Tensor) or knows(test):
            return plain(test, yes, no)
        return pytree.tree_map(lambda a, b: torch.where(test, a, b), yes(), no())

    names["cond"] = cond
    try:
        yield
    finally:
        names["cond"] = plain


@contextlib.contextmanager
def variables_as(model: torch.nn.Module, tensors: Mapping[str, Any]) -> Iterator[None]:
    """Keras variables have the values in `tensors`; what the call assigns to them is written there."""
    named = {name: v for name, v in _variables(model).items() if name in tensors}
    if not named:
        yield
        return
    scope = sys.modules["keras"].StatelessScope(state_mapping=[(v, tensors[n]) for n, v in named.items()])
    with scope:
        yield
    with torch.no_grad():
        for name, variable in named.items():
            value = scope.get_current_value(variable)
            if value is not tensors[name]:
                tensors[name].copy_(value)


def copy_of(model: M, memo: dict[int, Any] | None = None) -> M:
    """`copy.deepcopy(model, memo)`, after which `memo` knows what became of the parameters of Keras layers too.

    Keras copies a layer by writing it down and reading that, classes that are not registered here included; an
    optimizer copied along would keep to the old parameters.
    """
    memo = {} if memo is None else memo
    layers = [module for module in model.modules() if _is_layer(module)]
    if not layers:
        return copy.deepcopy(model, memo)
    known = {type(layer).__name__: type(layer) for layer in layers}
    with warnings.catch_warnings(), sys.modules["keras"].saving.custom_object_scope(known):
        warnings.simplefilter("ignore")  # of what `compile` was given, whose state is not used
        made = copy.deepcopy(model, memo)
    memo.update({id(old): new for old, new in _pairs(model, made)})
    return made


def _pairs(model: torch.nn.Module, made: torch.nn.Module) -> Iterator[tuple[Any, Any]]:
    """Values of the variables of each Keras layer, and of its copy's, those that PyTorch sees."""
    seen = {id(parameter) for parameter in model.parameters()}
    for old, new in zip(model.modules(), made.modules(), strict=True):
        if _is_layer(old):
            pairs = zip(old.variables, new.variables, strict=True)  # type: ignore[arg-type]
            yield from ((a.value, b.value) for a, b in pairs if id(a.value) in seen)


def _variables(model: torch.nn.Module) -> dict[str, Any]:
    if "keras" not in sys.modules:
        return {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for layer in model.modules():
        if _is_layer(layer):
            for variable in layer.variables:  # type: ignore[union-attr]
                name = names.get(id(variable.value))
                if name is not None:
                    found[name] = variable
    return found


def _is_layer(module: torch.nn.Module) -> bool:
    layer = getattr(sys.modules.get("keras"), "Layer", None)
    return layer is not None and isinstance(module, layer)
