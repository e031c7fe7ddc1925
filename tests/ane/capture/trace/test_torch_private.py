"""What torch does not document does what capture takes it for, and is named in two modules only."""

from __future__ import annotations

import ast
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import checkpoint

import ane_trainer
from ane_trainer.ane.capture.trace import torch_private
from ane_trainer.ane.errors import EnvironmentFault

aten = torch.ops.aten
PACKAGE = Path(ane_trainer.__file__).parent
HOMES = {"ane/capture/trace/torch_private.py", "ane/dynamo/torch_private.py"}
#: Attributes of torch's objects that have no public name.
ATTRIBUTES = {
    "_version",
    "_schema",
    "_can_decompose",
    "_non_persistent_buffers_set",
    "_dynamo",
    "_opt_called",
    "_C",
}


def private_names(tree: ast.AST) -> Iterator[str]:
    """`torch._C`, `from torch.utils._pytree import`, `from torch import _guards`, `tensor._version`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("torch", "functorch"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"{node.module}: {name}" for name in names if name.startswith("_"))
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("torch.") and "._" in a.name)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root = ast.unparse(node.value)
            is_op = root.startswith(("torch.ops.", "aten"))  # operators' names may begin with _
            if node.attr in ATTRIBUTES or (root.split(".")[0] == "torch" and not is_op):
                yield f"{root}.{node.attr}"


def test_private_names_are_kept_in_two_modules() -> None:
    found = []
    for path in sorted((PACKAGE / "ane").rglob("*.py")):
        if path.relative_to(PACKAGE).as_posix() not in HOMES:
            names = private_names(ast.parse(path.read_text()))
            found += [f"{path.relative_to(PACKAGE)}: {name}" for name in names]
    assert not found


def test_private_names_are_seen() -> None:
    text = (
        "import torch\nfrom torch.utils import _pytree\ntorch._C.x()\nt._version\ntorch.ops.aten._softmax\n"
    )
    assert sorted(private_names(ast.parse(text))) == ["t._version", "torch._C", "torch.utils: _pytree"]


def test_schemas_say_what_is_written_and_where_results_go() -> None:
    written = [
        a.alias_info is not None and a.alias_info.is_write
        for a in torch_private.schema(aten.add_.Tensor).arguments
    ]
    assert written == [True, False, False]
    assert [a.name for a in torch_private.schema(aten.div.out).arguments if a.is_out] == ["out"]
    assert torch_private.schema(aten.add_.Tensor).name == "aten::add_"


def test_composites_are_told_from_others() -> None:
    assert torch_private.can_decompose(aten.silu_backward.default)
    assert not torch_private.can_decompose(aten.mm.default)


def test_versions_count_writes() -> None:
    x = torch.zeros(2)
    before = torch_private.version(x)
    x[0].add_(1)
    assert torch_private.version(x) == before + 1


def test_a_graphs_code_is_written_when_it_is_first_run() -> None:
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.add, (graph.placeholder("x"), 1)))
    module = torch_private.graph_module(torch.nn.Module(), graph)
    module.recompile()
    assert float(module(torch.ones(()))) == 2.0
    assert "torch.add" in module.code
    graph.output_node().args = (graph.find_nodes(op="placeholder")[0],)
    module.recompile()
    assert float(module(torch.ones(()))) == 1.0


def test_schedulers_see_that_an_update_was_made() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    torch_private.mark_stepped(optimizer)
    scheduler.step()  # a warning is an error here


def test_buffers_that_are_not_saved() -> None:
    module = torch.nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("derived", torch.zeros(1), persistent=False)
    assert torch_private.non_persistent_buffers(module) == {"derived"}


def test_no_mode_sees_what_runs_without_modes() -> None:
    seen = []

    class Watch(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(1)
        with torch_private.without_modes():
            torch.zeros(1)
    assert [str(func) for func in seen] == ["aten.ones.default"]


def test_decompositions_of_operations_outside_the_core_table() -> None:
    table = torch_private.decompositions_of([aten.mish])
    assert torch.equal(table[aten.mish.default](torch.ones(1)), torch.nn.functional.mish(torch.ones(1)))


def test_code_that_asks_is_told_that_it_is_compiled() -> None:
    with torch_private.plain_kernels():
        assert torch.compiler.is_compiling()
        assert not torch.backends.mkldnn.enabled
    assert not torch.compiler.is_compiling()
    assert torch.backends.mkldnn.enabled


def test_distributions_ask_through_a_function_that_can_be_replaced() -> None:
    assert bool(torch_private.is_all_true(torch.ones(2, dtype=torch.bool)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_run_once(reentrant: bool) -> None:
    calls = []

    def part(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * x

    x = torch.ones(2, requires_grad=True)
    with torch_private.checkpoints_run_once():
        checkpoint.checkpoint(part, x, use_reentrant=reentrant).sum().backward()
    assert len(calls) == 1
    checkpoint.checkpoint(part, x, use_reentrant=reentrant).sum().backward()
    assert len(calls) == 3


def test_a_release_that_recomputes_all_the_same_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "_CHECKPOINTS", ())
    before = checkpoint.CheckpointFunction
    with pytest.raises(EnvironmentFault, match="needs checkpoints that can be run once") as caught, \
            torch_private.checkpoints_run_once():  # fmt: skip
        pass
    assert caught.value.code == "ANE210"
    assert checkpoint.CheckpointFunction is before


def test_transformers_use_a_mask_without_reading_it() -> None:
    """The causal mask itself is not told from others, unless the caller says so."""
    mask = torch.nn.Transformer.generate_square_subsequent_mask(4)
    layer = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(8, 2, 8), 1, enable_nested_tensor=False
    )
    wanted = layer(torch.ones(4, 1, 8), mask=mask)
    with torch_private.causal_masks_as_given():
        assert not torch.nn.modules.transformer._detect_is_causal_mask(mask)
        assert torch.nn.modules.transformer._detect_is_causal_mask(mask, True)
    assert torch.nn.modules.transformer._detect_is_causal_mask(mask)
    assert wanted.shape == (4, 1, 8)


def test_a_side_table_lives_with_its_tensors() -> None:
    table: torch_private.SideTable[str] = torch_private.SideTable()
    x, y = torch.ones(1), torch.ones(1)
    table[x], table[y] = "x", "y"
    assert (table.get(x), table.get(y), table.get(torch.ones(1)), table.get(3)) == ("x", "y", None, None)
    assert not vars(x)
    del x, y
    gc.collect()
    assert not table


@pytest.mark.parametrize("first", ["", "import torch._dynamo"])
def test_neither_an_optimizer_nor_a_capture_imports_dynamo(first: str) -> None:
    code = (
        f"{first}\n"
        + """
