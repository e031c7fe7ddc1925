"""What surrounds a model in the hunt: losses, optimizers, and what changes between steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Optimizer = torch.optim.Optimizer


def _dice(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    p = torch.sigmoid(o)
    return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


def _focal(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    each = F.binary_cross_entropy_with_logits(o, y, reduction="none")
    return (each * (1 - torch.exp(-each)) ** 2).mean()


def _masked_mean(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    mask = (y > 0).to(o.dtype)
    return ((o - y).square() * mask).sum() / mask.sum().clamp(min=1)


def _chosen_mean(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (o - y).abs()[y > 0].mean()


def _gaussian(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.gaussian_nll_loss(o, y, F.softplus(o) + 0.1)


def _log_cosh(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    d = o - y
    return (d + F.softplus(-2 * d) - 0.6931471805599453).mean()


def _contrast(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = F.normalize(o.flatten(1), dim=-1)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(o)))


#: Losses on numbers, on shares (0 or 1), and on classes.
NUMBERS: Mapping[str, Loss] = {
    "mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss, "smooth_l1": F.smooth_l1_loss,
    "mse_sum": lambda o, y: F.mse_loss(o, y, reduction="sum"), "l1_sum": lambda o, y: F.l1_loss(o, y, reduction="sum"),
    "rmse": lambda o, y: F.mse_loss(o, y).sqrt(), "masked_mean": _masked_mean, "chosen_mean": _chosen_mean,
    "gaussian": _gaussian, "log_cosh": _log_cosh, "weighted": lambda o, y: F.mse_loss(o, y) * 1e-3,
    "cosine": lambda o, y: (1 - F.cosine_similarity(o.flatten(1), y.flatten(1), dim=-1)).mean(),
    "norm": lambda o, y: torch.linalg.vector_norm(o - y), "contrast": _contrast,
}  # fmt: skip
SHARES: Mapping[str, Loss] = {
    "bce": F.binary_cross_entropy_with_logits, "dice": _dice, "focal": _focal,
    "bce_sum": lambda o, y: F.binary_cross_entropy_with_logits(o, y, reduction="sum"),
    "bce_weighted": lambda o, y: F.binary_cross_entropy_with_logits(o, y, pos_weight=torch.tensor(5.0, dtype=o.dtype)),
    "soft_margin": lambda o, y: F.soft_margin_loss(o, 2 * y - 1),
    "hinge": lambda o, y: F.relu(1 - (2 * y - 1) * o).mean(),
    "bce_plain": lambda o, y: F.binary_cross_entropy(torch.sigmoid(o), y),
}  # fmt: skip


def by_classes(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Loss:
    """A loss over classes, for outputs that keep them last."""
    return lambda o, y: loss(o.flatten(0, -2) if o.ndim == 3 else o, y.flatten() if o.ndim == 3 else y)


CLASSES: Mapping[str, Loss] = {
    "cross_entropy": by_classes(F.cross_entropy),
    "smoothed": by_classes(lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1)),
    "ignored": by_classes(lambda o, y: F.cross_entropy(o, y, ignore_index=0)),
    "cross_entropy_sum": by_classes(lambda o, y: F.cross_entropy(o, y, reduction="sum")),
    "nll": by_classes(lambda o, y: F.nll_loss(F.log_softmax(o, 1), y)),
    "kl": by_classes(lambda o, y: F.kl_div(F.log_softmax(o, 1), F.one_hot(y, o.shape[1]).to(o.dtype) * 0.8 + 0.02,
                                         reduction="batchmean")),
    "margin": by_classes(F.multi_margin_loss), "chosen": by_classes(lambda o, y: F.cross_entropy(o[y > 0], y[y > 0])),
    "gathered": by_classes(lambda o, y: -F.log_softmax(o, 1).gather(1, y[:, None]).mean()),
}  # fmt: skip

OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 1e-2),
    "momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
    "adam_decay": lambda p: torch.optim.Adam(p, 1e-3, weight_decay=1e-2),
    "adam_eps": lambda p: torch.optim.Adam(p, 1e-3, eps=1e-3, betas=(0.8, 0.95)),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-3),
    "radam": lambda p: torch.optim.RAdam(p, 1e-3),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "rmsprop_centered": lambda p: torch.optim.RMSprop(p, 1e-3, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2, eps=(1.2e-7, 1e-3)),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2),
}

#: What a loop does between steps, to model and optimizer, by name; the same to the step's and to the reference's.
Change = Callable[[nn.Module, Optimizer], None]


def _rate(model: nn.Module, optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.1


def _freeze(model: nn.Module, optimizer: Optimizer) -> None:
    first = next(model.parameters())
    first.requires_grad_(False)
    first.grad = None


def _evaluate(model: nn.Module, optimizer: Optimizer) -> None:
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.eval()


def _write(model: nn.Module, optimizer: Optimizer) -> None:
    for p in model.parameters():
        p.data = p.data * 0.5


def _clamp(model: nn.Module, optimizer: Optimizer) -> None:
    for p in model.parameters():
        p.data.clamp_(-0.05, 0.05)


def _reload(model: nn.Module, optimizer: Optimizer) -> None:
    model.load_state_dict({k: v * 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def _state(model: nn.Module, optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.ndim:
                value.mul_(0.25)


def _restart(model: nn.Module, optimizer: Optimizer) -> None:
    found = copy.deepcopy(optimizer.state_dict())
    for state in found["state"].values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                state[name] = value * 4.0
    optimizer.load_state_dict(found)


def _clear(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.state.clear()


def _buffers(model: nn.Module, optimizer: Optimizer) -> None:
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.mul_(0.5)


CHANGES: Mapping[str, Change] = {
    "none": lambda m, o: None, "lr": _rate, "requires_grad": _freeze, "eval": _evaluate, "p.data": _write,
    "clamp": _clamp, "load_state_dict": _reload, "moments": _state, "optimizer.load_state_dict": _restart,
    "state.clear": _clear, "buffers": _buffers,
}  # fmt: skip
