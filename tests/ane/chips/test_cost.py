"""The cost model: counts by hand, structure of the estimate, published latencies, honest unknowns."""

from __future__ import annotations

import csv
import math
import time
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ane_trainer.ane.chips import cost
from ane_trainer.ane.chips.cost import estimate, flops, macs
from ane_trainer.ane.chips.lookup import known_chips
from ane_trainer.ane.chips.work import function_work
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Function, Literal, Op, Program, TensorType, Value, literal


def weight(*shape: int) -> Literal:
    return Literal(TensorType("fp16", shape), b"\0" * (2 * math.prod(shape)))


def value(name: str, *shape: int) -> Value:
    return Value(name, TensorType("fp16", shape))


def op(kind: str, shape: tuple[int, ...], **args: object) -> Op:
    return Op(kind, tuple(args.items()), (value("y", *shape),))  # type: ignore[arg-type]


def run(inputs: tuple[Value, ...], *ops: Op) -> Program:
    return Program((Function("main", inputs, ops, (ops[-1].result,)),))


def gemm(m: int, k: int, n: int) -> Program:
    x = value("x", m, k)
    return run((x,), op("matmul", (m, n), x=x, y=Literal(TensorType("fp16", (k, n)), b"")))


def conv(b: int, c: int, h: int, kernel: int) -> Program:
    x = value("x", b, c, h, h)
    w = Literal(TensorType("fp16", (c, c, kernel, kernel)), b"")
    return run((x,), op("conv", (b, c, h, h), x=x, weight=w, pad_type=literal("same", "string")))


def test_counts_by_hand() -> None:
    x = value("x", 3, 5)
    assert macs(op("matmul", (3, 7), x=x, y=weight(5, 7))) == 3 * 5 * 7
    assert flops(op("matmul", (3, 7), x=x, y=weight(5, 7))) == 2 * 3 * 5 * 7
    turned = op("matmul", (5, 7), x=x, y=weight(3, 7), transpose_x=literal(True, "bool"))
    assert macs(turned) == 5 * 3 * 7
    assert flops(op("linear", (3, 7), x=x, weight=weight(7, 5), bias=weight(7))) == 2 * 3 * 5 * 7 + 21
    image = value("x", 2, 8, 6, 6)
    grouped = op("conv", (2, 4, 4, 4), x=image, weight=weight(4, 2, 3, 3), groups=literal(4, "int32"))
    assert macs(grouped) == 2 * 4 * 4 * 4 * (2 * 3 * 3)
    assert macs(op("conv_transpose", (2, 4, 8, 8), x=image, weight=weight(8, 4, 3, 3))) == 2 * 8 * 36 * 4 * 9
    batched = op("einsum", (2, 3, 7), values=(value("a", 2, 3, 5), value("b", 2, 5, 7)),
                 equation=literal("bij,bjk->bik", "string"))  # fmt: skip
    assert macs(batched) == 2 * 3 * 5 * 7
    heads = [value(name, 2, 4, 8) for name in "qkv"]
    attention = op("scaled_dot_product_attention", (2, 4, 8), query=heads[0], key=heads[1], value=heads[2])
    assert macs(attention) == 2 * 4 * 4 * (8 + 8)
    assert flops(op("relu", (3, 5), x=x)) == 15
    assert flops(op("add", (3, 5), x=x, y=weight(5))) == 15
    assert flops(op("reduce_sum", (3, 1), x=x)) == 15
    assert flops(op("softmax", (3, 5), x=x)) == 75
    assert (
        flops(op("max_pool", (2, 8, 3, 3), x=image, kernel_sizes=literal((2, 2), "int32"))) == 2 * 8 * 9 * 4
    )
    for kind in ("transpose", "reshape", "concat", "slice_by_size"):
        assert flops(op(kind, (5, 3), x=x)) == 0
        assert macs(op(kind, (5, 3), x=x)) == 0


def test_the_parts_add_up() -> None:
    b = Builder()
    x = b.input("x", TensorType("fp16", (128, 784)))
    h = b.op("relu", x=b.op("matmul", x=x, y=weight(784, 256)))
    y = b.op("softmax", x=b.op("matmul", x=h, y=weight(256, 10)))
    found = estimate(Program((b.finish((y,)),)), "m4")
    assert found.latency_us == pytest.approx(found.dispatch_us + sum(part.latency_us for part in found.ops))
    assert found.flops == 2 * 128 * (784 * 256 + 256 * 10) + 128 * 256 + 5 * 128 * 10
    assert found.engine_flops == found.flops
    first, relu, _, soft = found.ops
    assert first.activation_us > 0  # the batch comes in
    assert relu.bound_by == "fused"
    assert relu.latency_us == 0
    assert soft.activation_us > 0  # the result goes out
    assert first.weight_bytes == 2 * 784 * 256


