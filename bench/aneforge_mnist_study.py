"""Which assumption of the simulator moves ANEForge's seeded MNIST CNN, and by how many of 1,000 samples.

    python -m bench.aneforge_mnist_study EXAMPLES_FOLDER [VARIANT ...]

Silicon (ANEForge docs/training.md): 0.9080 on M1 and M2 Pro, 0.9070 on M5 after 300 steps. Each variant
changes one thing that the published facts leave open, runs the example, and prints its accuracies. Nothing
is downloaded.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ane_trainer.ane.simulator import KERNELS
from ane_trainer.ane.simulator.kernels import fused, pooling, reduction
from ane_trainer.ane.simulator.numbers import tables
from ane_trainer.ane.simulator.numbers.fp16 import round_half_away
from ane_trainer.ane.simulator.registry import WRITES
from ane_trainer.interop.aneforge import install


def _kernel(kind: str, run: Callable[..., Any]) -> None:
    KERNELS[kind] = replace(KERNELS[kind], run=run)
    WRITES.pop(kind, None)  # the compiled form of the same op


def _exact_table(name: str, function: Callable[[Any], Any]) -> Callable[[], None]:
    """The correctly rounded function where the table's result is finite and not zero."""

    def change() -> None:
        coarse = tables.FUNCTIONS[name]

        def fine(x: Any) -> Any:
            rough = coarse(x)
            with np.errstate(all="ignore"):
                return np.where((rough == 0) | (np.abs(rough) >= 65504), rough, function(x))

        tables.FUNCTIONS[name] = fine

    return change


def _one_rounding() -> None:
    """Table interpolation in wide arithmetic, rounded once."""

    def interpolate(self: tables.Table, position: Any, negative: Any = False) -> Any:
        return np.interp(position, np.arange(33.0), self.knots)

    tables.Table.interpolate = interpolate  # type: ignore[method-assign]


def _sum_with(order: Callable[[Any], Any]) -> Callable[[], None]:
    """reduce_sum over one axis by `order`, which sums axis 0."""

    def change() -> None:
        def run(ctx: Any, call: Any, x: Any) -> Any:
            over = reduction._over(call)
            (axis,) = over["axis"]
            total = order(np.moveaxis(x.astype(np.float64), axis, 0))
            return round_half_away(np.expand_dims(total, axis) if over["keepdims"] else total)

        _kernel("reduce_sum", run)

    return change


