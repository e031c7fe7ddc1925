"""Every lowering rule can be reached: capture leaves its operation whole, on this release of torch."""

from __future__ import annotations

import pytest
import torch

from ane_trainer.ane.capture.rewrites.decompositions import KEPT, decomposition_table
from ane_trainer.ane.capture.trace.torch_private import OpOverload, can_decompose
from ane_trainer.ane.compiler.lower.registry import known_overloads

#: Operations that capture itself writes into graphs, whatever the table says of them.
WRITTEN_BY_CAPTURE = {
    "aten.select_scatter.default": "a write through x[i] (capture/trace/operations.py)",
    "aten._cdist_forward.default": "of other powers than 2 (capture/rewrites/decompositions.py)",
    "aten._cdist_backward.default": "likewise",
}
#: Rules for other releases of torch than this one.
OTHER_RELEASES = {
    "aten.ldexp.Tensor": "whole from torch 2.11 on; 2.10 decomposes it",
}


def overload_of(name: str) -> OpOverload | None:
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload, None)


def decomposed(overload: OpOverload) -> bool:
    return overload in decomposition_table() or can_decompose(overload)


@pytest.mark.parametrize("name", known_overloads())
def test_capture_leaves_the_operation_of_a_rule_whole(name: str) -> None:
    if name in WRITTEN_BY_CAPTURE or name in OTHER_RELEASES:
        return
    overload = overload_of(name)
    assert overload is not None, f"{name}: this torch has no such operation; delete the rule"
    assert not overload._schema.is_mutable, (
        f"{name}: capture replaces what changes its arguments; delete the rule"
    )
    assert not decomposed(overload), (
        f"{name}: taken apart before lowering: delete the rule, or keep the operation"
    )


def test_operations_that_are_kept_arrive_whole() -> None:
    known = set(known_overloads())
    kept = [
        packet.default for packet in KEPT if packet is not torch.ops.aten.native_dropout
    ]  # refused by name
    assert not [str(o) for o in kept if decomposed(o) or str(o) not in known]


def test_the_exceptions_are_needed() -> None:
    for name in WRITTEN_BY_CAPTURE:
        overload = overload_of(name)
        assert overload is not None
        assert decomposed(overload), f"{name}: reachable anyway"
    assert OTHER_RELEASES.keys() <= set(known_overloads())
