"""Random changes of training images: shift, flip, crop, rotate, erase, mixup; a function of the generator only.

A batch gets a generator of its own, seeded by (seed, epoch, number of the batch), so a resumed run draws the
same changes. Geometry comes first, on pixels; erase and mixup act on the normalised values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ane_trainer.ane.errors import DataError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.training.datasets.description import one_hot
from ane_trainer.utils import did_you_mean

#: Name -> (amount if none is given, lowest, highest, what the amount is).
AUGMENTATIONS: dict[str, tuple[float, float, float, str]] = {
    "shift": (2.0, 0.0, 1024.0, "pixels at most, in each direction"),
    "flip": (0.5, 0.0, 1.0, "probability of left and right exchanged"),
    "crop": (0.7, 0.01, 1.0, "smallest share of the side that is kept, then scaled up"),
    "rotate": (10.0, 0.0, 180.0, "degrees at most, in each direction"),
    "erase": (0.25, 0.0, 1.0, "probability that a rectangle of 2 to 20 % of the area is wiped out"),
    "mixup": (0.2, 0.0, 16.0, "alpha of the Beta distribution of the mixing share"),
}


@dataclass(frozen=True)
class Augmentation:
    """One kind of change with its amount, written `name` or `name=amount`."""

    name: str
    amount: float

    def __str__(self) -> str:
        return f"{self.name}={self.amount:g}"


def parse_augmentations(texts: Sequence[str]) -> tuple[Augmentation, ...]:
    """`("flip", "shift=3")` as augmentations; DataError DATA102 for unknown names and amounts out of range."""
    found = []
    for text in (part.strip() for item in texts for part in item.split(",") if part.strip()):
        name, equals, amount_text = text.partition("=")
        if name not in AUGMENTATIONS:
            raise DataError(
                f"augment: needs a known name; got {name!r}. {did_you_mean(name, AUGMENTATIONS)}",
                code="DATA102",
            )
        default, lowest, highest, meaning = AUGMENTATIONS[name]
        try:
            amount = float(amount_text) if equals else default
        except ValueError:
            amount = math.nan
        if not lowest <= amount <= highest:
            raise DataError(
                f"augment: {name} needs a number from {lowest:g} to {highest:g} ({meaning}); "
                f"got {amount_text!r}. Write e.g. {name}={default:g}.",
                code="DATA102",
            )
        found.append(Augmentation(name, amount))
    return tuple(found)


def change_pixels(pixels_BCHW: Array, chosen: Sequence[Augmentation], random: np.random.Generator) -> Array:
    """Shift, flip, crop and rotate a batch; what comes in at a border is 0 (flip and crop bring nothing in)."""
    amounts = {item.name: item.amount for item in chosen}
    count = len(pixels_BCHW)
    if "flip" in amounts:
        turned_B = random.random(count) < amounts["flip"]
        pixels_BCHW = pixels_BCHW.copy()
        pixels_BCHW[turned_B] = pixels_BCHW[turned_B][..., ::-1]
    if "shift" in amounts:
        most = int(amounts["shift"])
        pixels_BCHW = _shifted(pixels_BCHW, random.integers(-most, most + 1, (count, 2)))
    if "rotate" in amounts or "crop" in amounts:
        pixels_BCHW = _resampled(pixels_BCHW, amounts, random)
    return pixels_BCHW


def _shifted(pixels_BCHW: Array, offsets_B2: NDArray[np.int64]) -> Array:
    """Each image moved down and right by its offsets, exactly."""
    height, width = pixels_BCHW.shape[2:]
    moved_BCHW = np.zeros_like(pixels_BCHW)
    for image_CHW, moved_CHW, (down, right) in zip(pixels_BCHW, moved_BCHW, offsets_B2.tolist(), strict=True):
        rows, columns = height - abs(down), width - abs(right)
        if rows > 0 and columns > 0:
            top, left = max(-down, 0), max(-right, 0)
            part_CHW = image_CHW[:, top : top + rows, left : left + columns]
            moved_CHW[:, max(down, 0) :, max(right, 0) :][:, :rows, :columns] = part_CHW
    return moved_BCHW


def _resampled(pixels_BCHW: Array, amounts: dict[str, float], random: np.random.Generator) -> Array:
    """Rotate about the centre and crop a random part, in one bilinear resampling (float32)."""
    count, _, height, width = pixels_BCHW.shape
    most = math.radians(amounts.get("rotate", 0.0))
    angle_B = np.asarray(random.uniform(-most, most, count))
    share_B = np.asarray(random.uniform(amounts.get("crop", 1.0), 1.0, count))
    centre_B2 = random.uniform(-1, 1, (count, 2)) * (1 - share_B)[:, None]
    cosine_B, sine_B = np.cos(angle_B) * share_B, np.sin(angle_B) * share_B
    theta_B23 = np.zeros((count, 2, 3))
    theta_B23[:, 0, 0] = theta_B23[:, 1, 1] = cosine_B
    theta_B23[:, 0, 1], theta_B23[:, 1, 0] = -sine_B * height / width, sine_B * width / height
    theta_B23[:, :, 2] = centre_B2
    source = torch.from_numpy(np.ascontiguousarray(pixels_BCHW, dtype=np.float32))
    grid = F.affine_grid(torch.from_numpy(theta_B23).float(), list(source.shape), align_corners=False)
    moved: NDArray[np.float32] = F.grid_sample(
        source, grid, padding_mode="zeros" if most else "border", align_corners=False
    ).numpy()
    return moved


def change_values(
    x_BCHW: NDArray[np.float32], y: Array, chosen: Sequence[Augmentation],
    random: np.random.Generator, num_classes: int | None,
) -> tuple[NDArray[np.float32], Array]:  # fmt: skip
    """Erase and mixup on normalised values. mixup turns class numbers into rows of probabilities [B, C]."""
    for item in chosen:
        if item.name == "erase":
            _erase(x_BCHW, item.amount, random)
        elif item.name == "mixup":
            share = np.float32(random.beta(item.amount, item.amount) if item.amount else 1.0)
            other_B = random.permutation(len(x_BCHW))
            soft = (
                one_hot(y.astype(np.int64), num_classes) if num_classes is not None else y.astype(np.float32)
            )
            x_BCHW = share * x_BCHW + (1 - share) * x_BCHW[other_B]
            y = share * soft + (1 - share) * soft[other_B]
    return x_BCHW, y


def _erase(x_BCHW: Array, probability: float, random: np.random.Generator) -> None:
    height, width = x_BCHW.shape[2:]
    for image_CHW in x_BCHW:
        hit, area, log_ratio, top, left = random.random(5)
        if hit >= probability:
            continue
        pixels = (0.02 + 0.18 * area) * height * width
        ratio = math.exp((2 * log_ratio - 1) * math.log(3.3))
        rows = min(height, max(1, round(math.sqrt(pixels * ratio))))
        columns = min(width, max(1, round(math.sqrt(pixels / ratio))))
        first_row, first_column = int(top * (height - rows + 1)), int(left * (width - columns + 1))
        image_CHW[:, first_row : first_row + rows, first_column : first_column + columns] = 0
