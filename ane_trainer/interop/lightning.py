"""Lightning on the engine: in a script, only the line that imports it changes.

    from ane_trainer.interop import lightning as L

Every name is Lightning's own but `Trainer`, which runs a module's networks by `torch.compile` with the backend "ane":
forward and backward in programs, losses, logging and the optimizer on the host, checkpoints as ever.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from ane_trainer.ane.errors import MissingDependency
from ane_trainer.interop.lengths import PROGRAMS

try:
    lightning = importlib.import_module("lightning")
except ImportError:
    raise MissingDependency("lightning: needs the package; got none. Do: pip install lightning.") from None

__all__ = ["Trainer"]

_engine = importlib.import_module("lightning.pytorch")
_rank_zero = importlib.import_module("lightning.pytorch.utilities.rank_zero")


def __getattr__(name: str) -> object:
    return getattr(lightning, name) if hasattr(lightning, name) else getattr(_engine, name)


class Trainer(lightning.Trainer):  # type: ignore[misc, name-defined]
    """Lightning's `Trainer`, with tensors on the host and the networks of its module on the engine or the simulator.

    ane_options  of the backend: chip, device, fidelity, ... (docs/pytorch.md).
    """

    def __init__(
        self, *args: object, ane_options: Mapping[str, str | int | bool] | None = None, **named: object
    ) -> None:
        for name, only in (("accelerator", "cpu"), ("precision", "32-true")):
            if named.get(name, "auto") not in ("auto", only, None, 32, "32"):
                _rank_zero.rank_zero_warn(f"ane_trainer: {name}={named[name]!r} is left out for {only!r}")
            named[name] = only
        super().__init__(*args, **named)
        self.callbacks.insert(0, _Compiling({"recompile_limit": PROGRAMS, **(ane_options or {})}))


class _Compiling(lightning.Callback):  # type: ignore[misc, name-defined]
    """Compiles each network of the module before it is first used, and names those that never ran."""

    def __init__(self, options: Mapping[str, str | int | bool]) -> None:
        self._options: dict[str, str | int | bool | Callable[..., object]] = {**options}
        self._called: dict[str, bool] = {}

    def _start(self, trainer: Trainer, module: nn.Module) -> None:
        for name, network in networks(module):
            if network._compiled_call_impl is None:
                network._compiled_call_impl = self._compiled(name, network)

    on_fit_start = on_validation_start = on_test_start = on_predict_start = _start

    def _compiled(self, name: str, network: nn.Module) -> Callable[..., object]:
        # A function of ours around the module: Dynamo passes over the code of torch's own containers.
        call: Callable[..., object] = network._call_impl

        def whole(*args: object, **named: object) -> object:
            return call(*args, **named)

        compiled = torch.compile(whole, backend="ane", options=self._options)
        self._called[name] = False

        def run(*args: object, **named: object) -> object:
            self._called[name] = True
            return compiled(*args, **named)

        return run

    def on_fit_end(self, trainer: Trainer, module: nn.Module) -> None:
        """Warn of networks that only parts of were called: these ran on the CPU."""
        unused = [name for name, called in self._called.items() if not called]
        if unused and not self._called.get(""):
            _rank_zero.rank_zero_warn(
                f"ane_trainer: never called as a whole, so on the CPU if at all: {', '.join(map(repr, unused))}"
            )


def networks(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What a module calls: itself, where it has a forward of its own, and its parts with parameters, by name."""
    if not name and type(module).forward is not lightning.LightningModule.forward:
        yield name, module
    for key, part in module.named_children():
        path = f"{name}.{key}" if name else key
        if isinstance(part, nn.ModuleList | nn.ModuleDict):
            yield from networks(part, path)
        elif any(True for _ in part.parameters()):
            yield path, part
