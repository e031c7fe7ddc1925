"""What torch.compile does not document does what the backend takes it for, and the backend is found by its name."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend

from ane_trainer.ane.dynamo import ane, torch_private
from ane_trainer.ane.dynamo.graphs import partition


def test_dynamo_finds_the_backend_by_its_entry_point() -> None:
    found = entry_points(group="torch_dynamo_backends", name="ane")
    assert [entry.value for entry in found] == ["ane_trainer.ane.dynamo:ane"]
    assert lookup_backend("ane") is ane


def test_graphs_of_one_function_have_one_identity() -> None:
    seen: list[str | None] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(torch_private.compile_id())
        return graph

    first, second = (
        torch.compile(lambda x: x + 1, backend=backend),
        torch.compile(lambda x: x * 2, backend=backend),
    )
    for size in (2, 3):
        first(torch.ones(size))
    second(torch.ones(2))
    assert len(seen) == 3
    assert seen[0] == seen[1] != seen[2]
    assert torch_private.compile_id() is None


def test_symbolic_sizes_have_formulas() -> None:
    found: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        (node,) = [
            n
            for n in graph.graph.nodes
            if isinstance(n.meta.get("example_value"), torch.Tensor) and n.users and n.op == "placeholder"
        ]
        found.append(torch_private.expression(node.meta["example_value"].shape[0]))
        return graph

    torch.compile(lambda x: x + 1, backend=backend, dynamic=True)(torch.ones(3))
    assert str(found[0]).startswith("s")
    assert torch_private.expression(3) == 3


def test_aot_takes_compilers_a_partition_and_decompositions() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def compiler(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(module)
        return torch_private.make_boxed_func(module.forward)

    graph = torch.fx.symbolic_trace(lambda x: (torch.tanh(x) * 2,))
    mode = torch_private.FakeTensorMode(allow_non_fake_inputs=True)
    x = torch.ones(2, requires_grad=True)
    compiled = torch_private.aot_module_simplified(
        graph, [mode.from_tensor(x)], fw_compiler=compiler, bw_compiler=compiler, inference_compiler=compiler,
        partition_fn=partition, decompositions={}, ignore_shape_env=True,
    )  # fmt: skip
    compiled(x)[0].sum().backward()
    assert len(graphs) == 2
    assert any(node.name.startswith("tangents") for node in graphs[1].graph.nodes)
    assert x.grad is not None


def test_checks_of_linear_algebra_are_effects() -> None:
    """What `graphs._drop_checks` takes out."""
    graphs: list[torch.fx.GraphModule] = []

    def compiler(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(module)
        return torch_private.make_boxed_func(module.forward)

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return torch_private.aot_module_simplified(
            graph, inputs, fw_compiler=compiler, bw_compiler=compiler, inference_compiler=compiler,
            partition_fn=partition,
        )  # fmt: skip

    torch.compile(torch.linalg.inv, backend=backend)(torch.eye(2))
    checks = [node for node in graphs[0].graph.nodes if node.target is torch_private.with_effects]
    written = tuple(map(int, torch.__version__.split(".")[:2])) > (2, 10)  # 2.10 drops them itself
    assert [node.args[1] for node in checks] == [torch.ops.aten._linalg_check_errors.default] * written
