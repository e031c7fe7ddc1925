"""Which parameters a forward or a loss writes to itself: momentum encoders, power iterations, weights that are clipped.

They are seen by the operations, not by their numbers: a copy that follows its original (`k = 0.9 * k + 0.1 * q`)
has the same numbers in the first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from ane_trainer.ane.capture.trace.torch_private import OpOverload, TorchDispatchMode, schema
from ane_trainer.ane.errors import Finding, UnsupportedModel

#: What `nn.Embedding(max_norm=...)` writes it writes again before each look-up: nothing of it need be kept.
_AGAIN = torch.ops.aten.embedding_renorm_.default


class Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active: `found` are the names of the tensors that an operation wrote to, also through a view."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {t.untyped_storage().data_ptr(): name for name, t in tensors.items()}
        self.found: set[str] = set()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func is not _AGAIN and (called := schema(func)).is_mutable:
            given = dict(zip((a.name for a in called.arguments), args, strict=False)) | (kwargs or {})
            for argument in called.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.found.update(self._named(given.get(argument.name)))
        return func(*args, **(kwargs or {}))

    def _named(self, value: object) -> Iterator[str]:
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                name = self._names.get(tensor.untyped_storage().data_ptr())
                if name is not None:
                    yield name


def as_written(
    old: torch.Tensor, written: torch.Tensor | None, slots: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What an update is added to: a parameter as the forward left it, without the residual of entries that changed."""
    if written is None:
        return old, slots
    hi = written.reshape(old.shape)
    return hi, {**slots, "residual": torch.where(hi == old, slots["residual"], 0.0)}


def refuse_trained(names: Iterable[str]) -> None:
    """Raises: UnsupportedModel for parameters that the forward writes to, in fp16, and the host updates in fp32."""
    fix = "Do it in your loop, after each step (with torch.no_grad(): ...), or take an optimizer that the engine runs."
    reason = "is written to by the forward, and updated by an optimizer on the host."
    found = [Finding(name, "parameter", reason, fix) for name in names]
    if found:
        raise UnsupportedModel("The forward changes parameters that the engine does not update:", found)
