"""Calibrate a step by one run in plain PyTorch: which random draws it makes, and how large its gradients are.

Also the two places where the user's code is called, which `sources` knows by their names.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ane_trainer.ane.capture.batches import plain_tensor
from ane_trainer.ane.capture.buffers import kept_views
from ane_trainer.ane.capture.intermediates import gradients_and_largest_intermediate
from ane_trainer.ane.capture.losses import Loss, check_classes
from ane_trainer.ane.capture.ports import Parameter
from ane_trainer.ane.capture.randomness import HostRandomMode, RandomDraw
from ane_trainer.ane.capture.rewrites.decompositions import decomposition_table
from ane_trainer.ane.capture.rewrites.keras_variables import (
    keras_state,
    own_signature,
    training_argument,
    variables_as,
)
from ane_trainer.ane.capture.rewrites.substitutes import rewriting
from ane_trainer.ane.capture.scaling import LARGEST_SCALE, SMALLEST_SCALE
from ane_trainer.ane.capture.stand_ins import StandIns
from ane_trainer.ane.capture.trace.torch_private import pytree
from ane_trainer.ane.capture.written import Writes
from ane_trainer.ane.errors import Finding, UnsupportedModel

Tensors = dict[str, torch.Tensor]

#: Where calibration puts the largest scaled gradient, and the largest gradient in its parameter's unit.
CALIBRATED_GRADIENT = 2048.0
CALIBRATED_UNIT_PEAK = 8.0
#: A gradient in its unit up to here leaves the unit as it is.
LARGEST_UNIT_PEAK = 4.0 * CALIBRATED_UNIT_PEAK
#: A gradient counts as this share of the largest at least: what is smaller in fp32 may be rounding in fp16, as that
#: of a bias before batch norm. Units of gradients that are truly that small move in the first steps.
LEAST_SHARE = 2.0**-10
#: Where the loss scale keeps gradients on their way: a quarter of fp16's range, since other batches have larger ones.
INTERMEDIATE_GRADIENT_BOUND = 2.0**14
#: The most that the loss scale is lowered for them: below, the accumulator's step of 2^-16 shows in the gradients.
LARGEST_CONCESSION = 64.0


@dataclass(frozen=True)
class Calibration:
    """What one plain PyTorch step on the example shows: its random draws, the largest entry of each gradient.

    `norm` is that of all gradients together. `witness`: what the function of that name gives, within rounding; empty
    where random draws count. `written`: parameters that the forward or the loss itself changes.
    """

    draws: tuple[RandomDraw, ...]
    peaks: Mapping[str, float]
    max_intermediate_gradient: float = 0.0
    norm: float = 0.0
    witness: tuple[float, ...] = ()
    written: tuple[str, ...] = ()

    def loss_scale(self) -> float:
        """A power of two that brings the largest gradient near CALIBRATED_GRADIENT, and none out of fp16."""
        peak = max(self.peaks.values(), default=0.0)
        wanted = _power_of_two(CALIBRATED_GRADIENT, peak, SMALLEST_SCALE, LARGEST_SCALE)
        return max(min(wanted, self.ceiling()), wanted / LARGEST_CONCESSION, SMALLEST_SCALE)

    def ceiling(self) -> float:
        """The loss scale up to which the gradients between the operations stay within INTERMEDIATE_GRADIENT_BOUND."""
        bound, largest = INTERMEDIATE_GRADIENT_BOUND, self.max_intermediate_gradient
        return _power_of_two(bound, largest, SMALLEST_SCALE, LARGEST_SCALE, LARGEST_SCALE)

    def unit(
        self, name: str, bounds: tuple[float, float], least: float = 0.0, most: float = math.inf
    ) -> float:
        """A power of two that brings the parameter's largest gradient near CALIBRATED_UNIT_PEAK.

        The gradient counts as `least` at least, and as `most` at most, to which it is clipped; one that is 0 in the
        example gets the unit of the largest.
        """
        largest = max(self.peaks.values())
        peak = max(min(max(self.peaks.get(name, 0.0) or largest, LEAST_SHARE * largest), most), least)
        return _power_of_two(CALIBRATED_UNIT_PEAK, peak, *bounds)


def calibrate(
    model: torch.nn.Module, loss: Loss, parameters: Sequence[Parameter], example: tuple[object, object]
) -> Calibration:
    """One forward and backward in plain PyTorch on copies; neither the model nor the random state changes.

    Only choices of scale come from it, never values: another example gives the same step up to rounding.
    """
    values = _copied(parameters)
    trained = [values[p.name] for p in parameters if p.trained]
    mode, writes = HostRandomMode(), Writes(values)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), rewriting(values_known=True), mode, writes:
        before = torch.get_rng_state()
        tensors = {**values, **copies(model, with_sparse=True)}
        output = call_aside(model, tensors, example[0])
        check_classes(loss, output, example[1])
        value = call_loss(loss, output, example[1], model, tensors)
        drawn = bool(mode.noted) or not torch.equal(before, torch.get_rng_state())
    _check_loss(value, bool(trained))
    gradients, largest = gradients_and_largest_intermediate(value.float(), trained, decomposition_table())
    peaks = _peaks(parameters, gradients)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
    known = () if drawn else _witness(value, gradients)
    return Calibration(tuple(mode.noted), peaks, largest, norm, known, tuple(sorted(writes.found)))


def gradient_peaks(
    model: torch.nn.Module, loss: Loss, parameters: Sequence[Parameter], example: tuple[object, object]
) -> dict[str, float]:
    """The largest entry of each gradient alone, with the draws of `calibrate`: its runs take half as long again."""
    values = _copied(parameters)
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        rewriting(values_known=True),
        HostRandomMode(),
    ):
        tensors = {**values, **copies(model, with_sparse=True)}
        value = call_loss(loss, call_aside(model, tensors, example[0]), example[1], model, tensors)
    trained = [values[p.name] for p in parameters if p.trained]
    return _peaks(parameters, torch.autograd.grad(value.float(), trained, allow_unused=True))


def _copied(parameters: Sequence[Parameter]) -> Tensors:
    """Copies of the parameters by name, of which those that are trained have gradients."""
    return {p.name: p.tensor.detach().clone().float().requires_grad_(p.trained) for p in parameters}


def _peaks(parameters: Sequence[Parameter], gradients: Sequence[torch.Tensor | None]) -> dict[str, float]:
    """The largest entry of each gradient, by parameter; `gradients` are those of the trained ones in order."""
    names = [p.name for p in parameters if p.trained]
    return {n: float(g.abs().amax()) for n, g in zip(names, gradients, strict=True) if g is not None}


def _witness(value: torch.Tensor, gradients: Sequence[torch.Tensor | None]) -> tuple[float, ...]:
    return (float(value.detach()), *(0.0 if g is None else float(g.norm()) for g in gradients))


def _check_loss(value: object, trained: bool) -> None:
    """Raises: UnsupportedModel ANE303 for what is not one number that depends on trained parameters."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        reason, fix = f"needs one number, a tensor of one element; got {got}.", "Take the mean or the sum."
    elif not trained or not value.requires_grad:
        reason = "depends on no parameter that is trained."
        fix = "Leave out detach(), no_grad() and whole numbers on its way, or set requires_grad_(True)."
    else:
        return
    raise UnsupportedModel(
        "There is nothing to train:", [Finding("loss", "loss", reason, fix)], code="ANE303"
    )


