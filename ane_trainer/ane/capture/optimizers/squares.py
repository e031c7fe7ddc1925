"""RMSprop, Adagrad, Adadelta and Adafactor as rules: gradients divided by a running measure of their size."""

from __future__ import annotations

import torch

from ane_trainer.ane.capture.optimizers.formulas import least, number, sqrt
from ane_trainer.ane.capture.optimizers.rule import (
    RESIDUAL,
    RESIDUAL_SCALE,
    ROOT_FACTOR,
    SQUARE_FACTOR,
    SQUARE_RESIDUAL_SCALE,
    Group,
    Rule,
    Shape,
    Slot,
    Slots,
    Update,
    average,
    average_square,
    bounded,
    coupled_decay,
    decay_scalars,
    denominator,
    forgets_at_once,
    root_epsilon,
    root_mean_square,
    square_scalars,
    square_slot,
    step_rate,
    units_for,
)

#: Ratios beyond this come from denominators that left fp16.
_RATIO_BOUND = 1024.0
#: Adadelta's steps are kept in the scale of weights' residuals, divided by 4; sixteen squares must stay in fp16.
_STEP_BOUND = 60.0

_GATED = frozenset({"rate", "forget_sq", "admit_sq"})


def _compiled(group: Group) -> tuple[object, ...]:
    return bool(group["weight_decay"]), group["maximize"], forgets_at_once(group)


# -- RMSprop: means are kept corrected for their bias, which the scalars put back


def _share(group: Group, step: int) -> float:
    """1 - alpha, corrected: the weight of the new square."""
    return (1.0 - number(group["alpha"])) / _rms_bias(group, step)


def _rms_bias(group: Group, step: int) -> float:
    return 1.0 - number(group["alpha"]) ** step


def _rmsprop_slots(group: Group, shape: Shape) -> tuple[Slot, ...]:
    slots = [square_slot("square_avg", _rms_bias)]
    if group["momentum"]:
        slots.append(Slot("momentum_buffer", 0))
    if group["centered"]:
        slots.append(Slot("grad_avg", 1, bias=_rms_bias))
    return tuple(slots)


def _rmsprop_scalars(group: Group, step: int) -> dict[str, float]:
    """The root of the uncorrected mean is sqrt(bias) times ours: rate and epsilon are divided by it."""
    share, bias = _share(group, step), _rms_bias(group, step)
    scalars = {"rate": step_rate(group), "size": ROOT_FACTOR / sqrt(bias), **square_scalars(share)}
    if group["centered"]:
        scalars |= {"forget": share, "bias": bias * SQUARE_FACTOR}
    if group["momentum"]:
        scalars |= {"admit": 1.0, "forget_buffer": 1.0 - number(group["momentum"])}
    return scalars


def _rmsprop(u: Update) -> tuple[Slots, torch.Tensor]:
    """v += forget_sq*(g^2-v); centered: v - mean^2; ratio = g/(sqrt(v)+eps); momentum sums the ratios."""
    new: Slots = {}
    s, g = u.scalars, coupled_decay(u)
    v = average_square(u, "square_avg", g, new)
    if u.group["centered"]:
        new["grad_avg"] = mean = average(u.slots["grad_avg"], g, s["forget"])
        rest = new[f"square_avg/{RESIDUAL}"] * (1.0 / SQUARE_RESIDUAL_SCALE)
        v = torch.clamp((v - mean * mean * s["bias"]) + rest, min=0.0)
    ratio = bounded((g / denominator(u, v)) * s["size"], _RATIO_BOUND)
    if u.group["momentum"]:
        buffer = u.slots["momentum_buffer"]
        new["momentum_buffer"] = ratio = buffer + (ratio * s["admit"] - buffer * s["forget_buffer"])
    return new, ratio * s["rate"]


RMSPROP = Rule(
    update=_rmsprop,
    slots=_rmsprop_slots,
    scalars=_rmsprop_scalars,
    unit_range=lambda group: units_for(number(group["eps"])),
    unit_scalars=lambda group, step, unit: {
        "eps": root_epsilon(number(group["eps"]) / sqrt(_rms_bias(group, step)), unit),
        **decay_scalars(group, unit),
    },
    gated=_GATED | {"forget", "admit", "forget_buffer"},
    compiled=lambda group: (bool(group["momentum"]), group["centered"], *_compiled(group)),
)

# -- Adagrad: the mean of the squares is kept instead of their sum, which leaves fp16


def _adagrad(u: Update) -> tuple[Slots, torch.Tensor]:
    """mean += (g^2-mean)/t; step = rate * g/(sqrt(mean)+eps), rate and eps divided by sqrt(t)."""
    new: Slots = {}
    g = coupled_decay(u)
    below = denominator(u, average_square(u, "sum", g, new))
    return new, bounded(g / below, _RATIO_BOUND / ROOT_FACTOR) * u.scalars["rate"]


def _adagrad_scalars(group: Group, step: int) -> dict[str, float]:
    slowed = 1.0 + (step - 1) * number(group["lr_decay"])
    rate = step_rate(group) * ROOT_FACTOR / (slowed * sqrt(step))
    return {"rate": rate, **square_scalars(1.0 / step)}


ADAGRAD = Rule(
    update=_adagrad,
    slots=lambda group, shape: (square_slot("sum", lambda group, step: number(step)),),
    scalars=_adagrad_scalars,
    unit_range=lambda group: units_for(number(group["eps"])),
    unit_scalars=lambda group, step, unit: {
        "eps": root_epsilon(number(group["eps"]) / sqrt(step), unit),
        **decay_scalars(group, unit),
    },
    gated=_GATED,
    compiled=_compiled,
    takes=lambda group: not group["initial_accumulator_value"],
)

