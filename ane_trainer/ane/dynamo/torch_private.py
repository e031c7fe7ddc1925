"""Everything of torch.compile's that the backend uses and torch does not document; tests/ane/dynamo/
test_torch_private.py checks each on the installed release.

`functorch.compile` is what torch's page on custom backends names.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import functorch.compile
import torch
from torch._higher_order_ops.effects import with_effects
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode

__all__ = [
    "OWN_SETTINGS",
    "DynamicOutputShapeException",
    "FakeTensorMode",
    "aot_module_simplified",
    "around_frames",
    "at_recompile_limit",
    "break_reasons",
    "causal_masks_as_given",
    "changed_inputs",
    "compile_id",
    "compiles_for",
    "data_of",
    "default_partition",
    "expression",
    "failure",
    "forget_backend",
    "gist",
    "given_up",
    "is_known",
    "leave_with",
    "make_boxed_func",
    "one_at_a_time",
    "refuse_second_derivatives",
    "registered_once",
    "settings_of_dynamo",
    "tracing_with",
    "user_line",
    "with_effects",
]  # fmt: skip


#: Marks a function of a list of inputs, as AOTAutograd wants its compilers' results.
make_boxed_func: Callable[[Callable[..., list[object]]], Callable[..., object]] = (
    functorch.compile.make_boxed_func
)
aot_module_simplified: Callable[..., Callable[..., object]] = functorch.compile.aot_module_simplified
#: `x.data`, as Dynamo's graphs spell it.
data_of: Callable[[torch.Tensor], torch.Tensor] = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]
default_partition: Callable[..., tuple[torch.fx.GraphModule, torch.fx.GraphModule]] = (
    functorch.compile.default_partition
)


#: A function of which Dynamo makes no graph.
untraced: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.compiler.disable


def tracing_with(mode: FakeTensorMode) -> contextlib.AbstractContextManager[object]:
    """Inside, AOTAutograd notes what it finds of a graph, for `changed_inputs`."""
    return torch._guards.tracing(torch._guards.TracingContext(mode))


def one_at_a_time() -> contextlib.AbstractContextManager[object]:
    """Inside, no other thread traces: Dynamo's own lock."""
    from torch._dynamo.convert_frame import compile_lock

    return compile_lock


def changed_inputs() -> int:
    """How many of a forward graph's first results are new values of inputs, which AOTAutograd copies into them."""
    context = torch._guards.TracingContext.try_get()
    found = None if context is None else context.fw_metadata
    return 0 if found is None else int(found.num_mutated_inp_runtime_indices)


def compile_id() -> str | None:
    """Which of the user's functions Dynamo compiles now: the same for other shapes and modes. None outside of it."""
    found = torch._guards.CompileContext.current_compile_id()
    return None if found is None else str(found.frame_id)


def expression(size: object) -> Any:
    """A symbolic size's formula, which is equal for equal sizes; other sizes as they are."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


# -- What Dynamo does not hand to a backend


def around_frames(start: Callable[[], None], end: Callable[[], None]) -> None:
    """Call the functions when Dynamo begins with a frame and is through with it, until `torch._dynamo.reset()`."""
    from torch._dynamo.callback import on_compile_end, on_compile_start

    def for_frames(function: Callable[[], None], arguments: object) -> None:
        """Not for a backward graph, which is compiled when it first runs, outside of a frame."""
        if not str(getattr(arguments, "callback_trigger", "")).endswith("LAZY_BACKWARD"):
            function()

    on_compile_start(functools.partial(for_frames, start))
    on_compile_end(functools.partial(for_frames, end))


def at_recompile_limit(tell: Callable[[str, str, str], bool]) -> None:
    """Call `tell(limit, function, reason)` when Dynamo gives a frame up because it compiled it too often.

    No callback runs then; Dynamo logs a warning, which is left out where `tell` returns True.
    """

    class Listener(logging.Filter):
        """Stands in the logger of the file that gives frames up."""

        def filter(self, record: logging.LogRecord) -> bool:
            args = record.args if isinstance(record.args, tuple) else ()
            if not str(record.msg).startswith("torch._dynamo hit config.") or len(args) < 4:
                return True
            return not tell(f"{args[0]} = {args[1]}", str(args[2]), str(args[3]))

    logger = logging.getLogger("torch._dynamo.convert_frame")
    for old in [f for f in logger.filters if type(f).__qualname__ == Listener.__qualname__]:
        logger.removeFilter(old)
    logger.addFilter(Listener())


#: What Dynamo cuts a graph at by default, and need not (`x[mask]`, and from torch 2.13 on `torch.autograd.grad`), and
#: that it does not look whether hooks were added to modules.
OWN_SETTINGS = {
    "capture_dynamic_output_shape_ops": True, "trace_autograd_ops": True, "skip_nnmodule_hook_guards": False,
}  # fmt: skip


def settings_of_dynamo(settings: dict[str, bool]) -> dict[str, bool]:
    """Change settings of Dynamo's that this release has; returns what they were."""
    from torch._dynamo import config

    before = {name: bool(getattr(config, name)) for name in settings if hasattr(config, name)}
    for name in before:
        setattr(config, name, settings[name])
    return before


