"""The cost model: time and energy of a MIL program on a chip, op by op, and how well that is known.

    latency = dispatch + sum over ops of (max(compute, weight stream) + activation transfer)

MAC array, elementwise unit and transfers run one after the other, also across independent branches (M6
notes, scheduling). Compute of matmul and conv runs at 4096 multiply-accumulates a cycle and engine, except:
a 64 KiB weight buffer per core holds `OCG = min(16, 2^k <= 64 KiB / bytes of one output channel)` channels,
and when fewer than 16 fit and the input exceeds the 2 MiB on-chip memory, the array starves
(rate x OCG * kH * kW / 16); 3x3 stride-1 convs gain by Winograd on M5 and M6. A program's inputs and outputs
cross memory at the transfer rates; values inside it stay on chip, except for elementwise work above 2 MiB.
Rates per chip are fitted by `bench/fit_cost.py` to published measurements (`data/cost_rates.csv`).
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib import resources

from ane_trainer.ane.chips.counting import FREE, MOVES, constant, flops, macs, shape_of
from ane_trainer.ane.chips.lookup import Chip, get_chip, op_status
from ane_trainer.ane.mil.opset import family
from ane_trainer.ane.mil.program import Function, Op, Program

__all__ = ["Cost", "OpCost", "Rates", "estimate", "flops", "macs", "rates"]

_ON_CHIP_BYTES = 2 * 2**20
_CORE_WEIGHT_BYTES = 64 * 2**10
_LARGE_IO_BYTES = 512 * 2**10
_LARGE_WEIGHT_BYTES = 16 * 2**20  # the compiler's limit of one kernel stream


@dataclass(frozen=True)
class Rates:
    """Rates of one chip; energy terms are None where no power is published.

    `large_io_us` adds to the dispatch when inputs and outputs take 512 KiB or more, `large_weight_gb_s` is
    the rate of one op's constants above 16 MiB, `starved_efficiency` scales a starved array's rate.
    `provenance` says whose rates they are; `error_band` is the 90th percentile of the relative error on
    published rows that the fit did not see, None for rates carried over from another chip.
    """

    dispatch_us: float
    large_io_us: float
    read_gb_s: float
    write_gb_s: float
    weight_gb_s: float
    large_weight_gb_s: float
    mac_efficiency: float
    starved_efficiency: float
    winograd_gain: float
    softmax_gelem_s: float
    norm_gelem_s: float
    pe_gelem_s: float
    pe_two_input_gelem_s: float
    spill_gb_s: float
    task_us: float
    pj_per_mac: float | None = None
    pj_per_io_byte: float | None = None
    pj_per_weight_byte: float | None = None
    static_w: float | None = None
    elementwise_w: float | None = None
    error_band: float | None = None
    provenance: str = ""


@dataclass(frozen=True)
class OpCost:
    """One op. `bytes` counts operands and results once, `weight_bytes` the constants among them.

    `bound_by` names the longest part: mac, elementwise, weights, activations, or free and fused (no time).
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
    bound_by: str

    @property
    def latency_us(self) -> float:
        return max(self.compute_us, self.weight_us) + self.activation_us


@dataclass(frozen=True)
class Cost:
    """A program's cost on a chip. `engine_flops` are those of ops that the engine takes on this path.

    `energy_uj` is None where no power is published. `error_band` is a relative half-width (0.3: +-30 %), None
    where nothing measured on this chip allows one; `provenance` says where the rates come from.
    """

    latency_us: float
    energy_uj: float | None
    ops: tuple[OpCost, ...]
    flops: int
    engine_flops: int
    dispatch_us: float
    provenance: str
    error_band: float | None


