"""Makes the backend known to Dynamo, and to accelerate, without importing either.

Dynamo finds the installed package through its entry point, but not a source tree; importing it takes seconds,
so registration waits until somebody else does. accelerate, through which Hugging Face's Trainer compiles, has a
closed list of backends (DynamoBackend, accelerate 1.15) and refuses others; the name is added to it.
`test_frameworks.py` tells when that can go.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REGISTRY = "torch._dynamo.backends.registry"
_ACCELERATE = "accelerate.utils.dataclasses"

Backend = Callable[..., Any]
Action = Callable[[ModuleType], None]


def register(backend: Backend) -> None:
    """Register `backend` under its name, now where Dynamo or accelerate is imported, else as soon as it is."""
    for name, add in ((_REGISTRY, _add_to_dynamo), (_ACCELERATE, _add_to_accelerate)):
        if name in sys.modules:
            add(sys.modules[name], backend)
        else:
            sys.meta_path.insert(0, _Finder(name, functools.partial(add, backend=backend)))


def _add_to_dynamo(registry: ModuleType, backend: Backend) -> None:
    name = backend.__name__
    if (
        registry._BACKENDS.get(name) is not None
    ):  # the entry point is known: Dynamo loads and registers it itself
        return
    if name not in registry._COMPILER_FNS:
        registry.register_backend(compiler_fn=backend, name=name)


def _add_to_accelerate(module: ModuleType, backend: Backend) -> None:
    kind, name = getattr(module, "DynamoBackend", None), backend.__name__.upper()
    if kind is None or name in kind.__members__:
        return
    member = str.__new__(kind, name)
    member._name_, member._value_ = name, name
    kind._member_map_[name] = kind._value2member_map_[name] = member
    kind._member_names_.append(name)


class _Finder(MetaPathFinder):
    """Finds one module, by the other finders, and then goes."""

    def __init__(self, name: str, action: Action) -> None:
        self._name, self._action = name, action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._action)
        return spec


class _Loader(Loader):
    """Loads as `loader` does, then acts on the module."""

    def __init__(self, loader: Loader, action: Action) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._action(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
