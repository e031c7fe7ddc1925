"""Core AI: MIL programs as Apple's `.aimodel` assets, and Apple's runtime to run them."""

from ane_trainer.ane.compiler.coreai.program import (
    INITIAL_STATE,
    MAIN,
    Asset,
    build_program,
    open_asset,
    program_dtype,
    save_asset,
)
from ane_trainer.ane.compiler.coreai.runtime import (
    LoadedAsset,
    make_state,
    missing,
    prefers_neural_engine,
    read_state,
)

__all__ = [
    "INITIAL_STATE", "MAIN", "Asset", "LoadedAsset", "build_program", "make_state", "missing", "open_asset",
    "prefers_neural_engine", "program_dtype", "read_state", "save_asset",
]  # fmt: skip
