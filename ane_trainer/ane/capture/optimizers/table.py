"""The table of rules by optimizer class, and the host's side of them: the value of every scalar for the next update.

Scalars are read from the user's `torch.optim` object before every step, in float64, so learning-rate schedulers and
changes of a parameter group by hand act at once. Settings that are compiled into the program (whether there is
momentum, weight decay, ...) are watched: changing one asks for a new program.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ane_trainer.ane.capture.optimizers.adam import ADAM, ADAMAX, LAMB, NADAM, RADAM
from ane_trainer.ane.capture.optimizers.momentum import LION, MUON, SGD
from ane_trainer.ane.capture.optimizers.rule import Group, Rule, adapted
from ane_trainer.ane.capture.optimizers.squares import ADADELTA, ADAFACTOR, ADAGRAD, RMSPROP
from ane_trainer.ane.capture.optimizers.trial import difference
from ane_trainer.ane.capture.trace.torch_private import has_global_step_hooks
from ane_trainer.ane.errors import Finding, UnsupportedModel, UsageError
from ane_trainer.ane.mil.program import MAX_FP16

#: Exact optimizer class -> rule. A subclass may override `step`, so it is not taken for its parent.
RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: ADAM,
    torch.optim.AdamW: ADAM,
    torch.optim.Adamax: ADAMAX,
    torch.optim.NAdam: NADAM,
    torch.optim.RAdam: RADAM,
    torch.optim.RMSprop: RMSPROP,
    torch.optim.Adagrad: ADAGRAD,
    torch.optim.Adadelta: ADADELTA,
    torch.optim.Adafactor: ADAFACTOR,
}
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    RULES[torch.optim.Muon] = MUON

#: Names that `register_optimizer` takes, for classes of the same settings and the same arithmetic.
NAMED: dict[str, Rule] = {
    **{kind.__name__.lower(): rule for kind, rule in RULES.items()},
    "lion": LION,
    "lamb": LAMB,
}


def _lamb_settings(group: Group) -> Group:
    """pytorch_optimizer's Lamb: the paper's third version with a corrected rate and norms of at most 10."""
    decoupled = group["weight_decouple"]
    return {**group, "bias_correction": False, "corrected_rate": True, "largest_norm": 10.0,
            "decoupled_weight_decay": decoupled}  # fmt: skip


def _lamb_options(group: Group) -> bool:
    off = ("rectify", "adam", "fixed_decay", "adam_debias", "adanorm", "cautious", "use_gc")
    return bool(group["grad_averaging"]) and not any(group.get(name) for name in off)


def _timm_lamb_options(group: Group) -> bool:
    off = ("max_grad_norm", "trust_clip", "caution", "decoupled_decay")
    return bool(group["grad_averaging"] and group["weight_decay"]) and not any(
        group.get(name) for name in off
    )


def _lion_options(group: Group) -> bool:
    off = ("fixed_decay", "adanorm", "cautious", "caution", "use_gc", "corrected_weight_decay")
    coupled = bool(group["weight_decay"]) and not group.get("weight_decouple", True)
    return not coupled and not any(group.get(name) for name in off)


_PACKAGED_LION = adapted(LION, lambda group: group, _lion_options)

#: Classes of packages that a rule covers, by module and name: nothing is to be registered for these. What a package
#: changes in a later version, and settings outside the groups, show in the trial.
PACKAGES: dict[str, Rule] = {
    "lion_pytorch.lion_pytorch.Lion": _PACKAGED_LION,
    "pytorch_optimizer.optimizer.lion.Lion": _PACKAGED_LION,
    "timm.optim.lion.Lion": _PACKAGED_LION,
    "pytorch_optimizer.optimizer.lamb.Lamb": adapted(
        LAMB, _lamb_settings, _lamb_options, lambda step: {"step": step}
    ),
    "timm.optim.lamb.Lamb": adapted(
        LAMB, lambda group: group, _timm_lamb_options, lambda step: {"step": torch.tensor(float(step))}
    ),
}
#: What `register_optimizer` was given.
_REGISTERED: dict[type[torch.optim.Optimizer], Rule] = {}

#: The optimizer runs on the host: no state and no scalars on the engine.
HOST = Rule(
    update=lambda u: ({}, torch.zeros_like(u.weight)),
    slots=lambda group, shape: (),
    scalars=lambda group, step: {},
    gated=frozenset(),
    compiled=lambda group: (),
    counters=lambda group, step: {},
)


def register_optimizer(kind: type[torch.optim.Optimizer], rule: Rule | str) -> None:
    """Let the engine run optimizers of class `kind` (not of its subclasses) by `rule`, or by one named here.

    Each optimizer is compared with its rule, in fp32 on small tensors, when a step is compiled: one that differs
    stays on the host, and the placement says so.

    Raises: UsageError for a class that is no optimizer, or an unknown name.
    """
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UsageError(
            f"register_optimizer: needs a subclass of torch.optim.Optimizer; got {kind!r}. Give the class."
        )
    if isinstance(rule, str) and rule not in NAMED:
        raise UsageError(
            f"register_optimizer: needs a rule, or one of {', '.join(NAMED)}; got {rule!r}. Choose one of them."
        )
    _REGISTERED[kind] = NAMED[rule] if isinstance(rule, str) else rule


def missing_rule(optimizer: torch.optim.Optimizer) -> str:
    """Why the engine cannot run the optimizer, as the end of a sentence; empty if it can."""
    rule = _find(type(optimizer))
    if rule is None:
        return "has no update rule for the engine"
    if _step_hooks(optimizer):
        return "has hooks around its step, which no program calls"
    try:
        covered = all(map(rule.takes, optimizer.param_groups)) and bool(structure(optimizer, rule))
    except (KeyError, TypeError):  # a class with other settings than the rule reads
        covered = False
    if not covered:
        return "has no update rule for its settings"
    if type(optimizer) in RULES:
        return ""
    return difference(optimizer, rule)


def _step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own) or has_global_step_hooks()


def _find(kind: type[torch.optim.Optimizer]) -> Rule | None:
    named = PACKAGES.get(f"{kind.__module__}.{kind.__qualname__}")
    return _REGISTERED.get(kind) or RULES.get(kind) or named


def rule_for(optimizer: torch.optim.Optimizer, on_host: bool = False) -> Rule:
    """The rule of an optimizer's class; HOST if it is to run there.

    Raises: UnsupportedModel naming the supported classes.
    """
    if on_host:
        return HOST
    reason = missing_rule(optimizer)
    rule = _find(type(optimizer))
    if reason or rule is None:
        names = ", ".join(f"torch.optim.{cls.__name__}" for cls in RULES)
        fix = f'Use one of {names}, give it a rule (register_optimizer), or use optimizer_on="host".'
        finding = Finding("optimizer", type(optimizer).__name__, f"{reason}.", fix)
        raise UnsupportedModel("The optimizer cannot run on the engine:", [finding])
    return rule


# -- Scalars


def port_name(scalar: str, group: int, groups: int) -> str:
    """The scalar's port: its own name, with the group's number where there are several groups."""
    return scalar if groups == 1 else f"{scalar}_{group}"


def scalar_values(
    optimizer: torch.optim.Optimizer,
    rule: Rule,
    step: int,
    units: Sequence[Sequence[float]],
    lags: Sequence[Sequence[int]] = (),
) -> dict[str, list[float]]:
    """Port name -> values for update number `step` (1 for the first): one, or one for each parameter of the group.

    `units`: for each group those of its parameters, in order; `lags`: how many updates each is behind.

    Raises: UsageError if a value does not fit fp16.
    """
    groups = optimizer.param_groups
    values: dict[str, list[float]] = {}
    for number, (group, own) in enumerate(zip(map(plain, groups), units, strict=True)):
        late = lags[number] if lags else ()
        steps = [max(step - lag, 1) for lag in late] if any(late) else [step] * len(own)
        even = len(set(steps)) < 2
        shared = [rule.scalars(group, n) for n in (steps[:1] or [step] if even else steps)]
        named = {name: [values[name] for values in shared] for name in shared[0]}
        by_unit = {key: rule.unit_scalars(group, *key) for key in set(zip(steps, own, strict=True))}
        for name in by_unit[steps[0], own[0]] if own else ():
            named[name] = [by_unit[key][name] for key in zip(steps, own, strict=True)]
        for name, found in named.items():
            _check_range(name, number, found, group.get("lr"))
            values[port_name(name, number, len(groups))] = found
    return values


def updates_seen(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> int:
    """How many updates of a parameter its state in `optimizer.state` stands for, by torch's count; 0 without one.

    A parameter that was frozen, or joined later, has seen fewer than others.
    """
    count = dict.get(optimizer.state, parameter, {}).get("step", 0)
    return int(count) if isinstance(count, (int, float, torch.Tensor)) else 0


def uneven_groups(optimizer: torch.optim.Optimizer, rule: Rule) -> tuple[int, ...]:
    """The groups whose trained parameters have seen different numbers of updates."""
    if rule.group_counters(1):
        return ()
    seen = [
        {updates_seen(optimizer, p) for p in group["params"] if p.requires_grad}
        for group in optimizer.param_groups
    ]
    return tuple(
        i
        for i, (counts, group) in enumerate(zip(seen, optimizer.param_groups, strict=True))
        if len(counts) > 1 and "step" in rule.counters(plain(group), 1)
    )


def _check_range(name: str, group: int, values: Iterable[float], rate: Any) -> None:
    for value in values:
        if not abs(value) <= MAX_FP16:
            given = f"a learning rate of {float(rate):.12g}, which is " if rate is not None else ""
            raise UsageError(
                f"optimizer: {name} of parameter group {group} needs a magnitude of at most {MAX_FP16:g}; "
                f"got {given}{value:g} in the engine's units. Choose a smaller learning rate or weight decay."
            )


def structure(optimizer: torch.optim.Optimizer, rule: Rule) -> tuple[object, ...]:
    """What of the optimizer's settings is compiled in: compare before every step."""
    return tuple((rule.compiled(group), len(group["params"])) for group in optimizer.param_groups)


