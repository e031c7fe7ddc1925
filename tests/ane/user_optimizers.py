"""Optimizers as their users write them, out of tensor operations, for the tests."""

from __future__ import annotations

import math
from typing import Any

import torch

Optimizer = torch.optim.Optimizer


class Lion(Optimizer):
    """As in its paper: the sign of an interpolated momentum, and decoupled weight decay."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.99), weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p)
                p.data.mul_(1 - group["lr"] * group["weight_decay"])
                update = state["exp_avg"] * beta1 + p.grad * (1 - beta1)
                p.add_(torch.sign(update), alpha=-group["lr"])
                state["exp_avg"].mul_(beta2).add_(p.grad, alpha=1 - beta2)


class HandAdam(Optimizer):
    """Adam with a Python integer for a step count."""

    def __init__(self, params: Any, lr: float = 2e-3, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["m"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    state["v"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["step"] += 1
                grad = p.grad
                if group["weight_decay"] != 0:
                    grad = grad.add(p, alpha=group["weight_decay"])
                state["m"] = beta1 * state["m"] + (1 - beta1) * grad
                state["v"] = beta2 * state["v"] + (1 - beta2) * grad**2
                m = state["m"] / (1 - beta1 ** state["step"])
                v = state["v"] / (1 - beta2 ** state["step"])
                p -= group["lr"] * m / (v.sqrt() + group["eps"])


class Lars(Optimizer):
    """SGD whose steps are as long as a share of the weight's norm."""

    def __init__(
        self, params: Any, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 1e-3
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": 0.02}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                grad = p.grad
                w_norm, g_norm = p.norm(2.0), grad.norm(2.0)
                ratio = group["trust"] * w_norm / (g_norm + w_norm * group["weight_decay"] + 1e-8)
                one = torch.ones_like(ratio)
                ratio = torch.where(w_norm > 0, torch.where(g_norm > 0, ratio, one), one)
                grad = grad.add(p, alpha=group["weight_decay"]) * ratio
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.clone(grad).detach()
                else:
                    state["momentum_buffer"].mul_(group["momentum"]).add_(grad)
                p.add_(state["momentum_buffer"], alpha=-group["lr"])


class Lamb(Optimizer):
    """Adam's direction times the ratio of norms; its step count is a tensor of the group."""

    def __init__(self, params: Any, lr: float = 5e-3, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group.setdefault("step", torch.zeros(()))
            group["step"] += 1
            count = group["step"].item()
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(p.grad, 0.1)
                v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                root = (v.sqrt() / math.sqrt(1 - 0.999**count)).add_(1e-6)
                update = (m / (1 - 0.9**count)).div_(root).add_(p, alpha=group["weight_decay"])
                ratio = (p.norm() / update.norm()).clamp(0.01, 10.0)
                p.add_(update * ratio, alpha=-group["lr"])


class Adan(Optimizer):
    """Three averages, one of differences of gradients: a state that is the gradient before."""

    def __init__(self, params: Any, lr: float = 2e-3, weight_decay: float = 0.02) -> None:
        betas = (0.98, 0.92, 0.99)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            b1, b2, b3 = group["betas"]
            group["step"] = group.get("step", 0) + 1
            c1, c2, c3 = (1.0 - b ** group["step"] for b in (b1, b2, b3))
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["m"], state["d"], state["n"] = (torch.zeros_like(p) for _ in range(3))
                if "previous" not in state or group["step"] == 1:
                    state["previous"] = p.grad.clone()
                change = p.grad - state["previous"]
                state["m"].mul_(b1).add_(p.grad, alpha=1 - b1)
                state["d"].mul_(b2).add_(change, alpha=1 - b2)
                both = p.grad + b2 * change
                state["n"].mul_(b3).addcmul_(both, both, value=1 - b3)
                below = (state["n"].sqrt() / math.sqrt(c3)).add_(group["eps"])
                update = (state["m"] / c1 + b2 * state["d"] / c2).div_(below)
                p.add_(update, alpha=-group["lr"]).div_(1 + group["lr"] * group["weight_decay"])
                state["previous"].copy_(p.grad)


class ClippedSecondMoment(Optimizer):
    """After Sophia: momentum divided by a running curvature (here squares), clipped entry by entry."""

    def __init__(self, params: Any, lr: float = 5e-3, rho: float = 0.04) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["m"], state["h"] = torch.zeros_like(p), torch.zeros_like(p)
                state["m"].mul_(0.96).add_(p.grad, alpha=0.04)
                state["h"].mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
                ratio = (state["m"].abs() / (group["rho"] * state["h"] + 1e-15)).clamp(None, 1)
                p.addcmul_(state["m"].sign(), ratio, value=-group["lr"])


class SumOfSquares(Optimizer):
    """Adagrad: a state that only grows."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    total = self.state[p].setdefault("total", torch.zeros_like(p))
                    total.addcmul_(p.grad, p.grad)
                    p.addcdiv_(p.grad, total.sqrt().add_(1e-10), value=-group["lr"])


class ScheduleFree(Optimizer):
    """Two weights, one a mean of the other: both must keep small steps."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            share = 1 / (group["k"] + 1)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "z" not in state:
                    state["z"] = torch.clone(p)
                p.lerp_(state["z"], weight=share)
                p.add_(p.grad, alpha=group["lr"] * (0.9 * (1 - share) - 1))
                state["z"].sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


class Foreach(Optimizer):
    """Momentum by `torch._foreach_` operations, nesterov-like."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            for p in params:
                if "v" not in self.state[p]:
                    self.state[p]["v"] = torch.zeros_like(p)
            buffers = [self.state[p]["v"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            steps = torch._foreach_add(grads, buffers, alpha=group["momentum"])
            torch._foreach_add_(params, steps, alpha=-group["lr"])


class Looking(Optimizer):
    """Stops where the gradient is small: it looks at a tensor."""

    def __init__(self, params: Any, lr: float = 0.1, how: str = "item") -> None:
        self.how = how
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self.how == "numpy":
                    size = abs(p.grad.detach().numpy()).max()
                elif self.how == "tolist":
                    size = max(p.grad.data.flatten().tolist())
                elif self.how == "if":
                    size = 1.0 if p.grad.norm() > 0 else 0.0
                else:
                    size = p.grad.norm().item()
                if size > 0:
                    p.add_(p.grad, alpha=-group["lr"])


class Noisy(Optimizer):
    """Langevin dynamics: random tensors."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad + 1e-3 * torch.randn_like(p), alpha=-group["lr"])


class EveryFew(Optimizer):
    """Momentum that starts over every few steps: other operations in some steps than in others."""

    def __init__(self, params: Any, lr: float = 0.05, every: int = 5) -> None:
        self.every, self.count = every, 0
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                    if self.count % self.every == 0:
                        buffer.zero_()
                    buffer.mul_(0.9).add_(p.grad)
                    p.add_(buffer, alpha=-group["lr"])


class Normalized(Optimizer):
    """Weights that stay on a sphere: they are divided by a tensor."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])
                    p.div_(p.norm())


class Careless(Optimizer):
    """Shrinks every parameter it has, also those without a gradient."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.99)
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])


class Named(Optimizer):
    """Momentum whose state has a name that the engine uses itself."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    kept = self.state[p].setdefault("residual", torch.zeros_like(p))
                    kept.mul_(0.9).add_(p.grad)
                    p.sub_(kept, alpha=group["lr"])
