"""`python -m ane_trainer` and `ane-trainer`: the command line, with Ctrl-C caught from the first import on."""

import sys


def main() -> None:
    """Run the command line and exit with the documented code."""
    try:
        from ane_trainer.cli import run_command

        code = run_command(sys.argv[1:])
    except KeyboardInterrupt:  # while the command line itself was imported
        print("ANE130 stopped before there was anything to save.", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
