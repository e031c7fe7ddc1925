"""Assertions for a project's own tests: `assert_trains` says whether a model trains on Apple's engine.

def test_my_model_trains_on_the_engine() -> None:
    assert_trains(MyModel(), (x, y), chips=("m1", "m4"))
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING, cast

from ane_trainer.ane.errors import UsageError
from ane_trainer.commands.check import verdict_of
from ane_trainer.commands.subjects import ModelSubject, Request
from ane_trainer.commands.verdicts import Verdict

if TYPE_CHECKING:
    from torch import nn

    from ane_trainer.ane.capture.losses import Loss

__all__ = ["assert_trains"]


def assert_trains(
    model: nn.Module,
    example: tuple[object, object],
    *,
    loss: str | Loss = "cross_entropy",
    chips: Sequence[str] = ("m4",),
    optimizer: str = "adam",
    path: str = "e5rt",
    run: bool = True,
) -> Verdict:
    """Assert that the training step of a model compiles for each chip and keeps to fp32; returns what was found.

    example  (x, y) as the loop yields them; x may be a tuple of several inputs.
    run      run the step once on the simulator against fp32; False: legality alone.

    AssertionError with every problem, its place and the way out. UsageError for unknown chips or an optimizer other
    than adam, adamw and sgd.
    """
    if isinstance(chips, str):
        raise UsageError(
            f"chips: needs a sequence of names; got {chips!r}. Give ({chips!r},).", code="ANE104"
        )
    x = example[0]
    batch = len(cast(Sized, x[0] if isinstance(x, (tuple, list)) else x))
    request = Request("assert_trains", ((),), 1, batch, optimizer=optimizer)
    subject = ModelSubject(type(model).__name__, model, loss, example, request)
    found = verdict_of(subject, chips, path, run=run)
    if not found.fits:
        raise AssertionError(found.as_text())
    return found
