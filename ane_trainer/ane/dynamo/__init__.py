"""`torch.compile(model, backend="ane")`: forward and backward as programs, the loop stays the user's.

    fast = torch.compile(model, backend="ane", options={"chip": "m4", "device": "sim"})

Dynamo captures the model, AOTAutograd splits it into a forward and a backward graph, and each becomes a
program by the same lower, legalize, compile and device as a whole training step. Dynamo finds the backend by the
installed package's entry point; in a source tree that is not installed, give `backend=ane_trainer.ane.dynamo.ane`.
`report()` says what was compiled, what runs on the host, where Dynamo cut the model and what it left to PyTorch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ane_trainer.ane.dynamo.options import Options, read_options
from ane_trainer.ane.dynamo.report import ProgramRecord, Report, begin_graph, report, reset

_LOADING = threading.Lock()

__all__ = ["Options", "ProgramRecord", "Report", "ane", "report", "reset"]


def _ane(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    options: object = None,
    mode: str | None = None,
) -> Callable[..., object]:
    """The Dynamo backend: a callable that compiles `graph` for the shapes it is called with.

    `options`, all optional: chip, device, fidelity, precision, threads, path as in `compile_step`;
    recompile_limit (8), the number of input shapes that one function may be compiled for; fallback, "none"
    or "cpu": run what the engine refuses in PyTorch on the CPU. `mode` has no meaning here and is ignored.

    The callable raises UnsupportedModel with every refused op, UsageError ANE114 beyond recompile_limit.
    Raises: UsageError for unknown options, EnvironmentFault for a device that is not here.
    """
    from ane_trainer.ane.capture.rewrites.composites import cdist
    from ane_trainer.ane.dynamo.shapes import Specializer  # imports Dynamo, which takes seconds

    settings = read_options(options)
    for node in graph.graph.find_nodes(op="call_function", target=torch.cdist):
        node.target = cdist
    graph.recompile()
    return Specializer(graph, settings, begin_graph(graph))


def _reset() -> None:
    """Dynamo was reset: the watch restarts when the backend is next asked for, and shapes are counted from zero."""
    from ane_trainer.ane.dynamo.shapes import forget_shapes
    from ane_trainer.ane.dynamo.torch_private import forget_backend

    forget_shapes()

    forget_backend("ane", lambda: __getattr__("ane"))


_ane.__name__ = _ane.__qualname__ = "ane"
_ane.reset = _reset  # type: ignore[attr-defined]  # Dynamo calls it


def __getattr__(name: str) -> Any:
    """`ane`: whoever asks for it is about to compile, and is told what Dynamo leaves out."""
    if name != "ane":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ane_trainer.ane.dynamo.silence import watch
    from ane_trainer.ane.dynamo.torch_private import registered_once

    with _LOADING:
        watch(_ane)
        registered_once("ane")
    return _ane
