"""`check`: verdicts of models of different kinds, four built to break, whose named fixes turn them green."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Literal, Program, TensorType, literal
from ane_trainer.ane.mil.text.printer import print_program
from ane_trainer.cli import run_command
from ane_trainer.commands import batches
from ane_trainer.commands.verdicts import ChipVerdict, Problem, Verdict
from ane_trainer.testing import assert_trains

NETS = """
import torch
from torch import nn

class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))

class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 10)
    def forward(self, x):
        return self.head(torch.relu(self.features(x)).mean((2, 3)))

class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(16, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 5))

class Regressor(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 1))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
    def forward(self, tokens):
        return self.head(self.table(tokens))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.facts, self.head = nn.Linear(16, 8), nn.Linear(4, 8), nn.Linear(8, 3)
    def forward(self, image, facts):
        return self.head(torch.relu(self.image(image.flatten(1)) + self.facts(facts)))

class Frozen(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(16, 16).requires_grad_(False), nn.Tanh(), nn.Linear(16, 4))

class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)
    def forward(self, x):
        rows = (x.abs() * 300).flatten(1)
        return self.head(rows[:, :64] / rows.sum(1, keepdim=True))

class Inverse(nn.Module):
    def __init__(self, heal=False):
        super().__init__()
        self.heal, self.head = heal, nn.Linear(16, 4)
    def forward(self, x):
        rows = x.reshape(-1, 4, 4) + 9 * torch.eye(4)
        rows = rows if self.heal else torch.linalg.inv(rows)
        return self.head(rows.flatten(1))

class Healed(Inverse):
    def __init__(self):
        super().__init__(heal=True)

class Wide(nn.Module):
    def __init__(self, outputs=16_400):
        super().__init__()
        self.head = nn.Linear(4, outputs)
    def forward(self, x):
        return self.head(x)

class Narrower(Wide):
    def __init__(self):
        super().__init__(16_384)

class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 4).double()
    def forward(self, x):
        return self.head(x.to(torch.float64))

class Cast(Double):
    def forward(self, x):
        return self.head(x.to(self.head.weight.dtype))

class Deep(nn.Sequential):
    def __init__(self, depth=9):
        super().__init__(*[layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.ReLU())], nn.Linear(8, 4))

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)
    def forward(self, x):
        return {"logits": self.head(x), "inputs": x}

def named_loss(output, target):
    return nn.functional.cross_entropy(output["logits"], target)

class Numpy(Named):
    def forward(self, x):
        return self.head(torch.from_numpy(x.detach().numpy() * 2))

class Torch(Named):
    def forward(self, x):
        return self.head(x * 2)

class Empty(Named):
    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0))
    def forward(self, x):
        return self.head(x)

class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 4), nn.Linear(4, 1)
    def forward(self, x):
        x = x.requires_grad_(True)
        y = self.head(torch.tanh(self.body(x)))
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0]

class Waves(Named):
    def forward(self, x):
        return self.head(x.sin())

class Shallow(Deep):
    def __init__(self):
        super().__init__(2)
"""


LOUD = """
import torch
from torch import nn

class Loud(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)
    def forward(self, x):
        y = self.norm(self.body(x))
        z = (y * 3000) * (y * 3000)
        return self.head(z * 1e-7)
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = run_command(["check", *words, "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("Mlp", "1x8x8"), ("Normed", "16"), ("Regressor", "13"), ("Tokens", "6"),
        ("Two", "1x4x4,4"), ("Frozen", "16"), ("Sum", "1x16x16"), ("Slope", "8"),
    ],
)  # fmt: skip
def test_a_model_trains(nets: Path, capsys: pytest.CaptureFixture[str], model: str, shape: str) -> None:
    code, found = checked(capsys, f"nets.py:{model}", "--input", shape, "--batch", "4", "--chip", "m4")
    (chip,) = found["chips"]
    assert (code, chip["verdict"], chip["refused"]) == (0, "trains", [])
    assert chip["agreement"].startswith("agrees with fp32")
    assert all(op["status"] in ("native", "reachable") and op["evidence"] for op in chip["checked"])
    assert any(op["where"].startswith("optimizer Adam") for op in chip["checked"])


