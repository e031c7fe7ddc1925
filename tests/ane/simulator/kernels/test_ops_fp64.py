"""Every op against fp64 semantics within its bound, on random shapes and parameters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.chips.lookup import known_ops as swept_ops
from ane_trainer.ane.chips.lookup import op_status
from ane_trainer.ane.mil.opset import known_ops
from ane_trainer.ane.simulator import KERNELS, WITHOUT_KERNEL
from tests.ane.simulator.kernels import (
    witness_images,
    witness_moves,
    witness_pointwise,
    witness_products,
    witness_reductions,
)
from tests.ane.simulator.kernels.witness import OPS, check

#: Importing them registers their ops.
WITNESSES = (witness_images, witness_moves, witness_pointwise, witness_products, witness_reductions)

#: Kernels held against something else: where.
ELSEWHERE = {
    **dict.fromkeys(
        [
            "constexpr_affine_dequantize",
            "constexpr_blockwise_shift_scale",
            "constexpr_cast",
            "constexpr_lut_to_dense",
            "constexpr_lut_to_sparse",
            "constexpr_sparse_blockwise_shift_scale",
            "constexpr_sparse_to_dense",
        ],
        "test_constexpr.py: coremltools' own decompression",
    ),
    "const": "test_constants.py",
    "fill": "test_constants.py",
    "range_1d": "test_constants.py",
    "non_zero": "test_constants.py: its operand is a constant",
    "reshape_like": "test_constants.py: its parameters are constants",
    "non_maximum_suppression": "test_suppression.py",
}


def test_every_kernel_has_a_witness_and_evidence() -> None:
    assert set(KERNELS) == set(OPS) | set(ELSEWHERE)
    assert all(k.evidence for k in KERNELS.values())
    assert all(k.bound for k in KERNELS.values() if k.level == "bounded")


def test_every_op_with_a_type_rule_has_a_kernel_or_a_reason() -> None:
    assert set(known_ops()) == set(KERNELS) | set(WITHOUT_KERNEL)
    assert not set(KERNELS) & set(WITHOUT_KERNEL)


def test_every_op_that_runs_by_e5rt_on_m5_has_a_kernel() -> None:
    """The sweep of the whole vocabulary (ANEForge, M5): native or reachable; gelu is listed by mode."""
    plain = [kind for kind in swept_ops("e5rt") if "(" not in kind]
    runs = {kind for kind in plain if op_status(kind, "m5").status in ("native", "reachable")}
    assert len(runs) > 110
    assert {kind for kind in runs if not kind.startswith("gelu_")} <= set(KERNELS)


@pytest.mark.parametrize("kind", sorted(OPS))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_within_bound_of_fp64(kind: str, seed: int) -> None:
    check(kind, OPS[kind](np.random.default_rng(seed)), "exact")


@pytest.mark.parametrize(
    "kind", ["matmul", "linear", "einsum", "conv", "conv_transpose", "avg_pool", "max_pool"]
)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_fast_within_bound_of_fp64(kind: str, seed: int) -> None:
    check(kind, OPS[kind](np.random.default_rng(seed)), "fast")
