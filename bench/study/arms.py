"""The arms of the study: plain PyTorch, the engine's arithmetic, and the latter without one of its ingredients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from unittest import mock

import torch

from ane_trainer.ane.capture import parts, update
from ane_trainer.ane.capture.optimizers.rule import two_term_add
from ane_trainer.ane.dispatch import loading
from ane_trainer.ane.stages import Captured


@dataclass(frozen=True)
class Arm:
    """One way to train: options of `Trainer`, and a change to how the step is captured."""

    name: str
    what: str
    options: Mapping[str, object]
    nudge: float = 0.0  #: relative change of the first weights
    change: Callable[[], AbstractContextManager[object]] = field(default=nullcontext, repr=False)


def _captured_anew() -> AbstractContextManager[object]:
    """No step from the disk, which knows nothing of what is left out here."""
    return mock.patch.object(loading, "memory_of", return_value=None)


@contextmanager
def _one_term() -> Iterator[None]:
    """A weight is one fp16 number: what two terms would keep of an update beyond it is thrown away."""

    def add(hi: torch.Tensor, lo: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        high, low = two_term_add(hi, lo, delta)
        return high, low * 0.0

    with _captured_anew(), mock.patch.object(update, "two_term_add", add):
        yield


@contextmanager
def _no_range_pass() -> Iterator[None]:
    """The graph as captured: neither norms by row nor powers of two beside values."""

    def as_it_is(captured: Captured, sizes: object, buffers: object) -> Captured:
        return captured

    def nothing(*arguments: object, **options: object) -> None:
        return None

    rows = mock.patch.object(parts, "scale_rows", nothing)
    with _captured_anew(), mock.patch.object(parts, "scale_found", as_it_is), rows:
        yield


_EXACT: Mapping[str, object] = {"device": "sim", "chip": "m4", "fidelity": "exact"}

#: By name, the reference first.
ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("fp32", "plain PyTorch on the CPU", {"device": "cpu"}),
        Arm(
            "nudged", "plain PyTorch from weights changed by one part in ten million", {"device": "cpu"}, 1e-7
        ),
        Arm("exact", "everything on the engine, the engine's arithmetic (M4)", _EXACT),
        Arm("fast", "the same program with sums in fp32", {**_EXACT, "fidelity": "fast"}),
        Arm("host", "exact, but the optimizer in fp32 on the host", {**_EXACT, "optimizer_on": "host"}),
        Arm("one-term", "exact, but each weight is one fp16 number", _EXACT, change=_one_term),
        Arm(
            "no-range",
            "exact, but the graph as captured, without the range pass",
            _EXACT,
            change=_no_range_pass,
        ),
    )
}
