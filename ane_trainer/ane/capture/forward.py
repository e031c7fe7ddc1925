"""The forward pass in evaluation mode as one pure function of (state, batch)."""

from __future__ import annotations

import torch

from ane_trainer.ane.capture.batches import Structure, program_form, tensors_of
from ane_trainer.ane.capture.calibrate import call_model, copies, module_mode
from ane_trainer.ane.capture.parts import finish
from ane_trainer.ane.capture.ports import batch_ports, float_buffers, identifier, unique
from ane_trainer.ane.capture.range import keep_in_range
from ane_trainer.ane.capture.rewrites.decompositions import decomposition_table
from ane_trainer.ane.capture.trace.sources import Place, SourceMode, watch_modules
from ane_trainer.ane.capture.trace.tracer import trace
from ane_trainer.ane.stages import Captured, Port


def capture_inference(model: torch.nn.Module, example: object, *, calibrate: bool = False) -> Captured:
    """Trace `model.eval()(example)`; the model's training mode is put back afterwards.

    `calibrate`: values that leave fp16's range for this example get powers of two, also ports of batch and results.
    """
    example = program_form(example)
    tensors = {**dict(model.named_parameters()), **float_buffers(model)}
    batch = batch_ports(example, "x")
    state = [Port(identifier(n), tuple(t.shape) or (1,), "state", n) for n, t in tensors.items()]
    ports = unique([*batch, *state])
    structure, leaves = Structure.of(example), tensors_of(example)
    ports = ports[len(batch) :] + ports[: len(batch)]
    inputs = {
        p.name: (t.detach().float() if t.is_floating_point() else t).reshape(p.shape)
        for p, t in zip(ports, [*tensors.values(), *leaves], strict=True)
    }
    outputs: list[Port] = []
    place = Place()

    def run_forward(*values: torch.Tensor) -> list[torch.Tensor]:
        x = structure.filled(values[len(state) :])
        named = {n: v.reshape(t.shape) for (n, t), v in zip(tensors.items(), values, strict=False)}
        with torch.no_grad(), watch_modules(model) as stack, SourceMode(stack.here, place):
            results = tensors_of(call_model(model, {**copies(model), **named}, x))
        several = len(results) > 1
        names = [f"output_{i}" if several else "output" for i in range(len(results))]
        outputs[:] = [
            Port(n, tuple(r.shape) or (1,), "result", n) for n, r in zip(names, results, strict=True)
        ]
        return [r.reshape(p.shape) for r, p in zip(results, outputs, strict=True)]

    with module_mode(model, training=False):
        graph = trace(run_forward, inputs, decomposition_table(), place)
    captured = finish(graph, ports, tuple(outputs))
    return keep_in_range(captured, [inputs]) if calibrate else captured
