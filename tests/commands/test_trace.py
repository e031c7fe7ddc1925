"""`trace`: the file is what Perfetto reads, its times are the estimate's, and pictures lie beside it."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Literal, Program, TensorType
from ane_trainer.ane.mil.text.printer import print_program
from ane_trainer.cli import run_command
from ane_trainer.training.reporting.page import with_pictures
from tests.commands.perfetto import query

NETS = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))

class Refused(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 4)
    def forward(self, x):
        return torch.linalg.svdvals(self.head(x))
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    return "nets.py"


def told(*words: str, code: int = 0) -> dict[str, Any]:
    """What a command prints with --json."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run_command([*words, "--json"]) == code
    found: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    return found


NET = ("--input", "16", "--classes", "4", "--batch", "8", "--chip", "m1")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """A model, the trace of its step, and what the command said."""
    folder = tmp_path_factory.mktemp("trace")
    (folder / "nets.py").write_text(NETS)
    model, file = f"{folder}/nets.py:Net", folder / "deep" / "net.json"
    return model, file, told("trace", model, *NET, "--out", str(file))


def test_times_are_those_of_the_estimate(net: tuple[str, Path, dict[str, Any]]) -> None:
    model, file, found = net
    (chip,) = told("estimate", model, *NET)["chips"]
    assert [item["latency_us"] for item in found["chips"]] == [chip["latency_us"]]
    events = json.loads(file.read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert max(e["ts"] + e["dur"] for e in slices) == pytest.approx(chip["latency_us"], abs=1e-3)
    took = sum(e["dur"] for e in slices if names[e["tid"]] not in ("weights", "modules"))
    assert took == pytest.approx(chip["latency_us"], rel=1e-3)
    assert all(e["cat"] == "modelled" and e["args"]["modelled"] is True for e in slices)
    by_op = {e["args"].get("op") for e in slices} - {None}
    assert by_op <= {op["name"] for op in chip["ops"]}
    assert {op["name"] for op in chip["ops"] if op["latency_us"] > 1e-3} <= by_op


def test_the_file_keeps_to_the_trace_event_format(net: tuple[str, Path, dict[str, Any]]) -> None:
    text = net[1].read_text()
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["displayTimeUnit"] in ("ms", "ns")
    needed = {
        "X": {"ts", "dur", "name", "cat"},
        "C": {"ts", "name", "args"},
        "M": {"name", "args"},
        "i": {"ts", "s"},
    }
    for event in document["traceEvents"]:
        assert needed[event["ph"]] <= event.keys()
        assert isinstance(event["pid"], int)
        assert event["ph"] == "C" or isinstance(event["tid"], int)
        if event["ph"] == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values())
    # Perfetto v52 misreads numbers of 20 digits, leading zeros included.
    assert max(map(len, re.findall(r"(?<=[:,\[])-?\d+\.\d+", text))) < 20


def test_perfetto_reads_it(net: tuple[str, Path, dict[str, Any]]) -> None:
    chip = net[2]["chips"][0]
    lanes = """
        select thread.name as lane, count(*) as slices, sum(dur) as took, max(ts + dur) as ends, max(depth) as depth
        from slice join thread_track on slice.track_id = thread_track.id join thread using (utid) group by lane"""
    counters = """
        select t.name as name, count(*) as values_, max(value) as most
        from counter join process_counter_track t on counter.track_id = t.id group by t.name"""
    faults = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"
    overlaps = """
        select count(*) as n from slice a join slice b
        on a.track_id = b.track_id and a.ts < b.ts and a.ts + a.dur > b.ts"""
    unlabelled = """
        select count(*) as n from slice where category != 'modelled'
        or ifnull(extract_arg(arg_set_id, 'args.modelled'), 0) != 1"""
    product = "select extract_arg(arg_set_id, 'args.FLOPs') as flops from slice where name like 'matmul%' order by ts"
    by_lane, tracks, wrong, over, bare, products = query(
        net[1], lanes, counters, faults, overlaps, unlabelled, product
    )
    assert not wrong
    assert over[0].n == 0
    assert bare[0].n == 0
    rows = {row.lane: row for row in by_lane}
    assert set(rows) == {"modules", *chip["busy_us"]}
    for lane, busy_us in chip["busy_us"].items():
        assert rows[lane].took == pytest.approx(1e3 * busy_us, abs=rows[lane].slices + 100)
        assert rows[lane].depth == 0
    assert max(row.ends for row in by_lane) == pytest.approx(1e3 * chip["latency_us"], abs=1)
    found = {row.name: row for row in tracks}
    assert {"bytes in flight bytes", "memory held inputs", "error that the op adds relative"} <= set(found)
    held = sum(row.most for name, row in found.items() if name.startswith("memory held"))
    assert held >= chip["peak_bytes"] > 0
    assert 1e-5 < found["error that the op adds relative"].most < 2e-3
    assert products[0].flops == 2 * 8 * 16 * 32


