"""Train PyTorch models on the Apple Neural Engine, or anywhere on a simulator of the engine's arithmetic.

    train, test = load_dataset("mnist")
    trainer = Trainer(build_model("mlp"), chip="m4")
    result = trainer.fit(train, epochs=5, val=test)

`compile_step` gives the training step alone to those who keep their own loop; `ane` holds programs, the
simulator and the cost model.
"""

from ane_trainer import ane, interop
from ane_trainer.__version__ import __version__
from ane_trainer.ane.dispatch import InferenceProgram, TrainingStep, compile_forward
from ane_trainer.ane.errors import AneTrainerError
from ane_trainer.core import run_training
from ane_trainer.data import load_dataset
from ane_trainer.models import build_model
from ane_trainer.training.config import TrainConfig, make_config
from ane_trainer.training.engine import compile_step
from ane_trainer.training.report import ConsoleReporter, Reporter
from ane_trainer.training.results import Epoch, Metrics, Result
from ane_trainer.training.trainer import Trainer

__all__ = [
    "AneTrainerError",
    "ConsoleReporter",
    "Epoch",
    "InferenceProgram",
    "Metrics",
    "Reporter",
    "Result",
    "TrainConfig",
    "Trainer",
    "TrainingStep",
    "__version__",
    "ane",
    "build_model",
    "compile_forward",
    "compile_step",
    "interop",
    "load_dataset",
    "make_config",
    "run_training",
]