def estimate(program: Program, chip: Chip | str, path: str = "e5rt") -> Cost:
    """The cost of one dispatch of the program's main function, weights and state crossing memory once.

    Control flow is not unrolled. Raises: UsageError for an unknown chip or path.
    """
    chip = get_chip(chip) if isinstance(chip, str) else chip
    found = rates(chip.name)
    status = {kind: op_status(kind, chip, path).status for kind in {op.kind for op in program.main.ops}}
    dispatch_us, note = _dispatch(program.main, chip, path, found)
    ops = tuple(_op_costs(program.main, chip, found))
    latency_us = dispatch_us + sum(op.latency_us for op in ops)
    on_engine = [op for op in ops if status[op.op] in ("native", "reachable")]
    return Cost(
        latency_us=latency_us,
        energy_uj=_energy_uj(program.main, ops, found, chip, latency_us),
        ops=ops,
        flops=sum(op.flops for op in ops),
        engine_flops=sum(op.flops for op in on_engine),
        dispatch_us=dispatch_us,
        provenance=found.provenance + note,
        error_band=found.error_band,
    )


def rates(chip_name: str) -> Rates:
    """The rates used for a chip (its canonical name)."""
    return _rates_table()[chip_name]


@cache
def _rates_table() -> dict[str, Rates]:
    text = resources.files("ane_trainer.ane.chips").joinpath("cost_rates.csv").read_text(encoding="utf-8")
    values: dict[str, dict[str, float | str]] = {}
    for row in csv.DictReader(text.splitlines()):
        held = values.setdefault(row["chip"], {})
        held[row["name"]] = row["value"] if row["name"] == "provenance" else float(row["value"])
    return {chip: Rates(**held) for chip, held in values.items()}  # type: ignore[arg-type]


def _dispatch(function: Function, chip: Chip, path: str, found: Rates) -> tuple[float, str]:
    """Dispatch time and a note; other paths have a floor only where one was measured on them."""
    io_bytes = sum(value.type.nbytes for value in (*function.inputs, *function.outputs))
    large_us = found.large_io_us if io_bytes >= _LARGE_IO_BYTES else 0.0
    evidence = chip.evidence_for("dispatch_floor_us")
    source = evidence.source if evidence else ""
    measured_on = {"Core ML": "coreml", "maderix": "direct", "ane-infer": "direct", "ANE-Training": "direct"}
    for word, known in measured_on.items():
        if path == known and word in source and chip.dispatch_floor_us is not None:
            return chip.dispatch_floor_us + large_us, ""
    return (
        found.dispatch_us + large_us,
        "" if path == "e5rt" else f"; dispatch time of e5rt, none known on {path}",
    )


def _op_costs(function: Function, chip: Chip, found: Rates) -> list[OpCost]:
    uses = Counter(value.name for op in function.ops for value in op.operands())
    outputs = {value.name for value in function.outputs}
    pending = {value.name: value.type.nbytes for value in function.inputs}
    makers = {value.name: op for op in function.ops for value in op.results}
    constants: dict[str, int] = {}
    costs = []
    for op in function.ops:
        if op.kind.startswith("constexpr_"):
            constants[op.name] = sum(item.type.nbytes for _, item in op.literals())
        read = sum(pending.pop(name, 0) for name in dict.fromkeys(v.name for v in op.operands()))
        written = sum(value.type.nbytes for value in op.results if value.name in outputs)
        activation_us = read / found.read_gb_s / 1e3 + written / found.write_gb_s / 1e3
        weight = _weight_bytes(op, constants)
        compute_us, unit = _compute_us(op, chip, found, makers, uses, outputs)
        weight_gb_s = found.large_weight_gb_s if weight > _LARGE_WEIGHT_BYTES else found.weight_gb_s
        weight_us = weight / weight_gb_s / 1e3
        parts = {unit: compute_us, "weights": weight_us, "activations": activation_us}
        moved = weight + sum(v.type.nbytes for v in op.operands()) + sum(v.type.nbytes for v in op.results)
        bound_by = max(parts, key=lambda key: parts[key]) if any(parts.values()) else unit
        costs.append(
            OpCost(
                name=op.name,
                op=op.kind,
                flops=flops(op),
                macs=macs(op),
                bytes=moved,
                weight_bytes=weight,
                compute_us=compute_us,
                weight_us=weight_us,
                activation_us=activation_us,
                bound_by=bound_by,
            )
        )
    return costs


