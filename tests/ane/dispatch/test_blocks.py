"""Programs of blocks against the whole program: the same bits, in programs whose number does not grow with depth."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from torch import nn

import ane_trainer as at
from ane_trainer.ane.capture.gradients import GradientOptions
from ane_trainer.ane.chips.cost import estimate
from ane_trainer.ane.chips.lookup import get_chip, known_layers
from ane_trainer.ane.dispatch import StepOptions, TrainingStep, build_step, compile_forward, resolve_target
from ane_trainer.ane.dispatch.devices import get_device
from ane_trainer.ane.dispatch.devices.chain import ChainSession
from ane_trainer.ane.dispatch.devices.joined import joined
from ane_trainer.ane.dispatch.devices.sim import SimSession
from ane_trainer.ane.dispatch.frozen import quantize_frozen
from ane_trainer.ane.errors import UsageError

TARGET = resolve_target("sim", threads=1)
Batch = tuple[torch.Tensor, torch.Tensor]
Batches = Callable[[int], list[Batch]]


class Layers(nn.Module):
    """`count` layers of a transformer between an embedding and a head."""

    def __init__(self, count: int, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True) for _ in range(count)
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Residual(nn.Module):
    """A block of a ResNet: two convolutions, and one on the way past them where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.past = nn.Conv2d(inner, outer, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return torch.relu(inner + self.past(x))


def resnet(stages: int, width: int = 4) -> nn.Module:
    made: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for i in range(stages):
        inner, outer = width * 2 ** max(i - 1, 0), width * 2**i
        made.append(nn.Sequential(Residual(inner, outer, 2 if i else 1), Residual(outer, outer, 1)))
    return nn.Sequential(
        *made, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width * 2 ** (stages - 1), 4)
    )


def tokens(count: int) -> list[Batch]:
    torch.manual_seed(5)
    return [(torch.randint(0, 16, (4, 6)), torch.randint(0, 4, (4,))) for _ in range(count)]


def pictures(count: int) -> list[Batch]:
    torch.manual_seed(5)
    return [(torch.randn(4, 3, 8, 8), torch.randint(0, 4, (4,))) for _ in range(count)]


def adamw(model: nn.Module, rate: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate)


def built(
    make: Callable[[], nn.Module], example: Batch, blocks: str | int, options: StepOptions, chip: str = "m4",
    optimize: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
) -> tuple[nn.Module, TrainingStep]:  # fmt: skip
    torch.manual_seed(1)
    model = make()
    optimizer = optimize(model)
    target = replace(TARGET, chip=chip)
    step = build_step(
        model, "cross_entropy", optimizer, example, target, replace(options, blocks=blocks, seed=3)
    )
    return model, step


