"""Generate the cost model: `python -m docs._generate.cost [fit | page | table]`, all of it without a word.

fit    fit and cross-validate: `cost_rates.csv`, `left_out.csv` (minutes)
page   from these `cost_intervals.csv`, `retold.csv` and docs/cost-model.md
table  print the aims, whether each is met, and the cross-validation
"""

from __future__ import annotations

import sys
from pathlib import Path

from ane_trainer.ane.chips import cost
from docs._generate.cost import page, retold
from docs._generate.cost.tables import read_left_out, refit, write_intervals

PAGE = Path(__file__).parents[2] / "cost-model.md"


def main(command: str = "") -> None:
    """Run one part, or all."""
    if command in ("", "fit"):
        refit()
    if command in ("", "page"):
        write_intervals(read_left_out())
        for cached in (cost._rates_table, cost._intervals):
            cached.cache_clear()
        retold.write()
        PAGE.write_text(page.document(), encoding="utf-8")
    if command == "table":
        print(page.cross_validation(read_left_out()))


if __name__ == "__main__":
    main(*sys.argv[1:2])
