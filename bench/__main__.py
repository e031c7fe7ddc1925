"""Every speed figure of the simulator, each as a ratio to PyTorch in the same run (under two minutes).

python -m bench
"""

from __future__ import annotations

import sys

from bench import mac, ops, step


def main() -> None:
    """The multiply-accumulate kernel, whole training steps, then op by op."""
    for title, part in (("Multiply-accumulate kernel", mac), ("Training step", step), ("Op by op", ops)):
        print(f"\n{title}\n", flush=True)
        part.main()


if __name__ == "__main__":
    sys.exit(main())
