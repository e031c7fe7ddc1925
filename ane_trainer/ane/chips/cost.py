"""The cost model: time and energy of a MIL program on a chip and path, op by op, with an interval that was checked.

    latency = dispatch + sum over ops of (max(compute, weights) + task + passes + transfers)

MAC array, elementwise unit and transfers run one after the other, also across independent branches (M6 notes,
scheduling). What an op gives them to do says `work.py`; the rates of each chip and path are fitted together to
published measurements, and the intervals are the cross-validated errors of that kind of program: both tables are
written by `python -m docs._generate.cost` (docs/cost-model.md).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

from ane_trainer.ane.chips.counting import flops, macs
from ane_trainer.ane.chips.lookup import Chip, get_chip, op_status
from ane_trainer.ane.chips.work import OpWork, function_work, held_bytes
from ane_trainer.ane.mil.opset import family
from ane_trainer.ane.mil.program import Program

__all__ = [
    "FEW_ROWS",
    "PARTS",
    "Cost",
    "Interval",
    "OpCost",
    "Rate",
    "estimate",
    "flops",
    "in_turn",
    "macs",
    "program_kind",
    "rates",
]

#: What a program's time is split into.
PARTS = ("dispatch", "mac", "elementwise", "weights", "activations")
#: Paths with measurements -> those that take their rates.
_RATES_OF = {"e5rt": "e5rt", "compiler": "e5rt", "direct": "direct", "netplist": "direct", "coreml": "coreml"}
#: Rows up to which a product waits for its weights.
FEW_ROWS = 64
#: Products with weights of an attention (query, key, value, output); a block has those of its feed-forward network too.
_PROJECTIONS = 4
#: Chips on which a program of nothing but relu runs on the host (published streams below 1 GB/s, gelu is faster).
_RELU_ON_HOST = ("m1", "m2-pro")


@dataclass(frozen=True)
class Rate:
    """A constant of one chip on one path: its value, the deviation of its log by the fit, and its source."""

    value: float
    deviation: float
    source: str


@dataclass(frozen=True)
class Interval:
    """Where nine of ten published values lie that the fit had not seen, of `rows` programs of this kind on this path;
    of none the values of all kinds there count.
    """

    low: float
    high: float
    rows: int


@dataclass(frozen=True)
class OpCost:
    """One op. `bytes` counts operands and results once, `weight_bytes` the constants among them as stored.

    `compute_us` is the MAC array's or the elementwise passes' time, `overhead_us` that of starting the task and
    of laying out operands again. `bound_by` names the longest part: mac, elementwise, weights, activations,
    host, or free and fused (no time). `source` is the user's module and line.
    """

    name: str
    op: str
    flops: int
    macs: int
    bytes: int
    weight_bytes: int
    compute_us: float
    weight_us: float
    activation_us: float
    overhead_us: float
    bound_by: str
    source: str | None = None

    @property
    def latency_us(self) -> float:
        return max(self.compute_us, self.weight_us) + self.overhead_us + self.activation_us


@dataclass(frozen=True)
class Cost:
    """A program's cost on a chip and path. `engine_flops` are those of ops that the engine takes on this path.

    `energy_uj` is of the engine's own rail: host, memory and the rest of the chip are not in it. `split` has the
    time of each of PARTS in us. `memory_bytes`: the program's constants as they are stored, its inputs and outputs;
    what lies between ops is not in it. `kind` is the kind of program that the intervals (in us and uJ) were checked on.
    """

    latency_us: float
    energy_uj: float
    ops: tuple[OpCost, ...]
    flops: int
    engine_flops: int
    dispatch_us: float
    split: Mapping[str, float]
    kind: str
    latency_interval: Interval
    energy_interval: Interval
    provenance: str
    memory_bytes: int = 0

    @property
    def error_band(self) -> float:
        """Half the width of the latency's interval as a share of it."""
        return (self.latency_interval.high - self.latency_interval.low) / 2 / self.latency_us


def estimate(program: Program, chip: Chip | str, path: str = "e5rt") -> Cost:
    """The cost of one dispatch of the program's main function, weights and state crossing memory once.

    Control flow is not unrolled. Raises: UsageError for an unknown chip or path.
    """
    chip = get_chip(chip) if isinstance(chip, str) else chip
    function = program.main
    status = {kind: op_status(kind, chip, path).status for kind in {op.kind for op in function.ops}}
    known = rates(chip.name, path)
    values = {name: rate.value for name, rate in known.items()}
    work = function_work(function)
    host = leaves_engine(work, chip)
    ops = tuple(_op_cost(item, chip, values, host) for item in work)
    latency_us = values["dispatch_us"] + sum(op.latency_us for op in ops)
    kind = program_kind(work)
    energy_uj = _energy_uj(work, ops, chip, values)
    basis = _basis(chip.name, path)
    return Cost(
        latency_us=latency_us,
        energy_uj=energy_uj,
        ops=ops,
        flops=sum(op.flops for op in ops),
        engine_flops=sum(op.flops for op in ops if status[op.op] in ("native", "reachable")),
        dispatch_us=values["dispatch_us"],
        split=_split(values["dispatch_us"], ops),
        kind=kind,
        latency_interval=_interval(path, kind, basis, "latency", latency_us),
        energy_interval=_interval(path, kind, basis, "energy", energy_uj),
        provenance=known["dispatch_us"].source + _substitute(path),
        memory_bytes=held_bytes(function),
    )


