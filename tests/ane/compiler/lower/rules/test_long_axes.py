"""Axes of thousands of elements: running sums and reversals in blocks, not by a matrix of n x n numbers."""

from __future__ import annotations

import torch

from tests.ane.compiler.lower.harness import check, lowered, normal


def test_running_sums_and_reversals_of_a_long_axis() -> None:
    check(lambda x: x.cumsum(0) / 64, [normal(3_001, 2)])
    check(lambda x: x.cumsum(1).flip(1) / 64, [normal(2, 2_900)])
    check(lambda x: torch.cat((x.flip(0), x)), [normal(2_049, 3)])


def test_a_program_of_them_is_small() -> None:
    """60,000 elements had a constant of 29 GB."""
    program = lowered(lambda x: x.cumsum(0).flip(0), [normal(60_000, 2)], "fp16").program
    constants = [op.result.type.shape for op in program.main.ops if op.kind == "const"]
    assert max((torch.Size(shape).numel() for shape in constants), default=0) <= 256 * 256
