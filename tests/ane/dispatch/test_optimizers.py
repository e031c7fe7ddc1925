"""Every optimizer that has a rule, in whole steps on the simulator: against PyTorch, and continued bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer import compile_step
from ane_trainer.ane.capture.optimizers import Rule, Slot, Update, average, step_rate
from ane_trainer.ane.capture.optimizers.table import NAMED, PACKAGES, RULES, missing_rule
from ane_trainer.ane.capture.optimizers.trial import difference
from ane_trainer.ane.dispatch import TrainingStep
from ane_trainer.ane.errors import UsageError
from tests.ane.dispatch import test_gradients as plain
from tests.ane.dispatch.test_gradients import batches, distance, mlp

Make = Callable[[nn.Module], torch.optim.Optimizer]


class Lion(plain.Lion):
    """A user's Lion, registered below."""


class Lamb(torch.optim.Optimizer):
    """A user's LAMB as in the paper, with bias correction."""

    def __init__(self, params: Any, lr: float = 5e-3, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
                update = state["exp_avg"] / (1 - beta1 ** state["step"]) / root + group["weight_decay"] * p
                p.sub_(update * (group["lr"] * p.norm() / update.norm()))


class Signed(torch.optim.Optimizer):
    """A user's optimizer with a rule of its own."""

    def __init__(self, params: Any, lr: float = 1e-3, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 1 - group["beta"])
                p.sub_(mean.sign(), alpha=group["lr"])


def _signed(u: Update) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    mean = average(u.slots["mean"], u.gradient, u.scalars["share"])
    return {"mean": mean}, torch.sign(mean) * u.scalars["rate"]


SIGNED = Rule(
    update=_signed,
    slots=lambda group, shape: (Slot("mean", 1),),
    scalars=lambda group, step: {"rate": step_rate(group), "share": 1 - group["beta"]},
    gated=frozenset({"rate", "share"}),
    compiled=lambda group: (),
    counters=lambda group, step: {},
)
at.register_optimizer(Lion, "lion")
at.register_optimizer(Lamb, "lamb")
at.register_optimizer(Signed, SIGNED)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def overall(model: nn.Module, twin: nn.Module, start: nn.Module) -> float:
    """The error of all parameters together, relative to how far they moved."""
    a, b, c = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (model, twin, start))
    return float((a - b).norm() / (b - c).norm())


#: fp16 gradients are right to 2^-11 each, over 12 steps the path to half a per cent of its length. Where the signs
#: of gradients near 0 flip, a weight is two whole steps off. PyTorch's Muon iterates in bf16, 1.4 % of an update.
CASES: dict[str, tuple[Make, float]] = {
    "sgd": (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01), 0.005),
    "adam": (lambda m: torch.optim.Adam(m.parameters()), 0.005),
    "amsgrad": (lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True), 0.005),
    "adamax": (lambda m: torch.optim.Adamax(m.parameters()), 0.005),
    "nadam": (lambda m: torch.optim.NAdam(m.parameters()), 0.005),
    "radam": (lambda m: torch.optim.RAdam(m.parameters()), 0.005),
    "rmsprop": (lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3), 0.005),
    "rmsprop-all": (
        lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, centered=True, momentum=0.9), 0.01,
    ),
    "adagrad": (lambda m: torch.optim.Adagrad(m.parameters()), 0.005),
    "adadelta": (lambda m: torch.optim.Adadelta(m.parameters()), 0.01),
    "adafactor": (lambda m: torch.optim.Adafactor(m.parameters(), weight_decay=0.01), 0.005),
    "lamb": (lambda m: Lamb(m.parameters()), 0.005),
    "lion": (lambda m: Lion(m.parameters()), 0.15),
    "signed": (lambda m: Signed(m.parameters()), 0.15),
}  # fmt: skip


def compiled(model: nn.Module, make: Make, **options: Any) -> TrainingStep:
    return compile_step(model, "cross_entropy", make(model), batches(1)[0], fidelity="fast", **options)


