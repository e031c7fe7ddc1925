"""`python -m ane_trainer` and `ane-trainer`: the command line, with signals caught from the first import on."""

import gc
import io
import os
import signal
import sys
from types import FrameType

#: New objects between two collections: at Python's own 700 (3.11) they take a tenth of what importing PyTorch takes.
_OBJECTS = 50_000
_STOPPED = "ANE130 stopped before there was anything to save."


def main() -> None:
    """Run the command line and exit with the documented code. SIGTERM and SIGHUP end it as Ctrl-C does."""
    gc.set_threshold(_OBJECTS)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    for stream in (sys.stdout, sys.stderr):  # names that the terminal's encoding does not have
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        from ane_trainer.cli import run_command

        code = run_command(sys.argv[1:])
    except KeyboardInterrupt:  # while the command line itself was imported
        print(_STOPPED, file=sys.stderr)
        code = 130
    gc.freeze()  # the interpreter's last collection would go through all that PyTorch made: a second
    sys.exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    """Until training takes the signals over, there is nothing to save."""
    if number == signal.SIGINT and not _imports(frame):
        raise KeyboardInterrupt(number)
    print(_STOPPED, file=sys.stderr, flush=True)
    if _imports(frame):  # NumPy's and PyTorch's C code drop an exception there, and go on or fail otherwise
        os._exit(128 + number)
    sys.exit(128 + number)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported in this frame or one that called it."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


if __name__ == "__main__":
    main()
