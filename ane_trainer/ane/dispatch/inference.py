"""`compile_forward` and `InferenceProgram`: a model's forward pass in evaluation mode as one program."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ane_trainer.ane.capture import capture_forward
from ane_trainer.ane.capture.batches import Structure, program_form, tensors_of
from ane_trainer.ane.capture.calibrate import call_aside, call_on_copies, copies, module_mode
from ane_trainer.ane.capture.ports import float_buffers
from ane_trainer.ane.capture.repeats import repeating
from ane_trainer.ane.capture.trace.sources import faults_in_words
from ane_trainer.ane.capture.trace.torch_private import pytree, version
from ane_trainer.ane.chips.cost import Cost
from ane_trainer.ane.compiler.blocks import Division, check_blocks
from ane_trainer.ane.compiler.build import prepare, whole
from ane_trainer.ane.dispatch.feeds import RANGES, Feeds, tell_of_rounded_integers
from ane_trainer.ane.dispatch.guards import Guards
from ane_trainer.ane.dispatch.harmless import Harmless
from ane_trainer.ane.dispatch.loading import cost_of
from ane_trainer.ane.dispatch.options import Target, resolve_target
from ane_trainer.ane.dispatch.parameters import check_parameters
from ane_trainer.ane.errors import NumericsWarning
from ane_trainer.ane.mil.program import Program


def compile_forward(
    model: torch.nn.Module,
    example: object,
    chip: str = "m4",
    device: str = "sim",
    fidelity: str = "exact",
    *,
    threads: int | None = None,
    path: str = "e5rt",
    precision: str = "auto",
    blocks: str | int = "auto",
) -> InferenceProgram:
    """Compile `model(example)` in evaluation mode; weights are inputs, so new ones need no new program.

    `blocks` as in `compile_step`: layers that are one program.

    Raises: UnsupportedModel, UsageError, EnvironmentFault as `compile_step` does.
    """
    check_blocks(blocks)
    target = resolve_target(device, chip, fidelity, precision, threads, path)
    return InferenceProgram(model, example, target, blocks)


#: Batches whose largest number is within these multiples of the example's go through its program.
_SMALLER, _LARGER = 2.0**-8, 8.0
#: Batches up to here may have a program of their own.
_LARGEST = 2.0**100
#: Programs for batches of other sizes and other states of the model.
_MOST_OTHERS = 8


class InferenceProgram:
    """A compiled forward pass. `program(x)` returns what `model.eval()(x)` would, in fp32 tensors.

    The module's present parameters are used: ones that changed since the last call are sent again. Its powers of two
    are chosen for the example; a batch of numbers of another size has a program of its own, and so has a model whose
    layers, attributes or constant buffers are others now: 8 at most.
    """

    def __init__(
        self, model: torch.nn.Module, example: object, target: Target, blocks: str | int = "auto"
    ) -> None:
        self.target, self._range = target, RANGES[target.precision]
        self._model, self._blocks, self._peaks = model, blocks, _peaks(example)
        self._others: list[InferenceProgram] = []
        self._harmless = Harmless()
        check_parameters(model, self._range)
        with faults_in_words(model, functools.partial(_run_plainly, model, example)):
            self._structure, self._shapes, integral = _output_of(model, example)
            captured = capture_forward(model, example, calibrate=target.precision == "fp16")
        assert target.chip is not None
        division = Division(blocks, repeating(model))
        self.compiled = prepare(captured, target.chip, target.path, target.precision, division)
        self._session = target.load(self.compiled)
        inputs = self.compiled.inputs
        self._feeds = Feeds((example,), ("x",), inputs, target.precision)
        tensors = dict(model.named_parameters()) | float_buffers(model)
        self._state = [(port, tensors[port.target]) for port in inputs if port.role == "state"]
        #: Places of results of integers, until one was told to be rounded.
        self._integers = integral if target.precision == "fp16" else []
        self._sent: dict[str, int] = {}
        self._guards = _guards_of(model, self._harmless.names)

    def __call__(self, x: object) -> Any:
        """The model's output for a batch of the compiled shape; DataError for another shape or bad values."""
        peaks = _peaks(x) if self._range.dtype == torch.float16 else []
        if max(peaks, default=0.0) >= _LARGEST:
            peaks = []
        for program in (self, *self._others):
            if program._fits(peaks) and not program._guards.changed():
                return program._run(x)
        return self._another(x, peaks)._run(x)

    def _run(self, x: object) -> object:
        feeds = self._feeds(x)
        self._send_weights()
        results = self._session.run(feeds)
        leaves = [
            torch.from_numpy(results[port.name].astype(np.float32) / np.float32(port.scale)).reshape(shape)
            for port, shape in zip(self.compiled.outputs, self._shapes, strict=True)
        ]
        largest = max(
            (float(leaves[i].abs().amax()) for i in self._integers if leaves[i].numel()), default=0.0
        )
        if largest >= self._range.largest_integer:
            self._integers = []
            tell_of_rounded_integers("output", largest)
        return self._structure.filled(leaves)

    @property
    def program(self) -> Program:
        """The MIL program of the forward pass, as one also where it is in programs of blocks."""
        return whole(self.compiled).program

    def text(self) -> str:
        """The program as MIL text."""
        return self.compiled.text

    def cost(self) -> Cost:
        """Estimated time and energy of one forward pass on the chip."""
        return cost_of(self.compiled.in_turn, self.target.path)

    def placement(self) -> dict[str, object]:
        """Where the program runs and how that is known."""
        where, how = self.target.placement()
        chain = self.compiled.chain
        return {
            "where": where, "how": how, "device": self.target.device, "choice": self.target.reason,
            "programs": len(self.compiled.programs), "dispatches": len(self.compiled.in_turn),
            "blocks": "" if chain is None else chain.chosen,
        }  # fmt: skip

    def close(self) -> None:
        """Release the device."""
        for other in self._others:
            other.close()
        self._session.close()

    def _fits(self, peaks: Sequence[float]) -> bool:
        """Whether a batch with these largest numbers is of the example's size."""
        if len(peaks) != len(self._peaks):
            return True
        pairs = zip(self._peaks, peaks, strict=True)
        return all(not new or _SMALLER * old <= new <= _LARGER * old for old, new in pairs)

    def _another(self, x: object, peaks: Sequence[float]) -> InferenceProgram:
        """A program for batches of this size and the model as it is now; one that is the same, with new guards."""
        self._feeds(_ones(x))  # shapes are refused first
        new = InferenceProgram(self._model, x, self.target, self._blocks)
        new._guards = _guards_of(self._model, self._harmless.names)
        for known in (self, *self._others):
            if known._fits(peaks) and known._computes_as(new):
                self._harmless.note(known._guards.differences())
                known._guards = _guards_of(self._model, self._harmless.names)
                new.close()
                return known
        if len(self._others) == _MOST_OTHERS:
            self._others.pop(0).close()
            warnings.warn(
                f"predict: needs inputs of about one size and a model that stays as it is; got {_MOST_OTHERS + 2} "
                "different ones, each with a program of its own. Normalise the inputs; keep as a buffer what changes.",
                NumericsWarning,
                stacklevel=3,
            )
        self._others.append(new)
        return new

    def _computes_as(self, other: InferenceProgram) -> bool:
        """Whether both are the same program on the same tensors."""
        mine, its = ([(port, id(tensor)) for port, tensor in each._state] for each in (self, other))
        return self.compiled.fingerprint == other.compiled.fingerprint and mine == its

    def _send_weights(self) -> None:
        dtype = self._range.dtype
        for port, tensor in self._state:
            if self._sent.get(port.name) != version(tensor):
                self._session.write(port.name, tensor.detach().to(dtype).numpy().reshape(port.shape))
                self._sent[port.name] = version(tensor)


