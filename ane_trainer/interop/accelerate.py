"""Hugging Face accelerate and the backend "ane": its closed list of Dynamo backends gets one name more.

    from ane_trainer.interop.accelerate import Accelerator

is all that changes in a script: accelerate's own, with that backend and tensors on the host. Every other name of
accelerate (`DistributedType`, `utils`, ...) is found here as well, so that the line may import several.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ane_trainer.ane.errors import EnvironmentFault, MissingDependency

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Accelerator", "install"]

_NAME = "ANE"


def __getattr__(name: str) -> object:
    if name == "Accelerator":
        return _accelerator()
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    install()
    return getattr(importlib.import_module("accelerate"), name)


@functools.cache
def _accelerator() -> type:
    install()
    import accelerate
    from torch import nn
    from torch.utils.data import DataLoader

    from ane_trainer.interop.lengths import PROGRAMS, pad_loaders

    class Accelerator(accelerate.Accelerator):  # type: ignore[misc]
        """accelerate's `Accelerator`, whose prepared models are compiled by the backend "ane".

        ane_options  of the backend: chip, device, fidelity, ... (docs/pytorch.md).
        """

        def __init__(
            self, *args: object, ane_options: Mapping[str, object] | None = None, **named: object
        ) -> None:
            if named.get("dynamo_plugin") is None and "dynamo_backend" not in named:
                options = {"recompile_limit": PROGRAMS, **(ane_options or {})}
                named["dynamo_plugin"] = accelerate.utils.TorchDynamoPlugin(backend=_NAME, options=options)
            super().__init__(*args, **{**named, "cpu": True, "mixed_precision": "no"})

        def prepare(self, *args: object, **named: object) -> object:
            """accelerate's, with batches of texts that come in few lengths: each is a program of its own."""
            configs = [getattr(given, "config", None) for given in args if isinstance(given, nn.Module)]
            tokens = [
                token for config in configs if (token := getattr(config, "pad_token_id", None)) is not None
            ]
            loaders = [given for given in args if isinstance(given, DataLoader)]
            if tokens and loaders:
                pad_loaders(loaders, tokens[0])
            return super().prepare(*args, **named)

    return Accelerator


def install() -> None:
    """From here on `transformers.TrainingArguments(torch_compile_backend="ane")` and accelerate take the backend.

    accelerate (1.15) refuses every backend that its enumeration `DynamoBackend` does not list;
    `tests/ane/dynamo/test_frameworks.py` tells when it does not any more. Calling it again changes nothing.

    Raises:
        MissingDependency: accelerate is not installed.
        EnvironmentFault: accelerate keeps its backends in another way.
    """
    try:
        from accelerate.utils import dataclasses
    except ImportError:
        raise MissingDependency(
            "accelerate: needs the package; got none. Do: pip install accelerate."
        ) from None
    kind = getattr(dataclasses, "DynamoBackend", None)
    if kind is None:
        raise EnvironmentFault(
            "accelerate: needs its enumeration DynamoBackend; got a release without it. Try the backend without "
            "install(): it may not be needed any more."
        )
    if _NAME in kind.__members__:
        return
    member = str.__new__(kind, _NAME)
    member._name_, member._value_ = _NAME, _NAME
    kind._member_map_[_NAME] = kind._value2member_map_[_NAME] = member
    kind._member_names_.append(_NAME)