def check_hooks(optimizer: torch.optim.Optimizer, rule: Rule) -> None:
    """Raises: UnsupportedModel if the optimizer has hooks now."""
    if rule is not HOST and _step_hooks(optimizer):
        rule_for(optimizer)


def plain(group: Mapping[str, object]) -> Group:
    """The group with one-element tensors (a tensor learning rate) as floats."""
    return {
        key: float(value) if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        for key, value in group.items()
        if key != "params"
    }


def check_counters(name: str, state: Mapping[str, object], wanted: Mapping[str, float]) -> None:
    """UsageError for a number of the state that does not follow from its step: NAdam's product, set by hand.

    So for a step of 0 beside moments, which nothing corrects for their bias.
    """
    moments = [v for v in state.values() if isinstance(v, torch.Tensor) and v.dim()]
    if wanted.get("step") and not state.get("step", 1) and any(bool(v.any()) for v in moments):
        raise UsageError(
            f"optimizer.state: needs a step of {name} that its moments follow from; got 0 beside other numbers. Clear "
            'the whole state, or compile with optimizer_on="host".'
        )
    for key, number in wanted.items():
        given = state.get(key)
        if key == "step" or not isinstance(given, (int, float, torch.Tensor)):
            continue
        if abs(float(given) - number) > 1e-3 * abs(number):
            raise UsageError(
                f"optimizer.state: needs the {key} of {name} that its step gives ({number:.6g}); got "
                f'{float(given):.6g}. Set both together, or compile with optimizer_on="host".'
            )
