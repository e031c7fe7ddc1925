"""The known datasets: file names, checksums, mirrors, class names and normalisation constants (a table)."""

from __future__ import annotations

from dataclasses import dataclass

from ane_trainer.training.datasets.description import DataDescription


class SourceFailed(Exception):
    """One source could not deliver; its text is the reason shown if every source fails."""


@dataclass(frozen=True)
class IdxFile:
    """One IDX file: its official name (without `.gz`), size and checksums.

    `raw_md5` is the value that torchvision and the datasets' authors publish, for comparison by eye; what
    the loader checks is `raw_sha256`, and `gz_sha256` on a download.
    """

    name: str
    raw_bytes: int
    raw_md5: str
    raw_sha256: str
    gz_sha256: str


@dataclass(frozen=True)
class Archive:
    """A published file that is kept as it is, with the MD5 that its authors or torchvision publish."""

    name: str
    md5: str


@dataclass(frozen=True)
class DatasetInfo:
    """What is known about a dataset before it is loaded.

    A pixel with byte value b is fed to the model as (b / pixel_max - mean) / std. `folder` is the name of
    torchvision's folder. `files` are train images, train labels, test images, test labels, as IDX; a dataset
    without them has `archives`, in which `members` are these four, or training and test files of CIFAR.
    `train_examples`: how many its training part has, None where its sources disagree.
    """

    name: str
    folder: str
    in_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    pixel_max: int
    mean: float
    std: float
    files: tuple[IdxFile, ...] = ()
    mirrors: tuple[str, ...] = ()
    archives: tuple[Archive, ...] = ()
    members: tuple[str, ...] = ()
    train_examples: int | None = None

    def describe(self) -> DataDescription:
        """As every dataset is described."""
        return DataDescription(
            self.name, "image", "classify", self.in_shape, self.class_names, (self.mean,), (self.std,),
            float(self.pixel_max),
        )  # fmt: skip


_DIGIT_NAMES = tuple(str(digit) for digit in range(10))