def in_turn(costs: Sequence[Cost]) -> Cost:
    """The cost of programs that run one after the other; their errors are taken to go the same way."""

    def together(intervals: Sequence[Interval]) -> Interval:
        rows = min(interval.rows for interval in intervals)
        return Interval(sum(i.low for i in intervals), sum(i.high for i in intervals), rows)

    return replace(
        costs[0],
        latency_us=sum(cost.latency_us for cost in costs),
        energy_uj=sum(cost.energy_uj for cost in costs),
        ops=tuple(op for cost in costs for op in cost.ops),
        flops=sum(cost.flops for cost in costs),
        engine_flops=sum(cost.engine_flops for cost in costs),
        dispatch_us=sum(cost.dispatch_us for cost in costs),
        split={part: sum(cost.split[part] for cost in costs) for part in PARTS},
        memory_bytes=sum(cost.memory_bytes for cost in costs),
        latency_interval=together([cost.latency_interval for cost in costs]),
        energy_interval=together([cost.energy_interval for cost in costs]),
    )


def rates(chip_name: str, path: str = "e5rt") -> Mapping[str, Rate]:
    """The constants of a chip (its canonical name) on a path; streams in GB/s, `*_us` in us, `*_pj` in pJ."""
    return _rates_table()[chip_name, _RATES_OF[path]]


def program_kind(work: Sequence[OpWork]) -> str:
    """The kind of program, as far as accuracy differs: what it is mostly made of, and how large it is."""
    products = [item for item in work if item.unit == "mac"]
    passes = [item for item in work if item.unit == "elementwise"]
    if not products:
        return _pass_kind(passes)
    softmax = sum(family(item.op.kind) == "softmax" for item in passes)
    if len(products) > 1 and len(passes) > 5 * len(products):
        return "training step"
    if len(products) > 8 and softmax and _one_query(products):
        return "decode"
    if len(products) > 16 and any(family(i.op.kind) in ("softmax", "pooling", "reduction") for i in passes):
        return "model"
    if len(products) > 1 and softmax:
        weighted = sum(item.weight_bytes > 0 for item in products)
        return "attention" if weighted <= _PROJECTIONS * softmax else "block"
    if len(products) > 1 or passes:
        return "chain"
    product = products[0]
    if any(name == "compressed" for name, _ in product.weights):
        return "compressed"
    if product.op.kind == "conv":
        return "convolution"
    return "matrix-vector" if product.weight_bytes and _positions(product) <= FEW_ROWS else "product"


def _one_query(products: Sequence[OpWork]) -> bool:
    """Whether few rows meet the weights and one row a head the cache, as a token at a time does."""
    few = all(_positions(item) <= FEW_ROWS for item in products if item.weight_bytes)
    between = [item.op.result.type.shape for item in products if not item.weight_bytes]
    return few and bool(between) and all(shape[-2:-1] == (1,) for shape in between)


def _positions(product: OpWork) -> int:
    """Rows of a product's result."""
    out = product.op.result.type
    return out.size // max(out.shape[-1], 1)


def _pass_kind(passes: Sequence[OpWork]) -> str:
    if len(passes) > 1:
        return "norm"
    families = {family(item.op.kind) for item in passes}
    for name in ("softmax", "reduction"):
        if name in families:
            return name
    return "norm" if "normalization" in families else "elementwise"


def leaves_engine(work: Sequence[OpWork], chip: Chip) -> bool:
    """Whether the whole program runs on the host although the engine could take it."""
    busy = {item.op.kind for item in work if item.unit != "free"}
    return chip.name in _RELU_ON_HOST and busy == {"relu"}


@cache
def _rates_table() -> dict[tuple[str, str], dict[str, Rate]]:
    found: dict[tuple[str, str], dict[str, Rate]] = {}
    for row in _rows("cost_rates.csv"):
        rate = Rate(float(row["value"]), float(row["deviation"]), row["source"])
        found.setdefault((row["chip"], row["path"]), {})[row["name"]] = rate
    return found


@cache
def _intervals() -> dict[tuple[str, ...], Interval]:
    return {
        (row["path"], row["kind"], row["basis"], row["quantity"]): Interval(
            float(row["low"]), float(row["high"]), int(row["rows"])
        )
        for row in _rows("cost_intervals.csv")
    }