def test_an_activation_whose_input_is_used_twice_is_not_fused() -> None:
    b = Builder()
    x = b.input("x", TensorType("fp16", (8, 64)))
    h = b.op("matmul", x=x, y=weight(64, 64))
    y = b.op("add", x=b.op("relu", x=h), y=h)
    found = estimate(Program((b.finish((y,)),)), "m4")
    assert [part.bound_by for part in found.ops][1] != "fused"


def test_an_activation_rides_behind_a_bias_and_a_residual_sum() -> None:
    b = Builder()
    x = b.input("x", TensorType("fp16", (8, 64)))
    h = b.op("relu", x=b.op("add", x=b.op("matmul", x=x, y=weight(64, 64)), y=weight(1, 64)))
    wide = b.op("add", x=b.op("matmul", x=h, y=weight(64, 64)), y=weight(1, 64))
    y = b.op("gelu", x=b.op("relu", x=b.op("add", x=wide, y=h)))
    program = Program((b.finish((y,)),))
    units = [(item.op.kind, item.unit) for item in function_work(program.main)]
    assert units[:5] == [
        ("matmul", "mac"), ("add", "fused"), ("relu", "fused"), ("matmul", "mac"), ("add", "fused")
    ]  # fmt: skip
    assert units[5:] == [("add", "elementwise"), ("relu", "fused"), ("gelu", "elementwise")]


def test_engine_flops_leaves_out_what_the_engine_refuses() -> None:
    x = value("x", 16, 64)
    program = run((x,), op("sin", (16, 64), x=x))
    assert estimate(program, "m5").engine_flops == 16 * 64
    assert estimate(program, "m1").engine_flops == 0
    assert estimate(program, "m1").flops == 16 * 64


@pytest.mark.parametrize(
    ("chip", "program", "published_us", "tolerance"),
    [
        ("m1", gemm(1024, 1024, 1024), 2273.7, 0.15),
        ("m1", conv(2, 512, 64, 3), 11181.3, 0.15),
        ("m1-max", conv(2, 512, 64, 3), 5644.6, 0.25),
        ("m4", gemm(1024, 1024, 1024), 745.9, 0.15),
        ("m4", gemm(4096, 4096, 4096), 25286.3, 0.15),
        ("m5-pro", gemm(2048, 2048, 2048), 1685.8, 0.10),
        ("m5-pro", gemm(8192, 8192, 8192), 225224.0, 0.12),
        ("m5-pro", gemm(1, 4096, 4096), 299.4, 0.10),
        ("m5-pro", conv(4, 512, 64, 3), 4102.6, 0.15),
        ("m5", gemm(2048, 2048, 2048), 1972.3, 0.15),  # no M5 row is fitted
    ],
)
def test_published_latencies(chip: str, program: Program, published_us: float, tolerance: float) -> None:
    assert estimate(program, chip).latency_us == pytest.approx(published_us, rel=tolerance)


def test_the_array_starves_when_a_long_contraction_meets_a_large_input() -> None:
    short, long = (estimate(gemm(1024, k, 1024), "m4").ops[0] for k in (2048, 4096))
    assert long.compute_us > 1.8 * 2 * short.compute_us
    few_rows = estimate(gemm(64, 4096, 1024), "m4").ops[0]
    assert few_rows.compute_us < 1.2 * 2 * estimate(gemm(64, 2048, 1024), "m4").ops[0].compute_us


def test_a_wide_operand_costs_nothing_at_2048_and_all_of_it_from_3072_on() -> None:
    """Published fan-ins end at 2,048 and go on at 3,072: an estimate must not jump between two neighbours."""

    def product(fan_in: int) -> float:
        x = value("x", 512, 512)
        first = op("matmul", (512, fan_in), x=x, y=Literal(TensorType("fp16", (512, fan_in)), b""))
        hidden = value("h", 512, fan_in)
        second = op("matmul", (512, 512), x=hidden, y=Literal(TensorType("fp16", (fan_in, 512)), b""))
        program = run((x,), Op(first.kind, first.args, (hidden,)), second)
        return estimate(program, "m5-pro").latency_us

    short, next_, middle, long = (product(fan_in) for fan_in in (2048, 2049, 2560, 3072))
    assert next_ < 1.5 * short  # the array takes half as many channels
    assert middle - short == pytest.approx((long - short) / 2, rel=0.2)
    assert long > 5 * short


def test_winograd_speeds_3x3_on_m5_and_not_on_m4() -> None:
    def gain(chip: str) -> float:
        three, five = (estimate(conv(1, 256, 64, k), chip).ops[0] for k in (3, 5))
        return five.compute_us / three.compute_us * 9 / 25

    assert 1.4 < gain("m5-pro") < 1.8
    assert gain("m4") == pytest.approx(1.0, rel=0.05)


