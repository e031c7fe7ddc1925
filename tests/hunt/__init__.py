"""A hunt for silent errors: models drawn at random, a few steps each against PyTorch in fp64.

`python -m tests.hunt --first 0 --count 5000`; what is drawn widens at 100,000 and 200,000, and from 300,000 on it is
what compiles quickly (`setups.SPACES`). Each draw is right, announced (an error of this package, a
NumericsWarning, a skipped step), silent, or a raw exception (`judging`). Exit code 1 if one is silent or raw.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from tests.hunt.judging import judge
from tests.hunt.setups import draw


def hunt(numbers: Sequence[int], show: bool = True) -> collections.Counter[str]:
    """Run these draws; prints what is not right."""
    counts: collections.Counter[str] = collections.Counter()
    for number in numbers:
        setup = draw(number)
        kind, facts = judge(setup)
        counts[kind] += 1
        if show and kind not in ("right", "void"):
            print(f"{kind}: {setup}: {facts}", flush=True)
    return counts
