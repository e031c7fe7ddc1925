"""Everything of torch that capture uses and torch does not document; tests/ane/capture/trace/test_torch_private.py
checks each on the installed release.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch._ops import OperatorBase, OpOverload, OpOverloadPacket
from torch.fx import Graph, GraphModule
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.nn.modules import transformer
from torch.optim import optimizer as _optimizers
from torch.utils import _pytree as pytree
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode as _TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from ane_trainer.ane.errors import EnvironmentFault

__all__ = [
    "Decompositions",
    "OpOverload",
    "OpOverloadPacket",
    "OperatorBase",
    "SideTable",
    "TorchDispatchMode",
    "can_decompose",
    "causal_masks_as_given",
    "checkpoints_run_once",
    "decompositions_of",
    "graph_module",
    "has_global_step_hooks",
    "is_all_true",
    "mark_stepped",
    "non_persistent_buffers",
    "optimizers_without_dynamo",
    "plain_kernels",
    "pytree",
    "schema",
    "step_without_dynamo",
    "version",
    "without_modes",
]  # fmt: skip

#: ATen overload -> the function that makes it of others.
Decompositions = Mapping[OperatorBase, Callable[..., object]]

#: `Distribution` asks this of samples when it was made with its checks on.
is_all_true: Callable[..., torch.Tensor] = torch._is_all_true


def has_global_step_hooks() -> bool:
    """Whether hooks stand on the steps of all optimizers (`register_optimizer_step_pre_hook` and `_post_hook`)."""
    return bool(_optimizers._global_optimizer_pre_hooks or _optimizers._global_optimizer_post_hooks)


#: Context: no function or dispatch mode sees what runs inside.
without_modes: Callable[[], contextlib.AbstractContextManager[object]] = _disable_current_modes
#: Where torch's releases keep the generator of checkpoints without reentrance: up to 2.13, and from 2.14 on.
_CHECKPOINTS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")


#: Where `torch._disable_dynamo` keeps, on a function, the form of it that Dynamo does not look into.
_DISABLED = "__dynamo_disable"

V = TypeVar("V")


class SideTable(Generic[V]):
    """What one capture knows of tensors, for as long as each lives; nothing is hung on the tensors themselves."""

    def __init__(self) -> None:
        self._values: Any = WeakTensorKeyDictionary()

    def __setitem__(self, tensor: torch.Tensor, value: V) -> None:
        self._values[tensor] = value

    def __bool__(self) -> bool:
        return len(self._values) > 0

    def get(self, key: object) -> V | None:
        """The tensor's value; None for another tensor, and for what is no tensor."""
        value: V | None = self._values.get(key) if isinstance(key, torch.Tensor) else None
        return value


class TorchDispatchMode(_TorchDispatchMode):  # type: ignore[no-untyped-call]
    """torch's, which asks Dynamo to stay out of its way; where that is not imported, no seconds go to its import."""

    def __enter__(self) -> Any:
        plain = getattr(type(self).__torch_dispatch__, "__wrapped__", None)
        if plain is not None and "torch._dynamo" not in sys.modules:
            setattr(plain, _DISABLED, plain)
        elif getattr(plain, _DISABLED, None) is plain is not None:
            delattr(plain, _DISABLED)
        return super().__enter__()  # type: ignore[no-untyped-call]


def schema(overload: OpOverload) -> torch.FunctionSchema:
    """The overload's schema: `name`, and `arguments` with `name`, `is_out`, `alias_info`."""
    return overload._schema


@functools.cache
def can_decompose(overload: OpOverload) -> bool:
    """Whether torch itself makes the overload of others."""
    return bool(overload._can_decompose())


def version(tensor: torch.Tensor) -> int:
    """How often the tensor's memory was written to."""
    return tensor._version


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Tell learning-rate schedulers, which warn otherwise, that the optimizer has made an update."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def optimizers_without_dynamo() -> Iterator[None]:
    """Within the block optimizers are made, and their state is read, without importing TorchDynamo.

    That takes as long as importing torch.

    Optimizers only ask Dynamo to stay out of their way; they find here that it does.
    """
    optimizer = torch.optim.Optimizer
    methods = (
        optimizer.add_param_group,
        optimizer.zero_grad,
        optimizer.state_dict,
        optimizer.load_state_dict,
    )
    plain = [found for method in methods if (found := getattr(method, "__wrapped__", None)) is not None]
    if "torch._dynamo" in sys.modules:
        yield
        return
    mine = [function for function in plain if not hasattr(function, "__dynamo_disable")]  # blocks may nest
    for function in mine:
        setattr(function, "__dynamo_disable", function)
    try:
        yield
    finally:
        for function in mine:
            delattr(function, "__dynamo_disable")


