"""Find repeated modules of a model: the blocks that one program can serve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch.nn import Module

_CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)


def repeating(model: Module) -> list[list[str]]:
    """Paths of the modules that repeat side by side, by the module that holds them; in the model's order.

    Layers of a list or `Sequential` first (a transformer's, the blocks of a ResNet's stage); else modules of one
    class as attributes of another; else single layers. The outermost repetition counts; empty where there is none.
    """
    for holds, counts in (
        (lambda m: isinstance(m, _CONTAINERS), _has_layers),
        (lambda m: not isinstance(m, _CONTAINERS), _has_layers),
        (lambda m: True, _has_parameters),
    ):
        found = list(_found(model, "", holds, counts))
        if found:
            return found
    return []


def _found(
    module: Module, path: str, holds: Callable[[Module], bool], counts: Callable[[Module], bool]
) -> Iterator[list[str]]:
    children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
    times = Counter(type(child) for _, child in children if counts(child))
    own = [name for name, child in children if counts(child) and times[type(child)] > 1]
    if holds(module) and own:
        yield own
    else:
        own = []
    for name, child in children:
        if name not in own:
            yield from _found(child, name, holds, counts)


def _has_parameters(module: Module) -> bool:
    return next(module.parameters(), None) is not None


def _has_layers(module: Module) -> bool:
    """A module made of others, not a mere list of them."""
    inner = next(module.children(), None) is not None
    return inner and not isinstance(module, _CONTAINERS) and _has_parameters(module)
