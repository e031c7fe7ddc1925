"""What macOS's compiler makes of a program, and what it refuses, as ANEForge measured it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import aneforge as af
import numpy as np
import pytest
from aneforge import build

from ane_trainer.interop.aneforge.host import LIBRARY_NAME
from tests.interop.harness import QUIET, compile_text, run, values

pytestmark = pytest.mark.filterwarnings(QUIET)

SCALED = """program(1.3) { func main<ios18>(tensor<fp16, [1, 4]> x) {
    tensor<fp16, %s> r = %s;
    tensor<fp16, [%s]> k = const()[val = tensor<fp16, [%s]>([%s])];
    tensor<fp16, %s> y = mul(x = k, y = r)[name = string("y")];
} -> (y); }
"""


@pytest.mark.parametrize("op", ["floor", "ceil", "round", "abs"])
def test_a_scalar_factor_of_a_rounded_value_is_lost(op: str, tmp_path: Path) -> None:
    """ANEForge issue 112 (M5): the rounding kernel drops it; one of full shape stays. ANEForge writes the latter."""
    x = np.array([[0.25, 1.75, -2.25, 3.0]], np.float16)
    function = {"floor": np.floor, "ceil": np.ceil, "round": np.round, "abs": np.abs}[op]
    call = f'{op}(x = x)[name = string("r")]'
    for size, lost in ((1, op != "abs"), (4, False)):
        factor = ", ".join(["0x1p-1"] * size)
        text = SCALED % ("[1, 4]", call, size, size, factor, "[1, 4]")
        out = compile_text(tmp_path / f"{size}", text, y=(1, 4)).eval({"x": x})["y"]
        np.testing.assert_array_equal(out, function(x) * (1 if lost else 0.5))
    np.testing.assert_array_equal(run(lambda t: getattr(t, op)() * 0.5, x), function(x) * 0.5)


def test_a_reduction_times_zero_does_not_compile(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    total = 'reduce_sum(axes = tensor<int32, [1]>([1]), keep_dims = bool(true), x = x)[name = string("r")]'
    for factor, refused in (("0x0p+0", True), ("0x1p+1", False)):
        text = SCALED % ("[1, 1]", total, 1, 1, factor, "[1, 1]")
        folder = tmp_path / factor
        if refused:
            with pytest.raises(RuntimeError, match="compile failed"):
                compile_text(folder, text, y=(1, 1))
            assert "a reduction times 0 does not compile" in capfd.readouterr().err
        else:
            assert compile_text(folder, text, y=(1, 1)).eval({"x": np.ones((1, 4), np.float16)})["y"] == 8


def test_kernels_may_be_of_any_height_and_not_of_any_width() -> None:
    x, kernel = values(1, 2, 50, 3), values(3, 2, 40, 1, seed=1, low=-0.2, high=0.2)
    windows = np.lib.stride_tricks.sliding_window_view(x[0], 40, axis=1)
    want = np.einsum("chwk,ock->ohw", windows, kernel[..., 0])
    np.testing.assert_allclose(run(lambda t: af.conv(t, kernel), x)[0], want, atol=2e-2)
    with pytest.raises(ValueError, match="kernel width"):
        af.conv(af.input((1, 2, 3, 50)), kernel.transpose(0, 1, 3, 2))


def test_the_library_is_built_where_it_is_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = build.build_dylib(tmp_path / "made" / LIBRARY_NAME)
    assert path.stat().st_size > 0
    assert "built" in capfd.readouterr().err
    assert build.build_dylib(path, quiet=True) == path
    assert capfd.readouterr().err == ""
    assert ctypes.CDLL(str(path)).ane_e5rt_program_compile
