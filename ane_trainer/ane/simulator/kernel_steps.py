"""One unfused op as a callable that fills its outputs: a writer, a kernel of the engine, or a function of the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ane_trainer.ane.errors import SimulationError
from ane_trainer.ane.mil.opset import Call, bind
from ane_trainer.ane.mil.program import Op
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.kernels.host import host_function, runs_on_host
from ane_trainer.ane.simulator.numbers.fp16 import round_half_away
from ane_trainer.ane.simulator.registry import KERNELS, WRITES, EngineContext, Kernel


def kernel_step(
    op: Op, context: EngineContext, operands: list[object], outputs: list[Array]
) -> Callable[[], None]:
    """One unfused op as a callable that fills `outputs`."""
    call = bind(op.kind, dict(op.args))
    host = runs_on_host(op)
    function = host_function(call) if host else None
    if function is None:
        writer = WRITES.get(op.kind)
        if writer is not None and not host:
            return writer(context, call, outputs, *operands)
        kernel = KERNELS.get(op.kind)
        if kernel is None:
            raise SimulationError(f"{op.name}: the simulator has no kernel for {op.kind}.", code="SIM104")
        function = partial(_run_kernel, kernel, context, call, _to_engine if host else _as_is)

    def step() -> None:
        results = function(*operands)
        for out, result in zip(outputs, results if isinstance(results, tuple) else (results,), strict=True):
            out[...] = result

    return step


def _run_kernel(
    kernel: Kernel, context: EngineContext, call: Call, convert: Callable[[object], object], *operands: object
) -> Any:
    return kernel.run(context, call, *map(convert, operands))


def _as_is(operand: object) -> Any:
    return operand


def _to_engine(operand: Any) -> Any:
    """fp32 numbers as the engine takes them: rounded to fp16."""
    if isinstance(operand, tuple):
        return tuple(map(_to_engine, operand))
    return round_half_away(operand) if operand is not None and operand.dtype == np.float32 else operand
