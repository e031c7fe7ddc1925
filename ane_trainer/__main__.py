"""`python -m ane_trainer` and `ane-trainer`: the command line, with signals caught from the first import on.

While Python itself starts, some 30 ms, a signal is Python's: Ctrl-C ends there with its traceback.
"""

import sys

_STOPPED = "ANE130 stopped before there was anything to save."
try:
    import gc
    import io
    import os
    import signal
    from types import FrameType
except KeyboardInterrupt:  # the first of them takes some milliseconds
    print(_STOPPED, file=sys.stderr)
    sys.exit(130)

#: New objects between two collections: at Python's own 700 (3.11) they take a tenth of what importing PyTorch takes.
_OBJECTS = 50_000
_came: list[int] = []


def main() -> None:
    """Run the command line and exit with the documented code. SIGTERM and SIGHUP end it as Ctrl-C does."""
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)
        code = _run()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is written: Python's end would show a traceback
    except KeyboardInterrupt:  # while the command line itself was imported
        print(_STOPPED, file=sys.stderr)
        code = 130
    sys.exit(code)


def _run() -> int:
    """The exit code of the command line."""
    gc.set_threshold(_OBJECTS)
    for stream in (sys.stdout, sys.stderr):  # names that the terminal's encoding does not have
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    from ane_trainer.cli import run_command

    code = run_command(sys.argv[1:])
    gc.freeze()  # the interpreter's last collection would go through all that PyTorch made: a second
    return code


def _stop(number: int, frame: FrameType | None) -> None:
    """Until training takes the signals over, there is nothing to save. A second one ends the process at once."""
    at_once = bool(_came) or _imports(frame)  # NumPy's and PyTorch's C code drop an exception in an import
    _came.append(number)
    if number == signal.SIGINT and not at_once:
        raise KeyboardInterrupt(number)
    print(_STOPPED, file=sys.stderr, flush=True)
    if at_once:
        os._exit(128 + number)
    sys.exit(128 + number)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported in this frame or one that called it."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


if __name__ == "__main__":
    main()