def _every_sum(order: Callable[[Any], Any], pools: bool) -> Callable[[], None]:
    """All sums over one axis by `order`: reductions and softmax, and with `pools` those of average pooling."""

    def change() -> None:
        def total(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
            (only,) = axis if isinstance(axis, tuple) else (axis,)
            result = round_half_away(order(np.moveaxis(np.asarray(x, np.float64), only, 0)))
            return np.expand_dims(result, only) if keepdims else result

        reduction._sum = total
        reduction._sum_by_fours = lambda x, over: total(x, **over)
        for kind in (
            "softmax",
            *reduction._BY_FOURS,
            *reduction._FOLDED,
        ):  # the compiled forms of the same ops
            WRITES.pop(kind, None)
        if pools:
            pooling._wide_sum = lambda taps: order(np.stack(taps).astype(np.float64))

    return change


def _sequential(x: Any) -> Any:
    total = np.zeros_like(x[0])
    for row in x:
        total = round_half_away(total + row).astype(np.float64)
    return total


def _lanes(x: Any) -> Any:
    """Four consecutive terms in fp16, then wide (ANE guide chapter 3 on M1)."""
    padded = np.concatenate([x, np.zeros((-len(x) % 4, *x.shape[1:]))])
    return sum(_sequential(group) for group in padded.reshape(-1, 4, *x.shape[1:]))


def _tree(x: Any) -> Any:
    while len(x) > 1:
        if len(x) % 2:
            x = np.concatenate([x, np.zeros_like(x[:1])])
        x = round_half_away(x[0::2] + x[1::2]).astype(np.float64)
    return x[0]


def _ones_matmul(x: Any) -> Any:
    """Through the multiply-accumulate unit: every term on the 2^-16 grid."""
    return np.sum(np.trunc(x * 65536 + np.copysign(0.5, x)) / 65536, axis=0)


def _softmax(combine: Callable[[Any, int], Any]) -> Callable[[], None]:
    return lambda: _kernel("softmax", lambda ctx, call, x: round_half_away(combine(x, call.integer("axis"))))


def _softmax_wide(x: Any, axis: int) -> Any:
    wide = np.exp(x.astype(np.float64) - x.max(axis, keepdims=True))
    return wide / wide.sum(axis, keepdims=True)


def _softmax_wide_sum(x: Any, axis: int) -> Any:
    weights = tables.evaluate("exp", round_half_away(x - x.max(axis, keepdims=True))).astype(np.float64)
    return weights / weights.sum(axis, keepdims=True)


def _division_exact() -> None:
    """Division with one rounding; x / 0 stays 65536 x."""
    _exact_table("inverse", lambda x: 1 / x)()


def _flush() -> None:
    """The sqrt and inverse tables take subnormals as zero."""
    for name in ("sqrt", "inverse"):
        real = tables.FUNCTIONS[name]
        tables.FUNCTIONS[name] = lambda x, real=real: real(np.where(np.abs(x) < 2.0**-14, 0.0, x))


#: Variants that leave sums as they are shipped; all others start from wide sums, rounded once.
SHIPPED = ("m1", "m2-pro", "m5")

#: Name -> (chip, fidelity, change).
VARIANTS: dict[str, tuple[str, str, Callable[[], None]]] = {
    "m1": ("m1", "exact", lambda: None),
    "m2-pro": ("m2-pro", "exact", lambda: None),
    "m5": ("m5", "exact", lambda: None),
    "fast accumulation (fp32)": ("m5", "fast", lambda: None),
    "sum: wide, rounded once": ("m5", "exact", lambda: None),
    "sum: sequential fp16": ("m5", "exact", _sum_with(_sequential)),
    "every sum: 4 lanes fp16, then wide": ("m5", "exact", _every_sum(_lanes, False)),
    "every sum and pool: 4 lanes": ("m5", "exact", _every_sum(_lanes, True)),
    "every sum: sequential fp16": ("m5", "exact", _every_sum(_sequential, False)),
    "every sum and pool: sequential fp16": ("m5", "exact", _every_sum(_sequential, True)),
    "sum: fp16 tree": ("m5", "exact", _sum_with(_tree)),
    "sum: ones matmul": ("m5", "exact", _sum_with(_ones_matmul)),
    "tables: one rounding": ("m5", "exact", _one_rounding),
    "sqrt: correctly rounded": ("m5", "exact", _exact_table("sqrt", np.sqrt)),
    "inverse: correctly rounded": ("m5", "exact", _division_exact),
    "exp: correctly rounded": ("m5", "exact", _exact_table("exp", np.exp)),
    "softmax: wide": ("m5", "exact", _softmax(_softmax_wide)),
    "softmax: exp table, wide division": ("m5", "exact", _softmax(_softmax_wide_sum)),
    "sqrt, inverse: subnormals are 0": ("m5", "exact", _flush),
}


def accuracies(examples: Path, name: str) -> list[str]:
    """Run the example with one change; the accuracies of its table."""
    chip, fidelity, change = VARIANTS[name]
    if name not in SHIPPED:
        _sum_with(lambda x: np.sum(x, axis=0))()
    change()
    tables.lookup.cache_clear()
    fused._TABLES.clear()
    install(chip, fidelity, threads=1)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(examples))
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        module = runpy.run_path(str(examples / "train_mnist_cnn.py"))
        module["main"]()
    return re.findall(r"^ +[1-9]\d* \| +\d+ \| +([\d.]+)", shown.getvalue(), re.M)


def main(arguments: list[str]) -> int:
    examples = Path(arguments[0]).resolve()
    if arguments[1:2] == ["--one"]:
        print(" ".join(accuracies(examples, arguments[2])))
        return 0
    print(f"{'variant':36} | accuracy after 50 / 100 / ... / 300 steps")
    for name in arguments[1:] or VARIANTS:
        command = [sys.executable, "-m", "bench.aneforge_mnist_study", str(examples), "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(f"{name:36} | {done.stdout.strip() or done.stderr.strip().splitlines()[-1]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
