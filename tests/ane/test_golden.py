"""The programs of 18 small nets are made of the operations that golden.txt has, whatever the release of torch."""

from __future__ import annotations

import pytest
import torch

from tests.ane import golden

#: Nets that a release of torch writes in another form: 2.10 clamps the squares of cosine similarity's norms, 2.15
#: compares with > in clamp's gradient.
OTHER_FORMS = {"2.10": {"cosine": "090cd9c57c443be0 274"}, "2.15": {"normalize": "b778bc8dba5b4ff7 249"}}


@pytest.mark.parametrize("name", golden.NETS)
def test_program_is_made_of_the_same_operations(name: str) -> None:
    hint = "another form of the program: if it is meant, run python -m tests.ane.golden"
    forms = golden.written() | OTHER_FORMS.get(".".join(torch.__version__.split(".")[:2]), {})
    assert golden.fingerprint(name) == forms[name], hint
