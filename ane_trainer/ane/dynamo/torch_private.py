"""Everything of torch.compile's that the backend uses and torch does not document; tests/ane/dynamo/
test_torch_private.py checks each on the installed release.

`functorch.compile` is what torch's page on custom backends names.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import functorch.compile
import torch
from torch._higher_order_ops.effects import with_effects
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

__all__ = [
    "DynamicOutputShapeException", "FakeTensorMode", "aot_module_simplified", "at_end_of_frames", "break_reasons",
    "compile_id", "compiles_for", "default_partition", "expression", "forget_backend", "gist", "given_up",
    "make_boxed_func", "with_effects",
]  # fmt: skip


#: Marks a function of a list of inputs, as AOTAutograd wants its compilers' results.
make_boxed_func: Callable[[Callable[..., list[object]]], Callable[..., object]] = (
    functorch.compile.make_boxed_func
)
aot_module_simplified: Callable[..., Callable[..., object]] = functorch.compile.aot_module_simplified
default_partition: Callable[..., tuple[torch.fx.GraphModule, torch.fx.GraphModule]] = (
    functorch.compile.default_partition
)


def compile_id() -> str | None:
    """Which of the user's functions Dynamo compiles now: the same for other shapes and modes. None outside of it."""
    found = torch._guards.CompileContext.current_compile_id()
    return None if found is None else str(found.frame_id)


def expression(size: object) -> Any:
    """A symbolic size's formula, which is equal for equal sizes; other sizes as they are."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


# -- What Dynamo does not hand to a backend


def at_end_of_frames(function: Callable[[], None]) -> None:
    """Call the function when Dynamo is through with a frame, until `torch._dynamo.reset()`."""
    from torch._dynamo.callback import on_compile_end

    on_compile_end(lambda _arguments: function())


def given_up() -> tuple[str, str] | None:
    """At the end of a frame: (the reason, file:line) if Dynamo gave the whole frame up."""
    from torch._dynamo.exc import Unsupported

    error = sys.exc_info()[1]
    if not isinstance(error, Unsupported):
        return None
    frames = list(getattr(error, "real_stack", None) or ())
    return gist(str(error)), f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def break_reasons() -> list[str]:
    """The reasons of all graph breaks so far."""
    from torch._dynamo.utils import counters

    return list(counters["graph_break"])


def gist(reason: str) -> str:
    """First line of a reason of Dynamo's, with what it is about and its explanation."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    text = lines[0] if lines else "no reason given"
    for start, form in (("Developer debug context:", ": {}"), ("Explanation:", " ({})")):
        found = next(
            (line.removeprefix(start).strip().rstrip(".") for line in lines if line.startswith(start)), ""
        )
        text += form.format(found) if found else ""
    return text


def compiles_for(backend: object) -> bool:
    """Whether torch.compile was used with the backend since Dynamo's last reset."""
    from torch._dynamo.eval_frame import cached_backends

    return any(getattr(wrapper, "compiler_fn", None) is backend for wrapper in cached_backends.values())


def forget_backend(name: str, load: Callable[[], object]) -> None:
    """Let Dynamo call `load` for the backend when it is next asked for by name, as it does for entry points."""
    from torch._dynamo.backends.registry import _BACKENDS, _COMPILER_FNS

    if _COMPILER_FNS.pop(name, None) is not None:
        _BACKENDS[name] = types.SimpleNamespace(load=load)  # type: ignore[assignment]
