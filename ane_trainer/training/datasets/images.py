"""Images in files: a folder with one subfolder per class becomes examples, with their size and scale found.

root/cat/1.png, root/dog/2.jpg                    divided into training and validation here
root/train/cat/1.png, root/val/cat/2.png, ...     (or valid, validation, test) as it is
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.errors import DataError, MissingDependency
from ane_trainer.training.datasets.batches import Examples, Subset
from ane_trainer.training.datasets.description import DataDescription
from ane_trainer.training.datasets.digests import digest_of
from ane_trainer.training.datasets.kinds import other_kind
from ane_trainer.training.datasets.splits import DataOptions, Parts, divide_rows
from ane_trainer.utils import as_text

#: File endings that are taken for images.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
#: Sides up to this stay as they are if all images have them; others are brought to it.
LARGEST_SIDE = 64
#: Decoded images are kept in memory up to so many bytes in all.
KEPT_BYTES = 2 << 30
#: Images that size, colour, mean and standard deviation are taken from.
SAMPLE = 2_000

#: What Pillow raises for a file that is no image, or only a part of one.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error)

#: Names of subfolders that divide the data.
SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
                 "test": "test"}  # fmt: skip


@dataclass(frozen=True)
class ImageFiles:
    """Examples in image files: x uint8 [B, C, H, W], decoded when first taken, y int64 [B] class numbers."""

    paths: tuple[Path, ...]
    labels_N: NDArray[np.int64]
    shape: tuple[int, int, int]
    draws = False
    _kept: dict[int, NDArray[np.uint8]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows_B: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Decoded images and class numbers; DataError DATA115 names a file that is no image."""
        return np.stack([self._image(int(row)) for row in rows_B]), self.labels_N[rows_B]

    def content(self) -> bytes:
        """Names and classes of the files, and what they hold."""
        names = "\0".join("/".join(path.parts[-2:]) for path in self.paths).encode(errors="surrogateescape")
        return names + self.labels_N.tobytes() + digest_of(self.paths)

    def targets(self) -> NDArray[np.int64]:
        """The class numbers."""
        return self.labels_N

    def _image(self, row: int) -> NDArray[np.uint8]:
        found = self._kept.get(row)
        if found is None:
            found = read_image(self.paths[row], self.shape)
            if (len(self._kept) + 1) * found.nbytes <= KEPT_BYTES:
                self._kept[row] = found
        return found


@dataclass(frozen=True)
class ImageFolder:
    """What a folder holds: files and class numbers by split, and the class names."""

    files: dict[str, tuple[tuple[Path, ...], NDArray[np.int64]]]
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def open_image_folder(path: Path, options: DataOptions) -> Parts:
    """The images of a folder by split, with size, colour and scale found from the training part."""
    folder = scan_image_folder(path)
    paths, labels = folder.files["train"]
    shape = find_shape(paths, options.size, options.channels)
    options.check_memory(shape, str(path))
    whole = ImageFiles(paths, labels, shape)
    parts: dict[str, Examples] = {
        split: ImageFiles(*files, shape) for split, files in folder.files.items() if split != "train"
    }
    rows = divide_rows(labels, set(parts), options)
    parts |= {split: Subset(whole, chosen) for split, chosen in rows.items()}
    mean, std = measure_scale(parts["train"], options.seed)
    description = DataDescription(
        path.resolve().name, "image", "classify", shape, folder.class_names, (mean,), (std,), 255.0,
        source=str(path), notes=folder.notes,
    )  # fmt: skip
    return Parts(parts, description, takes=frozenset({"size", "channels"}))


def scan_image_folder(root: Path) -> ImageFolder:
    """Find the images of `root` by split and class. DataError DATA115, DATA117 say what is wrong with it."""
    subfolders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and _shown(path)}
    splits: dict[str, Path] = {}
    for name, path in subfolders.items():
        if (split := SPLIT_FOLDERS.get(name.lower())) is not None:
            splits.setdefault(split, path)
    if "train" not in splits:
        splits = {"train": root}
    found = {split: _by_class(path) for split, path in splits.items()}
    ignored = sum(other for _, other in found.values())
    empty = [f"{path.name} holds no image: left out" for path in subfolders.values()
             if splits == {"train": root} and path.name not in found["train"][0]]  # fmt: skip
    names = tuple(sorted(found["train"][0]))
    _check_classes(root, names, {split: set(by_class) for split, (by_class, _) in found.items()})
    files = {}
    for split, (by_class, _) in found.items():
        pairs = [(path, names.index(name)) for name in sorted(by_class) for path in by_class[name]]
        files[split] = (tuple(path for path, _ in pairs), np.array([label for _, label in pairs], np.int64))
    notes = ((_others(ignored),) if ignored else ()) + tuple(map(as_text, empty))
    return ImageFolder(files, tuple(as_text(name) for name in names), notes)


def _others(count: int) -> str:
    what = "file that is not an image is" if count == 1 else "files that are not images are"
    return f"{count} {what} left out"


def _contents(root: Path) -> str:
    """What files there are instead, the most common endings."""
    found = (Path(name).suffix.lower() for _, _, names in os.walk(root) for name in names)
    common = Counter(itertools.islice(filter(None, found), 10_000)).most_common(3)
    return (
        f" among its files ({', '.join(f'{count} {suffix}' for suffix, count in common)})" if common else ""
    )


