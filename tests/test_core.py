"""The trainer and runs: learning, resuming bit for bit, interruption, divergence, refusals."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ane_trainer.ane.errors import (
    CheckpointError,
    DataError,
    Diverged,
    EnvironmentFault,
    Interrupted,
    UsageError,
)
from ane_trainer.core import evaluate_run, predict_run, resume_training, run_training
from ane_trainer.data import load_dataset
from ane_trainer.models import build_model
from ane_trainer.training.config import TrainConfig, load_config, make_config
from ane_trainer.training.folder.results import Epoch
from ane_trainer.training.folder.runs import RunFolder
from ane_trainer.training.reporting.report import Reporter
from ane_trainer.training.trainer import MAX_BAD_STEPS, Trainer

DEVICES = ("sim", "cpu")


def small_model(seed: int = 0) -> nn.Module:
    return build_model("mlp", (1, 8, 8), 10, hidden=(16,), seed=seed)


def small_trainer(device: str = "sim", seed: int = 0, **options) -> Trainer:
    model = small_model(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    return Trainer(model, optimizer=optimizer, device=device, report=Reporter(), **options)


def digits(batch_size: int = 64, limit: int | None = 256):
    return load_dataset("digits", batch_size, 0, limit=limit)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


class PressCtrlC(Reporter):
    """A user who interrupts after so many steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def step(self, loss: float, loss_scale: float, skipped_steps: int) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


class Remembering:
    """Batches in an order of their own, without any of the methods of `Batches`."""

    def __init__(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.passes += 1
        return iter(self.batches)


# Learning


@pytest.mark.parametrize("device", DEVICES)
def test_training_learns_and_tells_what_it_did(device: str) -> None:
    train, test = digits(limit=None)
    trainer = small_trainer(device)
    result = trainer.fit(train, epochs=4, val=test)
    assert result.test_accuracy is not None
    assert result.test_accuracy > 0.85
    assert [record.epoch for record in result.history] == [1, 2, 3, 4]
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert result.steps == 4 * len(train)
    assert result.device == device
    assert result.placement["how"]
    assert json.loads(json.dumps(result.to_json()))["steps"] == result.steps


def test_step_is_compiled_once_and_dispatched_once_a_step() -> None:
    train, test = digits()
    result = small_trainer().fit(train, epochs=2, val=test)
    assert (result.compiles, result.dispatches_per_step, result.engine_flop_fraction) == (1, 1, 1.0)
    assert result.host_bytes_per_step is not None
    batch_bytes = 64 * 64 * 2 + 64 * 2
    assert batch_bytes < result.host_bytes_per_step < batch_bytes + 200


def test_evaluation_agrees_with_torch() -> None:
    train, test = digits()
    trainer = small_trainer()
    trainer.fit(train, epochs=1)
    metrics = trainer.evaluate(test)
    model = trainer.model.eval()
    with torch.no_grad():
        x, y = next(iter(load_dataset("digits", 360, 0)[1]))
        x, y = x[: metrics.examples], y[: metrics.examples]
        right = float((model(x).argmax(dim=1) == y).float().mean())
        loss = float(nn.functional.cross_entropy(model(x), y))
    assert metrics.accuracy == pytest.approx(right, abs=0.01)
    assert metrics.loss == pytest.approx(loss, abs=0.01)


def test_predict_pads_and_cuts() -> None:
    train, _ = digits()
    trainer = small_trainer()
    trainer.fit(train, epochs=1)
    x, _ = next(iter(train))
    whole = trainer.predict(x)
    assert whole.shape == (64, 10)
    assert torch.equal(trainer.predict(x[:3]), whole[:3])
    assert torch.equal(trainer.predict(x[:3].numpy()), whole[:3])


def test_small_last_batch_is_trained_on() -> None:
    x, y = torch.randn(10, 1, 8, 8), torch.arange(10)
    data = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]
    assert small_trainer().fit(data, epochs=2).steps == 6


