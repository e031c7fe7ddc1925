"""The walk and the passes: refusals together, names, sources, what the passes remove."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from ane_trainer.ane.capture import capture_step
from ane_trainer.ane.compiler.lower import RULES, lower
from ane_trainer.ane.errors import UnsupportedModel
from ane_trainer.ane.mil.program import Literal
from ane_trainer.ane.stages import Alias, Captured, Port
from tests.ane.compiler.lower.harness import captured, check, gradients, lowered, normal


def kinds(function: object, *inputs: torch.Tensor) -> Counter[str]:
    program = lowered(function, [t.float() for t in inputs])  # type: ignore[arg-type]
    return Counter(op.kind for op in program.program.main.ops)


def test_every_rule_shows_its_form() -> None:
    for name, rule in RULES.items():
        assert "->" in (rule.__doc__ or ""), f"{name}: the docstring needs `aten -> MIL`"


def test_all_refusals_come_together_with_their_places() -> None:
    graph = captured(
        lambda x: (torch.linalg.qr(x)[0], torch.erfinv(x), torch.special.bessel_j0(x)), [torch.rand(3, 3)]
    )
    for node in graph.graph.graph.nodes:
        node.meta["ane_source"] = "net.head (model.py:7)"
    with pytest.raises(UnsupportedModel) as caught:
        lower(graph)
    assert caught.value.code == "ANE301"
    assert [f.op for f in caught.value.findings] == [
        "aten.linalg_qr.default",
        "aten.erfinv.default",
        "aten.special_bessel_j0.default",
    ]
    assert all(f.where == "net.head (model.py:7)" for f in caught.value.findings)


def test_random_ops_are_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedModel, match="draws random numbers"):
        lowered(lambda x: x + torch.rand_like(x), [torch.zeros(3)])


def test_unknown_ops_of_a_step_are_refused_together_with_their_place() -> None:
    class Strange(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.linalg.qr(x)[0]) * torch.special.bessel_j0(x)

    model = Strange()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = capture_step(model, "mse", optimizer, (torch.eye(3), torch.ones(3, 3)))
    with pytest.raises(UnsupportedModel) as caught:
        lower(step)
    assert {f.op.split(".")[1] for f in caught.value.findings} >= {"linalg_qr", "special_bessel_j0"}
    assert all("Strange (" in f.where and "test_lower.py:" in f.where for f in caught.value.findings)


def test_names_aliases_and_sources() -> None:
    graph = captured(lambda w, x: (w - x * 0.1, (w * x).sum()), [torch.ones(3), torch.ones(3)])
    for node in graph.graph.graph.nodes:
        node.meta["ane_source"] = "fc (model.py:3)"
    ports = (Port("fc.weight", (3,), "state", "fc.weight"), Port("x", (3,), "batch"))
    outs = (Port("fc.weight", (3,), "state", "fc.weight"), Port("loss", (), "result"))
    result = lower(Captured(graph.graph, ports, outs, (Alias("fc.weight", "fc.weight"),)))
    main = result.program.main
    assert [v.name for v in main.inputs] == ["fc_weight", "x"] == [p.name for p in result.inputs]
    assert [v.name for v in main.outputs] == ["fc_weight_out", "loss"] == [p.name for p in result.outputs]
    assert result.aliases == (Alias("fc_weight_out", "fc_weight"),)
    assert result.outputs[1].shape == (1,)
    assert {op.source for op in main.ops} == {"fc (model.py:3)"}
    names = [r.name for op in main.ops for r in op.results] + [v.name for v in main.inputs]
    assert len(names) == len(set(names))


def test_the_program_is_fp16_and_constants_stay_in_range() -> None:
    program = lower(
        captured(lambda x: x.masked_fill(x > 0, torch.finfo(torch.float32).min), [torch.zeros(3)])
    )
    literals = [
        item for op in program.program.main.ops for _, item in op.literals() if item.type.dtype == "fp16"
    ]
    assert -65504.0 in [item.to_python() for item in literals if not item.type.rank]
    assert {v.type.dtype for v in program.program.main.inputs} == {"fp16"}


def test_equal_ops_are_merged_and_dead_ones_dropped() -> None:
    assert kinds(lambda x: x.exp() + x.exp() + 0 * 1, normal(3)) == {"exp": 1, "add": 1}
    assert kinds(lambda x: (x.exp(), x.log() * 0 + x)[0], normal(3)) == {"exp": 1}


def test_transposes_of_operands_become_flags() -> None:
    counted = kinds(gradients(F.linear), normal(4, 5), normal(3, 5))
    assert counted["matmul"] == 3
    assert counted["transpose"] == 0


def test_transposes_between_convolutions_cancel() -> None:
    def net(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.relu(F.conv2d(x, w, b, padding=1)) * 2, w, b, padding=1)

    program = check(net, [normal(2, 3, 5, 5), normal(3, 3, 3, 3, seed=1), normal(3, seed=2)], atol=1e-5)
    shapes = [op.result.type.shape for op in program.program.main.ops if op.kind == "transpose"]
    assert sum(len(shape) == 4 and shape[0] == 2 for shape in shapes) == 2  # in and out, none between


def test_broadcasts_that_the_reader_does_itself_are_dropped() -> None:
    assert kinds(lambda x, y: x.expand(4, 3) * y, normal(1, 3), normal(4, 3)) == {"mul": 1}
    assert kinds(gradients(lambda x: (x * x).mean()), normal(4, 3))["tile"] == 0


def test_division_by_a_constant_is_a_product() -> None:
    program = lowered(lambda x: x / 8, [torch.ones(3)])
    (op,) = program.program.main.ops
    factor = op.arg("y")
    assert op.kind == "mul"
    assert isinstance(factor, Literal)
    assert factor.to_python() == 0.125


def test_booleans_are_never_cast_or_moved() -> None:
    def layer(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        mask = (x > 0).reshape(2, 6).t()[1:] & (y > 0)
        return mask.to(x.dtype).sum() + torch.where(mask, 1.0, 2.0).sum()

    program = check(layer, [normal(3, 4), normal(5, 2)])
    for op in program.program.main.ops:
        assert op.kind not in ("cast", "logical_and", "logical_or", "logical_xor")
        if any(v.type.dtype == "bool" for v in op.operands()):
            assert op.kind in ("select", "logical_not")
