"""The chip tables: every row has evidence, the strictest claim wins, unknown stays unknown."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ane_trainer.ane.chips import lookup as chips
from ane_trainer.ane.chips.lookup import CHIPS, LIMITS, get_chip, known_chips, limit, limits, op_status
from ane_trainer.ane.errors import UsageError

#: Peak TFLOP/s of one engine in the published chip table (16 x 256 x 2 x fmax), M6 has two.
PUBLISHED_PEAK_TFLOPS = {
    "m1": 11.7, "m1-pro": 12.0, "m1-max": 12.0, "m2": 15.9, "m2-pro": 15.8, "m3": 16.9, "m3-pro": 16.9,
    "m4": 19.4, "m4-pro": 19.4, "m4-max": 19.4, "m5": 17.8, "m5-pro": 19.4, "m5-max": 19.4, "m6": 2 * 20.5,
}  # fmt: skip


def test_the_chips_are_those_of_m1_to_m6() -> None:
    assert known_chips() == (
        "m1", "m1-pro", "m1-max", "m2", "m2-pro", "m2-max", "m3", "m3-pro", "m3-max",
        "m4", "m4-pro", "m4-max", "m5", "m5-pro", "m5-max", "m6",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "tflops"), PUBLISHED_PEAK_TFLOPS.items())
def test_peak_is_within_three_percent_of_the_published_table(name: str, tflops: float) -> None:
    assert get_chip(name).peak_fp16_flops == pytest.approx(tflops * 1e12, rel=0.03)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda c: c.name)
def test_every_known_figure_of_a_chip_has_evidence(chip: chips.Chip) -> None:
    derived = {"name", "title", "family", "generation", "aliases", "evidence"}
    for name in set(chip.__dataclass_fields__) - derived:
        evidence = chip.evidence_for(name)
        if getattr(chip, name) is not None:
            assert evidence is not None, name
        if evidence is not None:
            assert evidence.kind in ("measured", "decompiled", "published", "presumed")
            assert len(evidence.source) > 3


def test_every_limit_has_evidence_and_says_something_about_a_chip() -> None:
    for row in LIMITS:
        assert row.evidence.kind in ("measured", "decompiled", "published", "presumed"), row
        assert row.evidence.source, row
        assert row.unit, row
        assert row.value > 0, row
        assert row.path in chips.PATHS, row
        assert any(chips.covers(row.families, chip) for chip in CHIPS), row


def test_rows_of_one_limit_have_one_bound_and_unit() -> None:
    for name in chips.known_limits():
        rows = [row for row in LIMITS if row.name == name]
        assert len({(row.bound, row.unit) for row in rows}) == 1, name


def test_every_conflict_between_sources_resolves_to_the_stricter() -> None:
    conflicts = 0
    for chip in CHIPS:
        for path in chips.PATHS:
            for name in chips.known_limits():
                rows = limits(chip, name, path)
                values = [row.value for row in rows]
                if len(set(values)) < 2:
                    continue
                conflicts += 1
                chosen = limit(chip, name, path)
                assert chosen is not None
                assert chosen.value == (min(values) if chosen.bound == "max" else max(values))
    assert conflicts > 20  # the tables keep disagreeing rows on purpose


@pytest.mark.parametrize(
    ("chip", "name", "path", "value"),
    [
        ("m1", "conv_kernel_width", "e5rt", 13),  # engine table 13, front end 15
        ("m4", "conv_kernel_width", "e5rt", 15),  # engine table 16, front end 15
        ("m4", "conv_kernel_width", "compiler", 16),
        ("m4", "conv_kernel_height", "coreml", 31),
        ("m4", "matmul_contraction", "coreml", 32768),  # engine table 65536
        ("m4", "matmul_contraction", "e5rt", 65536),
        ("m1", "matmul_contraction", "e5rt", 16384),
        ("m3", "dimension", "e5rt", 16384),
        ("m4", "dimension", "e5rt", 65536),
        ("m4", "max_pool_window", "coreml", 8),
        ("m1", "pool_window", "e5rt", 28),
        ("m5", "operand_working_set", "e5rt", 2 * 2**20),
        ("m4", "compiles_per_process", "direct", 119),
        ("m5", "loaded_programs", "e5rt", 128),
        ("m5", "rank", "e5rt", 5),
    ],
)
def test_limits_of_the_fact_sheet(chip: str, name: str, path: str, value: float) -> None:
    found = limit(chip, name, path)
    assert found is not None
    assert found.value == value


def test_an_unknown_limit_is_none() -> None:
    assert limit("m4", "number_of_dreams") is None
    assert limit("m1", "max_pool_window", "coreml") is not None  # the compiler's limit binds every path
    assert limit("m1", "conv_stride", "coreml") is None  # swept on M4 only
    assert limit("m4", "compiles_per_process", "e5rt") is None  # a limit of the direct path


@pytest.mark.parametrize(
    ("chip", "clamp"),
    [("m1", 4094), ("m1-max", 4094), ("m2-pro", 4094), ("m3", 4094), ("m4", None), ("m5-pro", None)],
)  # fmt: skip
def test_the_width_slice_clamp_ends_with_m4(chip: str, clamp: float | None) -> None:
    assert get_chip(chip).width_slice_clamp == clamp


def test_what_nobody_measured_is_marked_presumed() -> None:
    evidence = get_chip("m3").evidence_for("width_slice_clamp")
    assert evidence is not None
    assert evidence.kind == "presumed"
    assert get_chip("m2").dispatch_floor_us is None
    assert get_chip("m5-max").dram_gb_s is None


@pytest.mark.parametrize("text", ["M1 Max", "m1_max", "m1-max", "m1max", " Apple M1 Max ", "h13g", "H13G"])
def test_names_are_tolerant(text: str) -> None:
    assert get_chip(text).name == "m1-max"


@pytest.mark.parametrize(("typo", "meant"), [("m1-mx", "m1-max"), ("m4pr0", "m4-pro"), ("m-5", "m5")])
def test_an_unknown_chip_names_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"Did you mean '{meant}'") as caught:
        get_chip(typo)
    assert caught.value.exit_code == 1
    assert typo in str(caught.value)


@given(st.text(max_size=12))
def test_any_text_is_a_chip_or_a_usage_error(text: str) -> None:
    try:
        found = get_chip(text)
    except UsageError as error:
        found = str(error)
    assert found in CHIPS or repr(text) in str(found)


def test_an_unknown_path_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="Did you mean 'coreml'"):
        limit("m4", "rank", "core_ml")


def test_the_m5_sweep_of_166_ops_is_whole() -> None:
    sweep = [s for s in (op_status(op, "m5") for op in chips.known_ops()) if "vocabulary sweep" in s.source]
    assert Counter(s.status for s in sweep) == {"native": 97, "reachable": 19, "refused": 50}
    walled = [s for s in sweep if "compiler fails" in s.evidence]
    assert len(walled) == 14


@pytest.mark.parametrize(
    ("op", "refused_on", "native_on"),
    [
        ("sin", ("m1", "m2-pro"), ("m3", "m4", "m5", "m6")),
        ("cos", ("m1", "m2"), ("m3", "m5")),
        ("topk", ("m1", "m1-max"), ("m2", "m4", "m5")),
        ("constexpr_blockwise_shift_scale", ("m1", "m2"), ("m3", "m5")),
    ],
)
def test_family_floors(op: str, refused_on: tuple[str, ...], native_on: tuple[str, ...]) -> None:
    assert {op_status(op, chip).status for chip in refused_on} == {"refused"}
    assert {op_status(op, chip).status for chip in native_on} == {"native"}


def test_netplist_floors() -> None:
    assert op_status("sort", "m1", "netplist").status == "refused"
    assert op_status("sort", "m5", "netplist").status == "reachable"
    assert op_status("dynamic_slice", "m2", "netplist").status == "reachable"


#: Ops of a training step that every generation runs (fact sheet, op support digest).
MINIMAL_TRAINING_SET = """
    matmul conv conv_transpose add sub mul real_div maximum minimum sqrt rsqrt inverse exp log erf tanh
    sigmoid silu gelu relu softmax reduce_sum reduce_mean reduce_max reduce_l2_norm transpose reshape concat
    slice_by_size select avg_pool max_pool
