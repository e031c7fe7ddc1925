"""Core AI: MIL programs as Apple's `.aimodel` assets, and Apple's runtime to run them."""

from ane_trainer.ane.compiler.coreai.asset import Asset, open_asset, save_asset
from ane_trainer.ane.compiler.coreai.program import INITIAL_STATE, MAIN, build_program, program_dtype
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
