"""Every op that ANEForge can emit, compiled by ANEForge, run on the simulator, against NumPy."""

from __future__ import annotations

import pytest
from aneforge._compile import _EMIT

from tests.interop import contraction_cases, pointwise_cases, shape_cases, spatial_cases
from tests.interop.harness import QUIET, Case

pytestmark = pytest.mark.filterwarnings(QUIET)

CASES = [
    *pointwise_cases.CASES,
    *shape_cases.CASES,
    *contraction_cases.CASES,
    *spatial_cases.CASES,
]

#: Covered by tests of their own: image inputs (test_runtime.py).
ELSEWHERE = {"cast"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_numpy(case: Case) -> None:
    case.check()


def test_every_emitter_has_a_case() -> None:
    covered = set().union(*(case.ops() for case in CASES))
    assert set(_EMIT) - covered - ELSEWHERE == set()