"""


@pytest.mark.parametrize("op", MINIMAL_TRAINING_SET.split())
def test_the_minimal_training_set_is_native_everywhere(op: str) -> None:
    assert {op_status(op, chip).status for chip in CHIPS} == {"native"}


def test_other_paths_and_forms() -> None:
    assert op_status("reshape", "m1", "direct").status == "refused"
    assert op_status("reshape", "m4", "direct").status == "native"
    assert op_status("gather(static_index)", "m4", "coreml").status == "reachable"
    assert op_status("gather", "m4", "coreml").status == "refused"  # the strictest of its forms
    concat = op_status("concat", "m4", "direct")  # Orion: refused; maderix: native
    assert concat.status == "refused"
    assert {row.status for row in concat.rows} == {"native", "refused"}


def test_an_op_without_a_source_is_unknown() -> None:
    assert op_status("frobnicate", "m4").status == "unknown"
    assert op_status("conv", "m2", "direct").status == "unknown"


def test_a_measured_row_is_told_from_a_presumed_one() -> None:
    assert op_status("cumsum", "m5").evidence.startswith("measured")
    assert op_status("cumsum", "m4").evidence.startswith("presumed as on A17")


def test_every_op_row_has_evidence_and_source() -> None:
    for path in chips.PATHS:
        for op in chips.known_ops(path):
            for chip in CHIPS:
                for row in op_status(op, chip, path).rows:
                    assert row.evidence.split(":")[0].split()[0] in ("measured", "predicted", "presumed"), row
                    assert row.source, row