@pytest.mark.parametrize("device", DEVICES)
def test_same_seed_gives_the_same_bits(device: str) -> None:
    trainers = [small_trainer(device, threads=threads) for threads in (1, 2)]
    for trainer in trainers:
        trainer.fit(digits()[0], epochs=1)
    assert same(trainers[0].model, trainers[1].model)


# Going on


@pytest.mark.parametrize("device", DEVICES)
def test_resumed_training_equals_an_uninterrupted_one(device: str, tmp_path: Path) -> None:
    whole = small_trainer(device)
    whole.fit(digits()[0], epochs=3)
    first = small_trainer(device)
    first.fit(digits()[0], epochs=1)
    first.save(tmp_path / "kept")
    second = Trainer.resume(tmp_path / "kept", report=Reporter())
    result = second.fit(digits()[0], epochs=2)
    assert same(whole.model, second.model)
    assert result.epochs == 3
    assert [r.train_loss for r in second.history] == [r.train_loss for r in whole.history]


@pytest.mark.parametrize("device", DEVICES)
def test_interrupted_in_the_middle_of_an_epoch(device: str, tmp_path: Path) -> None:
    whole = small_trainer(device)
    whole.fit(digits()[0], epochs=2)
    cut = small_trainer(device)
    cut.report = PressCtrlC(after=6)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(digits()[0], epochs=2)
    assert (cut.progress.epoch, cut.progress.batch) == (1, 2)
    cut.save(tmp_path / "kept")
    rest = Trainer.resume(tmp_path / "kept", report=Reporter())
    rest.fit(digits()[0], epochs=1)
    assert same(whole.model, rest.model)
    assert [r.train_loss for r in rest.history] == [r.train_loss for r in whole.history]


def test_resumed_loader_without_a_position_is_read_up_to_it(tmp_path: Path) -> None:
    batches = list(digits()[0])
    whole, cut = small_trainer("cpu"), small_trainer("cpu")
    whole.fit(Remembering(batches), epochs=2)
    cut.report = PressCtrlC(after=2)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(Remembering(batches), epochs=2)
    cut.save(tmp_path / "kept")
    rest = Trainer.resume(tmp_path / "kept", report=Reporter())
    rest.fit(Remembering(batches), epochs=2)
    assert same(whole.model, rest.model)


def test_resuming_on_an_object_is_refused_as_it_would_stay_as_it_is(tmp_path: Path) -> None:
    trainer = Trainer(nn.Linear(2, 2), "mse", device="cpu", report=Reporter())
    with pytest.raises(UsageError, match=r"Write trainer = Trainer.resume\(path, ...\)"):
        trainer.resume(trainer.save(tmp_path))


def test_saving_a_resumed_trainer_before_training_loses_nothing(tmp_path: Path) -> None:
    whole = small_trainer()
    whole.fit(digits()[0], epochs=2)
    first = small_trainer()
    first.fit(digits()[0], epochs=1)
    first.save(tmp_path / "a")
    Trainer.resume(tmp_path / "a", report=Reporter()).save(tmp_path / "b")
    last = Trainer.resume(tmp_path / "b", report=Reporter())
    last.fit(digits()[0], epochs=1)
    assert same(whole.model, last.model)


def test_loaders_of_torch_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    dataset = torch.utils.data.TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 10)
    models = []
    for seed in (0, 0, 1):
        trainer = small_trainer("cpu")
        trainer.seed = seed
        trainer.fit(torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True), epochs=1)
        models.append(trainer.model)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_ctrl_c_is_python_s_again_after_training() -> None:
    before = signal.getsignal(signal.SIGINT)
    small_trainer("cpu").fit(digits()[0], epochs=1)
    assert signal.getsignal(signal.SIGINT) is before


