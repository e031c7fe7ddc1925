"""What an update adds to a value is found in its graph, and equals `new - old`; where there is no sum nothing is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ane_trainer.ane.capture.range.changes import change_of
from ane_trainer.ane.capture.range.editing import Editor

UPDATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "average": lambda b, x: b * 0.999 + x * 0.001,
    "alpha": lambda b, x: torch.add(b * 0.99, x, alpha=0.01),
    "other order": lambda b, x: 0.001 * x + 0.999 * b,
    "difference": lambda b, x: b - (b - x) * 0.01,
    "mean": lambda b, x: b + (x - b) * 16 / (x.sum() + 100),
    "count": lambda b, x: b + 1,
    "view": lambda b, x: (b.reshape(1, 4) + 2.0).reshape(4),
    "chosen": lambda b, x: torch.where(x > 0, b * 0.9 + x * 0.1, b),
    "divided": lambda b, x: b / 1.01 + x,
}
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "largest": torch.maximum, "mostly new": lambda b, x: 0.1 * b + 0.9 * x, "product": lambda b, x: b * x,
    "negated": lambda b, x: x - b, "without it": lambda b, x: x + 1,
}  # fmt: skip


def found(update: Callable[[Tensor, Tensor], Tensor], b: Tensor, x: Tensor) -> Tensor | None:
    module = make_fx(update, tracing_mode="fake")(b, x)
    output, editor = module.graph.output_node(), Editor(module.graph)
    new = output.args[0]
    editor.here = output
    change = change_of(editor, new, next(iter(module.graph.nodes)))  # type: ignore[arg-type]
    if change is None:
        return None
    output.args = (change,)
    module.recompile()
    return module(b, x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", UPDATES)
def test_the_change_is_new_minus_old(name: str) -> None:
    b, x = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(found(UPDATES[name], b, x), UPDATES[name](b, x) - b, check_dtype=False)


@pytest.mark.parametrize("name", OTHERS)
def test_a_new_value_is_no_change(name: str) -> None:
    assert found(OTHERS[name], torch.randn(4), torch.randn(4)) is None