import sys, torch
from ane_trainer.ane.capture.trace.torch_private import TorchDispatchMode
from ane_trainer.ane.capture.trace.torch_private import optimizers_without_dynamo, step_without_dynamo
class Counting(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))
there = 'torch._dynamo' in sys.modules
for _ in range(2):  # the second time Dynamo is there
    with optimizers_without_dynamo():
        layer = torch.nn.Linear(2, 2)
        optimizer = torch.optim.Adam(layer.parameters())
        layer(torch.ones(2)).sum().backward()
        before = layer.bias.detach().clone()
        step_without_dynamo(optimizer)
        assert torch.allclose(layer.bias, before - 1e-3)
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    with Counting() as counting:
        torch.ones(2) + 1
    assert counting.count == 2
    assert len(optimizer.param_groups[0]['params']) == 2
    assert ('torch._dynamo' in sys.modules) == there
    torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)  # outside of the block torch is as it was
    there = True
    assert 'torch._dynamo' in sys.modules
"""
    )
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


def test_the_operations_of_the_tables_are_overloads() -> None:
    assert isinstance(aten.silu.default, torch_private.OpOverload)
    assert isinstance(aten.silu, torch_private.OpOverloadPacket)
    assert issubclass(torch_private.OpOverload, torch_private.OperatorBase)
