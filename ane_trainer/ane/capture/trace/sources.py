"""Source of an operation: the user's module path and line, forward and backward.

Every torch function the model calls is annotated with `module.path (file.py:line)` while it runs, and the
autograd nodes it made carry the same text, so that backward operations point at the line whose gradient
they compute. Nothing here changes what is computed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode

from ane_trainer.ane.capture.trace.torch_private import pytree
from ane_trainer.ane.errors import BrokenModel, Finding, UnsupportedModel

Tensors = dict[str, torch.Tensor]

META_KEY = "ane_source"
_TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep
PACKAGE_FOLDER = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(__file__)))) + os.sep
_OWN_FOLDER = os.path.dirname(os.path.dirname(__file__)) + os.sep


def _run(name: object, function: Callable[..., Tensors], *groups: Tensors) -> Tensors:
    return function(*groups)


@dataclass
class Place:
    """Where the operations that run now come from, for one capture: `module.path (file.py:line)`, or None.

    `stamp(name, function, *groups)` is `function(*groups)`, recorded once for equal structures (`stamps`).
    """

    text: str | None = None
    stamp: Callable[..., Tensors] = _run


class ModuleStack:
    """The dotted paths of the modules whose forward is running, innermost last."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.root = type(model).__name__
        self.paths: list[str] = []

    def here(self) -> str:
        """The innermost module's path, and the user's source line if there is one on the stack."""
        path = (self.paths[-1] if self.paths else "") or self.root
        line = user_line()
        return f"{path} ({line})" if line else path


@contextlib.contextmanager
def watch_modules(model: torch.nn.Module) -> Iterator[ModuleStack]:
    """Keep a `ModuleStack` of `model` up to date while the block runs."""
    stack = ModuleStack(model)
    handles = []
    for path, module in model.named_modules():

        def enter(_module: torch.nn.Module, _args: object, path: str = path) -> None:
            stack.paths.append(path)

        def leave(_module: torch.nn.Module, _args: object, _output: object) -> None:
            stack.paths.pop()

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class SourceMode(TorchFunctionMode):
    """Sets the place to `describe()` for every torch call, and tags the autograd nodes that it made."""

    def __init__(self, describe: Callable[[], str], place: Place) -> None:
        super().__init__()
        self._describe, self._place = describe, place

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Any = (),
        kwargs: dict[str, object] | None = None,
    ) -> Any:
        source = self._place.text = self._describe()
        result = func(*args, **(kwargs or {}))
        _tag(result, source)
        return result


def _metadata(node: torch.autograd.graph.Node) -> dict[str, Any]:
    return cast("dict[str, Any]", node.metadata)


def follow_backward(root: torch.Tensor, place: Place) -> None:
    """Let the nodes of `root`'s backward set the place to the source of their forward."""

    def enter(source: str) -> Callable[[object], None]:
        return lambda _gradients: setattr(place, "text", source)

    pending = [root.grad_fn]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        source = _metadata(node).get(META_KEY)
        if source is not None:
            node.register_prehook(enter(source))
        pending.extend(parent for parent, _ in node.next_functions)


def spread_sources(graph: torch.fx.Graph) -> None:
    """Give nodes without a source that of their first input that has one."""
    for node in graph.nodes:
        if META_KEY not in node.meta and node.op == "call_function":
            found = (n.meta.get(META_KEY) for n in node.all_input_nodes)
            source = next((s for s in found if s), None)
            if source is not None:
                node.meta[META_KEY] = source


def user_line() -> str | None:
    """`file.py:line` of the innermost frame outside torch and this package's capture; None if none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_OWN_FOLDER):
            if frame.f_code.co_name in ("call_model", "call_loss"):
                return None
        elif not name.startswith((_TORCH_FOLDER, "<")) and os.sep + "contextlib" not in name:
            return f"{_short(name)}:{frame.f_lineno}"
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


def loss_place(name: str) -> str:
    """Where an operation of a loss comes from: its name, and the user's line if there is one on the stack."""
    line = user_line()
    return f"loss {name} ({line})" if line else f"loss {name}"


#: What code of the user or of torch raises where a model cannot be run or recorded.
FAULTS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


#: What torch says where the forward casts to a dtype that the program's parameters do not have.
_OTHER_DTYPE = re.compile(r"(dtype|type|scalar).*(Double|BFloat16|Half|double|bfloat16|float16)", re.S)
_DTYPES = (
    "A program's parameters are float32 for PyTorch and fp16 on the engine: leave .double(), .half() and "
    ".to(torch.bfloat16) out of forward, or cast to the parameter's dtype (x.to(self.weight.dtype))."
)


@contextlib.contextmanager
def faults_in_words(model: torch.nn.Module, runs: Callable[[], object]) -> Iterator[None]:
    """Whatever the block raises, as a finding with module and line; `runs()` does the same in plain PyTorch.

    Raises: UnsupportedModel ANE303; BrokenModel where plain PyTorch raises, too.
    """
    try:
        yield
    except FAULTS as error:
        kind = UnsupportedModel
        fix = _DTYPES if _OTHER_DTYPE.search(str(error)) else (
            "Plain PyTorch runs it, a program cannot: leave this out of the step, or do it on the host."
        )  # fmt: skip
        try:
            runs()
        except FAULTS:
            kind = BrokenModel
            fix = "Plain PyTorch says the same: run loss(model(x), y).backward() there first."
        raise fault(error, place_of(error, model), fix, kind) from error


def fault(
    error: BaseException, where: str, fix: str, kind: type[UnsupportedModel] = UnsupportedModel
) -> UnsupportedModel:
    """An error of torch's or the user's as a refusal with its place."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines[0][:300] if lines else "no message").rstrip(".")
    finding = Finding(where, type(error).__name__, f"{text}.", fix)
    return kind("The step cannot be made of this model and loss:", [finding], code="ANE303")


def place_of(error: BaseException, model: torch.nn.Module) -> str:
    """`module.path (file.py:line)` of the innermost module and the user's innermost line that an error came through."""
    paths = {id(module): path for path, module in model.named_modules()}
    where, line, trace = "", "", error.__traceback__
    while trace is not None:
        frame, trace_line = trace.tb_frame, trace.tb_lineno
        where = paths.get(id(frame.f_locals.get("self")), "") or where
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH_FOLDER, PACKAGE_FOLDER, "<")) and os.sep + "contextlib" not in name:
            line = f"{_short(name)}:{trace_line}"
        trace = trace.tb_next
    where = where or type(model).__name__
    return f"{where} ({line})" if line else where


@functools.cache
def _short(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def _tag(result: object, source: str) -> None:
    """Note `source` on all autograd nodes behind `result` that have no source yet."""
    pending = [t.grad_fn for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    while pending:
        node = pending.pop()
        if node is None or META_KEY in _metadata(node):
            continue
        _metadata(node)[META_KEY] = source
        pending.extend(parent for parent, _ in node.next_functions)
