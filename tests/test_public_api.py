"""The names that users and other programs call, as documented, and what importing the package costs."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ane_trainer as at

#: The package is found whether it is installed or not.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}

HEAVY = ("coremltools", "coreai", "aneforge", "keras", "sklearn", "scipy", "matplotlib", "typer", "pooch")


def test_every_public_name_exists_and_says_what_it_is() -> None:
    for name in at.__all__:
        thing = getattr(at, name)
        assert name == "__version__" or (inspect.getdoc(thing) or "").strip(), name


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (at.load_dataset, ["name", "batch_size", "seed"]),
        (at.build_model, ["name", "in_shape", "num_classes"]),
        (at.Trainer, ["model", "loss", "optimizer", "device", "chip", "fidelity", "seed"]),
        (at.Trainer.fit, ["train", "epochs", "val"]),
        (at.Trainer.evaluate, ["data"]),
        (at.Trainer.predict, ["x"]),
        (at.Trainer.save, ["path"]),
        (at.Trainer.resume, ["path"]),
        (at.Trainer.export, ["path"]),
        (at.compile_step, ["model", "loss", "optimizer", "example", "chip", "device", "fidelity"]),
        (at.ane.load_program, ["path"]),
        (at.ane.simulate, ["program", "feeds", "chip", "fidelity"]),
        (at.ane.estimate, ["program", "chip"]),
        (at.interop.aneforge.install, ["chip"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures_hold_what_the_documents_use(function, parameters: list[str]) -> None:
    assert set(parameters) <= set(inspect.signature(function).parameters)


def test_a_step_of_the_users_own_loop() -> None:
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    model = at.build_model("mlp", (1, 8, 8), 10, hidden=(8,), seed=0)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = at.compile_step(model, "cross_entropy", optimizer, example=(x, y), chip="m4", device="sim")
    losses = [step(x, y) for _ in range(5)]
    step.sync()
    assert all(isinstance(loss, torch.Tensor) and loss.dtype == torch.float32 for loss in losses)
    assert losses[-1] < losses[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert step.program.main.ops
    assert step.text().startswith("program")
    assert step.cost().latency_us > 0
    assert step.placement()["where"] == "simulator of M4, exact"


def test_trainer_takes_a_callable_loss() -> None:
    data = [(torch.randn(4, 3), torch.randn(4, 2))]
    model = torch.nn.Linear(3, 2)
    trainer = at.Trainer(model, loss=lambda output, y: ((output - y) ** 2).mean(), report=at.Reporter())
    first = trainer.fit(data * 20).history[0].train_loss
    assert trainer.fit(data * 20).history[1].train_loss < first
    assert trainer.evaluate(data).accuracy is None


def test_import_brings_nothing_heavy() -> None:
    code = f"import sys, ane_trainer; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert done.stdout.strip() == "[]"


def test_import_changes_nothing_in_other_packages() -> None:
    """Finders of modules, torch's classes and functions: all as before."""
    code = (
        "import sys, torch, torch.utils.checkpoint; "
        "seen = lambda: [list(sys.meta_path), list(sys.path_hooks), dict(vars(torch.utils.checkpoint)), "
        "dict(vars(torch.nn.functional)), dict(vars(torch.Tensor))]; before = seen(); import ane_trainer as at; "
        "[getattr(at, name) for name in at.__all__]; at.ane.dynamo; "
        "print([a == b for a, b in zip(before, seen())], 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert done.stdout.split("] ") == ["[True, True, True, True, True", "False\n"]


def test_import_alone_does_not_import_torch() -> None:
    code = (
        "import sys, ane_trainer as at\nassert 'torch' not in sys.modules\nassert 'Trainer' in dir(at)\n"
        "try:\n    at.Trianer\nexcept AttributeError as error:\n    print(error)\n"
        "from ane_trainer import Trainer\nassert at.Trainer is Trainer\nassert at.ane.simulate\n"
        "assert at.interop.aneforge.install"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "module 'ane_trainer' has no attribute 'Trianer'"


def test_importing_all_of_it_takes_less_than_twice_torch() -> None:
    code = (
        "import time; a = time.process_time(); import torch; b = time.process_time(); "
        "import ane_trainer as at; at.Trainer; "
        "print((time.process_time() - a) / (b - a))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT
        )
        for _ in range(3)
    ]
    assert min(float(run.stdout) for run in runs) < 2
