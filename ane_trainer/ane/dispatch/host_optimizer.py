"""The optimizer on the host: any torch.optim object in fp32, with the gradients that the engine computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ane_trainer.ane.capture.optimizers.table import missing_rule
from ane_trainer.ane.capture.trace.torch_private import TorchDispatchMode, pytree
from ane_trainer.ane.errors import Finding, UnsupportedModel

_GROUP = "group/"


class HostOptimizer:
    """Runs `optimizer` on gradients by parameter name. `flops` are those of the first update, counted once.

    Raises: UnsupportedModel for optimizers that need a closure.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            reason = (
                "calls the model itself (its step needs a closure), which one program a step cannot serve."
            )
            fix = 'Use another optimizer, or torch.compile(model, backend="ane") with your own loop.'
            finding = Finding("optimizer", type(optimizer).__name__, reason, fix)
            raise UnsupportedModel("The optimizer cannot run:", [finding])
        self._optimizer = optimizer
        self._parameters = dict(model.named_parameters())
        self._start = [_counts(group) for group in optimizer.param_groups]
        self.flops = 0

    @property
    def _sparse(self) -> bool:
        """Whether the optimizer takes only gradients of the rows that a batch looks up."""
        return isinstance(self._optimizer, torch.optim.SparseAdam)

    def update(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """One `optimizer.step()`; `grad` of parameters without a gradient is None."""
        for name, parameter in self._parameters.items():
            gradient = gradients.get(name)
            if gradient is not None:
                gradient = gradient.reshape(parameter.shape).to(parameter.dtype)
                gradient = gradient.to_sparse(1) if self._sparse else gradient
            parameter.grad = gradient
        if self.flops:
            self._optimizer.step()
        else:
            with _Counter() as counter:
                self._optimizer.step()
            self.flops = counter.flops
        for parameter in self._parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """The optimizer's state by `<number>/<key>`; other things than tensors and numbers are left out.

        So are settings of groups, but not the integers that its steps count there.
        """
        found = {}
        for number, entries in self._optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                if isinstance(value, torch.Tensor):
                    found[f"{number}/{key}"] = value.clone()
                elif isinstance(value, (int, float)):
                    found[f"{number}/{key}/number"] = torch.tensor(value, dtype=torch.float64)
        for number, (group, start) in enumerate(zip(self._optimizer.param_groups, self._start, strict=True)):
            for key, value in _counts(group).items():
                if value != start.get(key):
                    found[f"{_GROUP}{number}/{key}"] = torch.tensor(value, dtype=torch.float64)
        return found

    def set_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` returned."""
        states: dict[int, dict[str, object]] = {}
        for name, value in tensors.items():
            if name.startswith(_GROUP):
                place, key = name.removeprefix(_GROUP).split("/", 1)
                self._optimizer.param_groups[int(place)][key] = int(value)
                continue
            number, key, *kind = name.split("/")
            states.setdefault(int(number), {})[key] = _number(float(value)) if kind else value.clone()
        if states:
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": states, "param_groups": groups})


def reason_for_host(optimizer: torch.optim.Optimizer, place: str, continues: bool) -> str:
    """Why an optimizer that may run anywhere runs on the host; empty if it runs on the engine.

    continues: its saved state is of an optimizer on the host.
    """
    if place != "auto":
        return ""
    return "is continued where it was when its state was saved" if continues else missing_rule(optimizer)


def _counts(group: Mapping[str, object]) -> dict[str, int]:
    return {k: v for k, v in group.items() if isinstance(v, int) and not isinstance(v, bool)}


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations: torch's formulas where it has them, else one an element."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports triton where that is installed: 0.3 s

        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self._formulas = 0, flop_registry

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: dict[str, object] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        else:
            leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            if not leaves:  # `_foreach_` operations change a list in place
                leaves = [leaf for leaf in pytree.tree_leaves(args[:1]) if isinstance(leaf, torch.Tensor)]
            self.flops += sum(leaf.numel() for leaf in leaves if leaf.is_floating_point())
        return result
