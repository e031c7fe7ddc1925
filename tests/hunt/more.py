"""More losses, optimizers and changes between steps, beside the first ones (`surroundings`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from tests.hunt import surroundings
from tests.hunt.surroundings import Change, Loss, Optimizer, by_classes


def _weights(o: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0.2, 3.0, o.shape[1], dtype=o.dtype)


def _triplet(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.triplet_margin_loss(o.flatten(1), y.flatten(1), o.flatten(1).roll(1, 0))


def _side(y: torch.Tensor) -> torch.Tensor:
    return torch.where(y.flatten(1)[:, 0] > 0, 1.0, -1.0).to(y.dtype)


def _embedded(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cosine_embedding_loss(o.flatten(1), y.flatten(1), _side(y), margin=0.2)


def _ranked(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    first, second = o.flatten(1)[:, 0], o.flatten(1)[:, 1]
    return F.margin_ranking_loss(first, second, _side(y), margin=0.1)


def _written(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Softmax and its logarithm written out, as in many tutorials."""
    p = o.softmax(1).clamp(min=1e-9)
    return -(F.one_hot(y, o.shape[1]).to(o.dtype) * p.log()).sum(1).mean()


def _focal(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    ce = F.cross_entropy(o, y, reduction="none")
    return ((1 - (-ce).exp()).square() * ce).mean()


def _distilled(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    target = (F.one_hot(y, o.shape[1]).to(o.dtype) * 3).log_softmax(1)
    return F.kl_div((o / 4).log_softmax(1), target, reduction="batchmean", log_target=True) * 16


NUMBERS: Mapping[str, Loss] = {
    **surroundings.NUMBERS, "huber_wide": lambda o, y: F.huber_loss(o, y, delta=10.0),
    "smooth_sharp": lambda o, y: F.smooth_l1_loss(o, y, beta=0.01, reduction="sum"), "triplet": _triplet,
    "embedded": _embedded, "ranked": _ranked,
    "poisson": lambda o, y: F.poisson_nll_loss(o.clamp(max=5.0), y.abs().clamp(max=20.0)),
    "gaussian_full": lambda o, y: F.gaussian_nll_loss(o, y, o.exp().clamp(1e-3, 1e3), full=True),
    "relative": lambda o, y: ((o - y).abs() / (y.abs() + 1e-3)).mean(),
    "msle": lambda o, y: F.mse_loss(F.softplus(o).log1p(), y.abs().log1p()),
    "quantile": lambda o, y: torch.maximum(0.9 * (y - o), -0.1 * (y - o)).mean(),
    "penalized": lambda o, y: F.mse_loss(o, y) + 1e-4 * o.square().sum() + 1e-3 * o.abs().mean(),
    "correlation": lambda o, y: 1 - torch.corrcoef(torch.stack((o.flatten(), y.flatten())))[0, 1],
    "psnr": lambda o, y: 10 * torch.log10(F.mse_loss(o, y)), "times_1e4": lambda o, y: F.mse_loss(o, y) * 1e4,
}  # fmt: skip
SHARES: Mapping[str, Loss] = {
    **surroundings.SHARES, "multilabel": lambda o, y: F.multilabel_soft_margin_loss(o.flatten(1), y.flatten(1)),
    "tversky": lambda o, y: 1 - (o.sigmoid() * y).sum() / (0.7 * o.sigmoid().sum() + 0.3 * y.sum() + 1e-7),
    "bce_mean_rows": lambda o, y: F.binary_cross_entropy_with_logits(o, y, reduction="none").flatten(1).sum(1).mean(),
    "hinge_embedding": lambda o, y: F.hinge_embedding_loss(o, 2 * y - 1),
    "iou": lambda o, y: 1 - (o.sigmoid() * y).sum() / (o.sigmoid() + y - o.sigmoid() * y).sum(),
}  # fmt: skip
CLASSES: Mapping[str, Loss] = {
    **surroundings.CLASSES,
    "class_weights": by_classes(lambda o, y: F.cross_entropy(o, y, weight=_weights(o))),
    "all_options": by_classes(lambda o, y: F.cross_entropy(o, y, _weights(o), ignore_index=0, label_smoothing=0.2)),
    "weights_sum": by_classes(lambda o, y: F.cross_entropy(o, y, _weights(o), ignore_index=2, reduction="sum")),
    "written": by_classes(_written), "focal_classes": by_classes(_focal), "distilled": by_classes(_distilled),
    "tempered": by_classes(lambda o, y: F.cross_entropy(o / 0.07, y)),
    "z_loss": by_classes(lambda o, y: F.cross_entropy(o, y) + 1e-4 * o.logsumexp(1).square().mean()),
    "brier": by_classes(lambda o, y: (o.softmax(1) - F.one_hot(y, o.shape[1])).square().sum(1).mean()),
    "margin_squared": by_classes(lambda o, y: F.multi_margin_loss(o, y, p=2, margin=2.0)),
}  # fmt: skip


def _groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, object]]:
    found = list(parameters)
    return [
        {"params": [p for p in found if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in found if p.ndim <= 1], "weight_decay": 0.0, "lr": 1e-2},
    ]


OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    **surroundings.OPTIMIZERS, "sgd_fast": lambda p: torch.optim.SGD(p, 0.5, weight_decay=1e-2),
    "dampened": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, dampening=0.5),
    "maximize": lambda p: torch.optim.Adam(p, 1e-3, maximize=True),
    "groups": lambda p: torch.optim.AdamW(_groups(p), 1e-3),
    "adam_fast": lambda p: torch.optim.Adam(p, 0.1, betas=(0.5, 0.9)),
    "nadam_decay": lambda p: torch.optim.NAdam(p, 1e-3, weight_decay=1e-2, decoupled_weight_decay=True),
    "rmsprop_eps": lambda p: torch.optim.RMSprop(p, 1e-2, alpha=0.9, eps=1e-10, weight_decay=1e-3),
    "adagrad_decay": lambda p: torch.optim.Adagrad(p, 1e-2, lr_decay=0.1, weight_decay=1e-3),
    "adam_tiny_rate": lambda p: torch.optim.Adam(p, 1e-5),
}  # fmt: skip


def _setting(name: str, value: object) -> Change:
    def change(model: nn.Module, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            if isinstance(group.get(name), tuple) == isinstance(value, tuple) and name in group:
                group[name] = value

    return change


def _whole_eval(model: nn.Module, optimizer: Optimizer) -> None:
    model.eval()


def _number(model: nn.Module, optimizer: Optimizer) -> None:
    """A Python number that the forward reads; an epsilon of a norm."""
    for module in model.modules():
        if isinstance(getattr(module, "factor", None), float):
            module.factor *= 0.5
        if isinstance(getattr(module, "eps", None), float):
            module.eps *= 10.0


def _one_tensor(model: nn.Module, optimizer: Optimizer) -> None:
    with torch.no_grad():
        last = list(model.parameters())[-1]
        last.copy_(torch.linspace(-1.0, 1.0, last.numel()).view_as(last))


def _frozen_norms(model: nn.Module, optimizer: Optimizer) -> None:
    """All parameters of one axis, if others are left."""
    if any(p.ndim > 1 for p in model.parameters()):
        for p in model.parameters():
            if p.ndim == 1:
                p.requires_grad_(False)
                p.grad = None


def _one_state(model: nn.Module, optimizer: Optimizer) -> None:
    """The state of one parameter begins again."""
    for p in list(optimizer.state)[:1]:
        del optimizer.state[p]


def _large_weights(model: nn.Module, optimizer: Optimizer) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8.0)


def _statistics(model: nn.Module, optimizer: Optimizer) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), torch.Tensor):
            module.reset_running_stats()  # type: ignore[operator]


CHANGES: Mapping[str, Change] = {
    **surroundings.CHANGES, "whole eval": _whole_eval, "number": _number, "one tensor": _one_tensor,
    "frozen vectors": _frozen_norms, "one state": _one_state, "weights x 8": _large_weights,
    "reset_running_stats": _statistics, "weight_decay": _setting("weight_decay", 0.05), "lr 0": _setting("lr", 0.0),
    "betas": _setting("betas", (0.7, 0.9)), "momentum": _setting("momentum", 0.5), "eps": _setting("eps", 1e-4),
}  # fmt: skip
