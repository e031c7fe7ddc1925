"""Whole training steps through Apple's Core AI runtime, with the state kept by it, against plain PyTorch."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("coreai")

from ane_trainer import compile_forward, compile_step
from ane_trainer.ane.compiler.coreai import open_asset, save_asset
from ane_trainer.ane.dispatch import units
from ane_trainer.ane.dispatch.devices import get_device
from ane_trainer.ane.errors import NumericsWarning, SimulationError, UsageError

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Block(nn.Module):
    """Embedding, one transformer layer, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.output = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.layer(self.embedding(x)).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(36, 4),
    )  # fmt: skip


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=2e-3)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn, "transformer": Block}


def batches(name: str, count: int = 4) -> Batches:
    draw = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        tokens = torch.randint(0, 16, (8, 6), generator=draw)
        images = torch.randn(8, 1, 6, 6, generator=draw)
        made.append((tokens if name == "transformer" else images, torch.randint(0, 4, (8,), generator=draw)))
    return made


def torch_losses(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Batches, steps: int
) -> list[float]:
    losses = []
    for i in range(steps):
        x, y = data[i % len(data)]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("optimizer", [adam, sgd])
@pytest.mark.parametrize("name", MODELS)
def test_fp32_follows_pytorch(name: str, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    wanted = copy.deepcopy(model)
    data = batches(name)
    step = compile_step(
        model, "cross_entropy", optimizer(model), data[0], device="coreai", precision="fp32", sync="lazy"
    )
    losses = [float(step(*data[i % len(data)])) for i in range(20)]
    step.close()
    np.testing.assert_allclose(losses, torch_losses(wanted, optimizer(wanted), data, 20), rtol=1e-5)
    assert losses[-1] < losses[0]
    if optimizer is adam:  # makes steps of parameters whose gradient is rounding noise: attention's key bias
        return
    for value, other in zip(model.state_dict().values(), wanted.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=2e-5)


class Square(nn.Module):
    """Attention of one head whose batch, length and width are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.head = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unsqueeze(1) for f in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.output(mixed.transpose(1, 2).reshape(x.shape)).flatten(1))


def test_axes_of_one_length_are_kept_apart() -> None:
    """Core AI's compiler moves the reshapes of such a step into the wrong product (`compiler.coreai.products`)."""
    torch.manual_seed(0)
    model = Square()
    wanted = copy.deepcopy(model)
    data = [(torch.randn(8, 8, 8), torch.randint(0, 8, (8,))) for _ in range(2)]
    step = compile_step(model, "cross_entropy", adam(model), data[0], device="coreai", precision="fp32")
    losses = [float(step(*data[i % 2])) for i in range(6)]
    step.close()
    np.testing.assert_allclose(losses, torch_losses(wanted, adam(wanted), data, 6), rtol=1e-5)
    for value, other in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_fp16_stays_within_a_band_of_the_simulator(name: str) -> None:
    """Both compute in fp16, one with IEEE rounding, one with the engine's: 1 % in the loss over 20 steps."""
    torch.manual_seed(0)
    model = MODELS[name]().train()
    data, curves = batches(name), []
    for device in ("coreai", "sim"):
        own = copy.deepcopy(model)
        with compile_step(
            own, "cross_entropy", adam(own), data[0], device=device, precision="fp16", sync="lazy"
        ) as step:
            curves.append([float(step(*data[i % len(data)])) for i in range(20)])
    np.testing.assert_allclose(curves[0], curves[1], rtol=0.01)
    assert curves[0][-1] < curves[0][0]


_CONTINUE = """
import json, sys
import numpy as np
from ane_trainer.ane.compiler.coreai import open_asset
asset = open_asset(sys.argv[1])
feeds = np.load(sys.argv[2])
losses = []
for i in range(5):
    batch = {k.split("/")[1]: feeds[k] for k in feeds if k.startswith(f"{i}/")}
    losses.append(float(asset.run(batch)["loss"][0]))
print(json.dumps(losses))
"""


def test_a_saved_asset_goes_on_in_a_new_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = mlp().train(), batches("mlp")
    optimizer = adam(model)
    feeds: dict[str, np.ndarray] = {}
    step = compile_step(model, "cross_entropy", optimizer, data[0], device="coreai", sync="lazy")
    session, run = step._loaded.session, step._loaded.session.run
    for i in range(5):
        step(*data[i % 4])
    state = {p.name: session.read(p.name) for p in step.compiled.inputs if p.role == "state"}
    path = save_asset(tmp_path / "step.aimodel", step.compiled.legalized.lowered, state, {"author": "test"})

    def note(inputs: dict[str, np.ndarray]) -> object:
        number = len({key.split("/")[0] for key in feeds})
        feeds.update({f"{number}/{name}": array for name, array in inputs.items()})
        return run(inputs)

    session.run = note  # type: ignore[method-assign]
    wanted = [float(step(*data[i % 4])) for i in range(5)]
    np.savez(tmp_path / "feeds.npz", **feeds)
    done = subprocess.run(
        [sys.executable, "-c", _CONTINUE, str(path), str(tmp_path / "feeds.npz")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == wanted
    asset = open_asset(path)
    assert set(asset.ports["states"]) == {a.input for a in step.compiled.aliases}
    assert all(np.array_equal(asset.state()[name], value) for name, value in state.items())
    asset.close()


@pytest.mark.slow
def test_a_process_that_never_closed_its_asset_ends_well(tmp_path: Path) -> None:
    """Threads of the runtime must not meet an interpreter that ends: 6 % of such processes aborted, four at a time."""
    torch.manual_seed(0)
    model, (x, y) = mlp().train(), batches("mlp")[0]
    step = compile_step(model, "cross_entropy", adam(model), (x, y), device="coreai", sync="lazy")
    zeros = {port.name: np.zeros(port.shape, np.float32) for port in step.compiled.inputs}
    state = {port.name: zeros.pop(port.name) for port in step.compiled.inputs if port.role == "state"}
    path = save_asset(tmp_path / "step.aimodel", step.compiled.legalized.lowered, state)
    np.savez(tmp_path / "feeds.npz", **{f"{i}/{name}": zeros[name] for i in range(5) for name in zeros})
    command = [sys.executable, "-c", _CONTINUE, str(path), str(tmp_path / "feeds.npz")]
    for _ in range(20):
        ends = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(4)
        ]
        errors = [process.communicate()[1] for process in ends]
        assert [process.returncode for process in ends] == [0] * 4, errors


def test_a_skipped_step_changes_only_the_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime has infinities and NaN, so the program guards what the engine's arithmetic leaves alone.

    This batch fits after 11 halvings of the loss scale. Here it gets 2, in runs that change nothing, and is lost.
    """
    monkeypatch.setattr(units, "ATTEMPTS", 3)
    torch.manual_seed(0)
    model, (x, y) = mlp().train(), batches("mlp")[0]
    step = compile_step(
        model, "cross_entropy", adam(model), (x, y), device="coreai", precision="fp16", sync="lazy",
        loss_scale=32768,
    )  # fmt: skip
    before = step.state_dict()
    with pytest.warns(NumericsWarning, match="The update was skipped"):
        step(x * 5e3, y)
    assert (step.steps, step.applied_steps, step.skipped_steps) == (1, 0, 1)
    assert step.loss_scale == 16384
    after = step.state_dict()
    for name, value in before.items():
        if name not in ("counters", "step/loss_scale", "step/loss_scale_inverse", "step/good_steps"):
            assert torch.equal(value, after[name]), name
    step.close()


def test_inference_follows_changed_weights() -> None:
    torch.manual_seed(0)
    model, (x, _) = cnn().eval(), batches("cnn")[0]
    program = compile_forward(model, x, device="coreai")
    torch.testing.assert_close(program(x), model(x).detach(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    torch.testing.assert_close(program(x), model(x).detach(), rtol=1e-5, atol=1e-5)
    program.close()


def test_the_session_refuses_what_does_not_fit() -> None:
    model, (x, y) = mlp().train(), batches("mlp")[0]
    step = compile_step(model, "cross_entropy", sgd(model), (x, y), device="coreai", sync="lazy")
    session = step._loaded.session
    with pytest.raises(SimulationError, match="needs a known name"):
        session.write("nothing", np.zeros(1))
    with pytest.raises(SimulationError, match="needs the shape"):
        session.write("loss_scale", np.zeros(2))
    with pytest.raises(SimulationError, match="they are missing"):
        session.run({})
    step.close()
    session.close()
    with pytest.raises(SimulationError, match="was closed"):
        session.read("loss_scale")


def test_precision_is_what_the_device_runs() -> None:
    model, (x, y) = mlp().train(), batches("mlp")[0]
    with pytest.raises(UsageError, match="needs auto or fp16 on device sim"):
        compile_step(model, "cross_entropy", sgd(model), (x, y), device="sim", precision="fp32")
    assert get_device("coreai").device.precisions[0] in ("fp16", "fp32")
