"""The loss of a model that a command is asked about, and targets for it where no data is given."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ane_trainer.ane.errors import DataError, UsageError
from ane_trainer.commands.blame import users_line

if TYPE_CHECKING:
    import torch

    from ane_trainer.ane.capture.losses import Loss
    from ane_trainer.commands.subjects import Request


def loss_and_target(
    name: str, output: object, x: torch.Tensor | tuple[torch.Tensor, ...], request: Request
) -> tuple[str | Loss, torch.Tensor]:
    """The loss, and targets of the kind that it takes.

    A function of the user's gets class numbers if it takes those, else numbers of the output's shape.
    """
    import torch

    loss: str | Loss = request.loss
    if isinstance(loss, str) and ":" in loss:
        return _own_loss(loss, output, request)
    assert isinstance(output, torch.Tensor)
    if loss == "auto":
        tokens = isinstance(x, torch.Tensor) and not x.is_floating_point()
        if isinstance(x, torch.Tensor) and output.ndim == 3 and tokens and output.shape[1] == x.shape[1]:
            from ane_trainer.ane.capture.losses import next_token_loss

            return next_token_loss, torch.randint(output.shape[2], tuple(x.shape))
        number = output.ndim < 2 or output.shape[1] == 1
        loss = "mse" if number or not output.ndim >= 2 else "cross_entropy"
    if loss in ("cross_entropy", "nll"):
        if output.ndim < 2:
            raise UsageError(
                f"{request.where}: {name} needs outputs [batch, classes] for {loss}; got {list(output.shape)}. "
                "Take another loss: --loss mse.",
                code="ANE104",
            )
        return loss, torch.randint(output.shape[1], (output.shape[0], *output.shape[2:]))
    y = torch.rand_like(output.float()) if str(loss).startswith("bce") else torch.randn_like(output.float())
    return loss, y


def _own_loss(spec: str, output: object, request: Request) -> tuple[Loss, torch.Tensor]:
    """A loss out of a file or module, and the first kind of targets for which it gives one number."""
    import torch

    from ane_trainer.ane.capture.trace.torch_private import pytree
    from ane_trainer.models import load_model_class

    loss = load_model_class(spec, "loss")
    faults: list[str] = []
    line = ""
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    for target in _targets(max(tensors, key=lambda leaf: leaf.ndim), request.batch) if tensors else ():
        try:
            with torch.no_grad(), warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                value = loss(output, target)
        except (RuntimeError, TypeError, IndexError, ValueError, AttributeError) as fault:
            faults.append(f"{list(target.shape)} {target.dtype}: {str(fault).splitlines()[0]}")
            line = line or users_line(fault)
            continue
        stretched = any(
            "target size" in str(each.message) for each in told
        )  # PyTorch's word for broadcast targets
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not stretched:
            return loss, target
        faults.append(f"{list(target.shape)} {target.dtype}: it gives no single number")
    raise DataError(
        f"{request.where}: {spec} needs to give one number for (output, target); "
        f"got ({'; '.join([*faults, *filter(None, [line])])}).",
        code="DATA105",
    )


def _targets(output: torch.Tensor, batch: int) -> list[torch.Tensor]:
    """Class numbers of each example, numbers like the output, a number of each example, class numbers of each place."""
    import torch

    classes = max(output.shape[1] if output.ndim > 1 else 2, 1)
    return [
        torch.randint(classes, (batch,)),
        torch.rand(output.shape),
        torch.rand(batch),
        torch.randint(classes, (output.shape[0], *output.shape[2:])),
    ]