def test_training_works_outside_the_main_thread() -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(small_trainer("cpu").fit(digits()[0], epochs=1)))
    thread.start()
    thread.join()
    assert results[0].steps == 4


# Refusals


@pytest.mark.parametrize(
    ("batch", "code"),
    [
        ((torch.full((4, 1, 8, 8), float("nan")), torch.zeros(4, dtype=torch.int64)), "DATA106"),
        ((torch.zeros(4, 1, 8, 8), torch.full((4,), 10)), "DATA107"),
        ((torch.zeros(4, 1, 8, 8), torch.full((4,), -1)), "DATA107"),
        ((torch.zeros(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64)), "DATA105"),
        ((torch.zeros(4, 1, 8, 9), torch.zeros(4, dtype=torch.int64)), "DATA105"),
        ((torch.zeros(4, 1, 8, 8),), "DATA105"),
        (torch.zeros(4, 1, 8, 8), "DATA105"),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_bad_batches_are_refused_by_name(device: str, batch, code: str) -> None:
    good = (torch.zeros(4, 1, 8, 8), torch.full((4,), 9))
    with pytest.raises(DataError, match=r"epoch 1, batch 2") as caught:
        small_trainer(device).fit([good, batch])
    assert caught.value.code == code


@pytest.mark.filterwarnings("ignore:step 1 departs:ane_trainer.NumericsWarning")  # what it does to the loss
def test_largest_fp16_number_passes_and_the_next_is_refused_unless_the_example_shows_it() -> None:
    y = torch.zeros(4, dtype=torch.int64)
    usual, largest, next_one = (torch.full((4, 1, 8, 8), value) for value in (1.0, 65504.0, 65520.0))
    small_trainer().fit([(largest, y)])
    small_trainer().fit([(next_one, y)])  # the host scales the inputs
    with pytest.raises(DataError, match=r"batch 2: x: .*65504.* got 65520"):
        small_trainer().fit([(usual, y), (next_one, y)])


@pytest.mark.parametrize("device", DEVICES)
def test_bad_values_are_refused_in_evaluation_too(device: str) -> None:
    x, y = torch.full((4, 1, 8, 8), float("inf")), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(DataError, match="evaluate: batch 1: x: needs finite numbers; got 256"):
        small_trainer(device).evaluate([(x, y)])
    with pytest.raises(DataError, match="predict: x: needs finite"):
        small_trainer(device).predict(x)


def test_empty_data_is_refused() -> None:
    with pytest.raises(DataError, match="at least one batch"):
        small_trainer("cpu").fit([])
    with pytest.raises(DataError, match="at least one batch"):
        small_trainer("cpu").evaluate([])


def test_one_shot_iterator_is_refused_for_two_epochs_only() -> None:
    batch = (torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match="an iterator that ends once"):
        small_trainer("cpu").fit(iter([batch]), epochs=2)
    assert small_trainer("cpu").fit(iter([batch]), epochs=1).steps == 1


def test_loss_that_stays_nan_stops_the_run() -> None:
    trainer = Trainer(
        small_model(), lambda output, y: output.sum() * float("nan"), device="cpu", report=Reporter()
    )
    batch = (torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(
        Diverged, match=rf"a loss that stays finite; got {MAX_BAD_STEPS} steps in a row"
    ) as caught:
        trainer.fit([batch] * 100)
    assert caught.value.exit_code == 4
    assert trainer.progress.steps == MAX_BAD_STEPS


@pytest.mark.filterwarnings("ignore::ane_trainer.NumericsWarning")
def test_gradients_that_never_fit_are_told_from_a_loss_that_does_not() -> None:
    """A learning rate of 1e4: no unit holds a gradient whose step does not fit a weight."""
    model = small_model()
    trainer = Trainer(
        model, lambda output, y: (output * 30).square().mean(), fidelity="fast", report=Reporter(),
        optimizer=torch.optim.SGD(model.parameters(), lr=1e4),
    )  # fmt: skip
    batch = (torch.ones(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(
        Diverged, match=r"gradients that fit; got .* the loss is finite .* most often of"
    ) as caught:
        trainer.fit([batch] * 100)
    assert "Normalise" in str(caught.value)


def test_weights_that_are_not_finite_stop_the_run() -> None:
    model = small_model()
    trainer = Trainer(
        model, optimizer=torch.optim.SGD(model.parameters(), lr=1e38), device="cpu", report=Reporter()
    )
    with pytest.raises(Diverged, match="not finite in fc"):
        trainer.fit(digits()[0])


@pytest.mark.parametrize("options", [{"device": "gpu"}, {"chip": "m99"}, {"fidelity": "vague"}])
def test_unknown_names_are_refused_early(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="got '"):
        Trainer(small_model(), **options)


def test_export_needs_data_to_check_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs data to check"):
        small_trainer("cpu").export(tmp_path / "model.onnx")


# Checkpoints


class Foreign(nn.Module):
    """A model of the user's own file."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.activation = nn.functional.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.layer(x.flatten(1)))


def test_users_own_modules_and_losses_are_restored(tmp_path: Path) -> None:
    trainer = Trainer(Foreign(), nn.CrossEntropyLoss(label_smoothing=0.1), device="cpu", report=Reporter())
    trainer.fit(digits()[0])
    trainer.save(tmp_path)
    again = Trainer.resume(tmp_path, report=Reporter())
    assert isinstance(again.model, Foreign)
    assert same(again.model, trainer.model)
    assert again.loss.label_smoothing == 0.1


class Dangerous(nn.Module):
    """Pickles as a call of print: what a hostile model file would do."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_model_files_cannot_call_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_trainer("cpu").save(tmp_path)
    torch.save({"model": Dangerous(), "loss": "mse"}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="print"):
        Trainer.resume(tmp_path)
    assert "never" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "model.pt"])
@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"x" * 999]
)
def test_damaged_files_are_refused(name: str, damage, tmp_path: Path) -> None:
    small_trainer("cpu").save(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        Trainer.resume(tmp_path)
    assert caught.value.code == "CKPT103"


def test_unstorable_model_has_to_be_passed_again(tmp_path: Path) -> None:
    model = small_model()
    model.helper = lambda x: x
    trainer = Trainer(model, device="cpu", report=Reporter())
    trainer.save(tmp_path)
    with pytest.raises(CheckpointError, match="model=") as caught:
        Trainer.resume(tmp_path)
    assert caught.value.code == "CKPT105"
    assert same(Trainer.resume(tmp_path, model=small_model(seed=5), report=Reporter()).model, model)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    small_trainer("cpu").save(tmp_path)
    with pytest.raises(CheckpointError, match="another one"):
        Trainer.resume(tmp_path, model=build_model("mlp", (1, 8, 8), 10, hidden=(17,)))


def test_unwritable_place_is_an_environment_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="can be written"):
        small_trainer("cpu").save(tmp_path / "file" / "inside")


# Runs


def config(**options) -> TrainConfig:
    return make_config(
        {"dataset": "digits", "hidden": (16,), "batch_size": 64, "epochs": 2, "limit": 256, **options}
    )


def test_run_folder_is_complete(tmp_path: Path) -> None:
    result = run_training(config(compare_fp32=True), out=tmp_path / "run", report=Reporter())
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {
        "config.toml", "metrics.jsonl", "result.json", "weights.safetensors", "program.mil", "weights.bin",
        "program.sha256", "checkpoint.safetensors", "checkpoint-before.safetensors", "best.safetensors",
        "data.json", "metrics.csv", "analysis.json", "report.html",
    }  # fmt: skip
    resolved = config(compare_fp32=True, model="mlp", loss="cross_entropy").resolved()
    assert load_config(tmp_path / "run" / "config.toml") == resolved
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [Epoch(**json.loads(line)) for line in lines] == list(result.history)
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored == json.loads(json.dumps(result.to_json()))
    assert {
        "dataset", "model", "parameters", "epochs", "steps", "test_accuracy", "test_loss", "train_loss",
        "device", "chip", "fidelity", "compiles", "dispatches_per_step", "engine_flop_fraction",
        "host_bytes_per_step", "loss_scale", "skipped_steps", "seconds_total", "seconds_per_step",
        "fp32_reference",
    } <= set(stored)  # fmt: skip
    assert abs(stored["fp32_reference"] - stored["test_accuracy"]) < 0.1


def test_evaluate_and_predict_a_run(tmp_path: Path) -> None:
    result = run_training(config(), out=tmp_path / "run", report=Reporter())
    found = evaluate_run(tmp_path / "run")
    _, test = load_dataset("digits")
    assert found["examples"] == test.num_examples
    limited = evaluate_run(tmp_path / "run", limit=256)
    assert limited["test_accuracy"] == result.test_accuracy
    assert limited["test_loss"] == pytest.approx(result.test_loss)
    by_index = predict_run(tmp_path / "run", index=3)["predictions"][0]
    assert by_index["truth"] == str(int(test.labels[3]))
    np.save(tmp_path / "x.npy", test.images[3:5].numpy())
    by_file = predict_run(tmp_path / "run", [tmp_path / "x.npy"])["predictions"]
    assert len(by_file) == 2
    assert by_file[0]["class"] == by_index["class"]
    assert sum(by_file[0]["probabilities"]) == pytest.approx(1)
    several = predict_run(tmp_path / "run", index="2:4,7")["predictions"]
    assert [row["input"] for row in several] == ["2", "3", "7"]
    assert several[1]["probabilities"] == by_index["probabilities"]


def test_interrupted_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    run_training(config(), out=tmp_path / "whole", report=Reporter())
    with pytest.raises(Interrupted, match="--resume") as caught:
        run_training(config(), out=tmp_path / "cut", report=PressCtrlC(after=6))
    assert caught.value.exit_code == 130
    assert not (tmp_path / "cut" / "result.json").exists()
    result = resume_training(tmp_path / "cut", report=Reporter())
    assert result.steps == 8
    whole, cut = (RunFolder(tmp_path / name).read_weights().state for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 2


def test_finished_run_takes_more_epochs_only_when_asked(tmp_path: Path) -> None:
    run_training(config(device="cpu"), out=tmp_path / "run", report=Reporter())
    with pytest.raises(UsageError, match="--epochs 7"):
        resume_training(tmp_path / "run", report=Reporter())
    assert resume_training(tmp_path / "run", epochs=3, report=Reporter()).epochs == 3


def test_out_folder_with_a_run_is_left_alone(tmp_path: Path) -> None:
    run_training(config(device="cpu", epochs=1), out=tmp_path, report=Reporter())
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(CheckpointError, match="holds one already"):
        run_training(config(device="cpu"), out=tmp_path, report=Reporter())
    assert (tmp_path / "result.json").read_bytes() == before


def test_nothing_is_written_before_names_are_checked(tmp_path: Path) -> None:
    for options in ({"dataset": "mnst"}, {"model": "mpl"}, {"device": "gpu"}):
        with pytest.raises((UsageError, DataError)):
            run_training(config(**options), out=tmp_path / "run", report=Reporter())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"dataset": "mnist"}, 0.975),
        ({"dataset": "mnist", "model": "cnn", "epochs": 2}, 0.983),
        ({"dataset": "fashion-mnist"}, 0.87),
    ],
)
def test_full_training_reaches_the_promised_accuracy(options, least: float, tmp_path: Path) -> None:
    result = run_training(make_config(options), out=tmp_path / "run", report=Reporter())
    assert result.test_accuracy is not None
    assert result.test_accuracy >= least
    assert result.engine_flop_fraction == 1.0
