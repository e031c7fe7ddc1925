"""`.aimodel` files of programs: written with the state they start from, opened as something to call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.compiler.coreai.program import INITIAL_STATE, MAIN, build_program
from ane_trainer.ane.compiler.coreai.runtime import LoadedAsset, make_state, read_state, require
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.stages import Lowered


def save_asset(
    path: str | Path,
    lowered: Lowered,
    initial: Mapping[str, NDArray[Any]] | None = None,
    metadata: Mapping[str, Any] | None = None,
    mutable: bool = True,
) -> Path:
    """Write a program as `.aimodel`; replaces an older one.

    `initial` holds the state's values by port, kept in the function `initial_state`; the state is updated in
    place, or, if not `mutable`, an input and an output. `metadata`: `description`,
    `author`, `license`, and anything else as custom JSON values.
    Raises: MissingDependency without the extra `coreai`; UnsupportedModel for ops without a translation.
    """
    require()
    from coreai.runtime import AIModelAssetMetadata

    target = Path(path)
    if target.suffix != ".aimodel":
        raise UsageError(f"{target}: needs a name that ends in .aimodel. Rename it.", code="ANE111")
    described = AIModelAssetMetadata()
    for key, value in (metadata or {}).items():
        if key in ("author", "license"):
            setattr(described, key, value)
        elif key == "description":
            described.model_description = value
        else:
            described.set_custom(key, value)
    build_program(lowered, initial, mutable).save_asset(target, described)
    return target


class Asset:
    """An opened `.aimodel` with its state in memory: what an app does with such a file.

    `run(inputs)` updates the state; `state()` copies it out. Arrays have the program's dtype.
    """

    def __init__(self, path: str | Path) -> None:
        self._loaded = LoadedAsset(Path(path))
        self.ports = self._loaded.describe(MAIN)
        self._state: dict[str, Any] = {}
        if INITIAL_STATE in self._loaded.functions:
            values = self._loaded.call(INITIAL_STATE, {})
            self._fixed = {name: v for name, v in values.items() if name not in self.ports["states"]}
            self._state = {name: make_state(v) for name, v in values.items() if name in self.ports["states"]}
        else:
            self._fixed = {}

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One call of `main`."""
        return self._loaded.call(MAIN, {**self._fixed, **inputs}, self._state)

    def state(self) -> dict[str, NDArray[Any]]:
        """A copy of every state, the unchanging ones included."""
        return {**self._fixed, **{name: np.array(read_state(value)) for name, value in self._state.items()}}

    def close(self) -> None:
        """Release the model."""
        self._loaded.close()


def open_asset(path: str | Path) -> Asset:
    """Open an `.aimodel` that `save_asset` wrote, with the state it was saved with.

    Raises: MissingDependency without the extra `coreai`; UsageError if there is no such asset.
    """
    require()
    if not (Path(path) / "main.mlirb").is_file():
        raise UsageError(f"{path}: needs an .aimodel folder; got none. Export one first.", code="ANE112")
    return Asset(path)