def _rows(name: str) -> list[dict[str, str]]:
    text = resources.files("ane_trainer.ane.chips").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _interval(path: str, kind: str, basis: str, quantity: str, value: float) -> Interval:
    """The interval of a kind of program; where too few rows exist, of all programs of the path, then of all."""
    table, path = _intervals(), _RATES_OF[path]
    for key in ((path, kind), (path, "any"), ("any", kind), ("any", "any")):
        if (factor := table.get((*key, basis, quantity))) is not None:
            rows = factor.rows if key == (path, kind) else 0
            return Interval(factor.low * value, factor.high * value, rows)
    raise KeyError(quantity)  # the table has a row for any kind of program


def _basis(chip: str, path: str) -> str:
    """`measured` for a chip with published programs on this path, else `carried`."""
    return "measured" if rates(chip, path)["dispatch_us"].source.startswith("fitted") else "carried"


def _substitute(path: str) -> str:
    return "" if _RATES_OF[path] == path else f"; nothing is published on {path}: rates of {_RATES_OF[path]}"


def _op_cost(work: OpWork, chip: Chip, rates_gb_s: Mapping[str, float], host: bool) -> OpCost:
    def stream_us(streams: tuple[tuple[str, int], ...]) -> float:
        return sum(size / rates_gb_s[name] for name, size in streams) / 1e3

    op, compute_us, overhead_us, unit = work.op, 0.0, 0.0, work.unit
    if unit == "mac":
        compute_us = work.macs / (_mac_rate(work, chip, rates_gb_s) * chip.peak_fp16_flops / 2e6)
        overhead_us = rates_gb_s["mac_task_us"] + stream_us(work.passes)
    elif unit == "elementwise" and not host:
        compute_us, overhead_us = stream_us(work.passes), rates_gb_s["task_us"]
    weight_us, activation_us = stream_us(work.weights), stream_us(work.transfers)
    if host and chip.activation_stream_gb_s is not None:
        activation_us, unit = (
            sum(size for _, size in work.transfers) / chip.activation_stream_gb_s / 1e3,
            "host",
        )
    parts = {unit: compute_us + overhead_us, "weights": weight_us, "activations": activation_us}
    bound_by = max(parts, key=lambda key: parts[key]) if any(parts.values()) else unit
    moved = sum({v.name: v.type.nbytes for v in (*op.operands(), *op.results)}.values())
    return OpCost(
        name=op.name,
        op=op.kind,
        flops=flops(op),
        macs=work.macs,
        bytes=work.weight_bytes + moved,
        weight_bytes=work.weight_bytes,
        compute_us=compute_us,
        weight_us=weight_us,
        activation_us=activation_us,
        overhead_us=overhead_us,
        bound_by="host" if host and any(parts.values()) else bound_by,
        source=op.source,
    )


def _mac_rate(work: OpWork, chip: Chip, values: Mapping[str, float]) -> float:
    """Share of the array's peak that an op reaches; above 1 by Winograd's form and int8."""
    rate = values["mac"] * work.mac_rate
    if work.winograd and chip.winograd:
        rate *= values["winograd"]
    return rate * (values["int8"] if work.int8 else 1.0)


def _split(dispatch_us: float, ops: Sequence[OpCost]) -> dict[str, float]:
    """Time by part; an op that waits for its weights counts as weights."""
    found = dict.fromkeys(PARTS, 0.0) | {"dispatch": dispatch_us}
    for op in ops:
        unit = "mac" if op.macs else "elementwise"
        found[unit if op.compute_us >= op.weight_us else "weights"] += max(op.compute_us, op.weight_us)
        found[unit] += op.overhead_us
        found["activations"] += op.activation_us
    return found


def _energy_uj(
    work: Sequence[OpWork], ops: Sequence[OpCost], chip: Chip, values: Mapping[str, float]
) -> float:
    def picojoules(streams: Sequence[tuple[str, int]], name: str) -> float:
        return sum(size for _, size in streams) * values[name]

    total_pj, array_us, draining_us = 0.0, 0.0, 0.0
    for item, op in zip(work, ops, strict=True):
        fast = item.winograd and chip.winograd
        gain = values["winograd"] if fast else 1.0
        gain /= values["relu_share"] if item.rectified and not fast else 1.0  # Winograd's form fills zeros in
        total_pj += item.macs / gain * values["mac_pj"] + picojoules(item.weights, "weight_pj")
        read = [part for part in item.transfers if part[0] == "read"]
        written = [part for part in item.transfers if part[0] != "read"]
        total_pj += (
            picojoules(read, "transfer_pj") + picojoules(written, "transfer_pj") * values["write_share"]
        )
        array_us += max(op.compute_us, op.weight_us) if item.unit == "mac" else 0.0
        draining_us += sum(size / values[name] for name, size in written) / 1e3
    pass_us = sum(op.overhead_us + (0.0 if op.macs else op.compute_us) for op in ops)
    watts = (
        ("dispatch_w", values["dispatch_us"]),
        ("mac_w", array_us),
        ("pass_w", pass_us),
        ("write_w", draining_us),
    )
    return total_pj * 1e-6 + sum(values[name] * us for name, us in watts)
