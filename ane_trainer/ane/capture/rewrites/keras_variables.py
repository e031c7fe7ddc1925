"""Keras 3 layers on the torch backend inside a model: their variables, and calls on other values of them.

Keras layers do not read the parameters that PyTorch sees in them but variables of their own, so calling one
on other tensors takes Keras' stateless scope. Variables that are not trained (batch norm's statistics, seeds)
are parameters to PyTorch; here they count as buffers. Nothing is imported: without Keras there are none.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def keras_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The variables that are not trained, by the name of the parameter that PyTorch sees in their place."""
    return {name: v.value for name, v in _variables(model).items() if not v.trainable}


def training_argument(model: torch.nn.Module) -> dict[str, bool]:
    """{"training": ...} for a Keras model, which does not look at PyTorch's mode."""
    if _is_layer(model) and getattr(model, "_call_has_training_arg", False):
        return {"training": model.training}
    return {}


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
