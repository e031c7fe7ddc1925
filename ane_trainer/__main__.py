"""`python -m ane_trainer` and `ane-trainer`: the command line, with signals caught from the first import on."""

import signal
import sys

_STOPPED = "ANE130 stopped before there was anything to save."


def main() -> None:
    """Run the command line and exit with the documented code. SIGTERM and SIGHUP end it as Ctrl-C does."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        from ane_trainer.cli import run_command

        code = run_command(sys.argv[1:])
    except KeyboardInterrupt:  # while the command line itself was imported
        print(_STOPPED, file=sys.stderr)
        code = 130
    sys.exit(code)


def _stop(number: int, _frame: object) -> None:
    """Until training takes the signals over, there is nothing to save."""
    print(_STOPPED, file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
