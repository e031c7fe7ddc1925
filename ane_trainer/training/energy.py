"""Energy of the Neural Engine in joules, by its own counter on a Mac; None wherever there is none.

The counter is the engine's power rail as `zeus-apple-silicon` reads it (IOReport, no administrator needed).
Unverified on hardware: written after that package's interface, tested up to it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ane_trainer.ane.dispatch.devices.aneforge_runtime import on_apple_silicon

EXTRA = 'pip install "ane_trainer[energy]"'

#: Devices whose programs the engine's rail can be charged with.
_ENGINES = ("e5rt", "e5rt-pingpong", "coreai")

_MODULE = "zeus_apple_silicon"
_WINDOW = "ane_trainer"


class Reading:
    """Filled when the measured block ends: `joules` of the engine's rail, None if not known."""

    joules: float | None = None


@contextmanager
def measured(device: str) -> Iterator[Reading]:
    """Measure the block if `device` runs on an engine and its counter can be read."""
    reading = Reading()
    monitor = _monitor() if device in _ENGINES and missing() is None else None
    if monitor is None:
        yield reading
        return
    try:
        monitor.begin_window(_WINDOW)
    except RuntimeError:
        yield reading
        return
    try:
        yield reading
    finally:
        reading.joules = _end(monitor)


def missing() -> str | None:
    """None if there may be a counter, else why there is none and what to type."""
    if not on_apple_silicon():
        return "the engine's counter is read on an Apple silicon Mac only"
    try:
        importlib.import_module(_MODULE)
    except ImportError:
        return f"the package zeus-apple-silicon is not installed. Install it: {EXTRA}"
    return None


def total(joules: list[float | None]) -> float | None:
    """The sum; None when a part is not known, or there is none."""
    known = [value for value in joules if value is not None]
    return math.fsum(known) if known and len(known) == len(joules) else None


def _monitor() -> Any:
    try:
        return importlib.import_module(_MODULE).AppleEnergyMonitor()
    except RuntimeError:  # what the package raises where the system gives no counters
        return None


def _end(monitor: Any) -> float | None:
    try:
        millijoules = getattr(monitor.end_window(_WINDOW), "ane_mj", None)
    except RuntimeError:
        return None
    return None if millijoules is None else float(millijoules) / 1000.0