def loss_of(model: torch.nn.Module, loss: Loss, example: tuple[object, object]) -> float:
    """The loss in plain PyTorch, with the same draws at each call; nothing of the model's tensors changes."""
    values = {name: p.detach().clone().float() for name, p in model.named_parameters()}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), rewriting(values_known=True), HostRandomMode():
        torch.manual_seed(0)
        tensors = {**values, **copies(model, with_sparse=True)}
        output = call_aside(model, tensors, example[0])
        return float(call_loss(loss, output, example[1], model, tensors))


def witness(
    model: torch.nn.Module, loss: Loss, parameters: Sequence[Parameter], example: tuple[object, object]
) -> tuple[float, ...]:
    """The loss in plain PyTorch and the norm of each trained parameter's gradient: what a program must have been
    captured from. The same draws at each call; nothing of the model's tensors changes.
    """
    values = _copied(parameters)
    trained = [values[p.name] for p in parameters if p.trained]
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        rewriting(values_known=True),
        HostRandomMode(),
    ):
        torch.manual_seed(0)
        tensors = {**values, **copies(model, with_sparse=True)}
        output = call_aside(model, tensors, example[0])
        value = call_loss(loss, output, example[1], model, tensors)
        gradients = torch.autograd.grad(value, trained, allow_unused=True)
    return _witness(value, gradients)