def _compute_us(
    op: Op, chip: Chip, found: Rates, makers: dict[str, Op], uses: Counter[str], outputs: set[str]
) -> tuple[float, str]:
    """Time on the unit that does the work, and the unit's name."""
    work = family(op.kind)
    if work in FREE or not op.results:
        return 0.0, "free"
    if work == "contraction":
        peak = chip.peak_fp16_flops / 2 * found.mac_efficiency * _mac_rate(op, chip, found)
        return macs(op) / peak * 1e6 + found.task_us, "mac"
    runtime = list(op.operands())
    if len(runtime) == 1 and op.result.type.shape == runtime[0].type.shape and work not in MOVES:
        maker = makers.get(runtime[0].name)
        alone = uses[runtime[0].name] == 1 and runtime[0].name not in outputs
        on_macs = maker is not None and family(maker.kind) == "contraction"
        if on_macs and alone and work not in ("normalization", "softmax"):
            return 0.0, "fused"  # bias, scale and activation ride on the MAC output stage
    elements = max([v.type.size for v in runtime] + [v.type.size for v in op.results])
    gelem_s = found.pe_gelem_s if len(runtime) < 2 else found.pe_two_input_gelem_s
    if work == "softmax":
        gelem_s = found.softmax_gelem_s
    elif work == "normalization":
        gelem_s = found.norm_gelem_s
    bytes_off_chip = sum(
        v.type.nbytes for v in runtime if v.name in makers and v.type.nbytes > _ON_CHIP_BYTES
    )
    busy_us = max(elements / gelem_s / 1e3, bytes_off_chip / found.spill_gb_s / 1e3)
    return busy_us + found.task_us, "elementwise"


def _mac_rate(op: Op, chip: Chip, found: Rates) -> float:
    """Fraction of the array's rate: weight buffer starvation below 1, Winograd above."""
    taps, fan_in, positions, winograd = 1, 1, 1, False
    out = op.result.type.shape
    if op.kind in ("matmul", "linear"):
        fan_in = macs(op) // max(op.result.type.size, 1)
        positions = op.result.type.size // max(out[-1], 1)
    elif op.kind == "conv":
        weight = shape_of(op, "weight")
        taps, fan_in = math.prod(weight[2:]), math.prod(weight[1:])
        positions = out[0] * math.prod(out[2:])
        plain = all(constant(op, name) in (None, (1,) * len(weight[2:])) for name in ("strides", "dilations"))
        winograd = chip.winograd and plain and weight[2:] == (3, 3) and constant(op, "groups") in (None, 1)
    fits = max(_CORE_WEIGHT_BYTES // (2 * fan_in), 1)
    channels = min(16, 2 ** int(math.log2(fits)))
    rate = 1.0
    if positions * (fan_in // taps) * 2 >= _ON_CHIP_BYTES:
        starved = channels * taps / 16
        rate = starved * found.starved_efficiency if starved < 1 else 1.0
    return rate * (found.winograd_gain if winograd else 1.0)


def _energy_uj(
    function: Function, ops: tuple[OpCost, ...], found: Rates, chip: Chip, latency_us: float
) -> float | None:
    per_mac, per_io, per_weight = found.pj_per_mac, found.pj_per_io_byte, found.pj_per_weight_byte
    static_w, elementwise_w = found.static_w, found.elementwise_w
    if per_mac is None or per_io is None or per_weight is None or static_w is None or elementwise_w is None:
        return None
    io_bytes = sum(value.type.nbytes for value in (*function.inputs, *function.outputs))
    weight_bytes = sum(op.weight_bytes for op in ops)
    by_name = {op.name: op for op in function.ops}
    work = sum(op.macs / max(_mac_rate(by_name[op.name], chip, found), 1.0) for op in ops if op.macs)
    busy_us = sum(op.compute_us for op in ops if op.macs == 0)
    moved_uj = (per_mac * work + per_io * io_bytes + per_weight * weight_bytes) * 1e-6
    return moved_uj + static_w * latency_us + elementwise_w * busy_us


def _weight_bytes(op: Op, constants: dict[str, int]) -> int:
    """Bytes of constants that stream to the MAC array or the elementwise unit."""
    own = sum(
        item.type.nbytes for _, item in op.literals() if item.type.dtype not in ("string", "bool", "int32")
    )
    if family(op.kind) in FREE:
        return 0
    return own + sum(constants.get(value.name, 0) for value in op.operands())