def test_energy_of_the_engine_rail() -> None:
    program = gemm(2048, 2048, 2048)
    assert all(estimate(program, name).energy_uj > 0 for name in known_chips())
    measured_uj = 7637.5e-3 * 1726.8  # M5 Pro: engine power x time of this product in the power loop
    found = estimate(program, "m5-pro")
    assert found.energy_uj == pytest.approx(measured_uj, rel=0.15)
    assert found.energy_interval.low < measured_uj < found.energy_interval.high


def _wide(interval: cost.Interval) -> float:
    return interval.high / interval.low


@pytest.mark.parametrize("name", known_chips())
def test_every_chip_says_whose_constants_it_has(name: str) -> None:
    found = estimate(gemm(2048, 2048, 2048), name)
    fitted = name in ("m1", "m1-max", "m2-pro", "m4", "m5-pro")
    assert found.provenance.startswith("fitted to" if fitted else "carried over")
    assert found.latency_interval.low < found.latency_us < found.latency_interval.high
    assert found.kind == "product"
    if not fitted:  # and its interval is that of chips left out
        assert _wide(found.latency_interval) > _wide(estimate(gemm(2048, 2048, 2048), "m4").latency_interval)


def test_paths_have_constants_of_their_own() -> None:
    program = gemm(8, 8, 8)
    assert estimate(program, "m4", "direct").dispatch_us != estimate(program, "m4", "e5rt").dispatch_us
    assert "rates of direct" in estimate(program, "m1", "netplist").provenance
    with pytest.raises(UsageError, match="path: needs a known one"):
        estimate(program, "m4", "teleport")
    with pytest.raises(UsageError, match="Did you mean"):
        estimate(program, "m44")


def test_base_m4_streams_large_weights_slowly_and_m5_pro_does_not() -> None:
    large = {chip: estimate(gemm(1, 4096, 4096), chip).ops[0].weight_us for chip in ("m4", "m5-pro")}
    assert large["m4"] > 4 * large["m5-pro"]  # 24 and 150 GB/s


def test_int8_weights_bring_nothing_on_m5_pro_and_half_the_time_on_m4() -> None:
    def gain(chip: str) -> float:
        packed = Literal(TensorType("int8", (4096, 4096)), b"")
        w = Value("w", TensorType("fp16", (4096, 4096)))
        unpack = Op("constexpr_affine_dequantize", (("quantized_data", packed),), (w,))
        x = value("x", 1, 4096)
        small = estimate(run((x,), unpack, op("matmul", (1, 4096), x=x, y=w)), chip)
        assert small.ops[-1].weight_bytes == 4096 * 4096
        return small.latency_us / estimate(gemm(1, 4096, 4096), chip).latency_us

    assert gain("m4") < 0.65
    assert gain("m5-pro") > 0.85


def test_a_norm_spreads_rows_which_is_slow_and_a_channel_is_free() -> None:
    def stream(shape: tuple[int, ...], other: tuple[int, ...]) -> set[str]:
        b = Builder()
        x, y = b.input("x", TensorType("fp16", shape)), b.input("r", TensorType("fp16", other))
        middle = b.op("sub", x=b.op("exp", x=x), y=y)
        work = function_work(b.finish((b.op("exp", x=middle),)))
        return set(dict(next(item for item in work if item.op.kind == "sub").passes))

    assert stream((64, 512), (64, 1)) == {"spread"}
    assert stream((64, 512), (1, 512)) == {"spread"}
    assert stream((64, 512), (64, 512)) == {"pass"}
    assert stream((1, 64, 32, 32), (1, 64, 1, 1)) == {"pass"}
    assert stream((64, 512), (1, 1)) == {"pass"}


def test_relu_alone_runs_on_the_host_of_m1() -> None:
    x = value("x", 2048, 4096)
    alone = estimate(run((x,), op("relu", (2048, 4096), x=x)), "m1")
    assert alone.ops[0].bound_by == "host"
    assert alone.latency_us == pytest.approx(39179.5, rel=0.1)  # published


def test_a_thousand_ops_are_priced_at_once() -> None:
    x = value("x", 64, 64)
    ops = [
        Op("relu", (("x", x if not i else value(f"t{i - 1}", 64, 64)),), (value(f"t{i}", 64, 64),))
        for i in range(1000)
    ]
    program = Program((Function("main", (x,), tuple(ops), (ops[-1].result,)),))
    took = []
    for _ in range(4):  # one of them may collect the garbage of other tests
        began = time.process_time()
        estimate(program, "m4")
        took.append(time.process_time() - began)
    assert min(took) < 0.3