def call_model(model: torch.nn.Module, tensors: Mapping[str, Any], x: object) -> Any:
    """`model(x)` on other tensors; a tuple or list `x` is several arguments, a dict keyword arguments.

    A tuple or list that the model takes only as a whole is one argument, and so is a dictionary for Keras.
    """
    args, keywords = _arguments(model, x)
    keywords |= training_argument(model)
    places = _everywhere(model, tensors)
    with variables_as(model, tensors), kept_views(model, tensors), StandIns(model, tensors):
        return torch.func.functional_call(model, places, args, keywords, tie_weights=False)


def call_aside(model: torch.nn.Module, tensors: Mapping[str, Any], x: object) -> Any:
    """`call_model` on copies of the batch, so that a forward that writes into its input (`x -= mean`) leaves it."""
    return call_model(model, tensors, pytree.tree_map_only(torch.Tensor, torch.clone, x))


def call_on_copies(model: torch.nn.Module, x: object) -> object:
    """`model(x)` on copies of its parameters and buffers, which a forward may write to."""
    return call_aside(model, state_copies(model), x)


def state_copies(model: torch.nn.Module) -> Tensors:
    """Copies of all parameters and buffers, for a call that may write to them."""
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    return values | copies(model, with_sparse=True)


def _arguments(model: torch.nn.Module, x: object) -> tuple[tuple[object, ...], dict[str, Any]]:
    if not isinstance(x, (tuple, list, dict)):
        return (x,), {}
    signature = own_signature(model)
    if isinstance(x, dict):
        whole = signature is not None and not _binds(signature, (), x)
        return ((x,), {}) if whole else ((), dict(x))
    signature = signature or inspect.signature(model.forward)
    several = _binds(signature, tuple(x), {}) or not _binds(signature, (x,), {})
    return (tuple(x) if several else (x,)), {}


def _binds(signature: inspect.Signature, args: tuple[object, ...], keywords: dict[str, object]) -> bool:
    try:
        signature.bind(*args, **keywords)
    except TypeError:
        return False
    return True


def _everywhere(model: torch.nn.Module, tensors: Mapping[str, object]) -> dict[str, Any]:
    """`tensors` under one name for each place of the model that holds the tensor they stand for.

    Tied tensors have several places. A module with two names has its own once: `functional_call` would put the
    stand-in back for the second name (`self.conv = ...; self.net = Sequential(self.conv, ...)`).
    """
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    stand_ins = {id(tensor): tensors[name] for name, tensor in named if name in tensors}
    places = {}
    for path, module in model.named_modules():
        for name, tensor in itertools.chain(
            module.named_parameters(recurse=False, remove_duplicate=False),
            module.named_buffers(recurse=False, remove_duplicate=False),
        ):
            if id(tensor) in stand_ins:
                places[f"{path}.{name}" if path else name] = stand_ins[id(tensor)]
    return places


def call_loss(
    loss: Loss, output: object, target: object, model: torch.nn.Module, tensors: Mapping[str, Any]
) -> torch.Tensor:
    """`loss(output, target)` on other tensors of the model, for a loss with a penalty on its weights.

    Its name marks in a stack where the user's code begins.
    """
    with StandIns(model, tensors):
        return loss(output, target)


@contextlib.contextmanager
def module_mode(model: torch.nn.Module, *, training: bool) -> Iterator[None]:
    """Within the block the model is in training or evaluation mode; then each submodule is in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


def copies(model: torch.nn.Module, *, with_sparse: bool = False) -> Tensors:
    """Copies of all buffers, so that a forward in training mode changes nothing; sparse ones only `with_sparse`, dense.

    A recorded forward gets those as state, since a program has no sparse tensors to make them of.
    """
    buffers = dict(model.named_buffers()) | keras_state(model)
    kept = {n: b for n, b in buffers.items() if with_sparse or b.layout is torch.strided}
    return {name: plain_tensor(buffer.detach()).clone() for name, buffer in kept.items()}


def _power_of_two(
    wanted: float, peak: float, lowest: float, highest: float, otherwise: float = 1024.0
) -> float:
    if not peak > 0.0 or not math.isfinite(peak):
        return min(max(otherwise, lowest), highest)
    return min(max(2.0 ** math.floor(math.log2(wanted / peak)), lowest), highest)
