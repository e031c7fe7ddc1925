"""Tells a fault in a user's model file from one of ours, and reports it with the user's frames alone."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType

from ane_trainer.ane.errors import AneTrainerError, BrokenModel, UsageError

#: Set it to see the whole traceback.
SHOW_ALL = "ANE_TRAINER_TRACEBACK"

_OURS = str(Path(__file__).resolve().parents[1])
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
#: Folders of packages wherever they are: of a user (pip --user), of Debian, of another environment.
_PACKAGES = frozenset({"site-packages", "dist-packages"})
_MOST_FRAMES = 6


class UserFaults:
    """Within the block, an exception that a user's file raised becomes a UsageError (ANE119) that shows its lines.

    `SystemExit` counts: a model file that calls `sys.exit` does not end the command without a word. So does what a
    step could not be made of because plain PyTorch raises it, too (`BrokenModel`).
    """

    def __enter__(self) -> UserFaults:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.environ.get(SHOW_ALL):
            return
        if isinstance(error, BrokenModel) and (cause := error.__cause__) is not None:
            error, trace = cause, cause.__traceback__
        if isinstance(error, AneTrainerError):
            return
        if error is None or isinstance(error, KeyboardInterrupt):
            return
        if frames := users_frames(error, trace):
            raise UsageError(_message(error, frames), code="ANE119") from None


def users_frames(error: BaseException, trace: TracebackType | None) -> list[traceback.FrameSummary]:
    """The frames of a traceback that are neither this package's nor an installed package's nor Python's own.

    Empty where this package itself failed: then the fault is ours, whoever called. PyTorch's RuntimeError (shapes
    that do not fit, say) comes out of the call that carries out the user's operation, which may be in our files.
    """
    frames = traceback.extract_tb(trace)
    if frames and frames[-1].filename.startswith(_OURS + os.sep) and not isinstance(error, RuntimeError):
        return []
    return [frame for frame in frames if _is_users(frame.filename)]


def users_line(error: BaseException) -> str:
    """Where in the user's files an exception came from, as "net.py, line 9, in forward"; empty if nowhere."""
    frames = users_frames(error, error.__traceback__)
    return f"{_short(frames[-1].filename)}, line {frames[-1].lineno}, in {frames[-1].name}" if frames else ""


def _is_users(file: str) -> bool:
    if file.startswith("<") or file.startswith(_OURS + os.sep) or not _PACKAGES.isdisjoint(Path(file).parts):
        return False
    return not any(file.startswith(place + os.sep) for place in _INSTALLED if place)


def _message(error: BaseException, frames: list[traceback.FrameSummary]) -> str:
    said = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else _said(error)
    last = frames[-1]
    lines = [f"{_short(last.filename)}, line {last.lineno}, in {last.name}: {said}"]
    for frame in frames[-_MOST_FRAMES:]:
        lines += [f"  {_short(frame.filename)}:{frame.lineno} in {frame.name}", f"    {frame.line}"]
    lines.append(f"Correct the file. The whole traceback: set {SHOW_ALL}=1.")
    return "\n".join(lines)


def _said(error: BaseException) -> str:
    """The exception's kind and the first line of what it says."""
    held = traceback.TracebackException(
        type(error), error, None
    )  # whose text is safe from the user's own __str__
    text = str(held).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _short(file: str) -> str:
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative
