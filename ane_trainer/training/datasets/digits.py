"""The `digits` dataset: 8x8 images bundled with scikit-learn, in a split that never changes."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.errors import DataError, MissingDependency

TRAIN_EXAMPLES = 1437
_SPLIT_SEED = 0
_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"

Split = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def load_digits() -> tuple[Split, Split]:
    """(images [N, 8, 8] with values 0 to 16, labels [N]) of 1,437 training and 360 test examples.

    MissingDependency if scikit-learn is not installed, DataError DATA112 if it holds other data than known.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise MissingDependency(
            'load_dataset("digits"): needs scikit-learn, which brings the data; got no such package. '
            'Do: pip install "ane_trainer[digits]".'
        ) from error
    data = bundled()
    images = np.asarray(data.images).astype(np.uint8)
    labels = np.asarray(data.target).astype(np.uint8)
    found = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if found != _SHA256:
        raise DataError(
            f'load_dataset("digits"): needs the data that scikit-learn 1.x carries; got SHA-256 {found}. '
            "Do: reinstall scikit-learn.",
            code="DATA112",
        )
    order = np.random.Generator(np.random.PCG64(_SPLIT_SEED)).permutation(len(images))
    train, test = order[:TRAIN_EXAMPLES], order[TRAIN_EXAMPLES:]
    return (images[train], labels[train]), (images[test], labels[test])