def assert_same(one: TrainingStep, other: TrainingStep) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def train_both(
    make: Callable[[], nn.Module], batches: list[Batch], options: StepOptions, blocks: int = 1,
    optimize: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
) -> tuple[TrainingStep, TrainingStep]:  # fmt: skip
    """The whole program and programs of blocks on the same batches: their losses and states are the same bits."""
    (whole_model, whole), (model, step) = (
        built(make, batches[0], b, options, optimize=optimize) for b in ("off", blocks)
    )
    for x, y in batches:
        assert float(whole(x, y)) == float(step(x, y))
    for left, right in zip(whole_model.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(left, right)
    assert_same(whole, step)
    assert whole.dispatches_per_step == 1
    assert step.applied_steps == whole.applied_steps > 0
    return whole, step


QUIET = StepOptions(verify="off")


def test_a_transformer_with_dropout_clipping_and_accumulation() -> None:
    options = replace(QUIET, gradients=GradientOptions(clip_norm=0.5, accumulate=2))
    _, step = train_both(lambda: Layers(2), tokens(4), options)
    forward = [each for each in step.dispatches if each.title.startswith("forward layers")]
    assert [each.title for each in forward] == ["forward layers.0", "forward layers.1"]
    assert len({each.program for each in forward}) == 1
    assert len(step.programs) < step.dispatches_per_step == len(step.dispatches)


def test_a_resnet_with_running_statistics() -> None:
    _, step = train_both(lambda: resnet(2), pictures(3), QUIET)
    titles = [each.title for each in step.dispatches]
    assert {"forward 3.0", "forward 3.1", "forward 4.0", "forward 4.1", "backward 3.0"} <= set(titles)


class Scaled(nn.Module):
    """A layer with a number of its own, which is a constant of its program."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(8, 8), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x)) * self.factor


def scaled_layers(count: int = 3) -> nn.Module:
    layers = (Scaled(0.3 + 0.2 * i) for i in range(count))
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(*layers), nn.Linear(8, 4))


def numbers(count: int) -> list[Batch]:
    torch.manual_seed(5)
    return [(torch.randn(4, 6), torch.randint(0, 4, (4,))) for _ in range(count)]


@pytest.mark.parametrize(
    "optimize",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
        lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-2, momentum=0.9, centered=True),
        lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True),
        lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2),
    ],
    ids=["sgd", "rmsprop", "amsgrad", "adafactor"],
)
def test_optimizers_whose_new_state_is_read_in_the_step(
    optimize: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    train_both(scaled_layers, numbers(3), QUIET, optimize=optimize)


def test_batches_whose_gradients_do_not_fit_run_again() -> None:
    batches = [(x * s, y) for s, (x, y) in zip((1.0, 1.0, 9000.0, 1.0), numbers(4), strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, step = train_both(scaled_layers, batches, QUIET)
    assert step.loss_scale == whole.loss_scale
    assert step.health == whole.health


def test_numbers_that_differ_between_layers_are_inputs_of_one_program() -> None:
    _, step = train_both(scaled_layers, numbers(3), QUIET)
    forward = [each for each in step.dispatches if each.title.startswith("forward 1.")]
    assert len(forward) == 3
    assert len({each.program for each in forward}) == 1
    assert len({each.constants for each in forward}) == 3


def test_layers_whose_frozen_weights_are_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ane_trainer.ane.dispatch.frozen.MIN_ELEMENTS", 16)

    def make() -> nn.Module:
        model = scaled_layers(2)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith("linear.weight"))
        assert quantize_frozen(model, "int8") == 2
        return model

    _, step = train_both(make, numbers(3), QUIET)
    held = [op for part in step.programs for op in part.program.main.ops if op.kind.startswith("constexpr")]
    assert held
    assert all(port.target != "1.0.linear.weight" for port in step.compiled.inputs)
    chain = step.host_side[1].compiled.chain
    assert chain is not None
    found = [op.args for op in joined(step.program.main, chain)[0].ops if op.kind.startswith("constexpr")]
    assert len(found) == 2 < len(held)  # decoded once for forward and backward


def test_several_blocks_in_one_program() -> None:
    _, step = train_both(scaled_layers, numbers(2), QUIET, blocks=2)
    assert [each.title for each in step.dispatches if each.title.startswith("forward 1.")] == [
        "forward 1.0 to 1", "forward 1.2",
    ]  # fmt: skip


def test_programs_do_not_grow_with_depth() -> None:
    sizes = []
    for depth in (2, 4):
        _, step = built(lambda depth=depth: scaled_layers(depth), numbers(1)[0], 1, QUIET)
        sizes.append((len(step.programs), step.dispatches_per_step))
    assert sizes[1][0] == sizes[0][0]
    assert sizes[1][1] == sizes[0][1] + 3 * 2


@pytest.mark.parametrize(("first", "second"), [("off", 1), (1, "off")])
def test_a_state_goes_on_in_the_other_form(first: str | int, second: str | int) -> None:
    make, batches = scaled_layers, numbers(4)
    _, reference = built(make, batches[0], first, QUIET)
    for x, y in batches[:2]:
        reference(x, y)
    _, resumed = built(make, batches[0], second, QUIET)
    resumed.load_state_dict(reference.state_dict())
    for x, y in batches[2:]:
        assert float(reference(x, y)) == float(resumed(x, y))
    assert_same(reference, resumed)
    assert resumed.compiled.fingerprint == reference.compiled.fingerprint


def test_auto_takes_long_pieces_where_blocks_are_short() -> None:
    """Twelve layers of 40 operations fill three programs; one for each layer and phase took 81 dispatches."""
    data = torch.randn(8, 16), torch.randint(0, 4, (8,))

    def deep() -> nn.Module:
        layers = [layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(16, 4))

    losses = []
    for blocks in ("auto", "off", 1):
        torch.manual_seed(0)
        model = deep()
        step = at.compile_step(
            model, "cross_entropy", torch.optim.Adam(model.parameters()), data, blocks=blocks, verify="off"
        )
        losses.append([float(step(*data)) for _ in range(3)])
        place = step.placement()
        if blocks == "auto":
            assert place["dispatches"] == place["programs"] <= 5, place
    assert losses[0] == losses[1] == losses[2]


def test_auto_divides_what_is_longer_than_known_to_compile() -> None:
    _, step = built(lambda: scaled_layers(6), numbers(1)[0], "auto", QUIET, chip="m1")
    most, _ = known_layers(get_chip("m1"))
    place = step.placement()
    assert len(step.program.main.ops) > most
    assert max(len(part.program.main.ops) for part in step.programs) <= most
    assert str(place["blocks"]).startswith(f"auto: {len(step.program.main.ops)} operations")
    assert (place["programs"], place["dispatches"]) == (len(step.programs), len(step.dispatches))
    _, short = built(lambda: nn.Sequential(nn.Linear(6, 4)), numbers(1)[0], "auto", QUIET)
    assert short.placement()["blocks"] == ""
    assert short.dispatches_per_step == 1


def test_cost_is_that_of_every_dispatch() -> None:
    _, step = built(scaled_layers, numbers(1)[0], 1, QUIET)
    costs = [estimate(step.programs[each.program].program, "m4") for each in step.dispatches]
    assert step.cost().latency_us == pytest.approx(sum(cost.latency_us for cost in costs))
    assert step.cost().dispatch_us == pytest.approx(sum(cost.dispatch_us for cost in costs))


def test_devices_without_shared_memory_compute_the_same() -> None:
    _, step = built(scaled_layers, numbers(1)[0], 1, QUIET)
    compiled, session = step.host_side[1].compiled, step.host_side[1].session
    assert isinstance(session, SimSession)
    device = get_device("sim").device
    parts = [device.load(part, fidelity="exact", threads=1) for part in compiled.programs]
    other = ChainSession(compiled, parts)
    for port in compiled.inputs:
        if port.role == "state":
            other.write(port.name, session.read(port.name))
    for x, y in numbers(3):
        feeds = step.feeds(x, y)
        if step.host_side[1].floors:
            feeds[step.host_side[1].floors] = feeds[step.host_side[1].limits] * 0
        found, expected = other.run(feeds), session.run(feeds)
        assert found.keys() == expected.keys()
        assert all((found[name] == expected[name]).all() for name in found)
    for port in compiled.inputs:
        if port.role == "state":
            assert (other.read(port.name) == session.read(port.name)).all()
    other.close()


def test_windows_of_an_image_are_no_copies_between_programs() -> None:
    """On the simulator the programs of a step take the steps that one program takes, but for what loops share."""
    counts = []
    for blocks in ("off", 1):
        _, step = built(lambda: resnet(2), pictures(1)[0], blocks, QUIET)
        counts.append(len(step.host_side[1].session._plan.steps))
    assert counts[1] <= 1.05 * counts[0]


def test_the_forward_pass_alone() -> None:
    torch.manual_seed(1)
    model, (x, _) = Layers(3), tokens(1)[0]
    outputs = []
    for blocks in ("off", 1):
        with closing(compile_forward(model, x, threads=1, blocks=blocks)) as program:
            outputs.append(program(x))
            place = program.placement()
    assert torch.equal(*outputs)
    assert (place["programs"], place["dispatches"], place["blocks"]) == (3, 5, "blocks=1")


@pytest.mark.parametrize("blocks", [0, -1, True, "all", 1.5])
def test_other_wishes_are_refused(blocks: object) -> None:
    with pytest.raises(UsageError, match='blocks: needs "auto", "off" or a number from 1 on'):
        StepOptions(blocks=blocks)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "vit", "resnet18"])
def test_twenty_steps(name: str) -> None:
    """The issue's three: a GPT-2 of 4 layers, a ViT of 4 blocks, a ResNet-18; 20 steps each."""
    if name == "gpt2":
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            n_layer=4, n_embd=32, n_head=2, vocab_size=64, n_positions=16, use_cache=False, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        torch.manual_seed(7)
        batches = [(x, x.reshape(-1)) for x in (torch.randint(0, 64, (2, 8)) for _ in range(20))]
        train_both(lambda: Logits(transformers.GPT2LMHeadModel(config)), batches, QUIET)
    elif name == "vit":
        train_both(lambda: Vit(4), [(x.mean(1, keepdim=True), y) for x, y in pictures(20)], QUIET)
    else:
        train_both(lambda: resnet(4), pictures(20), QUIET)


class Logits(nn.Module):
    """A Hugging Face model's logits, tokens in rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits.flatten(0, 1)


class Vit(nn.Module):
    """A vision transformer on 4x4 patches."""

    def __init__(self, count: int, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.place = nn.Parameter(torch.randn(1, 4, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, count, enable_nested_tensor=False)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.encoder(x).mean(1))


def test_what_depends_on_no_input_lasts_from_step_to_step() -> None:
    """The number of rows, worked out in one program and read in others, once lay in memory that they share."""

    def contrast(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.normalize(output.flatten(1), dim=-1)
        return nn.functional.cross_entropy(rows @ rows.T / 0.1, torch.arange(len(output)))

    x, y = tokens(1)[0]
    losses = []
    for blocks in ("off", 1):
        torch.manual_seed(0)
        model = Layers(3, dropout=0.0)
        options = StepOptions(blocks=blocks, seed=3)  # type: ignore[arg-type]
        with build_step(
            model, contrast, torch.optim.SGD(model.parameters(), lr=0.0), (x, y), TARGET, options
        ) as step:
            losses.append([float(step(x, y)) for _ in range(4)])
    assert losses[0] == losses[1]