def test_pictures_lie_beside_it(net: tuple[str, Path, dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    pictures = [Path(name) for name in net[2]["pictures"]]
    assert {p.name for p in pictures} == {
        f"net-{k}-m1.{f}" for k in ("roofline", "memory") for f in ("png", "svg")
    }
    for picture in pictures:
        data = picture.read_bytes()
        assert data.startswith(b"\x89PNG") if picture.suffix == ".png" else b"<svg" in data[:800]
    drawn = net[1].with_name("net-roofline-m1.svg").read_text()
    for words in ("TFLOP/s", "elementwise passes", "the whole dispatch", "not measured"):
        assert words in drawn


def test_a_program_and_what_does_not_fit(nets: str) -> None:
    b = Builder()
    weight = Literal(TensorType("fp16", (64, 64)), b"\0\x44" * 64 * 64)  # 4.0
    out = b.op("exp", x=b.op("matmul", x=b.input("x", TensorType("fp16", (8, 64))), y=weight))
    text, blob = print_program(Program((b.finish((out,)),)))
    Path("p").mkdir()
    Path("p/model.mil").write_text(text)
    if blob:
        Path("p/weights.bin").write_bytes(blob)
    found = told("trace", "p/model.mil", "--no-pictures")
    assert found["chips"][0]["ops"] == 2
    assert "random inputs" in found["chips"][0]["errors"]
    assert "infinities, exp" in found["chips"][0]["errors"]
    assert [e for e in json.loads(Path("trace.json").read_text())["traceEvents"] if e["ph"] == "i"]
    Path("trace.json").unlink()
    refused = told("trace", f"{nets}:Refused", *NET, code=3)
    assert refused["chips"] == []
    assert "nets.py" in refused["refused"]["m1"]
    assert not Path("trace.json").exists()


def test_a_run_has_them_in_its_report(nets: str) -> None:
    pytest.importorskip("sklearn")
    words = [
        "train",
        "digits",
        "--epochs",
        "1",
        "--batch",
        "256",
        "--limit",
        "256",
        "--fidelity",
        "fast",
        "--out",
        "run",
    ]
    assert run_command(words) == 0
    report = Path("run/report.html")
    assert report.read_text().count("by the cost model, not measured") == 2
    found = told("trace", "run", "--chip", "m1,m4")
    assert found["file"] == str(Path("run/trace.json"))
    assert "run/report.html" in found["pictures"]
    assert report.read_text().count("by the cost model, not measured") == 4
    assert "trace its model" in found["chips"][0]["errors"]


def test_pictures_replace_those_of_before() -> None:
    page = "<p>a</p><!-- pictures of a step --><!-- end of the pictures --><p>b</p>"
    once = with_pictures(page, ["<img 1>"])
    assert "<img 1>" in once
    assert with_pictures(once, []) == page
    assert with_pictures("<p>an older page</p>", ["<img 1>"]) == "<p>an older page</p>"
