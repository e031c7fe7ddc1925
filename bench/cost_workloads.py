"""Published benchmark rows as programs: reads measurements, keeps what describes a program completely.

Used by `fit_cost.py`. A workload is a text of a word and integers, e.g. `conv B C H kernel stride depth`.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ane_trainer.ane.mil.program import Function, Literal, Op, Program, TensorType, Value, literal


@dataclass(frozen=True)
class Row:
    """One published latency: `workload` is a word and integers that `program` turns into a MIL program."""

    chip: str
    kind: str
    workload: str
    latency_us: float
    energy_uj: float | None
    source: str
    held_out: bool = False


# --- workloads -> programs -------------------------------------------------------------------------------


class _Graph:
    """Builds programs from shapes; weights have a type and no payload."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def op(self, kind: str, shape: tuple[int, ...], **args: object) -> Value:
        result = Value(f"t{len(self.ops)}", TensorType("fp16", shape))
        self.ops.append(Op(kind, tuple(args.items()), (result,)))  # type: ignore[arg-type]
        return result


def _value(*shape: int) -> Value:
    return Value("x", TensorType("fp16", shape))


def _weight(*shape: int) -> Literal:
    return Literal(TensorType("fp16", shape), b"")


def _gemm(g: _Graph, m: int, k: int, n: int) -> tuple[Value, Value]:
    x = _value(m, k)
    return x, g.op("matmul", (m, n), x=x, y=_weight(k, n))


def _conv(g: _Graph, b: int, c: int, h: int, k: int, stride: int, depth: int) -> tuple[Value, Value]:
    x = y = _value(b, c, h, h)
    for _ in range(depth):
        h //= stride
        strides = literal((stride, stride), "int32")
        y = g.op("conv", (b, c, h, h), x=y, weight=_weight(c, c, k, k), strides=strides)
        stride = 1
    return x, y


def _unary(kind: str) -> Callable[..., tuple[Value, Value]]:
    def build(g: _Graph, *shape: int) -> tuple[Value, Value]:
        x = _value(*shape)
        return x, g.op(kind, shape, x=x)

    return build


def _reduce(g: _Graph, r: int, c: int) -> tuple[Value, Value]:
    x = _value(r, c)
    return x, g.op("reduce_sum", (r, 1), x=x, axes=literal((1,), "int32"))


