"""PyTorch's operator database: what `tests/data/op_db_claims.txt` claims holds, forward and gradients.

Left out of the database's samples, for every op (`op_db.py` has the reasons as text): samples without tensors,
with complex numbers, with empty tensors, of more than five axes or 20,000 elements, with results that are random,
empty, complex or not finite, and calls that torch itself refuses.
"""

from __future__ import annotations

import random

import pytest

from ane_trainer.ane.errors import UnsupportedModel
from tests.ane.compiler.lower.op_db import check_sample, claims, operators, samples

# the database's generators and the ops themselves warn about deprecations of torch's own
pytestmark = pytest.mark.filterwarnings("ignore")

CLAIMS = claims()
QUICK_OPS, QUICK_SAMPLES = 70, 4
QUICK = sorted(random.Random(4).sample(sorted(CLAIMS), QUICK_OPS))


def check(name: str, most: int | None = None) -> None:
    """All of an op's samples (of each variant), or the first `most`; refusals only as the claim says."""
    covered, refused = 0, set()
    for op in operators(name):
        cases = [s for s in samples(op) if not isinstance(s, str)]
        for case in cases[:most]:
            try:
                check_sample(case, op.supports_autograd)
            except UnsupportedModel as error:
                known = {text for text in CLAIMS[name] if text in str(error)}
                refused |= known or {f"another reason: {error}"}
            else:
                covered += 1
    assert refused <= set(CLAIMS[name])
    assert covered or most, f"{name}: no sample is covered"
    if most is None:
        assert refused == set(CLAIMS[name]), f"{name}: now covered, take the remark out of the claims"


def test_at_least_150_ops_are_claimed() -> None:
    assert len(CLAIMS) >= 150
    missing = {name for name in CLAIMS if not operators(name)}
    assert missing <= {
        "native_group_norm",
        "nn.functional.linear_cross_entropy",
    }  # not in the database of torch 2.10


@pytest.mark.parametrize("name", QUICK)
def test_some_samples(name: str) -> None:
    check(name, QUICK_SAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_all_samples(name: str) -> None:
    check(name)
