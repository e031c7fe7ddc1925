"""Checks of a model's parameters before a compilation: they hold numbers, on the CPU, within the precision."""

from __future__ import annotations

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ane_trainer.ane.dispatch.feeds import Range
from ane_trainer.ane.errors import DataError, UsageError


def check_placed(model: torch.nn.Module, where: str = "model") -> None:
    """UsageError ANE103 for parameters or buffers that hold no numbers yet, or are on another device than the CPU."""
    lazy, elsewhere = [], []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)) or tensor.is_meta:
            lazy.append(name)
        elif tensor.device.type != "cpu":
            elsewhere.append(f"{name} on {tensor.device}")
    if lazy:
        got = f"{', '.join(lazy[:3])} without (lazy modules, device 'meta')"
        fix = "Run the model once on an example, or build it on the CPU, before its optimizer is made."
    elif elsewhere:
        got = f"{', '.join(elsewhere[:3])}{' and more' if len(elsewhere) > 3 else ''}"
        fix = "Call model.cpu() before the optimizer is made: a step's weights live on the engine, not on a GPU."
    else:
        return
    raise UsageError(f"{where}: needs parameters with numbers, on the CPU; got {got}. {fix}", code="ANE103")


def check_parameters(model: torch.nn.Module, limits: Range) -> None:
    """DataError for parameters that are nan or inf, or that the precision does not hold; and `check_placed`."""
    check_placed(model)
    wrong = [
        f"{name} up to {float(peak):g}"
        for name, p in model.named_parameters()
        if p.numel() and p.is_floating_point()
        if not (peak := _peak(p.detach())) <= limits.largest
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(
            f"model: needs parameters that are finite and at most {limits.largest:g} ({limits.name}); got "
            f"{', '.join(wrong[:3])}{more}. Reinitialise the model, or load weights that are whole.",
            code="DATA106",
        )


def _peak(tensor: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high)