def _attention(g: _Graph, s: int, d: int, heads: int) -> tuple[Value, Value]:
    x = _value(s, d)
    q, k, v = (g.op("matmul", (s, d), x=x, y=_weight(d, d)) for _ in range(3))
    q, k, v = (g.op("reshape", (s, heads, d // heads), x=item) for item in (q, k, v))
    q, k, v = (g.op("transpose", (heads, s, d // heads), x=item) for item in (q, k, v))
    scores = g.op("matmul", (heads, s, s), x=q, y=k, transpose_y=literal(True, "bool"))
    weights = g.op("softmax", (heads, s, s), x=scores)
    y = g.op("matmul", (heads, s, d // heads), x=weights, y=v)
    y = g.op("reshape", (s, d), x=g.op("transpose", (s, heads, d // heads), x=y))
    return x, g.op("matmul", (s, d), x=y, y=_weight(d, d))


def _jacobi(g: _Graph, n: int, iterations: int) -> tuple[Value, Value]:
    x = y = _value(1, n)
    for _ in range(iterations):
        y = g.op(
            "mul", (1, n), x=g.op("sub", (1, n), x=_weight(1, n), y=_gemm_step(g, y, n)), y=_weight(1, n)
        )
    return x, y


def _gemm_step(g: _Graph, x: Value, n: int) -> Value:
    return g.op("matmul", (1, n), x=x, y=_weight(n, n))


BUILDERS: dict[str, Callable[..., tuple[Value, Value]]] = {
    "gemm": _gemm, "conv": _conv, "attention": _attention, "jacobi": _jacobi, "reduce_sum": _reduce,
    **{kind: _unary(kind) for kind in ("relu", "gelu", "sigmoid", "softmax", "layer_norm")},
}  # fmt: skip


def program(workload: str) -> Program:
    """The program of a workload text, e.g. `gemm 512 512 512` or `conv B C H kernel stride depth`."""
    word, *numbers = workload.split()
    g = _Graph()
    x, y = BUILDERS[word](g, *map(int, numbers))
    return Program((Function("main", (x,), tuple(g.ops), (y,)),))


# --- measurements -> rows --------------------------------------------------------------------------------

#: Pattern over `workload | shape` -> class and workload text.
PATTERNS: tuple[tuple[str, str, str], ...] = (
    (r"(?:saturation_sweep.* / |^)gemm(?: / power)? \| N=(\d+)", "gemm", "gemm {0} {0} {0}"),
    (r"conv(?: / power)? \| C=(\d+) B=(\d+) HxW=(\d+)x", "conv", "conv {1} {0} {2} 3 1 1"),
    (r"gemm \(batched .*M=128,K=1024,N=1024\) \| B=(\d+)", "gemm batched", "gemm {0}*128 1024 1024"),
    (r"GEMM \w+ \(M=(\d+),K=(\d+),N=(\d+)\)", "gemm", "gemm {0} {1} {2}"),
    (r"^matmul.* \| M=(\d+) K=(\d+) N=(\d+)", "gemm small", "gemm {0} {1} {2}"),
    (r"^conv: .* \| C=(\d+) H=(\d+) k=(\d+) stride=(\d+)", "conv small", "conv 1 {0} {1} {2} {3} 1"),
    (r"conv resnet-ish \(C=256,32x32,k=3,depth=16\)", "conv stack", "conv 1 256 32 3 1 16"),
    (r"conv single \(C=64,32x32,k=3,depth=1\)", "conv small", "conv 1 64 32 3 1 1"),
    (r"attention \w+ \(S=(\d+),D=(\d+),H=(\d+)\)", "attention", "attention {0} {1} {2}"),
    (r"Jacobi solve \(n=(\d+), iters=(\d+)\)", "gemv chain", "jacobi {0} {1}"),
    (r"gap_measurements / gemv", "gemv", "gemm 1 4096 4096"),
    (r"_sweep \| N=(\d+) K=(\d+) weight_MB", "gemv", "gemm 1 {1} {0}"),
    (r"streaming \(relu / x\*2\) / sizes \| shape=\[(\d+), (\d+)\]", "stream", "relu {0} {1}"),
    (r"gelu \(light compute\) / sizes \| shape=\[(\d+), (\d+)\]", "stream", "gelu {0} {1}"),
    (r"reduction \(sum\) / sizes \| shape=\[(\d+), (\d+)\]", "reduction", "reduce_sum {0} {1}"),
    (r"softmax / sizes \| shape=\[(\d+), (\d+)\]", "softmax", "softmax {0} {1}"),
    (r"layer_norm / sizes \| shape=\[(\d+), (\d+)\]", "layer_norm", "layer_norm {0} {1}"),
    (r"layer_norm vit \((\d+), (\d+)\)", "layer_norm", "layer_norm {0} {1}"),
    (r"^fused: (relu|gelu|sigmoid|softmax|layer_norm) \((\d+), (\d+)\)", "elementwise small", "{0} {1} {2}"),
)  # fmt: skip

#: Roofs that the sources state as a rate only; the size is that of the same benchmark on other chips.
SUMMARY = (
    Row(
        "m2-pro", "gemm", "gemm 4096 4096 4096", 2 * 4096**3 / 3.36e6, None, "roofline summary: 3.36 TFLOP/s"
    ),
    Row("m2-pro", "conv", "conv 2 512 64 3 1 1", 38.65e9 / 4.62e6, None, "roofline summary: 4.62 TFLOP/s"),
)

CHIP_NAMES = {
    "M5 Pro": "m5-pro", "M5 Pro Mac17,8": "m5-pro", "M4 Mac16,12": "m4", "M1 Max": "m1-max",
    "M1 Max MacBookPro18,2": "m1-max", "M1 MacBookPro17,1": "m1", "M2 Pro": "m2-pro",
}  # fmt: skip
LARGEST_ROWS = {"m1": 8192, "m1-max": 8192, "m2-pro": 8192, "m4": 16384, "m5-pro": 16384}
LATENCY = {"lat_ms": 1e3, "ane_lat_ms": 1e3, "latency_ms": 1e3, "p50_us": 1.0, "iter_ms": 1e3}


def distil(path: Path) -> list[Row]:
    """The rows of a measurements table that describe a program completely."""
    groups: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    with path.open(encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            engine = record["path"].startswith("ANE e5rt") or record["path"] in (
                "ANE",
                "ane",
                "ANE (aneforge)",
                "e5rt",
            )
            if record["chip"] in CHIP_NAMES and engine and "aneforge" in record["source"]:
                key = (record["chip"], record["workload"], record["shape"], record["source"])
                if record["value"] != "0":
                    groups[key][record["metric"]] = float(record["value"])
    rows = {row for key, metrics in groups.items() for row in _rows(key, metrics)} | set(SUMMARY)
    return _split(sorted(rows, key=lambda r: (r.chip, r.kind, r.workload, r.source, r.latency_us)))


def _split(rows: list[Row]) -> list[Row]:
    """Hold out a quarter of each chip's classes with at least three rows, the same one every time."""
    sizes = Counter((row.chip, row.kind) for row in rows)

    def held_out(row: Row) -> bool:
        digest = hashlib.sha256(f"{row.chip} {row.workload} {row.source}".encode()).digest()
        return sizes[row.chip, row.kind] >= 3 and digest[0] % 4 == 0 and row not in SUMMARY

    return [replace(row, held_out=held_out(row)) for row in rows]


def _rows(key: tuple[str, ...], metrics: dict[str, float]) -> Iterator[Row]:
    chip, workload, shape, source = key
    text = f"{workload} | {shape}"
    if workload.endswith(" / power") and "bandwidth_roofline" in source + workload and not shape:
        # Power loops run the largest size of the sweep; the loop's time agrees with that row's latency.
        text = f"{workload.removesuffix('power')}sizes | shape=[{LARGEST_ROWS[CHIP_NAMES[chip]]}, 4096]"
    for pattern, kind, form in PATTERNS:
        match = re.search(pattern, text)
        if match is None:
            continue
        filled = form.format(*[item for item in match.groups() if item is not None])
        filled = re.sub(r"(\d+)\*(\d+)", lambda m: str(int(m[1]) * int(m[2])), filled)
        name = next((n for n in LATENCY if n in metrics), None)
        if name is not None:
            short = source.split("/")[-1].removesuffix(".json")
            power_mw = metrics.get("ane_active_mW", 0.0)
            energy_uj = power_mw * metrics["iter_ms"] if power_mw > 20 and "iter_ms" in metrics else None
            yield Row(CHIP_NAMES[chip], kind, filled, metrics[name] * LATENCY[name], energy_uj, short)
        return


def load(path: Path) -> list[Row]:
    """Rows of the distilled table."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Row(r["chip"], r["kind"], r["workload"], float(r["latency_us"]),
                    float(r["energy_uj"]) if r["energy_uj"] else None, r["source"], r["held_out"] == "True")
                for r in csv.DictReader(file)]  # fmt: skip
