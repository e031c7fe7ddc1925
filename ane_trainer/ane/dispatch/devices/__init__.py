"""Devices: what can run a compiled program, and the choice among them."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass

from ane_trainer.ane.dispatch.devices.coreai import CoreAI
from ane_trainer.ane.dispatch.devices.e5rt import E5RT
from ane_trainer.ane.dispatch.devices.protocol import Device, Session
from ane_trainer.ane.dispatch.devices.sim import Simulator
from ane_trainer.ane.errors import EnvironmentFault, UsageError
from ane_trainer.utils import did_you_mean

__all__ = ["DEVICE_NAMES", "Choice", "Device", "Session", "choose_precision", "get_device", "register"]

#: Every name that `get_device` knows, the ones without an implementation on this machine included.
DEVICE_NAMES = ("auto", "sim", "e5rt", "e5rt-pingpong", "coreai", "cpu")

_REGISTERED: dict[str, Device] = {}

#: Devices that can run without reaching an engine say here why `auto` passes them over; None: it does not.
_PASSED_OVER: dict[str, Callable[[], str | None]] = {}


@dataclass(frozen=True)
class Choice:
    """A device, and why it was taken when the user left the choice open."""

    device: Device
    reason: str


def register(device: Device, passed_over: Callable[[], str | None] | None = None) -> None:
    """Make a device available under its name; the order of registration is the order of `auto`."""
    _REGISTERED[device.name] = device
    if passed_over is not None:
        _PASSED_OVER[device.name] = passed_over


def choose_precision(device: Device, precision: str) -> str:
    """The float type of programs for a device; `auto` takes the device's first choice.

    Raises: UsageError for one that the device does not run.
    """
    if precision == "auto":
        return device.precisions[0]
    if precision not in device.precisions:
        known = " or ".join(("auto", *device.precisions))
        raise UsageError(
            f"precision: needs {known} on device {device.name}; got {precision!r}. Choose one of them.",
            code="ANE113",
        )
    return precision


def get_device(name: str) -> Choice:
    """The device called `name`; `auto` takes the first available engine, else the simulator.

    Raises: UsageError for an unknown name, or for `cpu`, which runs no program; EnvironmentFault when the
    device cannot run here, saying what to type instead. Nothing falls back in silence.
    """
    if name == "auto":
        return _choose()
    if name == "cpu":
        raise UsageError(
            'device: needs a device that runs programs; got "cpu", which is plain PyTorch without a program. '
            'Use Trainer(..., device="cpu") or `ane-trainer train --device cpu` for it, or device="sim".',
            code="ANE101",
        )
    device = _REGISTERED.get(name)
    if device is None:
        raise UsageError(_unknown(name), code="ANE101")
    reason = device.unavailable()
    if reason is not None:
        raise EnvironmentFault(f"device: needs {name} to be available; {reason}", code="ANE202")
    return Choice(device, "as asked for")


def _choose() -> Choice:
    refused = []
    for device in _REGISTERED.values():
        if device.name == "sim":
            continue
        why = device.unavailable() or _PASSED_OVER.get(device.name, lambda: None)()
        if why is None:
            return Choice(device, f"auto: {device.name} is available")
        refused.append(f"{device.name}: {why}")
    here = f"{platform.system()} {platform.machine()}"
    if here != "Darwin arm64":
        return Choice(_REGISTERED["sim"], f"auto: no Neural Engine here, {here}")
    return Choice(_REGISTERED["sim"], "auto: " + "; ".join(refused))


def _unknown(name: str) -> str:
    return f"device: needs a known one; got {name!r}. {did_you_mean(str(name), DEVICE_NAMES)}"


register(Simulator())
register(coreai := CoreAI(), coreai.not_chosen)
register(direct := E5RT(), direct.not_chosen)
register(E5RT("pingpong"), lambda: "it is taken only by name")