def refuse_second_derivatives(error: Callable[[], Exception]) -> None:
    """Within a backward pass that keeps its own graph: raise this error if that graph is differentiated.

    AOTAutograd calls `_double_backward` then, whose class raises a RuntimeError.
    """

    def backward(*_arguments: object) -> None:
        raise error()

    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_double_backward":
        frame = frame.f_back
    differentiated = frame.f_locals.get("CompiledFunctionBackward") if frame is not None else None
    if differentiated is not None:
        differentiated.backward = staticmethod(backward)


def is_known(value: object) -> bool:
    """Whether a tensor has values while AOTAutograd traces: a constant of the model."""
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return False
    return not torch._is_functional_tensor(value) and not hasattr(value, "from_functional")


def given_up() -> tuple[str, str] | None:
    """At the end of a frame: (the reason, file:line) if Dynamo gave the whole frame up."""
    from torch._dynamo.exc import Unsupported, UserError

    error = sys.exc_info()[1]
    if not isinstance(error, (Unsupported, UserError)):
        return None
    return gist(str(error)), user_line()


def wants_one_graph() -> bool:
    """At the end of a frame: whether torch.compile was asked for one graph (`fullgraph=True`): breaks are errors."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if "one_graph" in frame.f_locals:
            return bool(frame.f_locals["one_graph"])
    return False


def failure() -> BaseException | None:
    """At the end of a frame: the error that Dynamo is about to raise; where a backend failed, the backend's own."""
    from torch._dynamo.exc import (
        BackendCompilerFailed,
        InternalTorchDynamoError,
        TorchDynamoException,
        TorchRuntimeError,
    )

    error = sys.exc_info()[1]
    if isinstance(error, BackendCompilerFailed):
        return error.inner_exception
    if isinstance(error, (TorchRuntimeError, InternalTorchDynamoError)):
        _, _, cause = str(error).partition("): got ")
        said = (cause or str(error)).strip().splitlines()[0]
        return RuntimeError(said.partition("Error(")[2].rstrip(")").strip("'\"") or said)
    control = isinstance(error, TorchDynamoException) or not isinstance(error, Exception)
    return None if control else error


def user_line() -> str:
    """At the end of a frame that failed: `file:line` of the user's code, empty if Dynamo does not know it."""
    frames = list(getattr(sys.exc_info()[1], "real_stack", None) or ())
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def leave_with(error: BaseException) -> None:
    """At the end of a frame: have this error raised in place of Dynamo's."""
    from torch._dynamo.callback import callback_handler
    from torch._dynamo.exc import ShortenTraceback

    class Instead(ShortenTraceback):
        """Carries the error through Dynamo, which lets this kind alone and asks it for what to raise."""

        def remove_dynamo_frames(self) -> Any:
            return error

    name = (
        "_CompilationCallbackHandler__pending_callbacks_counter"  # an error of a callback leaves it as it was
    )
    setattr(callback_handler, name, getattr(callback_handler, name) - 1)
    raise Instead(str(error), first_useful_frame=None)


def causal_masks_as_given() -> None:
    """From here on Dynamo does not look into whether a mask is the causal one (`trace.torch_private`, same name)."""
    compared = getattr(torch.nn.modules.transformer, "_detect_is_causal_mask", None)
    if compared is not None and not getattr(compared, "_ane_as_given", False):

        def as_given(mask: object, is_causal: bool | None = None, size: int | None = None) -> bool:
            return is_causal is True

        torch.compiler.substitute_in_graph(compared)(as_given)
        compared._ane_as_given = True


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


def registered_once(name: str) -> None:
    """Let threads that ask for a backend by name at the same time all register it, which Dynamo refuses the second.

    To be called by what loads the backend, one thread at a time.
    """
    if "torch._dynamo" not in sys.modules:
        return
    from torch._dynamo.backends.registry import _COMPILER_FNS

    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name != "lookup_backend":
        frame = frame.f_back
    if frame.f_code.co_name != "lookup_backend":
        return
    lookups.append(name)
    for _ in range(1000 if lookups.count(name) > 1 else 0):
        if _COMPILER_FNS.pop(name, None) is not None:
            return
        time.sleep(0.001)


#: Names of backends that Dynamo looked up since they were last forgotten, once for each time.
lookups: list[str] = []


def forget_backend(name: str, load: Callable[[], object]) -> None:
    """Let Dynamo call `load` for the backend when it is next asked for by name, as it does for entry points."""
    from torch._dynamo.backends.registry import _BACKENDS, _COMPILER_FNS

    lookups[:] = [other for other in lookups if other != name]
    if _COMPILER_FNS.pop(name, None) is not None:
        _BACKENDS[name] = types.SimpleNamespace(load=load)  # type: ignore[assignment]
