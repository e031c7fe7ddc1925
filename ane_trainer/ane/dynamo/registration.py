"""Makes the backend known to Dynamo when the package runs from a source tree, without importing Dynamo.

The installed package is found through its entry point. Importing Dynamo takes seconds, so registration waits
until somebody else imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REGISTRY = "torch._dynamo.backends.registry"

Backend = Callable[..., Any]


def register(backend: Backend) -> None:
    """Register `backend` under its name, now if Dynamo is imported, else as soon as it is."""
    if _REGISTRY in sys.modules:
        _add(sys.modules[_REGISTRY], backend)
    else:
        sys.meta_path.insert(0, _Finder(backend))


def _add(registry: ModuleType, backend: Backend) -> None:
    if backend.__name__ not in registry._COMPILER_FNS:
        registry.register_backend(compiler_fn=backend, name=backend.__name__)


class _Finder(MetaPathFinder):
    """Finds one module, by the other finders, and then goes."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._backend)
        return spec


class _Loader(Loader):
    """Loads as `loader` does, then registers."""

    def __init__(self, loader: Loader, backend: Backend) -> None:
        self._loader, self._backend = loader, backend

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add(module, self._backend)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
