"""The conformance suite: equal engines give no difference, wrong ones exactly the expected, reports become evidence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ane_trainer.ane.chips.lookup import op_status
from ane_trainer.ane.errors import DataError, UsageError
from ane_trainer.ane.simulator import KERNELS
from ane_trainer.ane.verify.evidence import read_rows, stored_rows
from ane_trainer.cli import run_command
from ane_trainer.commands.conformance import commands as conformance
from ane_trainer.commands.conformance import evidence
from ane_trainer.commands.conformance import report as report_file
from ane_trainer.commands.conformance.compare import difference
from ane_trainer.commands.conformance.engines import DeviceEngine
from ane_trainer.commands.conformance.report import examine
from ane_trainer.commands.conformance.suite import VERSION, suite
from docs._generate import fidelity
from tests.standin.library import Engine, needs_compiler

#: Runs of the suite need no more memory and time when one thread computes.
THREADS = 1

#: Ops of the e5rt path without a case: constants, ops without a runtime input, and forms of others.
LEFT_OUT = {
    "affine", "const", "constexpr_cast", "constexpr_lut_to_sparse", "constexpr_sparse_blockwise_shift_scale",
    "fill", "fill_like", "non_maximum_suppression", "range_1d", "resize",
}  # fmt: skip


def sim(chip: str, mode: str = "exact") -> DeviceEngine:
    return DeviceEngine("sim", chip, mode, THREADS)


def wrong(report: dict[str, Any]) -> set[str]:
    return {entry["case"] for entry in report["different"]}


# -- the suite -------------------------------------------------------------------------------------------------


def test_every_op_of_the_path_has_a_case() -> None:
    kinds = {op.kind for case in suite() for op in case.make()[0].main.ops}
    wanted = {
        kind
        for kind in KERNELS
        if op_status("gelu_exact" if kind == "gelu" else kind, "m5").status in ("native", "reachable")
    }
    assert wanted - kinds == LEFT_OUT
    assert len({case.name for case in suite()}) == len(suite())


def test_programs_and_inputs_are_those_of_the_version() -> None:
    """Reports of one version must be comparable: whoever changes a case changes `VERSION` and this number."""
    digest = hashlib.sha256()
    for case in suite():
        program, feeds = case.make()
        digest.update(f"{case.name} {[op.kind for op in program.main.ops]}".encode())
        for name, array in feeds.items():
            digest.update(name.encode() + array.tobytes())
    assert (VERSION, digest.hexdigest()[:12]) == (2, "17b99f658495")


def test_one_operand_ops_see_all_bit_patterns() -> None:
    (case,) = (case for case in suite() if case.name == "tanh")
    (array,) = case.make()[1].values()
    assert np.unique(array.view(np.uint16)).size == 65536


# -- comparing -------------------------------------------------------------------------------------------------


def test_difference_counts_bits_and_distances() -> None:
    want = np.array([1, -0.0, 2, np.inf], np.float16)
    assert difference(want.copy(), want) is None
    got = np.array([1, 0.0, 2.00390625, 65504], np.float16)
    found = difference(got, want)
    assert found is not None
    assert (found["count"], found["of"], found["max_ulp"]) == (3, 4, 2)
    assert found["first"] == [[1, "0000", "8000"], [2, "4002", "4000"], [3, "7bff", "7c00"]]
    across = difference(np.array([-(2.0**-24)], np.float16), np.array([2.0**-24], np.float16))
    assert across is not None
    assert across["max_ulp"] == 2
    assert difference(want[:2], want) == {"shape": [[2], [4]], "dtype": ["float16", "float16"]}


# -- the self-test: engines that are right, and engines that are not -------------------------------------------


def test_an_engine_that_is_right_gives_no_difference() -> None:
    report = examine(sim("m4"), sim("m4"), only="cliff")
    assert len(report["equal"]) == report["cases"] >= 6
    assert [report[kind] for kind in ("different", "failed", "skipped")] == [[], [], []]


def test_another_chips_cliffs_are_found_and_nothing_else() -> None:
    report = examine(sim("m1"), sim("m5"), only="cliff")
    assert wrong(report) == {"cliff: slice_by_size last axis"}
    (found,) = report["different"]
    x = np.concatenate([np.arange(4064, 4128, 0.5), [8192, 32768, 65504]])
    assert found["count"] == 2 * 7 * int((x.astype(np.float16) > 4094).sum())
    assert all(got == "7c00" for _, got, _ in found["first"])


def test_a_wrong_accumulator_is_found_where_it_matters() -> None:
    report = examine(sim("m4", "fast"), sim("m4"), only="contraction")
    assert wrong(report) == {case for case in wrong(report) if case.startswith("contraction: ")}
    assert len(wrong(report)) == report["cases"]
    assert examine(sim("m4", "fast"), sim("m4"), only="movement")["different"] == []
    training = examine(sim("m4", "fast"), sim("m4"), only="mlp adam")
    assert "training: mlp adam" in wrong(training)


def test_refusals_of_the_chip_do_not_end_the_examination() -> None:
    report = examine(sim("m1"), sim("m1"), only="pointwise: sin")
    assert report["cases"] == 0  # the family is no part of the name
    report = examine(sim("m1"), sim("m1"), only="sin")
    assert {entry["case"] for entry in report["skipped"]} == {"pointwise: sin"}
    assert report["equal"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["m1", "m5"])
def test_the_whole_suite_on_equal_engines(chip: str) -> None:
    report = examine(sim(chip), sim(chip))
    assert [report[kind] for kind in ("different", "failed")] == [[], []]
    assert len(report["equal"]) + len(report["skipped"]) == report["cases"] > 190
    assert len(json.dumps(report, separators=(",", ":"))) < 10_000


@pytest.mark.slow
def test_the_report_of_a_bad_engine_fits_into_one_message() -> None:
    report = examine(sim("m1", "fast"), sim("m5"))
    assert len(json.dumps(report, separators=(",", ":"))) < 60_000


@needs_compiler
def test_direct_dispatch_is_examined_through_its_own_runtime(engine: Engine) -> None:
    """The stand-in computes as M4: no difference from M4; M1's simulator has a cliff that it has not."""
    same = examine(DeviceEngine("e5rt", "m4"), sim("m4"), only="cliff")
    assert len(same["equal"]) == same["cases"]
    other = examine(DeviceEngine("e5rt", "m1"), sim("m1"), only="slice_by_size last")
    assert wrong(other) == {"cliff: slice_by_size last axis"}