def _check_classes(root: Path, names: Sequence[str], by_split: dict[str, set[str]]) -> None:
    if len(names) < 2:
        loose = sum(path.suffix.lower() in SUFFIXES for path in root.iterdir())
        got = (
            f"only {names[0]!r}"
            if names
            else f"{loose:,} images that are in no class"
            if loose
            else "no image" + _contents(root)
        )
        tables = sorted(
            path for path in root.iterdir() if path.suffix.lower() in (".csv", ".tsv", ".parquet")
        )
        raise DataError(
            f"{root}: needs a folder for each of two or more classes, with images in it; got {got}. "
            + (f"Of tables name one: {tables[0]}." if tables else "Lay it out as folder/class/image.png."),
            code="DATA117",
        )
    for split, found in by_split.items():
        if unknown := sorted(found - set(names)):
            raise DataError(
                f"{root}: the {split} part needs classes that the training part has; got {', '.join(unknown)}. "
                "Add training images, or take these out.",
                code="DATA117",
            )


def _by_class(folder: Path) -> tuple[dict[str, list[Path]], int]:
    """Images below each subfolder, sorted, and the number of other files."""
    found: dict[str, list[Path]] = {}
    others = 0
    for subfolder in sorted(path for path in folder.iterdir() if path.is_dir() and _shown(path)):
        paths = list(_files(subfolder))
        images = [path for path in paths if path.suffix.lower() in SUFFIXES]
        others += len(paths) - len(images)
        if images:
            found[subfolder.name] = images
    return found, others


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, sorted."""
    return [path for path in _files(folder) if path.suffix.lower() in SUFFIXES]


def _files(folder: Path) -> Iterator[Path]:
    seen, top = set[str](), os.path.realpath(folder)  # real folders, since links may lead back
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or top.startswith(real.rstrip(os.sep) + os.sep):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(names) if not name.startswith("."))


def _shown(path: Path) -> bool:
    return not path.name.startswith((".", "__"))


def find_shape(paths: Sequence[Path], size: int | None, channels: int | None) -> tuple[int, int, int]:
    """(C, H, W) for images: the common size if all are small and alike, else a square; grey only if all are."""
    sizes: Counter[tuple[int, int]] = Counter()
    grey = True
    damaged: list[DataError] = []
    for path in _sample(paths):
        try:
            with _opened(path) as image:
                sizes[image.size] += 1
                grey = grey and image.mode in ("1", "L", "LA", "I;16", "I", "F")
        except DataError as error:  # all of them are told at once
            damaged.append(error)
    if damaged:
        others = f" So are {len(damaged) - 1} more." if len(damaged) > 1 else ""
        raise DataError(f"{damaged[0].args[0]}{others}", code="DATA115")
    ((width, height), most) = sizes.most_common(1)[0]
    if size is not None:
        width = height = size
    elif most < sizes.total() or max(width, height) > LARGEST_SIDE:
        side = min(LARGEST_SIDE, min(min(pair) for pair in sizes))
        width = height = max(side, 8)
    return (channels if channels is not None else 1 if grey else 3), height, width


def measure_scale(examples: Examples, seed: int) -> tuple[float, float]:
    """Mean and standard deviation of the pixels, 0 to 1, over at most 2,000 images."""
    rows = np.random.Generator(np.random.PCG64([seed, 4])).permutation(len(examples))[:SAMPLE]
    total, squares, count = 0.0, 0.0, 0
    for row in rows:
        values = examples.take(np.array([row]))[0].astype(np.float64) / 255
        total, squares, count = total + values.sum(), squares + (values**2).sum(), count + values.size
    mean = float(total / count)
    return mean, max(float(squares / count - mean**2) ** 0.5, 1e-3)


def read_image(path: Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """An image file as uint8 [C, H, W]: turned upright, scaled to cover the shape, cut to it in the middle."""
    with _opened(path) as opened:
        try:
            return pixels_of(opened, shape)
        except _DAMAGED as error:
            raise _damaged(path, error) from None


def pixels_of(image: Any, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A PIL image as `read_image` returns a file."""
    pil, operations = _pillow()
    channels, height, width = shape
    image = operations.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("pixels in floating point, whose black and white are not known; save 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip
        values = np.asarray(image)
        image = pil.fromarray((values >> (8 if values.max() > 255 else 0)).astype(np.uint8))
    image = image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    if image.size != (width, height):
        image = operations.fit(image, (width, height), pil.Resampling.BILINEAR)
    pixels = np.asarray(image, np.uint8)
    return pixels[None].copy() if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    pil, _ = _pillow()
    try:
        image = pil.open(path)
    except _DAMAGED as error:
        raise _damaged(path, error) from None
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise _damaged(path, error) from None
    with image:
        yield image


def _damaged(path: Path, error: BaseException) -> DataError:
    what, fix = str(error or type(error).__name__).rstrip("."), "Take it out or mend it."
    with contextlib.suppress(OSError):
        what, fix = other_kind(path, b"\x89PNG", b"\xff\xd8\xff") or (what, fix)
    return DataError(f"{path}: needs an image that can be read; got {what}. {fix}", code="DATA115")


def _pillow() -> tuple[ModuleType, ModuleType]:
    """PIL's Image and ImageOps; MissingDependency without Pillow."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingDependency(
            'images: needs Pillow to read image files; got no such package. Do: pip install "ane_trainer[data]".'
        ) from error
    return Image, ImageOps


def _sample(paths: Sequence[Path]) -> Iterable[Path]:
    """All paths, or evenly spaced ones."""
    return paths if len(paths) <= SAMPLE else paths[:: -(-len(paths) // SAMPLE)]
