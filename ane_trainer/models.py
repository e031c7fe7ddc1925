"""`build_model()`: small ready-made networks for PyTorch and Keras, and users' classes out of a file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import nn

from ane_trainer.ane.errors import UsageError
from ane_trainer.training.networks.torch_nets import (
    ACTIVATIONS,
    CharacterTransformer,
    VisionTransformer,
    cnn,
    mlp,
)
from ane_trainer.training.networks.user import build_user_model, classes_in, load_model_class
from ane_trainer.utils import did_you_mean, seeded

__all__ = ["ACTIVATIONS", "FRAMEWORKS", "MODELS", "build_model", "load_model_class"]

FRAMEWORKS = ("torch", "keras")
# name: (what builds it, its default activation)
MODELS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "mlp": (mlp, "gelu"),
    "cnn": (cnn, "relu"),
    "transformer": (VisionTransformer, "gelu"),
    "gpt": (CharacterTransformer, "gelu"),
}


def build_model(
    name: str, in_shape: Sequence[int] = (1, 28, 28), num_classes: int = 10, *,
    hidden: Sequence[int] | int | None = None, activation: str | None = None, framework: str = "torch",
    seed: int | None = None, **options: object,
) -> nn.Module:  # fmt: skip
    """A new model that maps images [B, *in_shape] to class scores (logits) [B, num_classes].

    name        "mlp" (takes `hidden`); "cnn" (takes channels=(16, 64)); "transformer" (takes patch=7, or 4
                where 7 does not divide the image, width=64, depth=2, heads=4); "gpt", which maps
                tokens [B, T] to scores [B, num_classes, T] of the next one (width, depth, heads); or
                "path/to/file.py:ClassName" or "package.module:ClassName", any class or function that returns an
                nn.Module: it is called with all options given here, and with in_shape and num_classes if it has
                such parameters; or
                "path/to/model.keras", saved by Keras 3 under any backend, with its weights.
    hidden      widths of the mlp's hidden layers; default (256,); () is a linear model.
    activation  a name in ACTIVATIONS; default "gelu", for the cnn "relu".
    framework   "torch", or "keras": "mlp" and "cnn" as Keras 3 models on Keras' torch backend. They are
                nn.Modules too and take images in the same layout.
    seed        of the initial weights; PyTorch's global generator is then left as it was. None: uses it.

    UsageError: ANE102 unknown name, activation or framework, or a class that cannot be loaded; ANE103
    options that do not fit. MissingDependency / EnvironmentFault: Keras absent, or on another backend.
    """
    if framework not in FRAMEWORKS:
        raise UsageError(_unknown("framework", framework, FRAMEWORKS), code="ANE102")
    if activation is not None and activation not in ACTIVATIONS:
        raise UsageError(_unknown("activation", activation, ACTIVATIONS), code="ANE102")
    arguments = {**options, **_given(hidden=hidden, activation=activation)}
    with seeded(seed):
        if ":" in name:
            return build_user_model(
                name, {"in_shape": tuple(in_shape), "num_classes": num_classes}, arguments
            )
        if name.endswith(".py"):
            raise UsageError(
                f"model: needs {name}:ClassName; got the file alone. {classes_in(name)}", code="ANE102"
            )
        if name.endswith(".keras"):
            from ane_trainer.training.networks.keras_nets import load_keras_model

            return load_keras_model(name)
        if name not in MODELS:
            hint = "Or give a file or module: path/to/file.py:ClassName, package.module:ClassName."
            raise UsageError(f"{_unknown('model', name, MODELS)} {hint}", code="ANE102")
        builder, default_activation = MODELS[name]
        _check_options(name, builder, arguments)
        arguments = _as_sizes(name, {"num_classes": num_classes, "in_shape": tuple(in_shape), **arguments})
        arguments.setdefault("activation", default_activation)
        if framework == "keras":
            from ane_trainer.training.networks.keras_nets import build_keras_model

            builder = partial(build_keras_model, name, seed=seed)
        return builder(**arguments)


def _given(**arguments: object) -> dict[str, object]:
    return {key: value for key, value in arguments.items() if value is not None}


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    return f"{kind}: needs a known name; got {name!r}. {did_you_mean(name, known)}"


def _check_options(name: str, builder: Callable[..., nn.Module], arguments: dict[str, object]) -> None:
    """Refuse options that the builder does not take."""
    known = [key for key in inspect.signature(builder).parameters if key not in ("in_shape", "num_classes")]
    for key in arguments:
        if key not in known:
            hint = did_you_mean(key, known)
            raise UsageError(
                f"build_model({name!r}): needs a known option; got {key!r}. {hint}", code="ANE103"
            )


def _as_sizes(name: str, arguments: dict[str, object]) -> dict[str, object]:
    """Allow a bare number for `hidden` and `channels`; refuse whatever is not a whole number >= 1."""
    sizes = dict(arguments)
    for key in ("hidden", "channels"):
        if isinstance(sizes.get(key), int):
            sizes[key] = (sizes[key],)
    for key, value in sizes.items():
        values = value if isinstance(value, (tuple, list)) else (value,)
        if key != "activation" and any(not isinstance(size, int) or size < 1 for size in values):
            raise UsageError(
                f"build_model({name!r}): needs whole numbers >= 1 for {key}; got {value!r}.", code="ANE103"
            )
    return sizes