# -- Adadelta


def _rho_bias(group: Group, step: int) -> float:
    return 1.0 - number(group["rho"]) ** step


def _adadelta(u: Update) -> tuple[Slots, torch.Tensor]:
    """d = sqrt(a+eps) * g/sqrt(v+eps); a += forget_sq*(d^2-a); step = rate * d."""
    new: Slots = {}
    s, g = u.scalars, coupled_decay(u)
    v = average_square(u, "square_avg", g, new) + s["eps"]
    below = torch.sqrt(torch.clamp(v, min=u.least**2) if u.least else v)
    above = torch.sqrt(u.slots["acc_delta"] + s["step_eps"])
    step = bounded(bounded(g / below, _RATIO_BOUND / ROOT_FACTOR) * above, _STEP_BOUND)
    average_square(u, "acc_delta", step, new, "step_")
    return new, step * s["rate"]


def _adadelta_scalars(group: Group, step: int) -> dict[str, float]:
    """Both means are divided by the bias of the step that reads them, which their ratio cancels.

    `below` comes times ROOT_FACTOR, so `step` is divided by it; its square times SQUARE_FACTOR is d^2.
    """
    bias, following = _rho_bias(group, step), _rho_bias(group, step + 1)
    forget = 1.0 - number(group["rho"])
    later = {f"step_{name}": value for name, value in square_scalars(forget / following).items()}
    return {
        "rate": -number(group["lr"]) * ROOT_FACTOR,
        "step_eps": number(group["eps"]) * RESIDUAL_SCALE**2 / bias,
        **square_scalars(forget / bias),
        **later,
    }


def _adadelta_slots(group: Group, shape: Shape) -> tuple[Slot, ...]:
    later: Slot = Slot(
        "acc_delta", 0, SQUARE_RESIDUAL_SCALE, lambda g, step: _rho_bias(g, step + 1), RESIDUAL_SCALE**2
    )
    return square_slot("square_avg", _rho_bias), later


ADADELTA = Rule(
    update=_adadelta,
    slots=_adadelta_slots,
    scalars=_adadelta_scalars,
    unit_range=lambda group: (0.0, 16.0 / sqrt(number(group["eps"]) or 1e-18)),
    unit_scalars=lambda group, step, unit: {
        "eps": number(group["eps"]) * unit**2 * SQUARE_FACTOR / _rho_bias(group, step),
        **decay_scalars(group, unit),
    },
    gated=_GATED | {"step_forget_sq", "step_admit_sq"},
    compiled=_compiled,
)

# -- Adafactor: second moments of matrices as a row times a column


def _adafactor(u: Update) -> tuple[Slots, torch.Tensor]:
    """u = g / sqrt(row*column/mean(row)); step = rate * max(eps2, rms(w)) / max(1, rms(u)/d) * u."""
    new: Slots = {}
    g, s = u.gradient, u.scalars
    if "variance" in u.slots:
        root = torch.sqrt(average_square(u, "variance", g, new))
    else:
        rows, columns = (
            torch.sqrt(average_square(u, name, root_mean_square(g, (axis,)), new))
            for name, axis in (("row_var", g.ndim - 1), ("col_var", g.ndim - 2))
        )
        mean = torch.maximum(root_mean_square(rows, (g.ndim - 2,)), s["mean_eps"])
        root = rows * (columns / mean)
    root = torch.maximum(root, s["eps"])
    root = torch.clamp(root, min=u.least) if u.least else root
    direction = bounded(g / root, _RATIO_BOUND / ROOT_FACTOR)
    length = torch.clamp(root_mean_square(direction) * s["inverse_d"], min=1.0)
    size = torch.maximum(root_mean_square(u.weight), s["least_weight"])
    delta = direction * ((size / length) * s["rate"]).reshape(1)
    return new, delta - u.weight * s["decay"] if u.group["weight_decay"] else delta


def _adafactor_slots(group: Group, shape: Shape) -> tuple[Slot, ...]:
    if len(shape) < 2:
        return (square_slot("variance"),)
    row, column = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
    return square_slot("row_var", shape=row), square_slot("col_var", shape=column)


def _adafactor_scalars(group: Group, step: int) -> dict[str, float]:
    rate, decay = number(group["lr"]), number(group["weight_decay"])
    scalars = {
        "rate": -least(rate, 1.0 / sqrt(step)) * RESIDUAL_SCALE * ROOT_FACTOR,
        "inverse_d": ROOT_FACTOR / number(group["d"]),
        "least_weight": number(group["eps"][1]),
        **square_scalars(number(step) ** number(group["beta2_decay"])),
    }
    return {**scalars, "decay": rate * decay * RESIDUAL_SCALE} if decay else scalars


def _first_epsilon(group: Group) -> float:
    given = group["eps"][0]
    return torch.finfo(torch.float32).eps if given is None else number(given)


def _adafactor_unit_scalars(group: Group, step: int, unit: float) -> dict[str, float]:
    """The mean of rows is at least eps1, a root at least eps1."""
    epsilon = _first_epsilon(group)
    return {
        "eps": root_epsilon(epsilon, unit),
        "mean_eps": root_epsilon(sqrt(epsilon), unit),
    }


ADAFACTOR = Rule(
    update=_adafactor,
    slots=_adafactor_slots,
    scalars=_adafactor_scalars,
    unit_scalars=_adafactor_unit_scalars,
    unit_range=lambda group: units_for(sqrt(_first_epsilon(group)) / 32.0),
    gated=_GATED | {"decay"},
    compiled=_compiled,
)