@pytest.mark.parametrize("name", CASES)
def test_the_path_is_pytorchs_and_goes_on_bit_for_bit(name: str) -> None:
    make, bound = CASES[name]
    model, data = mlp(), batches(12)
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    step = compiled(model, make, sync="lazy")
    for x, y in data[:6]:
        step(x, y)
    kept = step.state_dict()
    for x, y in data[6:]:
        step(x, y)
    step.sync()
    assert (step.optimizer_on, step.engine_flop_fraction, step.compiles) == ("engine", 1.0, 1)
    reference = make(twin)
    for x, y in data:
        reference.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        reference.step()
    assert distance(model, twin, start) < bound
    other = copy.deepcopy(start)
    again = compiled(other, make, state=kept, sync="lazy")
    for x, y in data[6:]:
        again(x, y)
    again.sync()
    for (key, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_muon_is_pytorchs_within_its_bf16(shape: tuple[int, int]) -> None:
    """Gradients whose singular values are of one size: those near 0 are noise in bf16 and fp16 alike."""
    torch.manual_seed(2)
    model = nn.Linear(*shape, bias=False)
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    data = [(torch.randn(64, shape[0]), torch.randn(64, shape[1])) for _ in range(6)]
    step = compile_step(
        model, "mse", torch.optim.Muon(matrices(model)), data[0], fidelity="exact", sync="lazy"
    )
    reference = torch.optim.Muon(matrices(twin))
    for x, y in data:
        step(x, y)
        reference.zero_grad()
        F.mse_loss(twin(x), y).backward()
        reference.step()
    step.sync()
    assert step.optimizer_on == "engine"
    assert distance(model, twin, start) < 0.03


PACKAGED = [
    ("lion_pytorch", "Lion", {"weight_decay": 0.1}, ""),
    ("lion_pytorch", "Lion", {"weight_decay": 0.1, "decoupled_weight_decay": True}, "differs from its rule"),
    ("pytorch_optimizer", "Lion", {"weight_decay": 0.1}, ""),
    ("pytorch_optimizer", "Lion", {"cautious": True}, "no update rule for its settings"),
    ("pytorch_optimizer", "Lamb", {"weight_decay": 0.01}, ""),
    ("pytorch_optimizer", "Lamb", {"weight_decay": 0.01, "weight_decouple": False}, ""),
    ("pytorch_optimizer", "Lamb", {"pre_norm": True}, "differs from its rule"),
]


@pytest.mark.parametrize(("package", "name", "settings", "reason"), PACKAGED)
def test_optimizers_of_packages_run_where_they_agree(
    package: str, name: str, settings: dict[str, Any], reason: str
) -> None:
    kind = getattr(pytest.importorskip(package), name)
    assert f"{kind.__module__}.{kind.__qualname__}" in PACKAGES
    model, data = mlp(), batches(8)
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    step = compiled(model, lambda m: kind(m.parameters(), **settings), sync="lazy")
    assert step.optimizer_on == ("host" if reason else "engine")
    assert reason in step.placement()["optimizer_reason"]
    reference = kind(twin.parameters(), **settings)
    for x, y in data:
        step(x, y)
        reference.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        reference.step()
    step.sync()
    assert overall(model, twin, start) < (0.15 if name == "Lion" else 0.02)


def test_a_rule_that_is_not_the_classs_is_found_out() -> None:
    class Doubled(plain.Lion):
        def step(self, closure: Any = None) -> None:
            super().step()
            super().step()

    at.register_optimizer(Doubled, "lion")
    optimizer = Doubled(mlp().parameters())
    assert "differs from its rule in step 1" in missing_rule(optimizer)
    assert not optimizer.state
    optimizer.register_step_pre_hook(lambda *args: pytest.fail("a hook ran"))
    optimizer.register_step_post_hook(lambda *args: pytest.fail("a hook ran"))
    assert "has hooks around its step" in missing_rule(optimizer)  # without a trial; in one they do not run
    assert "differs from its rule in step 1" in difference(optimizer, NAMED["lion"])

    class Failing(plain.Lion):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("not today")

    at.register_optimizer(Failing, "lion")
    assert "not today" in missing_rule(Failing(mlp().parameters()))

    class Other(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"rate": 1.0})

    at.register_optimizer(Other, "adam")
    assert missing_rule(Other(mlp().parameters())) == "has no update rule for its settings"


def test_registering_checks_what_it_is_given() -> None:
    with pytest.raises(UsageError, match=r"subclass of torch\.optim\.Optimizer"):
        at.register_optimizer(nn.Linear, "lion")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="lamb"):
        at.register_optimizer(Lion, "tiger")
    assert set(NAMED) == {"lion", "lamb"} | {kind.__name__.lower() for kind in RULES}