# -- reports and evidence --------------------------------------------------------------------------------------


def from_a_mac(report: dict[str, Any], chip: str = "m1") -> dict[str, Any]:
    """The report as this chip's Mac would have written it."""
    machine = report["machine"] | {
        "system": "Darwin",
        "release": "26.5",
        "build": "25F71",
        "chip": "Apple M1",
    }
    device = {"name": "e5rt", "chip": chip, "fidelity": "exact"}
    return report | {
        "machine": machine, "machine_chip": chip, "device": device, "compared_with": device | {"name": "sim"}
    }  # fmt: skip


def test_reports_become_rows_and_rows_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examine(sim("m1"), sim("m5"), only="cliff")
    path = report_file.write_report(from_a_mac(found), tmp_path / "report.json")
    assert path.read_text().count("\n") == 1
    table = tmp_path / "rows.csv"
    rows, added = conformance.read([path], table)
    assert added == len(rows) == found["cases"]
    assert conformance.read([path, path], table)[1] == 0
    assert set(read_rows(table)) == set(rows)
    (row,) = (row for row in rows if row.differences)
    assert (row.chip, row.case, row.os, row.build) == (
        "m1",
        "cliff: slice_by_size last axis",
        "Darwin 26.5",
        "25F71",
    )
    assert f"{row.differences} of {row.values} differ" in evidence.rows_as_text(rows).splitlines()[0]
    monkeypatch.setattr(fidelity, "stored_rows", lambda: rows)
    book = fidelity.document(lambda figure: figure.published)
    assert f"| m1 | {row.case} | {row.differences} of {row.values} | {row.max_ulp} |" in book


def test_rows_that_the_package_carries_say_where_they_come_from() -> None:
    for row in stored_rows():
        assert row.device in evidence.ENGINES
        assert row.build
        assert row.differences >= 0
        assert math.isfinite(row.max_ulp)


def test_only_an_engine_is_evidence(tmp_path: Path) -> None:
    report = examine(sim("m4"), sim("m4"), only="square near")
    with pytest.raises(DataError, match="the device sim on"):
        evidence.rows_of(report)
    other = from_a_mac(report) | {"machine_chip": "m4"}
    with pytest.raises(DataError, match="Apple M1, compared with the simulator of m1"):
        evidence.rows_of(other)
    assert evidence.rows_of(from_a_mac(report))
    for text in ("", "[]", '{"format": "another"}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(DataError, match="needs a report"):
            conformance.read([tmp_path / "report.json"])


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["conformance", "--device", "sim", "--only", "square near", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "conformance-m4-sim.json").read_text())["equal"] == found["equal"]
    assert run_command(["conformance", "--device", "sim", "--only", "nothing like it"]) == 1
    assert run_command(["conformance-read", "conformance-m4-sim.json"]) == 1
    if sys.platform != "darwin":
        monkeypatch.delenv("ANEFORGE_DYLIB", raising=False)
        assert run_command(["conformance"]) == 2
        assert "--device sim" in capsys.readouterr().err
    with pytest.raises(UsageError):
        conformance.run("sim", "m4", only="nothing like it", out=tmp_path / "report.json")


def test_reports_are_values() -> None:
    report = examine(sim("m4"), sim("m4"), only="square near")
    assert json.loads(json.dumps(report)) == report
    assert {field.name for field in dataclasses.fields(evidence.Row)} >= {"chip", "case", "report"}


@pytest.mark.mac
def test_on_the_engine_the_suite_runs_and_leaves_a_report(tmp_path: Path) -> None:
    report, path = conformance.run("e5rt", out=tmp_path / "report.json")
    print(report_file.as_text(report))
    assert evidence.rows_of(report_file.read_report(path))
    assert len(report["equal"]) > len(report["failed"])