def _guards_of(model: torch.nn.Module, harmless: frozenset[str]) -> Guards:
    """What a forward pass in evaluation mode may read of Python; the mode and the counts of batch norms it does not."""
    label = type(model).__name__
    modes = {f"{label}.{path}.training" if path else f"{label}.training" for path, _ in model.named_modules()}
    counts = [name for name, _ in model.named_buffers() if name.endswith("num_batches_tracked")]
    counts += [name.removeprefix(f"{label}.") for name in harmless]
    return Guards(model, None, frozenset(modes | harmless), counts)


def _peaks(x: object) -> list[float]:
    """The largest magnitude of each tensor of floats."""
    leaves = [leaf for leaf in tensors_of(x) if leaf.is_floating_point() and leaf.numel()]
    return [float(leaf.detach().abs().amax()) for leaf in leaves]


def _ones(x: object) -> object:
    """The batch with numbers that fit any port."""
    return pytree.tree_map(
        lambda v: torch.ones_like(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v, x
    )


def _run_plainly(model: torch.nn.Module, example: object) -> None:
    with module_mode(model, training=False), torch.no_grad():
        call_on_copies(model, program_form(example))


def _single(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters in single precision."""
    return {name: p.detach().clone().float() for name, p in model.named_parameters()}


def _output_of(model: torch.nn.Module, example: object) -> tuple[Structure, list[tuple[int, ...]], list[int]]:
    """Structure and shapes of the model's output, and which are integers, from one run in plain PyTorch."""
    with module_mode(model, training=False), torch.no_grad():
        output = call_aside(model, _single(model) | copies(model, with_sparse=True), program_form(example))
    leaves = tensors_of(output)
    floats = [leaf.is_floating_point() or leaf.dtype == torch.bool for leaf in leaves]
    integral = [i for i, is_float in enumerate(floats) if not is_float]
    return Structure.of(output), [tuple(leaf.shape) for leaf in leaves], integral
