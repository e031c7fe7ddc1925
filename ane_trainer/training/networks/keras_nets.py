"""The ready-made networks as Keras 3 models on Keras' torch backend, where a model is an nn.Module."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Sequence
from typing import Any

from torch import nn

from ane_trainer.ane.errors import EnvironmentFault, MissingDependency, UsageError


def import_keras() -> Any:
    """The keras package on its torch backend.

    If Keras is not imported yet and KERAS_BACKEND is not set, it is set to torch for this process.
    MissingDependency if Keras is not installed; EnvironmentFault ANE203 if it runs on another backend.
    """
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "torch")
    wanted = os.environ.get("KERAS_BACKEND", "torch")
    if "keras" not in sys.modules and wanted != "torch":
        raise _wrong_backend(wanted)
    try:
        import keras
    except ImportError as error:
        raise MissingDependency(
            'framework="keras": needs Keras 3; got no such package. Do: pip install "ane_trainer[keras]".'
        ) from error
    if keras.backend.backend() != "torch":
        raise _wrong_backend(keras.backend.backend())
    return keras


def load_keras_model(path: str) -> nn.Module:
    """The model in a `.keras` file, whatever backend saved it; UsageError ANE102 if it cannot be read."""
    keras = import_keras()
    try:
        model: nn.Module = keras.saving.load_model(path, compile=False)
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        zipfile.BadZipFile,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"model: needs a file that Keras 3 can read; got {path} ({reason[:160]}). "
            "Save it by model.save('name.keras'), and import the modules of its own layers first.",
            code="ANE102",
        ) from error
    return model


def _wrong_backend(backend: str) -> EnvironmentFault:
    return EnvironmentFault(
        f'framework="keras": needs Keras\' torch backend; got {backend!r}. '
        "Set KERAS_BACKEND=torch before the first import of keras.",
        code="ANE203",
    )


def build_keras_model(
    name: str,
    in_shape: Sequence[int],
    num_classes: int,
    activation: str,
    seed: int | None = None,
    **sizes: Any,
) -> nn.Module:
    """A Keras model of class scores on images [B, C, H, W], the channels first as in PyTorch."""
    if name not in ("mlp", "cnn"):
        raise UsageError(
            f'build_model({name!r}): needs framework="torch"; got "keras". Keras has "mlp" and "cnn".',
            code="ANE103",
        )
    keras = import_keras()
    if name == "mlp":
        layers = [keras.layers.Flatten(), *_hidden_layers(keras, activation, seed, **sizes)]
    else:
        layers = [*_conv_layers(keras, activation, seed, **sizes), keras.layers.Flatten()]
    head = keras.layers.Dense(num_classes, name="head", kernel_initializer=_weights(keras, seed, 0))
    model: nn.Module = keras.Sequential([keras.Input(tuple(in_shape)), *layers, head])
    return model


def _hidden_layers(
    keras: Any, activation: str, seed: int | None, hidden: Sequence[int] = (256,)
) -> list[object]:
    function = _activation(keras, activation)
    return [
        keras.layers.Dense(width, activation=function, kernel_initializer=_weights(keras, seed, number))
        for number, width in enumerate(hidden, 1)
    ]


def _conv_layers(
    keras: Any, activation: str, seed: int | None, channels: Sequence[int] = (16, 64)
) -> list[object]:
    layers = []
    first = {"data_format": "channels_first"}
    for number, width in enumerate(channels, 1):
        options = {"padding": "same", "kernel_initializer": _weights(keras, seed, number), **first}
        layers.append(keras.layers.Conv2D(width, 3, activation=_activation(keras, activation), **options))
        layers.append(keras.layers.MaxPooling2D(2, **first))
    return layers


def _weights(keras: Any, seed: int | None, layer: int) -> Any:
    return keras.initializers.GlorotUniform(seed=None if seed is None else seed * 1000 + layer)


def _activation(keras: Any, name: str) -> Any:
    functions = keras.activations
    if name == "gelu-tanh":
        return lambda x: functions.gelu(x, approximate=True)
    if name == "gelu":
        return lambda x: functions.gelu(x, approximate=False)
    if name == "leaky-relu":
        return lambda x: functions.leaky_relu(x, negative_slope=0.01)
    return functions.get({"hardswish": "hard_swish"}.get(name, name))
