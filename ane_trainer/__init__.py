"""Train PyTorch models on the Apple Neural Engine, or anywhere on a simulator of the engine's arithmetic.

    train, test = load_dataset("mnist")
    trainer = Trainer(build_model("mlp"), chip="m4")
    result = trainer.fit(train, epochs=5, val=test)

`compile_step` gives the training step alone to those who keep their own loop; `ane` holds programs, the
simulator and the cost model. Names are imported at first use: `import ane_trainer` alone does not import PyTorch.
"""

from ane_trainer.__version__ import __version__ as __version__

TYPE_CHECKING = False  # type checkers know the name; `typing` takes 10 ms in which Ctrl-C would be Python's
if TYPE_CHECKING:
    from ane_trainer import ane as ane
    from ane_trainer import interop as interop
    from ane_trainer.ane.capture.optimizers import register_optimizer as register_optimizer
    from ane_trainer.ane.dispatch import InferenceProgram as InferenceProgram
    from ane_trainer.ane.dispatch import TrainingStep as TrainingStep
    from ane_trainer.ane.dispatch import compile_forward as compile_forward
    from ane_trainer.ane.errors import AneTrainerError as AneTrainerError
    from ane_trainer.ane.errors import NumericsWarning as NumericsWarning
    from ane_trainer.core import run_training as run_training
    from ane_trainer.data import load_dataset as load_dataset
    from ane_trainer.models import build_model as build_model
    from ane_trainer.training.callbacks import BestWeights as BestWeights
    from ane_trainer.training.callbacks import Callback as Callback
    from ane_trainer.training.callbacks import EarlyStopping as EarlyStopping
    from ane_trainer.training.callbacks import TimeLimit as TimeLimit
    from ane_trainer.training.callbacks import WeightAveraging as WeightAveraging
    from ane_trainer.training.config import TrainConfig as TrainConfig
    from ane_trainer.training.config import make_config as make_config
    from ane_trainer.training.debugging import debug as debug
    from ane_trainer.training.engine import compile_step as compile_step
    from ane_trainer.training.folder.results import Epoch as Epoch
    from ane_trainer.training.folder.results import Metrics as Metrics
    from ane_trainer.training.folder.results import Result as Result
    from ane_trainer.training.keras_fit import fit_keras as fit_keras
    from ane_trainer.training.language.lora import LoraOptions as LoraOptions
    from ane_trainer.training.reporting.report import ConsoleReporter as ConsoleReporter
    from ane_trainer.training.reporting.report import Reporter as Reporter
    from ane_trainer.training.schedules import LearningRateSchedule as LearningRateSchedule
    from ane_trainer.training.schedules import Schedule as Schedule
    from ane_trainer.training.trainer import Trainer as Trainer

_PLACES = {
    "Schedule": "ane_trainer.training.schedules",
    "LearningRateSchedule": "ane_trainer.training.schedules",
    "WeightAveraging": "ane_trainer.training.callbacks",
    "TimeLimit": "ane_trainer.training.callbacks",
    "EarlyStopping": "ane_trainer.training.callbacks",
    "Callback": "ane_trainer.training.callbacks",
    "BestWeights": "ane_trainer.training.callbacks",
    "AneTrainerError": "ane_trainer.ane.errors",
    "ConsoleReporter": "ane_trainer.training.reporting.report",
    "Epoch": "ane_trainer.training.folder.results",
    "InferenceProgram": "ane_trainer.ane.dispatch",
    "LoraOptions": "ane_trainer.training.language.lora",
    "Metrics": "ane_trainer.training.folder.results",
    "NumericsWarning": "ane_trainer.ane.errors",
    "Reporter": "ane_trainer.training.reporting.report",
    "Result": "ane_trainer.training.folder.results",
    "TrainConfig": "ane_trainer.training.config",
    "Trainer": "ane_trainer.training.trainer",
    "TrainingStep": "ane_trainer.ane.dispatch",
    "ane": "",
    "build_model": "ane_trainer.models",
    "compile_forward": "ane_trainer.ane.dispatch",
    "compile_step": "ane_trainer.training.engine",
    "debug": "ane_trainer.training.debugging",
    "fit_keras": "ane_trainer.training.keras_fit",
    "interop": "",
    "load_dataset": "ane_trainer.data",
    "make_config": "ane_trainer.training.config",
    "register_optimizer": "ane_trainer.ane.capture.optimizers",
    "run_training": "ane_trainer.core",
}

__all__ = ["__version__", *_PLACES]

if not TYPE_CHECKING:  # so that a wrong name is still an error to a type checker

    def __getattr__(name):
        """The name, imported now; the helper as well, so that the command line listens to Ctrl-C early."""
        from ane_trainer.utils import lazy_names

        return lazy_names(__name__, _PLACES)[0](name)

    def __dir__():
        """All names, imported or not."""
        return sorted({*globals(), *_PLACES})
