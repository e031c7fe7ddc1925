"""Everything of torch.compile's that the backend uses and torch does not document; tests/ane/dynamo/
test_torch_private.py checks each on the installed release.

`functorch.compile` is what torch's page on custom backends names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import functorch.compile
import torch
from torch._higher_order_ops.effects import with_effects
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = [
    "FakeTensorMode", "aot_module_simplified", "compile_id", "default_partition", "expression", "make_boxed_func",
    "with_effects",
]  # fmt: skip


#: Marks a function of a list of inputs, as AOTAutograd wants its compilers' results.
make_boxed_func: Callable[[Callable[..., list[Any]]], Callable[..., Any]] = functorch.compile.make_boxed_func
aot_module_simplified: Callable[..., Callable[..., Any]] = functorch.compile.aot_module_simplified
default_partition: Callable[..., tuple[torch.fx.GraphModule, torch.fx.GraphModule]] = (
    functorch.compile.default_partition
)


def compile_id() -> str | None:
    """Which of the user's functions Dynamo compiles now: the same for other shapes and modes. None outside of it."""
    found = torch._guards.CompileContext.current_compile_id()
    return None if found is None else str(found.frame_id)


def expression(size: Any) -> Any:
    """A symbolic size's formula, which is equal for equal sizes; other sizes as they are."""
    return size.node.expr if isinstance(size, torch.SymInt) else size