# Checksums of the .gz files as published (MNIST: by torchvision; Fashion-MNIST: by its authors),
# raw MD5s as published; raw SHA-256s computed from files whose raw MD5s match.
MNIST = DatasetInfo(
    name="mnist",
    folder="MNIST",
    in_shape=(1, 28, 28),
    class_names=_DIGIT_NAMES,
    pixel_max=255,
    mean=0.1307,
    std=0.3081,
    train_examples=60_000,
    files=(
        IdxFile(
            name="train-images-idx3-ubyte",
            raw_bytes=47_040_016,
            raw_md5="6bbc9ace898e44ae57da46a324031adb",
            raw_sha256="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            gz_sha256="440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        IdxFile(
            name="train-labels-idx1-ubyte",
            raw_bytes=60_008,
            raw_md5="a25bea736e30d166cdddb491f175f624",
            raw_sha256="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            gz_sha256="3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        IdxFile(
            name="t10k-images-idx3-ubyte",
            raw_bytes=7_840_016,
            raw_md5="2646ac647ad5339dbf082846283269ea",
            raw_sha256="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            gz_sha256="8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        IdxFile(
            name="t10k-labels-idx1-ubyte",
            raw_bytes=10_008,
            raw_md5="27ae3e4e09519cfbb04c329615203637",
            raw_sha256="ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            gz_sha256="f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
)

FASHION_MNIST = DatasetInfo(
    name="fashion-mnist",
    folder="FashionMNIST",
    in_shape=(1, 28, 28),
    class_names=(
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    pixel_max=255,
    mean=0.2860,
    std=0.3530,
    train_examples=60_000,
    files=(
        IdxFile(
            name="train-images-idx3-ubyte",
            raw_bytes=47_040_016,
            raw_md5="f4a8712d7a061bf5bd6d2ca38dc4d50a",
            raw_sha256="c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            gz_sha256="3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        IdxFile(
            name="train-labels-idx1-ubyte",
            raw_bytes=60_008,
            raw_md5="9018921c3c673c538a1fc5bad174d6f9",
            raw_sha256="bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            gz_sha256="a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        IdxFile(
            name="t10k-images-idx3-ubyte",
            raw_bytes=7_840_016,
            raw_md5="8181f5470baa50b63fa0f6fddb340f0a",
            raw_sha256="5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            gz_sha256="346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        IdxFile(
            name="t10k-labels-idx1-ubyte",
            raw_bytes=10_008,
            raw_md5="15d484375f8d13e6eb1aabb0c3f46965",
            raw_sha256="0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            gz_sha256="67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    mirrors=(
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
)  # fmt: skip

# 1,797 images of 8x8 pixels with values 0 to 16, bundled with scikit-learn; mean and std are those of the
# training part of our fixed split.
DIGITS = DatasetInfo(
    name="digits",
    folder="",
    in_shape=(1, 8, 8),
    class_names=_DIGIT_NAMES,
    pixel_max=16,
    mean=0.3054,
    std=0.3760,
    train_examples=1_437,
)

_IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte",
              "t10k-labels-idx1-ubyte")  # fmt: skip

KMNIST = DatasetInfo(
    name="kmnist",
    folder="KMNIST",
    in_shape=(1, 28, 28),
    class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    pixel_max=255,
    mean=0.1918,
    std=0.3483,
    train_examples=60_000,
    mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
    archives=(
        Archive("train-images-idx3-ubyte.gz", "bdb82020997e1d708af4cf47b453dcf7"),
        Archive("train-labels-idx1-ubyte.gz", "e144d726b3acfaa3e44228e80efcd344"),
        Archive("t10k-images-idx3-ubyte.gz", "5c965bf0a639b31b8f53240b1b52f4d7"),
        Archive("t10k-labels-idx1-ubyte.gz", "7320c461ea6c1c855c0b718fb2a4b134"),
    ),
    members=_IDX_NAMES,
)


def _emnist(split: str, classes: str, mean: float = 0.1736, std: float = 0.3317) -> DatasetInfo:
    """One division of EMNIST; all come in one archive, with their images turned by 90 degrees and mirrored."""
    return DatasetInfo(
        name=f"emnist-{split}", folder="EMNIST", in_shape=(1, 28, 28), class_names=tuple(classes), pixel_max=255,
        mean=mean, std=std, mirrors=("https://biometrics.nist.gov/cs_links/EMNIST/",),
        archives=(Archive("gzip.zip", "58c8d27c78d21e728a6bc7b3cc06412e"),),
        members=tuple(f"emnist-{split}-{part}-{what}-ubyte" for part in ("train", "test")
                      for what in ("images-idx3", "labels-idx1")),
    )  # fmt: skip


_UPPER, _LOWER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_MERGED = _DIGITS + _UPPER + "abdefghnqrt"
EMNIST = (
    _emnist("balanced", _MERGED), _emnist("letters", _LOWER), _emnist("digits", _DIGITS), _emnist("mnist", _DIGITS),
    _emnist("byclass", _DIGITS + _UPPER + _LOWER), _emnist("bymerge", _MERGED),
)  # fmt: skip

_CIFAR_10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)

# Mean and std over all channels of the training images. The names of CIFAR-100 are in its archive.
CIFAR_10 = DatasetInfo(
    name="cifar-10", folder="cifar-10-batches-py", in_shape=(3, 32, 32), class_names=_CIFAR_10_NAMES,
    pixel_max=255, mean=0.4734, std=0.2516, train_examples=50_000, mirrors=_CIFAR_MIRRORS,
    archives=(Archive("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),
    members=(*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
)  # fmt: skip
CIFAR_100 = DatasetInfo(
    name="cifar-100", folder="cifar-100-python", in_shape=(3, 32, 32),
    class_names=tuple(str(number) for number in range(100)), pixel_max=255, mean=0.4782, std=0.2682,
    train_examples=50_000,
    mirrors=_CIFAR_MIRRORS,
    archives=(Archive("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),),
    members=("train", "test"),
)  # fmt: skip

DATASETS = {info.name: info for info in (MNIST, FASHION_MNIST, KMNIST, *EMNIST, CIFAR_10, CIFAR_100, DIGITS)}
