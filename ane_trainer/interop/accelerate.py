"""Hugging Face accelerate and the backend "ane": its closed list of Dynamo backends gets one name more.

    from ane_trainer.interop.accelerate import Accelerator

is all that changes in a script: accelerate's own, with that backend and tensors on the host.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ane_trainer.ane.errors import EnvironmentFault, MissingDependency

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Accelerator", "install"]

_NAME = "ANE"


def __getattr__(name: str) -> object:
    if name != "Accelerator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _accelerator()


@functools.cache
def _accelerator() -> type:
    install()
    import accelerate

    class Accelerator(accelerate.Accelerator):  # type: ignore[misc]
        """accelerate's `Accelerator`, whose prepared models are compiled by the backend "ane"."""

        def __init__(self, *args: object, **named: object) -> None:
            if named.get("dynamo_plugin") is None:
                named.setdefault("dynamo_backend", _NAME)
            super().__init__(*args, **{**named, "cpu": True, "mixed_precision": "no"})

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
