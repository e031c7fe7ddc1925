"""`python -m tests.hunt`: see the package."""

from __future__ import annotations

import argparse
import sys

from tests.hunt import hunt


def main() -> int:
    """Run a stretch of draws; 1 if one is silent or raw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    counts = hunt(range(args.first, args.first + args.count))
    print(dict(counts))
    return 1 if counts["silent"] or counts["raw"] else 0


if __name__ == "__main__":
    sys.exit(main())