def test_the_split_adds_up() -> None:
    b = Builder()
    x = b.input("x", TensorType("fp16", (128, 784)))
    h = b.op("relu", x=b.op("matmul", x=x, y=weight(784, 256)))
    found = estimate(Program((b.finish((b.op("softmax", x=b.op("matmul", x=h, y=weight(256, 10))),)),)), "m1")
    assert tuple(found.split) == cost.PARTS
    assert sum(found.split.values()) == pytest.approx(found.latency_us)


@given(st.integers(1, 512), st.integers(1, 512), st.integers(1, 512), st.sampled_from(known_chips()))
def test_more_work_never_costs_less(m: int, k: int, n: int, chip: str) -> None:
    small, large = estimate(gemm(m, k, n), chip), estimate(gemm(m * 2, k, n), chip)
    assert 0 < small.latency_us <= large.latency_us
    assert large.flops == 2 * small.flops
    assert 0 < small.energy_uj <= large.energy_uj


def test_every_constant_has_a_source_and_a_deviation() -> None:
    data = resources.files("ane_trainer.ane.chips")
    rows = list(csv.DictReader((data / "cost_rates.csv").read_text(encoding="utf-8").splitlines()))
    assert rows
    assert all(row["source"] and float(row["value"]) > 0 and float(row["deviation"]) > 0 for row in rows)
    assert all(
        cost.rates(chip, path)["read"].value > 0
        for chip in known_chips()
        for path in ("e5rt", "direct", "coreml")
    )


def test_winograds_form_leaves_no_zeros_to_save_on() -> None:
    """M5 Pro has it, M4 has not: behind a relu a 3x3 convolution takes less energy on M4 alone."""
    found = {}
    for kind in ("relu", "tanh"):
        b = Builder()
        y = b.op(kind, x=b.input("x", TensorType("fp16", (1, 64, 32, 32))))
        y = b.op("conv", x=y, weight=weight(64, 64, 3, 3), pad_type="same")
        program = Program((b.finish((y,)),))
        for chip in ("m4", "m5-pro"):
            found[chip, kind] = estimate(program, chip).energy_uj
    assert found["m4", "relu"] < found["m4", "tanh"]
    assert found["m5-pro", "relu"] == pytest.approx(found["m5-pro", "tanh"])


def test_waiting_for_weights_takes_energy() -> None:
    """The array is powered while it waits: a slower stream of the same bytes takes more."""
    b = Builder()
    y = b.op("matmul", x=b.input("x", TensorType("fp16", (1, 4096))), y=weight(4096, 4096))
    found = estimate(Program((b.finish((y,)),)), "m4")
    rates = {name: rate.value for name, rate in cost.rates("m4").items()}
    (op,) = found.ops
    floor = rates["weight_pj"] * op.weight_bytes * 1e-6 + rates["mac_w"] * op.weight_us
    assert op.weight_us > op.compute_us
    assert floor < found.energy_uj < 1.3 * floor


def test_products_behind_a_relu_take_less_energy_and_no_less_time() -> None:
    """Half of their activations are zero; also through a view, not behind another op."""
    found = {}
    for kinds in (("relu",), ("relu", "reshape"), ("tanh",), ("relu", "tanh")):
        b = Builder()
        y = b.input("x", TensorType("fp16", (512, 512)))
        for kind in kinds:
            shape = {"shape": literal([512, 512], "int32")} if kind == "reshape" else {}
            y = b.op(kind, x=y, **shape)
        y = b.op("matmul", x=y, y=weight(512, 512))
        program = Program((b.finish((y,)),))
        found[kinds] = estimate(program, "m4")
        assert [item.rectified for item in function_work(program.main)][-1] == ("tanh" not in kinds)
    plain, behind = found["tanh",], found["relu",]
    saved = 512**3 * cost.rates("m4")["mac_pj"].value * (1 - cost.rates("m4")["relu_share"].value) * 1e-6
    assert plain.energy_uj - behind.energy_uj == pytest.approx(saved)
    assert found["relu", "reshape"].energy_uj == behind.energy_uj
    assert behind.latency_us == plain.latency_us


def test_an_interval_counts_programs_of_its_own_kind_alone() -> None:
    """A softmax by the direct path, of which nothing is published, was said to rest on its 74 convolutions."""
    b = Builder()
    program = Program((b.finish((b.op("softmax", x=b.input("x", TensorType("fp16", (64, 64))), axis=-1),)),))
    found = {path: estimate(program, "m4", path) for path in ("e5rt", "direct")}
    assert found["direct"].kind == found["e5rt"].kind == "softmax"
    assert found["direct"].latency_interval.rows == 0
    assert found["e5rt"].latency_interval.rows >= 16
    assert (
        found["direct"].latency_interval.low
        < found["direct"].latency_us
        < found["direct"].latency_interval.high
    )
