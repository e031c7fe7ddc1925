"""The programs of 18 small nets are made of the operations that golden.txt has, whatever the release of torch."""

from __future__ import annotations

import pytest

from tests.ane import golden


@pytest.mark.parametrize("name", golden.NETS)
def test_program_is_made_of_the_same_operations(name: str) -> None:
    hint = "another form of the program: if it is meant, run python -m tests.ane.golden"
    assert golden.fingerprint(name) == golden.written()[name], hint
