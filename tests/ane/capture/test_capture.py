"""What capture takes, what it names and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ane_trainer.ane.capture import capture_forward, capture_step, capture_training
from ane_trainer.ane.errors import UnsupportedModel, UsageError
from ane_trainer.ane.stages import Captured
from tests.ane.capture.harness import FxStep, torch_step


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 4 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        x = F.max_pool2d(x, 2)
        return self.head(x.flatten(1))


def example(batch: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 1, 8, 8, generator=generator), torch.randint(
        0, 5, (batch,), generator=generator
    )


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def step_against_torch(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, loss: str = "cross_entropy"
) -> FxStep:
    """One captured step and one torch step from the same start; parameters and buffers agree."""
    twin = copy.deepcopy(model)
    optimizer, reference = sgd(model), sgd(twin)
    step = FxStep(capture_training(model, loss, optimizer, (x, y)), model, optimizer)
    functions = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
    expected = torch_step(twin, functions[loss], reference, x, y)
    assert step.step({"x": x, "y": y})[0] == pytest.approx(expected, rel=1e-5)
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        if tensor.is_floating_point():
            value = step.value(name).float().reshape(tensor.shape)
            torch.testing.assert_close(value, tensor.detach(), rtol=2e-5, atol=2e-6)
    return step


def test_a_cnn_with_batch_norm_steps_as_torch_does() -> None:
    torch.manual_seed(0)
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step_against_torch(model, *example())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "capture changed the model"


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)])
def test_norms_and_their_gradients(norm: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 1), norm, nn.Flatten(), nn.Linear(32, 5))
    step_against_torch(model, torch.randn(6, 3, 8), torch.randint(0, 5, (6,)))


def test_batch_norm_in_eval_mode_keeps_its_statistics() -> None:
    torch.manual_seed(0)
    model = Net()
    model.norm.eval()
    step = step_against_torch(model, *example())
    assert "norm.running_mean" not in {p.target for p in step.captured.outputs}


def test_embedding_and_class_weights_by_one_hot() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6, padding_idx=0), nn.Flatten(), nn.Linear(18, 4))
    x, y = torch.randint(0, 11, (5, 3)), torch.randint(0, 4, (5,))
    step_against_torch(model, x, y)
    weight = torch.tensor([1.0, 0.5, 2.0, 3.0])

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target, weight=weight, ignore_index=2, label_smoothing=0.1)

    twin = copy.deepcopy(model)
    optimizer, reference = sgd(model), sgd(twin)
    step = FxStep(capture_training(model, loss, optimizer, (x, y)), model, optimizer)
    assert step.step({"x": x, "y": y})[0] == pytest.approx(torch_step(twin, loss, reference, x, y), rel=1e-5)
    for name, tensor in twin.named_parameters():
        torch.testing.assert_close(step.value(name).float(), tensor.detach(), rtol=1e-5, atol=1e-6)


def test_frozen_and_unreached_parameters_have_no_update() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 2), "unused": nn.Linear(2, 2)})
    model["a"].requires_grad_(False)
    model.forward = lambda x: model["b"](model["a"](x))  # type: ignore[method-assign]
    captured = capture_step(model, "mse", sgd(model), (torch.randn(4, 3), torch.randn(4, 2)))
    updated = {p.target for p in captured.outputs if p.role == "state"}
    assert "b.weight" in updated
    assert not any(target.startswith(("a.", "unused.")) for target in updated)
    assert "a.weight" in {p.target for p in captured.inputs}
    assert "a.weight/residual" not in {p.target for p in captured.inputs}


def test_tied_weights_are_one_state() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    step = step_against_torch(model, torch.randn(4, 6), torch.randn(4, 6), "mse")
    assert [p.target for p in step.captured.inputs if p.target.endswith("weight")] == ["0.weight"]


def test_ports_are_named_after_the_module_and_unique() -> None:
    model = Net()
    captured = capture_step(model, "cross_entropy", sgd(model), example())
    names = [p.name for p in (*captured.inputs, *captured.outputs)]
    assert len(set(names)) == len(names)
    assert {"x", "y", "conv_weight", "conv_weight_momentum_buffer", "loss_scale", "rate"} <= set(names)
    assert [n.name for n in captured.graph.graph.nodes if n.op == "placeholder"] == [
        p.name for p in captured.inputs
    ]
    assert {a.input for a in captured.aliases} <= {p.name for p in captured.inputs if p.role == "state"}
    assert {a.output for a in captured.aliases} == {p.name for p in captured.outputs if p.role == "state"}


def test_clashing_names_are_told_apart() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Linear(2, 2)
            self.x_weight = nn.Parameter(torch.ones(2))
            self.loss_scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.x(x) * self.x_weight * self.loss_scale

    model = Clash()
    captured = capture_step(model, "mse", sgd(model), (torch.ones(3, 2), torch.ones(3, 2)))
    names = [p.name for p in captured.inputs]
    assert len(set(names)) == len(names)
    step_against_torch(model, torch.ones(3, 2), torch.zeros(3, 2), "mse")


def located(captured: Captured) -> tuple[int, int]:
    """(call nodes with a source, call nodes)."""
    calls = [n for n in captured.graph.graph.nodes if n.op == "call_function"]
    return sum("ane_source" in n.meta for n in calls), len(calls)


def test_nodes_know_module_and_line_forward_and_backward() -> None:
    model = Net()
    captured = capture_step(model, "cross_entropy", sgd(model), example())
    found, all_calls = located(captured)
    assert found == all_calls
    sources = {
        str(n.target): n.meta["ane_source"] for n in captured.graph.graph.nodes if "ane_source" in n.meta
    }
    line = Net.forward.__code__.co_firstlineno + 1
    for target in ("aten.convolution.default", "aten.convolution_backward.default"):
        assert sources[target].startswith("conv (")
        assert sources[target].endswith(f"test_capture.py:{line})")
    assert sources["aten.max_pool2d_with_indices_backward.default"].startswith("Net (")
    assert {"loss cross_entropy", "loss scaling", "optimizer SGD (conv.weight)"} <= {
        n.meta.get("ane_source") for n in captured.graph.graph.nodes
    }


def test_sequential_modules_are_located_without_a_line() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    captured = capture_step(model, "mse", sgd(model), (torch.ones(2, 3), torch.ones(2, 2)))
    sources = {n.meta["ane_source"] for n in captured.graph.graph.nodes if n.op == "call_function"}
    assert {"0", "1", "2", "loss mse"} <= sources
    assert not any("harness" in s or "test_capture" in s for s in sources)


def test_forward_is_in_eval_mode_and_leaves_the_mode_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Net(), nn.Dropout(0.9))
    x, _ = example()
    captured = capture_forward(model, x)
    assert model.training
    assert model[0].norm.training
    inputs = {**dict(model.named_parameters()), **dict(model.named_buffers()), "x": x}
    (result,) = captured.graph(*(inputs[p.target] for p in captured.inputs))
    torch.testing.assert_close(result, copy.deepcopy(model).eval()(x))
    assert [p.name for p in captured.outputs] == ["output"]


def test_several_inputs_and_keyword_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.fc(a - b)

    model, a, b, y = Two(), torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 2)
    for x, names in (((a, b), ["x_0", "x_1"]), ({"a": a, "b": b}, ["x_a", "x_b"])):
        captured = capture_step(model, "mse", sgd(model), (x, y))
        assert [p.name for p in captured.inputs if p.role == "batch"] == [*names, "y"]


def test_dropout_becomes_a_mask_that_the_host_feeds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.25), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    x, y = torch.randn(4, 6), torch.randn(4, 3)
    optimizer = sgd(model)
    step = FxStep(capture_training(model, "mse", optimizer, (x, y)), model, optimizer)
    (port,) = (p for p in step.captured.inputs if p.target.startswith("dropout/"))
    assert (port.shape, port.target, port.role) == ((4, 8), "dropout/0.25", "batch")
    mask = (torch.rand(4, 8) > 0.25) / 0.75
    expected = F.mse_loss(twin[2](twin[0](x) * mask), y)
    assert step.step({"x": x, "y": y, port.name: mask})[0] == pytest.approx(
        float(expected.detach()), rel=1e-5
    )


def test_capture_does_not_touch_the_random_state() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.25), nn.Linear(8, 3))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    capture_step(model, "mse", sgd(model), (torch.ones(4, 6), torch.ones(4, 3)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"model\.parameters\(\)"):
        capture_step(Net(), "cross_entropy", sgd(Net()), example())


@pytest.mark.parametrize(
    "loss", ["cross_entropy", "mse", "nll", "bce_with_logits", "l1", "huber", "smooth_l1"]
)
def test_losses_by_name(loss: str) -> None:
    model = nn.Linear(3, 4)
    y = torch.randint(0, 4, (5,)) if loss in ("cross_entropy", "nll") else torch.rand(5, 4)
    captured = capture_step(model, loss, sgd(model), (torch.randn(5, 3), y))
    assert captured.outputs[0].name == "loss"


def test_unknown_loss_suggests_a_near_one() -> None:
    model = nn.Linear(3, 4)
    with pytest.raises(UsageError, match="Did you mean 'cross_entropy'"):
        capture_step(model, "crossentropy", sgd(model), (torch.ones(1, 3), torch.zeros(1, dtype=torch.long)))
