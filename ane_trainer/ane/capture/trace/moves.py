"""ATen operations that give their operand's numbers on, in sets by what they keep of it; every pass reads them here."""

from __future__ import annotations

import torch

aten = torch.ops.aten

#: The same tensor once more.
COPIES = frozenset((
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
))  # fmt: skip
#: The same numbers, in another type at most.
CAST = COPIES | {aten._to_copy.default}
#: The same numbers in the same order, in a shape that an argument gives.
VIEWS = frozenset((aten.view.default, aten._unsafe_view.default, aten.reshape.default))
#: The same numbers in the same order.
RESHAPED = VIEWS | {
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip
#: The same numbers in another order of the axes.
PERMUTED = frozenset((aten.permute.default, aten.t.default, aten.transpose.int))
#: Each number once: what is true of all numbers of one is true of the other's.
MOVED = COPIES | RESHAPED | PERMUTED
#: Each number at least once.
SPREAD = MOVED | {aten.expand.default}
#: Some of the numbers: what holds for each of the operand's holds for each of these.
TAKEN = SPREAD | {aten.slice.Tensor, aten.select.int}
