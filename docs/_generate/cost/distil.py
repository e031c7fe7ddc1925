"""Distil a table of published measurements into `measurements.csv`: the rows whose program is fully described.

    python -m docs._generate.cost.distil MEASUREMENTS.csv

MEASUREMENTS has the columns source, chip, workload, shape, metric, value, unit, path and notes. A row of the
result is one published value: latency (us) or energy on the engine's rail (uJ, power times loop time) of a
workload text on a chip and path.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from ane_trainer.ane.chips.cost import FEW_ROWS

TABLE = Path(__file__).with_name("measurements.csv")


@dataclass(frozen=True, order=True)
class Row:
    """One published value. `family` is the kind of program; `value` is in us (latency) or uJ (energy)."""

    chip: str
    path: str
    family: str
    workload: str
    quantity: str
    value: float
    source: str


CHIPS = {
    "M5 Pro": "m5-pro", "M5 Pro Mac17,8": "m5-pro", "M4 Mac16,12": "m4", "M4": "m4", "M1 Max": "m1-max",
    "M1 Max MacBookPro18,2": "m1-max", "M1 MacBookPro17,1": "m1", "M2 Pro": "m2-pro", "M3 Pro": "m3-pro",
    "M6": "m6", "M5 Pro (mlperf)": "m5-pro", "host(unspecified, likely M5 Pro)": "m5-pro", "M1 (h13g)": "m1-max",
}  # fmt: skip
LARGEST_ROWS = {"m1": 8192, "m1-max": 8192, "m2-pro": 8192, "m4": 16384, "m5-pro": 16384}

#: metric -> factor to us.
LATENCY = {
    "lat_ms": 1e3, "ane_lat_ms": 1e3, "latency_ms": 1e3, "iter_ms": 1e3, "energy_iter_ms": 1e3,
    "latency_per_step_ms": 1e3, "min_us": 1.0, "p50_us": 1.0, "median_ms": 1e3, "ane_fp16_ms": 1e3,
    "ane_int4_ms": 1e3, "fp16_ms": 1e3, "ms": 1e3, "ane_ms": 1e3, "p50": 1e3, "Latency": 1e3, "ms/eval": 1e3,
    "latency": 1e3, "latency_median": 1.0, "ane_latency": 1e3,
}  # fmt: skip

#: Pattern over `source | workload | shape | metric` -> family and workload text, for ANEForge's benchmarks.
E5RT = (
    (r"(?:saturation_sweep.* / |\| )gemm(?: / power)? \| N=(\d+)", "gemm", "gemm {0} {0} {0}"),
    (r"conv(?: / power)? \| C=(\d+) B=(\d+) HxW=(\d+)x", "conv", "conv {1} {0} {2} 3 1"),
    (r"gemm \(batched .*M=128,K=1024,N=1024\) \| B=(\d+)", "gemm", "gemm_batched {0} 128 1024 1024"),
    (r"GEMM \w+ \(M=(\d+),K=(\d+),N=(\d+)\)", "gemm", "gemm {0} {1} {2}"),
    (r"matmul.*\| M=(\d+) K=(\d+) N=(\d+)", "gemm", "gemm {0} {1} {2}"),
    (r"conv: .*\| C=(\d+) H=(\d+) k=(\d+) stride=(\d+)", "conv", "conv 1 {0} {1} {2} {3}"),
    (r"blocks / standalone / ops / conv1x1 \| C=(\d+) HW=\[(\d+)", "conv", "conv 1 {0} {1} 1 1"),
    (r"conv single \(C=64,32x32,k=3,depth=1\)", "conv", "conv_stack 1 64 32 3 1"),
    (r"gap_measurements / gemv", "gemv", "gemm 1 4096 4096"),
    (r"_sweep \| N=(\d+) K=(\d+) weight_MB", "gemv", "gemm 1 {1} {0}"),
    (r"(\d+)x(\d+) B=(\d+) / (int8|int4|sparse) \|", "compressed", "gemm {2} {0} {1} {3}"),
    (r"(\d+)x(\d+) B=(\d+) / fp16 \|", "gemv", "gemm {2} {0} {1}"),
    (r"\d+x\d+ B=\d+ \| N=(\d+) K=(\d+) B=(\d+) \| ane_fp16", "gemv", "gemm {2} {1} {0}"),
    (r"\d+x\d+ B=\d+ \| N=(\d+) K=(\d+) B=(\d+) \| ane_int4", "compressed", "gemm {2} {1} {0} int4"),
    (r"(?:streaming \(relu / x\*2\)) / sizes \| shape=\[(\d+), (\d+)\]", "elementwise", "relu {0} {1}"),
    (r"gelu \(light compute\) / sizes \| shape=\[(\d+), (\d+)\]", "elementwise", "gelu {0} {1}"),
    (r"reduction \(sum\) / sizes \| shape=\[(\d+), (\d+)\]", "reduction", "reduce_sum {0} {1}"),
    (r"softmax / sizes \| shape=\[(\d+), (\d+)\]", "softmax", "softmax {0} {1}"),
    (r"layer_norm / sizes \| shape=\[(\d+), (\d+)\]", "norm", "layer_norm {0} {1}"),
    (r"(layer|rms)_norm vit \((\d+), (\d+)\)", "norm", "{0}_norm {1} {2}"),
    (r"\| (?:_verdict_summary / )?layer_norm \((\d+), (\d+)\)", "norm", "layer_norm {0} {1}"),
    (r"\| (?:_verdict_summary / )?gelu \((\d+), (\d+)\)", "elementwise", "gelu {0} {1}"),
    (r"group_norm fmap \((\d+), (\d+), (\d+), (\d+)\)", "norm", "group_norm {0} {1} {2} {3}"),
    (r"blocks / standalone / ops / group_norm \| C=(\d+) HW=\[(\d+)", "norm", "group_norm 1 {0} {1} {1}"),
    (r"blocks / standalone / ops / gelu\d? \| C=(\d+) HW=\[(\d+)", "elementwise", "gelu 1 {0} {1} {1}"),
    (r"fused: (relu|gelu|sigmoid) \((\d+), (\d+)\)", "elementwise", "{0} {1} {2}"),
    (r"fused: softmax \((\d+), (\d+)\)", "softmax", "softmax {0} {1}"),
    (r"fused: (l2_norm|rms_norm|layer_norm) \((\d+), (\d+)\)", "norm", "{0} {1} {2}"),
    (r"fused: group_norm \((\d+), (\d+), (\d+), (\d+)\)", "norm", "group_norm {0} {1} {2} {3}"),
    (r"fused: (max_pool|pixel_shuffle) \((\d+), (\d+), (\d+), (\d+)\)", "elementwise", "{0} {1} {2} {3} {4}"),
    (r"conv (?:resnet-ish|stack) \(C=256,32x32,k=3,depth=16\)", "chain", "conv_stack 1 256 32 3 16"),
    (r"gap_measurements / fused_block", "chain", "conv_stack 4 256 64 3 3"),
    (r"Jacobi solve \(n=(\d+), iters=(\d+)\)", "chain", "jacobi {0} {1}"),
    (r"stencil 5pt \((\d+)x\d+, steps=(\d+)\)", "chain", "stencil {0} {1}"),
    (r"blocks / fused \| C=(\d+) HW=\[(\d+)", "chain", "neck {0} {1}"),
    (r"vision \(conv-stack.*\) \| B=(\d+)", "chain", "vision {0}"),
    (r"attention (?:\w+ )?\(S=(\d+),D=(\d+),H=(\d+)\)", "attention", "attention {0} {1} {2}"),
    (r"attention \(self-attn block, S=128\) \| B=(\d+)", "attention", "attention_batched {0} 128 768 12"),
    (r"encoder \(transformer block, S=128\) \| B=(\d+)", "block", "encoder {0} 128 768 12"),
    (r"encoder_serving_crosspath.*\| B=(\d+) \| ane_fp16_ms", "block", "encoder_flat {0} 128 768 12"),
    (r"vit_b16 / matmul\+conv \|.*fp16_ms", "model", "vit 12 768 12"),
    (r"minilm_l6 / matmul \|.*fp16_ms", "model", "minilm 64 6 384 12"),
    (r"ResNet-(\d+) (?:forward|tinygrad)", "model", "resnet {0}"),
    (r"resnet50_(?:loadgen|official).*p50", "model", "resnet 50"),
)  # fmt: skip

#: The same for kernels of one or several 1x1 convolutions in memory (maderix, ANE-Training).
DIRECT = (
    (r"[|/] (\d+)x conv (\d+)ch sp(\d+) \|", "stack", "pointwise_stack {1} {2} {0}"),
    (r"Ch=(\d+); Sp=(\d+); Depth=(\d+)", "stack", "pointwise_stack {0} {1} {2}"),
    (r"/ (\d+) \| Sp=(\d+); Depth=(\d+)", "stack", "pointwise_stack {0} {1} {2}"),
    (r"[|/] (\d+)x conv (\d+)ch(?: 64x64)? \| .*(?:FP16)", "stack",
     "pointwise_stack {1} 4096 {0}"),
    (r"[|/] (\d+)x conv (\d+)ch(?: 64x64)? \| .*(?:INT8|W8A8)", "stack", "pointwise_stack_w8a8 {1} 4096 {0}"),
    (r"Config=128x conv 512ch 64x64", "stack", "pointwise_stack_w8a8 512 4096 128"),
    (r"[|/] (\d+)ch x(\d+)sp \|", "kernel", "pointwise_conv {0} {0} {1}"),
    (r"/ (\d+)x(\d+) sp(\d+) \|", "kernel", "pointwise_conv {0} {1} {2}"),
    (r"Throughput Map / (\d+) \| .*?(\d+)x(\d+)$", "kernel", "pointwise_conv {1} {2} {0}"),
    (r"Config=QKV sp(\d+)", "kernel", "pointwise_conv 768 768 {0}"),
    (r"Config=FFN-up sp(\d+)", "kernel", "pointwise_conv 768 2048 {0}"),
    (r"Config=(\d+)x(\d+) sp(\d+)", "kernel", "pointwise_conv {0} {1} {2}"),
    (r"Shape=(\d+)x(\d+) \| sp(\d+) Latency", "kernel", "pointwise_conv {0} {1} {2}"),
    (r"conv1x1 chain depth FP16 \| 512ch 32x32 L=(\d+)", "stack", "pointwise_stack 512 1024 {0}"),
    (r"conv1x1 chain depth W8A8 \| 512ch 32x32 L=(\d+)", "stack", "pointwise_stack_w8a8 512 1024 {0}"),
)  # fmt: skip

#: Core ML, Core AI on M6 and M5 Pro.
COREML = (
    (r"(?:chain FP16|chain depth) \(2 ANEs\) \| 512ch 32x32 L=(\d+)", "stack", "pointwise_stack 512 1024 {0}"),
    (r"chain W8 weight-only \(2 ANEs\) \| 512ch 32x32 L=(\d+)", "stack", "pointwise_stack 512 1024 {0} int8"),
    (r"chain W8A8 \(2 ANEs\) \| 512ch 32x32 L=(\d+)", "stack", "pointwise_stack_w8a8 512 1024 {0}"),
    (r"weight streaming unique \| 512ch 1x1 w16 L=(\d+)", "stack", "pointwise_stack 512 1 {0}"),
    (r"128-layer conv1x1 512ch 4096 pos: core(?:ml|ai)-fp16", "stack", "pointwise_stack 512 4096 128"),
    (r"FP16 128-layer dense", "stack", "pointwise_stack 512 4096 128"),
    (r"W4A16 conv1x1 512ch 4096pos \| layers=(\d+)", "stack", "pointwise_stack 512 4096 {0} int4"),
    (r"A8W4 conv1x1 512ch 4096pos \| layers=(\d+)", "stack", "pointwise_stack_w8a8 512 4096 {0}"),
)  # fmt: skip

_SUMMARY = "summary of the published rooflines"


def _roof(chip: str, workload: str, latency_us: float, path: str = "e5rt", source: str = _SUMMARY) -> Row:
    return Row(chip, path, "roof", workload, "latency", float(f"{latency_us:.6g}"), source)


#: What sources state of a chip as one rate: peak of one product, of one 3x3 convolution, activation stream (in
#: and out), dispatch floor, weight stream. A chip of which nothing else is published is fitted to these alone.
ROOFS = (
    *(_roof(chip, f"gemm {n} {n} {n}", 2 * n**3 / tflops / 1e6) for chip, n, tflops in (
        ("m1", 4096, 2.70), ("m1-max", 4096, 4.59), ("m2-pro", 4096, 3.36), ("m4", 4096, 5.44),
        ("m5", 2048, 8.71), ("m5-pro", 2048, 10.0))),
    *(_roof(chip, f"conv {b} 512 64 3 1", b * 19.327e9 / tflops / 1e6) for chip, b, tflops in (
        ("m1", 2, 3.46), ("m1-max", 2, 6.85), ("m2-pro", 2, 4.62), ("m4", 4, 9.5), ("m5", 4, 17.4),
        ("m5-pro", 4, 18.8))),
    *(_roof(chip, f"relu {rows} 4096", 4 * rows * 4096 / rate / 1e3) for chip, rows, rate in (
        ("m1-max", 8192, 7.4), ("m4", 16384, 7.7), ("m5", 16384, 20.0), ("m5-pro", 16384, 24.0))),
    *(_roof(chip, "gelu 1 64", floor) for chip, floor in (
        ("m1", 210.0), ("m1-max", 190.0), ("m2-pro", 100.0), ("m4", 92.0), ("m5", 90.0), ("m5-pro", 76.0))),
    _roof("m5", "pointwise_stack 512 64 128", 4.295e9 / 12.44e6, "direct", "maderix, issue 3"),
    _roof("m4-pro", "pointwise_stack 512 64 128", 4.295e9 / 12.57e6, "direct", "maderix, issue 3"),
    _roof("m4-max", "pointwise_stack 512 64 128", 4.295e9 / 10.93e6, "direct", "maderix, issue 3"),
    _roof("m5", "pointwise_conv 64 64 64", 111.5, "direct", "ane-infer"),
    _roof("m4-max", "pointwise_conv 64 64 64", 95.0, "direct", "Orion"),
    _roof("m3-pro", "pointwise_conv 64 64 64", 238.5, "direct", "ANE-Training: 197 to 280"),
    _roof("m4", "pointwise_conv 64 64 64", 92.5, "direct", "maderix: 90 to 95"),
)  # fmt: skip


#: Training steps stated in prose (ANEForge's documentation; the higher figure includes its host loop).
TRAINING = (
    Row("m5-pro", "e5rt", "training", "mlp_step 128 784 256 10", "latency", 400.0, "docs/training"),
    Row("m5-pro", "e5rt", "training", "mlp_step 128 784 256 10", "latency", 430.0, "docs/training"),
)


def distil(path: Path) -> list[Row]:
    """The rows of a measurements table that describe a program completely, sorted."""
    rows, loops = {*ROOFS, *TRAINING}, defaultdict[tuple[str, ...], dict[str, float]](dict)
    with path.open(encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            kind = _path(record)
            if record["chip"] not in CHIPS or kind is None or float(record["value"]) <= 0:
                continue
            described = _describe(record, kind)
            if described is None:
                continue
            chip, (family, workload) = CHIPS[record["chip"]], described
            short = record["source"].split("/")[-1].removesuffix(".json")[:60]
            value = _latency_us(record, workload)
            if value is not None:
                rows.add(Row(chip, kind, family, workload, "latency", float(f"{value:.6g}"), short))
            if record["path"] in ("ANE", "ANE8", "ane"):
                key = (record["workload"], record["shape"], record["path"])
                loops[chip, kind, family, workload, short, *key][record["metric"]] = float(record["value"])
    rows.update(_energies(loops))
    return sorted(rows)


def _path(record: dict[str, str]) -> str | None:
    path = record["path"]
    if "aneforge" in record["source"].lower() and (
        path.startswith("ANE") or (path in ("ane", "e5rt") and "jitter=True" not in record["notes"])
    ):
        return "e5rt"
    if path == "direct":
        return "direct"
    if path in ("Core ML CPU_AND_NE", "Core ML", "Core AI"):
        return "coreml"
    return "direct" if "compute_array.md" in record["source"] and record["chip"] == "M4" else None


def _describe(record: dict[str, str], path: str) -> tuple[str, str] | None:
    text = " | ".join(record[name] for name in ("source", "workload", "shape", "metric"))
    if "bandwidth_roofline" in text and record["workload"].endswith(" / power"):
        # Power loops run the largest size of the sweep.
        largest = f"sizes | shape=[{LARGEST_ROWS[CHIPS[record['chip']]]}, 4096] | "
        text = text.replace("power |  | ", largest)
    if "decode_measurement" in text:
        return _decode(record)
    if "ANEForge PR" in text or "aneforge" in text or path != "e5rt":
        for pattern, family, form in {"e5rt": E5RT, "direct": DIRECT, "coreml": COREML}[path]:
            match = re.search(pattern, text)
            if match is not None:
                workload = form.format(*match.groups())
                return _product_family(family, workload), workload
    return None


def _product_family(family: str, workload: str) -> str:
    """What one benchmark calls gemm and another gemv are programs of one family where their rows are few."""
    word, rows, *_ = workload.split()
    if word != "gemm" or family == "compressed":
        return family
    return "gemv" if int(rows) <= FEW_ROWS else "gemm"


def _decode(record: dict[str, str]) -> tuple[str, str] | None:
    match = re.search(r"batch=32 batch=(\d+)", record["shape"])
    if match is None:
        return None
    quick = record["chip"].startswith("M1")  # the small configuration
    size = "1024 4 16 4096 128" if quick else "2048 8 16 8192 256"
    return "decode", f"decode {match[1]} {size}" + (" int8" if record["path"] == "ANE8" else "")


def _latency_us(record: dict[str, str], workload: str) -> float | None:
    metric, unit, value = record["metric"], record["unit"], float(record["value"])
    if metric.startswith("sp") and metric.endswith("Latency"):
        return value * 1e3
    if metric in ("p50_min", "p50_max"):
        return value * 1e3
    if metric in LATENCY and unit in ("us", "ms"):
        return value * (1.0 if unit == "us" else 1e3)
    rate = unit in ("TFLOP/s", "TOP/s") and "Throughput Map" in record["workload"] + record["metric"]
    rate = rate or (
        unit in ("TFLOP/s", "TOP/s") and ("Sp=" in record["shape"] or "Config=" in record["shape"])
    )
    rate = rate or (unit == "TOP/s" and ("64x64" in record["workload"] or "INT8 vs" in record["workload"]))
    if not rate or "Ch=" in record["shape"]:
        return None
    return _flops(workload) / value / 1e6


def _flops(workload: str) -> float:
    word, *rest = workload.split()
    numbers = [int(item) for item in rest if item.isdigit()]
    if word == "pointwise_conv":
        return 2.0 * numbers[0] * numbers[1] * numbers[2]
    return 2.0 * numbers[0] ** 2 * numbers[1] * numbers[2]


def _energies(loops: dict[tuple[str, ...], dict[str, float]]) -> Iterator[Row]:
    """Engine power times loop time; powers under 20 mW are sampling misses."""
    for (chip, path, family, workload, short, *_), metrics in loops.items():
        loop_ms = metrics.get("iter_ms", metrics.get("energy_iter_ms"))
        power_mw = metrics.get("ane_active_mW", 0.0)
        if loop_ms is not None and power_mw > 20:
            yield Row(chip, path, family, workload, "energy", float(f"{power_mw * loop_ms:.6g}"), short)


def load() -> list[Row]:
    """The rows of the table in the tree."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return [Row(**{**record, "value": float(record["value"])}) for record in csv.DictReader(file)]


def main() -> None:
    """Write the table from the measurements named on the command line."""
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([item.name for item in fields(Row)])
        writer.writerows(astuple(row) for row in distil(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