def test_an_installed_module_is_checked_without_a_run(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checked(capsys, "nets:Cnn", "--input", "1x6x6", "--batch", "2", "--no-run")
    assert code == 0
    assert found["chips"][0]["agreement"] == ""


@pytest.mark.parametrize(
    ("broken", "healed", "shape", "chip", "verdict", "word"),
    [
        ("Inverse", "Healed", "16", "m4", "does not train", "linalg_inv"),
        ("Wide", "Narrower", "4", "m1", "does not train", "at most 16384"),
        ("Double", "Cast", "16", "m4", "does not train", "Double"),
    ],
)
def test_a_model_built_to_break_and_its_fix(
    nets: Path, capsys: pytest.CaptureFixture[str],
    broken: str, healed: str, shape: str, chip: str, verdict: str, word: str,
) -> None:  # fmt: skip
    words = ["--input", shape, "--batch", "2", "--chip", chip, "--no-run"]
    code, found = checked(capsys, f"nets.py:{broken}", *words)
    told = found["chips"][0]
    assert told["verdict"] == verdict
    assert code == (3 if verdict == "does not train" else 0)
    problems = [p for p in told["problems"] if word in p["reason"] + p["op"]]
    assert len(problems) == 1  # told once, at the user's line, with a way out
    assert problems[0]["fix"]
    assert "nets.py:" in problems[0]["where"]
    code, found = checked(capsys, f"nets.py:{healed}", *words)
    assert (code, found["chips"][0]["verdict"]) == (0, "trains")


def test_a_model_too_long_for_one_program_and_its_fix(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input", "8", "--batch", "2", "--chip", "m1", "--no-run"]
    code, found = checked(capsys, "nets.py:Deep", *words, "--blocks", "off")
    told = found["chips"][0]
    (problem,) = [p for p in told["problems"] if "known to compile" in p["reason"]]
    assert (code, told["verdict"]) == (0, "unproven")
    code, found = checked(capsys, "nets.py:Deep", *words)
    divided = found["chips"][0]
    assert (code, divided["verdict"]) == (0, "trains")
    (note,) = [p for p in divided["problems"] if p["rule"] == "program-size"]
    programs, longest, dispatches = map(
        int, re.findall(r"in (\d+) programs of up to (\d+), (\d+) ", note["reason"])[0]
    )
    assert (
        f"makes {programs} programs of up to {longest} ops, {dispatches} dispatches a step" in problem["fix"]
    )
    assert longest <= 383 < int(told["budgets"]["ops"].split()[0])


def kernel(*widths: int) -> Program:
    b = Builder()
    y = b.input("x", TensorType("fp16", (1, 2, 8, 32)))
    for width in widths:
        weight = Literal(TensorType("fp16", (2, 2, 1, width)), b"\0" * (8 * width))
        y = b.op("conv", x=y, weight=weight, pad_type=literal("same", "string"))
    return Program((b.finish((y,)),))


def test_a_kernel_too_wide_for_m1_and_two_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, program in (("wide", kernel(15)), ("stacked", kernel(8, 8))):
        text, blob = print_program(program)
        (tmp_path / f"{name}.mil").write_text(text)
        (tmp_path / "weights.bin").write_bytes(blob)
        code, found = checked(capsys, f"{name}.mil", "--chip", "m1,m4")
        verdicts = [chip["verdict"] for chip in found["chips"]]
        assert (code, verdicts) == (
            (3, ["does not train", "trains"]) if name == "wide" else (0, ["trains"] * 2)
        )
        if name == "wide":
            (problem,) = found["chips"][0]["refused"]
            assert "kernel width of at most 13" in problem["reason"]
            assert "Stack smaller kernels" in problem["fix"]
            assert problem["evidence"]
        run_command(["check", f"{name}.mil"])
        assert "M4    runs" in capsys.readouterr().out  # it is no training step
        assert run_command(["estimate", f"{name}.mil", "--chip", "m1,m4", "--json"]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert [chip["refused"] for chip in found["chips"]] == [["conv"] if name == "wide" else [], []]
        run_command(["estimate", f"{name}.mil", "--chip", "m1"])
        told = "M1: the engine refuses conv by e5rt, priced as if it took them" in capsys.readouterr().out
        assert told == (name == "wide")


def test_what_is_missing_is_said(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, word in (
        (["nets.py:Two", "--input", "1x4x4"], "2 inputs (image, facts)"),
        (["nets.py:Mlp", "--input", "1x9x9"], "DATA105"),
        (["nets.py:Mlp", "--input", "1x8x8", "--dtype", "double"], "--dtype"),
        (["nowhere.at.all:Net", "--input", "4"], "cannot be imported"),
        (["torch.nn:Identity", "--input", "4"], "needs parameters to train"),
    ):
        assert run_command(["check", *words, "--batch", "2"]) == 1
        assert word in capsys.readouterr().err


def test_sarif_has_the_users_lines(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_command(["check", "nets.py:Inverse", "--input", "16", "--batch", "2", "--sarif", "out.sarif"])
    assert code == 3
    (run,) = json.loads((nets / "out.sarif").read_text())["runs"]
    place = run["results"][0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "nets.py"
    assert "linalg.inv" in NETS.splitlines()[place["region"]["startLine"] - 1]
    assert {result["ruleId"] for result in run["results"]} <= {
        rule["id"] for rule in run["tool"]["driver"]["rules"]
    }


def test_assert_trains() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    example = (torch.randn(4, 8), torch.randint(3, (4,)))
    assert assert_trains(model, example, chips=("m1",)).chips[0].verdict == "trains"

    class Inverts(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(super().forward(x))  # type: ignore[no-any-return]

    with pytest.raises(AssertionError, match=r"does not train[\s\S]*linalg_inv"):
        assert_trains(Inverts(8, 8), (torch.randn(8, 8), torch.randn(8, 8)), loss="mse", run=False)


def test_the_steps_of_the_action_and_the_hook_run(nets: Path) -> None:
    yaml = pytest.importorskip("yaml")
    root = Path(__file__).resolve().parents[2]
    steps = yaml.safe_load((root / "action.yml").read_text())["runs"]["steps"]
    (hook,) = yaml.safe_load((root / ".pre-commit-hooks.yaml").read_text())
    assert hook["entry"] == "ane-trainer check"
    assert [step["shell"] for step in steps] == ["bash"] * 2
    environment = {**os.environ, "PATH": f"{nets}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(root)}
    (nets / "ane-trainer").write_text(f'#!/bin/sh\nexec {sys.executable} -m ane_trainer "$@"\n')
    (nets / "ane-trainer").chmod(0o755)
    given = {"CHIPS": "m1,m4", "ARGUMENTS": "--input 16 --batch 2 --no-run", "SARIF": "out.sarif"}
    for model, code in (("Frozen", 0), ("Inverse", 3)):
        inputs = {**given, "SUBJECT": f"nets.py:{model}"}
        assert set(inputs) == set(steps[1]["env"])
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", steps[1]["run"]]
        done = subprocess.run(words, env={**environment, **inputs}, cwd=nets, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        (run,) = json.loads((nets / "out.sarif").read_text())["runs"]
        assert len(run["results"]) == (0 if code == 0 else 2)  # one a chip
    done = subprocess.run(  # as pre-commit calls a hook
        [*hook["entry"].split(), "nets.py:Inverse", "--input", "16", "--batch", "2", "--no-run"],
        env=environment, cwd=nets, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3
    assert "linalg_inv" in done.stdout


def test_the_documented_workflow_has_what_the_action_and_the_hook_take() -> None:
    yaml = pytest.importorskip("yaml")
    root = Path(__file__).resolve().parents[2]
    blocks = re.findall(r"```yaml\n(.*?)```", (root / "docs/integrations.md").read_text(), re.S)
    job, config = map(yaml.safe_load, blocks)
    (ours,) = [s for s in job["jobs"]["trains"]["steps"] if "ane_trainer@" in s["uses"]]
    known = yaml.safe_load((root / "action.yml").read_text())["inputs"]
    assert set(ours["with"]) <= set(known)
    assert {name for name, about in known.items() if about.get("required")} <= set(ours["with"])
    (hook,) = yaml.safe_load((root / ".pre-commit-hooks.yaml").read_text())
    assert [each["id"] for each in config["repos"][0]["hooks"]] == [hook["id"]]


def test_rewrites_are_told_op_by_op(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A norm by rows and values that leave fp16, each at its module with the reason; nothing where all is as it was."""
    (nets / "loud.py").write_text(LOUD)
    code, found = checked(capsys, f"{nets}/loud.py:Loud", "--input", "16", "--batch", "4", "--no-run")
    assert code == 0
    rewrites = found["chips"][0]["rewrites"]
    norms = [r for r in rewrites if r["op"] == "norm"]
    assert [r["where"].split(" ")[0] for r in norms] == ["norm"]
    assert "before it is squared" in norms[0]["change"]
    assert "256" in norms[0]["reason"]
    large = [r for r in rewrites if r["reason"].startswith("reaches")]
    assert large
    assert all("times 2^-" in r["change"] for r in large)
    assert any("loud.py:11" in r["where"] for r in large)
    run_command(["check", f"{nets}/loud.py:Loud", "--input", "16", "--batch", "4", "--no-run"])
    text = capsys.readouterr().out
    assert f"{len(rewrites)} rewritten to stay in range" in text
    assert "norm" in text
    _, quiet = checked(capsys, "nets.py:Frozen", "--input", "16", "--batch", "4", "--no-run")
    assert not [r for r in quiet["chips"][0]["rewrites"] if r["op"] == "norm"]


def test_chips_of_the_same_arithmetic_share_a_run(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ane_trainer.ane.chips.lookup import get_chip
    from ane_trainer.commands import check_runs
    from ane_trainer.commands.check_runs import CheckRuns
    from ane_trainer.commands.subjects import ModelSubject, Request, resolve

    ran: list[str] = []
    plain = check_runs.hazards
    monkeypatch.setattr(
        check_runs, "hazards", lambda few, step, chip: ran.append(chip) or plain(few, step, chip)
    )
    monkeypatch.setattr(check_runs, "_LIGHT", 1e-9)
    subject = resolve("nets.py:Cnn", Request("check", ((1, 8, 8),), 10, 16))
    assert isinstance(subject, ModelSubject)
    before = [p.clone() for p in subject.model.parameters()]
    runs = CheckRuns(subject, "e5rt", True)
    outcomes = []
    for name in ("m4", "m4-pro", "m1"):
        step, _ = runs.step(get_chip(name))
        outcomes.append(runs.outcome(step, get_chip(name)))
        step.discard()
    assert outcomes[0] is outcomes[1]
    assert ran == ["m4", "m1"]
    assert all(map(torch.equal, before, subject.model.parameters()))
    assert "batches of 16, run once on the first 8" in runs.sampled


def test_a_large_model_gets_a_smaller_batch_and_it_is_said(
    nets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_MACS", 2e4)  # of a forward pass; Cnn's has 2,344 an example
    run_command(["check", "nets.py:Cnn", "--input", "1x8x8", "--no-run", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "batches of 8 (more take long on this machine; --batch 128 asks for more)" in found["sampled"]
    monkeypatch.undo()
    monkeypatch.chdir(nets)
    run_command(["check", "nets.py:Mlp", "--input", "1x8x8", "--no-run", "--json"])
    assert (
        "batches of 128; nothing was run" in json.loads(capsys.readouterr().out.splitlines()[-1])["sampled"]
    )


def test_a_batch_beyond_the_memory_is_refused_before_it_is_made(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It filled the machine's memory first."""
    for words in (["nets.py:Cnn", "--input", "1x8x8"], ["nets.py:Regressor", "--input", "13"]):
        assert run_command(["check", *words, "--batch", "9999999999999"]) == 1
        error = capsys.readouterr().err
        assert "--batch needs at most" in error
        assert "got 9,999,999,999,999. Take fewer" in error


def test_a_model_without_outputs_is_told_so(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ended in PyTorch's traceback: targets for no classes cannot be drawn."""
    (nets / "none.py").write_text(
        "from torch import nn\n\nclass None_(nn.Linear):\n    def __init__(self):\n        super().__init__(4, 2)\n"
        "    def forward(self, x):\n        return super().forward(x)[:, :0]\n"
    )
    for command in ("check", "estimate", "debug", "trace"):
        assert run_command([command, "none.py:None_", "--input", "4", "--batch", "2"]) == 1
        assert "needs outputs; got an empty tensor, [2, 0]" in capsys.readouterr().err


def test_the_memory_of_an_example_goes_by_its_numbers() -> None:
    """Not by those of the weights, of which one example takes no more than many."""
    sizes = [
        batches.each_bytes(
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
            torch.zeros(n, 4),
            torch.zeros(2 * n, 4),
        )
        for n in (2, 50)
    ]
    assert sizes[0] == sizes[1]
    assert 12 * (4 + 8 + 8 + 2) <= sizes[0] <= 12 * 2 * (4 + 8 + 8 + 2)


def test_a_loss_of_the_users_own_takes_a_dict(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["check", "nets.py:Named", "--input", "8"]) == 1
    assert "dict of logits, inputs" in capsys.readouterr().err
    words = ("nets.py:Named", "--input", "8", "--batch", "4", "--loss", "nets.py:named_loss")
    code, found = checked(capsys, *words)
    assert (code, found["chips"][0]["verdict"]) == (0, "trains")
    spec = "torch.nn.functional:poisson_nll_loss"
    code, found = checked(capsys, "nets.py:Regressor", "--input", "13", "--batch", "4", "--loss", spec)
    assert (code, found["chips"][0]["verdict"]) == (0, "trains")


@pytest.mark.parametrize(
    ("broken", "reason", "healed"),
    [("Numpy", "takes a tensor's numbers out of PyTorch", "Torch"), ("Empty", "has no entries", "Torch")],
)
def test_what_no_program_can_do_is_refused_by_place(
    nets: Path, capsys: pytest.CaptureFixture[str], broken: str, reason: str, healed: str
) -> None:
    code, found = checked(capsys, f"nets.py:{broken}", "--input", "8", "--batch", "4")
    (problem,) = found["chips"][0]["refused"]
    assert (code, reason in problem["reason"]) == (3, True)
    assert "nothing was run" in found["sampled"]
    assert checked(capsys, f"nets.py:{healed}", "--input", "8", "--batch", "4", "--no-run")[0] == 0


def test_a_file_of_core_mls_is_checked_for_core_ml() -> None:
    from ane_trainer.commands.subjects import route_of

    assert [route_of(None, name) for name in ("net.mlpackage", "net.mil", "net.py:Net")] == [
        "coreml", "e5rt", "e5rt",
    ]  # fmt: skip
    assert route_of("direct", "net.mlpackage") == "direct"


def test_an_op_that_a_chip_lacks_names_the_first_that_runs_it(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("nets.py:Waves", "--input", "8", "--batch", "4", "--no-run")
    code, found = checked(capsys, *words, "--chip", "m1,m3")
    refused, healed = found["chips"]
    assert (code, refused["verdict"], healed["verdict"]) == (3, "does not train", "trains")
    assert all("M3 runs it; for M1" in problem["fix"] for problem in refused["refused"])


def test_sarif_places_are_addresses_of_files() -> None:
    """A path below the working folder stays one, an absolute one is a file's address, blanks are quoted."""

    def place(where: str, *sources: Path) -> tuple[str, int]:
        found = Verdict(
            "m", (ChipVerdict("m4", "M4", (Problem("refused", "error", where, "conv", "wide"),)),)
        )
        document: Any = found.to_sarif(sources)
        physical = document["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
        return physical["artifactLocation"]["uri"], physical["region"]["startLine"]

    assert place("f (pkg/net.py:7)") == ("pkg/net.py", 7)
    assert place("f (/opt/lib/net.py:9)") == ("file:///opt/lib/net.py", 9)
    assert place("f (net.py:7)", Path("my nets/net.py")) == ("my%20nets/net.py", 7)


SKIPS = """
import torch
from torch import nn

class Squares(nn.Linear):
    def __init__(self):
        super().__init__(16, 3)
    def forward(self, x):
        return (super().forward(x) * 300) ** 2

def smaller(output, target):
    return ((output - target) ** 2).mean() / 2**18
"""


def test_a_step_whose_updates_are_all_skipped_departs_and_its_fix_heals(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its loss agrees with fp32, but its gradients, some 1e9, fit into no unit: it was said to train."""
    (nets / "skips.py").write_text(SKIPS)
    code, found = checked(capsys, "skips.py:Squares", "--input", "16", "--batch", "8", "--loss", "mse")
    assert code == 3
    (problem,) = [p for p in found["chips"][0]["problems"] if p["rule"] == "agreement"]
    assert "changed no weight" in problem["reason"]
    assert "Divide the loss" in problem["fix"]
    loss = "skips.py:smaller"
    code, found = checked(capsys, "skips.py:Squares", "--input", "16", "--batch", "8", "--loss", loss)
    assert (code, found["chips"][0]["verdict"]) == (0, "trains")


LATER = """
import torch
from torch import nn

class Dead(nn.Module):
    def __init__(self, scale=1e-8):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.full((8,), float(scale)))
    def forward(self, x):
        return self.head(self.body(x) * self.scale * 1e4)

class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
    def forward(self, x):
        return 40 * self.head(torch.relu(self.body(x * 4)))

def summed(output, target):
    return ((output - 300 * target) ** 2).sum()

class Offset(nn.Module):
    def __init__(self, offset=300):
        super().__init__()
        self.offset, self.body, self.head = offset, nn.Linear(8, 8), nn.Linear(8, 3)
    def forward(self, x):
        h = self.body(x) + self.offset
        mean = h.mean(-1, keepdim=True)
        variance = (h * h).mean(-1, keepdim=True) - mean**2
        return self.head((h - mean) / torch.sqrt(variance + 1e-5))
"""


def test_a_step_that_stands_still_after_its_first_update_departs_and_its_fix_heals(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scale of 1e-8 gets a power of two that its first update, 1e-3, leaves: it was said to train."""
    (nets / "later.py").write_text(LATER)
    words = ("later.py:Dead", "--input", "8", "--batch", "8")
    code, found = checked(capsys, *words)
    (problem,) = [p for p in found["chips"][0]["problems"] if p["rule"] == "agreement"]
    assert (code, found["chips"][0]["verdict"]) == (3, "departs")
    assert "after the first update" in problem["reason"]
    assert "Dead (later.py:" in problem["reason"]
    assert "start the weights there nearer" in problem["fix"]
    code, found = checked(capsys, *words, "--model-arg", "scale=1e-3")
    assert (code, found["chips"][0]["verdict"]) == (0, "trains")


def test_a_small_model_runs_its_whole_batch(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gradients of a sum over 128 examples are beyond the smallest unit, those of 8 are not: it was said to train."""
    (nets / "later.py").write_text(LATER)
    words = ("later.py:Sum", "--input", "8", "--loss", "later.py:summed")
    code, found = checked(capsys, *words, "--batch", "128")
    (problem,) = [p for p in found["chips"][0]["problems"] if p["rule"] == "agreement"]
    assert (code, "run once on all of them" in found["sampled"]) == (3, True)
    assert "changed no weight" in problem["reason"]
    code, found = checked(capsys, *words, "--batch", "8")
    assert (code, found["chips"][0]["verdict"]) == (0, "trains")


def test_numbers_that_depart_are_told_and_not_what_follows_from_them(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its updates are skipped because its forward is wrong: a smaller loss, as it was told to take, heals nothing."""
    (nets / "later.py").write_text(LATER)
    words = ("later.py:Offset", "--input", "8", "--batch", "8")
    code, found = checked(capsys, *words)
    (problem,) = [p for p in found["chips"][0]["problems"] if p["rule"] == "agreement"]
    assert code == 3
    assert "departs from fp32" in problem["reason"]
    assert "Divide the loss" not in problem["fix"]
    assert "ane-trainer debug" in problem["fix"]  # which names the offset: tests/training/debugging
    code, found = checked(capsys, *words, "--model-arg", "offset=0")
    assert (code, found["chips"][0]["verdict"]) == (0, "trains")


def test_a_size_is_refused_once_with_the_way_out(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("nets.py:Wide", "--input", "4", "--batch", "2", "--no-run", "--chip", "m1,m4")
    code, found = checked(capsys, *words)
    (problem,) = found["chips"][0]["refused"]
    assert (code, found["chips"][1]["verdict"]) == (3, "trains")
    assert problem["fix"].count("16384 or less") == 1
    assert "M4 takes it" in problem["fix"]