def step_without_dynamo(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()`; of torch's own optimizers without hooks, the function itself, which imports no TorchDynamo.

    What stands around it turns gradients off, asks Dynamo for a graph break, and calls hooks.
    """
    kind = type(optimizer)
    around = (
        optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or has_global_step_hooks()
    )
    changed = "step" in vars(optimizer) or optimizer.defaults.get("differentiable", False)
    if "torch._dynamo" in sys.modules or around or changed or not kind.__module__.startswith("torch.optim."):
        optimizer.step()
        return
    with torch.no_grad():
        inspect.unwrap(kind.step)(optimizer)


def non_persistent_buffers(module: torch.nn.Module) -> set[str]:
    """Names of the module's own buffers that are not saved."""
    return module._non_persistent_buffers_set


def decompositions_of(packets: Sequence[OpOverloadPacket]) -> Decompositions:
    """torch's decompositions of these operations, all overloads, in its core table or not."""
    from torch._decomp import get_decompositions

    return get_decompositions(packets)


def graph_module(root: torch.nn.Module, graph: Graph) -> GraphModule:
    """A module of a graph, which writes and compiles its Python code when that is first asked for (to run it)."""
    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph)


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Inside, CPU layers are made of plain matmuls, and `torch.compiler.is_compiling()` holds.

    Not `torch.backends.mkldnn.flags`: it also sets an option for Intel GPUs and warns that there is none. Models
    that look at values to choose a path (`if mask.all()`) take the one that fits all values.
    """
    onednn, compiling = torch._C._get_mkldnn_enabled(), torch.compiler._is_compiling_flag
    torch._C._set_mkldnn_enabled(False)
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch.compiler._is_compiling_flag = compiling


@contextlib.contextmanager
def checkpoints_run_once() -> Iterator[None]:
    """Inside, `torch.utils.checkpoint` calls its function once and recomputes nothing.

    Raises: EnvironmentFault where the installed torch recomputes all the same.
    """
    names = [name for name in _CHECKPOINTS if hasattr(checkpoint, name)]
    kept = {name: getattr(checkpoint, name) for name in (*names, "CheckpointFunction")}
    for name in names:
        setattr(checkpoint, name, _once)
    setattr(checkpoint, "CheckpointFunction", _Once)  # noqa: B010  (mypy: assigning to a type)
    try:
        _check_checkpoints()
        yield
    finally:
        for name, value in kept.items():
            setattr(checkpoint, name, value)


@contextlib.contextmanager
def causal_masks_as_given() -> Iterator[None]:
    """Inside, `nn.Transformer` and its like do not compare a mask with the causal one, which would read its values.

    Unless the caller says `is_causal=True`, the mask is used as it is, which gives the same.
    A release without this comparison needs none left out.
    """
    name = "_detect_is_causal_mask"
    kept = getattr(transformer, name, None)
    if kept is not None:
        setattr(transformer, name, lambda mask, is_causal=None, size=None: is_causal is True)
    try:
        yield
    finally:
        if kept is not None:
            setattr(transformer, name, kept)


def _once(*_: object, **__: object) -> Iterator[None]:
    yield


class _Once:
    """Stands for the autograd function of reentrant checkpoints."""

    @staticmethod
    def apply(function: Callable[..., object], _preserve: bool, *args: object) -> Any:
        return function(*args)


def _check_checkpoints() -> None:
    """Whether the substitution takes effect: a checkpointed function runs once for forward and backward."""
    plain = getattr(
        checkpoint.checkpoint, "__wrapped__", checkpoint.checkpoint
    )  # else Dynamo is imported: 2 s
    for reentrant in (False, True):
        calls: list[None] = []

        def probe(x: torch.Tensor, calls: list[None] = calls) -> torch.Tensor:
            calls.append(None)
            return x * x

        with torch.enable_grad():
            x = torch.ones(1, requires_grad=True)
            y: Any = plain(probe, x, use_reentrant=reentrant)
            torch.autograd.grad(y, x)
        if len(calls) != 1:
            raise EnvironmentFault(
                f"torch {torch.__version__}: needs checkpoints that can be run once; got one that is recomputed "
                f"(use_reentrant={reentrant}). Install a release of torch that the README names.",
                code="ANE210",
            )
