"""Small helpers that need no PyTorch at import: logging, lazy names, running means, readable numbers, atomic files."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import gc
import importlib
import inspect
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

_LOGGER_NAME = "ane_trainer"


def is_interactive() -> bool:
    """True if standard error is a terminal that wants progress bars and colour."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def setup_logging(level: int | str = logging.INFO) -> logging.Logger:
    """Send the package's log records to standard error: through rich on a terminal, as plain lines elsewhere.

    Calling it again replaces the handler and the level; other packages' loggers are left alone.
    Standard output stays free for results (`--json`).
    """
    logger = logging.getLogger(_LOGGER_NAME)
    handler: logging.Handler
    if is_interactive():
        from rich.console import Console
        from rich.logging import RichHandler

        console = Console(stderr=True)
        handler = RichHandler(console=console, show_time=False, show_path=False, highlighter=None)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return logger


def lazy_names(
    package: str, places: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__` (PEP 562): each name is imported from its module at first use.

    `places` maps a name to the module that has it, or to "" where the name is a submodule of `package` itself.
    """

    def get(name: str) -> object:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        place = places[name]
        found = (
            getattr(importlib.import_module(place), name)
            if place
            else importlib.import_module(f"{package}.{name}")
        )
        setattr(sys.modules[package], name, found)
        return found

    return get, lambda: sorted({*vars(sys.modules[package]), *places})


def with_parameters(
    command: Callable[..., object], parameters: Sequence[inspect.Parameter], *, like: Callable[..., object]
) -> Callable[..., Any]:
    """`command` with the name and docstring of `like` and a signature of these parameters."""
    command.__name__, command.__doc__ = like.__name__, like.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(list(parameters))  # type: ignore[attr-defined]
    return command


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run a block with PyTorch's CPU generator seeded, then put the generator back; None changes nothing."""
    if seed is None:
        yield
        return
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def count_correct(output_BC: torch.Tensor, target: torch.Tensor) -> int:
    """How many rows of `output_BC` have their largest entry at the target's class.

    `target` holds class indices [B] or one-hot / probability rows [B, C].
    """
    expected_B = target.argmax(dim=1) if target.ndim == output_BC.ndim else target
    return int((output_BC.argmax(dim=1) == expected_B).sum())


class RunningMean:
    """The mean of values seen so far, each weighted by the number of examples that it stands for."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0.0

    def update(self, value: float, count: float = 1) -> None:
        """Add `value`, the mean of `count` examples."""
        self.total += float(value) * count
        self.count += count

    @property
    def mean(self) -> float:
        """The weighted mean; nan before the first update."""
        return self.total / self.count if self.count else float("nan")


def format_bytes(size_bytes: float) -> str:
    """Bytes in decimal units: 512 B, 1.5 KB, 20.3 MB."""
    return _scaled(size_bytes, ("B", "KB", "MB", "GB", "TB"), separator=" ")


def format_count(count: float) -> str:
    """A count with thousands separators up to a million, then 1.2M, 3.4G, 5.6T: 203,530."""
    if abs(count) < 1e6:
        return f"{count:,.0f}"
    return _scaled(count / 1e6, ("M", "G", "T"), separator="")


def format_seconds(seconds: float) -> str:
    """A duration a person reads at a glance: 85 us, 12 ms, 3.2 s, 4 min 05 s, 2 h 03 min."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _scaled(value: float, units: tuple[str, ...], *, separator: str) -> str:
    index = 0
    while abs(value) >= 999.5 and index < len(units) - 1:
        value /= 1000
        index += 1
    digits = 0 if float(value).is_integer() or abs(value) >= 100 else 1
    return f"{value:.{digits}f}{separator}{units[index]}"


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """A sentence that helps after a mistyped name: `Did you mean 'mnist'? Known: digits, mnist.`"""
    names = sorted(known)
    lowered = {name.lower(): name for name in names}
    close = difflib.get_close_matches(str(word).lower(), lowered, n=1, cutoff=0.5)
    hint = f"Did you mean {lowered[close[0]]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}."


def atomic_write(path: str | Path, data: bytes | str) -> Path:
    """Write a file so that a reader, or a crash, sees either the old content or all of the new one.

    Text is written as UTF-8. Missing folders are made; OSError if the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    return path


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure, where the system lets a folder be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(handle)
        os.close(handle)


def atomic_write_json(path: str | Path, value: object) -> Path:
    """Write `value` as indented JSON through `atomic_write`; nan and inf are refused (ValueError)."""
    return atomic_write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def memory_bytes() -> int:
    """The machine's memory; 2^34 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 1 << 34


def as_text(name: str) -> str:
    """A file's name in characters that can be written anywhere: bytes that are no UTF-8 become a question mark."""
    return name.encode(errors="replace").decode()


#: What breaks a line or turns its direction around, as an escape.
_UNSEEN = {
    n: repr(chr(n))[1:-1]
    for n in (*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def printable(text: str) -> str:
    """A name from outside on one line: control characters, and those that reverse the direction, as escapes."""
    return text.translate(_UNSEEN)


def finite(value: object) -> Any:
    """`value` with nan and inf replaced by None, as JSON wants it."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


@contextlib.contextmanager
def without_lines(start: str) -> Iterator[None]:
    """Within the block, lines on the process's standard error that begin so are left out; others come after it.

    For native libraries, which write past `sys.stderr`.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            caught.seek(0)
            for line in caught:
                if not line.startswith(start.encode()):
                    os.write(2, line)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Within the block Python looks for no cycles of objects: for work that makes many objects, which stay.

    It looks once behind it, and puts them with the old ones; by itself it would go through them twice.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.collect(1)
            gc.enable()


def return_memory() -> None:
    """Give memory that Python holds and does not use back to the system, where the C library is one that keeps it.

    glibc does with blocks of up to 32 MiB, which it takes for small ones once such blocks were freed.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def without_warnings_of(logger: str) -> Iterator[None]:
    """Within the block, a logger of another package says errors only."""
    named = logging.getLogger(logger)
    before = named.level
    named.setLevel(logging.ERROR)
    try:
        yield
    finally:
        named.setLevel(before)


def torchrun_rank() -> int:
    """The number of this process among those that torchrun started; 0 where it is the only one."""
    return int(os.environ.get("RANK", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0


class Interval(NamedTuple):
    """So many steps, or so many seconds; 0: never."""

    steps: int = 0
    seconds: float = 0.0


def read_interval(text: str) -> Interval:
    """Steps as in "500", or a time as in "10min"; ValueError for anything else."""
    if text.strip().isdecimal() and int(text):
        return Interval(steps=int(text))
    try:
        return Interval(seconds=read_duration(text)) if text else Interval()
    except ValueError:
        raise ValueError("needs a number of steps, or a time as in 10min") from None


def read_duration(text: str) -> float:
    """Seconds of "90s", "10min" (or "10m"), "2h"; ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise ValueError("needs a time as in 90s, 10min or 2h")
    return float(found[1]) * {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}[found[2]]


def prune(place: Path, limit: int, keep: Path | None = None) -> tuple[int, int]:
    """Delete entries of a cache, those used longest ago first, until it holds at most `limit` bytes; never `keep`.

    Returns (entries, bytes) that went. What another process deletes meanwhile is as good.
    """
    found = sorted(entries_of(place))
    total, gone = sum(size for _, size, _ in found), [0, 0]
    for _, size, path in found:
        if total - gone[1] <= limit:
            break
        if path == keep:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        gone = [gone[0] + 1, gone[1] + size]
    return gone[0], gone[1]


def added(place: Path, size: int, limit: int, keep: Path | None = None) -> None:
    """An entry of `size` bytes came to a cache: `prune` it where their sum, kept in a file beside it, is too much.

    Looking at thousands of entries each time would take seconds: a quarter of the limit is freed at once.
    """
    with contextlib.suppress(OSError):
        kept = place.with_name(f"{place.name}.total")
        text = kept.read_bytes()[:20] if kept.exists() else b""
        total = int(text) + size if text.isdigit() else limit + 1
        if total > limit:
            prune(place, limit * 3 // 4, keep)
            total = sum(each for _, each, _ in entries_of(place))
        kept.write_text(str(total))


def entries_of(place: Path) -> list[tuple[int, int, Path]]:
    """(when it was used, bytes, path) of each file or folder of a cache."""
    found = []
    for path in place.iterdir() if place.is_dir() else ():
        with contextlib.suppress(OSError):
            files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
            found.append((path.stat().st_mtime_ns, sum(file.stat().st_size for file in files), path))
    return found
