"""The command line: commands, exit codes, errors, JSON, terminal, Ctrl-C; as a process where that matters."""

import contextlib
import errno
import importlib
import inspect
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file

from ane_trainer.__version__ import __version__
from ane_trainer.cli import COMMANDS, Command, run_command
from ane_trainer.commands.options import Output, takes_train_options
from ane_trainer.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TINY = ("train", "digits", "--hidden", "16", "--batch-size", "64", "--limit", "128", "--epochs", "1")


@dataclass(frozen=True)
class Done:
    """What a command left: exit code and output."""

    returncode: int
    stdout: str
    stderr: str


def run_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ane_trainer", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, env=ENVIRONMENT)


def run(*arguments: str, cwd: Path) -> Done:
    """The command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(arguments)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder with one finished run in runs/, and its result."""
    folder = tmp_path_factory.mktemp("work")
    done = run(*TINY, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_version_and_help(tmp_path: Path) -> None:
    assert run_process("--version", cwd=tmp_path).stdout.strip() == __version__
    for arguments in (("--help",), ("-h",), ()):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 0
        assert done.stderr == ""
        for panel in ("Train and use models", "Inspect", "Mac only"):
            assert panel in done.stdout
    assert "fetch" in run("data", cwd=tmp_path).stdout
    for command in COMMANDS:
        done = run(*command.name.split(), "-h", cwd=tmp_path)
        assert done.returncode == 0
        assert f"Usage: ane-trainer {command.name}" in done.stdout
        assert "--json" in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_summary_is_the_beginning_of_the_commands_own_help(command: Command) -> None:
    """Help of all commands is a table, so that no command has to be imported for it; it must not drift."""
    module = importlib.import_module(f"ane_trainer.commands.{command.module}")
    function = getattr(module, command.name.replace(" ", "_").replace("-", "_"))
    assert (function.__doc__ or "").splitlines()[0].startswith(command.summary.rstrip("."))


def test_help_errors_and_listings_do_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from ane_trainer.cli import run_command\n"
        "for words in ([], ['train', '-h'], ['check', '-h'], ['--version'], ['data'],\n"
        "              ['train', 'x', '--epochs', '0'], ['nonsense'], ['train', '--no-such']):\n"
        "    run_command(words)\n"
        "print([m for m in ('torch', 'numpy', 'llvmlite') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_field_of_the_configuration_is_an_option_with_help() -> None:
    done = run("train", "-h", cwd=Path.cwd())
    for name, field in TrainConfig.model_fields.items():
        assert field.description, f"{name}: Field(description=...) is the option's help"
        assert name == "dataset" or f"--{name.replace('_', '-')}" in done.stdout


def test_a_new_field_of_the_configuration_becomes_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wider(TrainConfig):
        tempo: float = Field(1.5, description="How fast.", json_schema_extra={"panel": "Music"})
        loud: bool = Field(True, description="With sound.")
        names: dict[str, str] = Field({}, description="By name.")

    monkeypatch.setattr("ane_trainer.commands.options.TrainConfig", Wider)

    def play(*, as_json: bool = False, options: Mapping[str, object] = {}) -> Output:
        return Output(dict(options), "")

    taken = takes_train_options(play)
    given = {name: None for name in inspect.signature(taken).parameters if name != "as_json"}
    assert taken(**{**given, "tempo": "1e6", "names": [], "loud": False}).values == {
        "tempo": "1e6",
        "loud": False,
    }
    option = typing.get_args(inspect.signature(taken).parameters["loud"].annotation)[1]
    assert option.param_decls == ("--no-loud",) or "--loud/--no-loud" in (option.default, *option.param_decls)


def test_json_result_is_the_last_line_and_equals_the_file(trained: tuple[Path, dict]) -> None:
    folder, result = trained
    assert result == json.loads((folder / result["run"] / "result.json").read_text())
    assert result["device"] == "sim"
    assert result["test_accuracy"] > 0.1


def test_plain_output_says_where_it_ran_and_what_to_type_next(tmp_path: Path) -> None:
    done = run_process(*TINY, "--out", "here", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"ane_trainer {__version__} - device: SIMULATOR of M4")
    assert "auto:" in lines[0]
    assert any(line.startswith("epoch 1/1") for line in lines)
    assert "ran on   simulator of M4, exact" in lines
    assert "known by" not in done.stdout
    time_line = next(line for line in lines if line.startswith("time  "))
    assert all(phase in time_line for phase in ("start ", "compile ", "train ")), time_line
    assert lines[-2].endswith("evaluate here")
    assert any(line.startswith("saved    here") for line in lines)
    text = (tmp_path / "here" / "report.html").read_text()
    for section in ("Curves", "Confusion matrix", "Worst samples", "Most expensive ops", "Environment"):
        assert section in text
    assert f"{json.loads((tmp_path / 'here' / 'analysis.json').read_text())['accuracy']:.2%}" in text
    rows = (tmp_path / "here" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 2
    assert rows[0].startswith("epoch,steps,train_loss")


def test_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "ane_trainer", *TINY, "--device", "cpu", "--epochs", "3"]
    environment = {**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=slave, stderr=slave, cwd=tmp_path, env=environment)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert process.wait(timeout=60) == 0
    assert b"\x1b[" in shown
    assert b"test accuracy" in shown


def test_evaluate_and_predict(trained: tuple[Path, dict]) -> None:
    folder, result = trained
    done = run("evaluate", result["run"], "--limit", "128", "--json", cwd=folder)
    assert json.loads(done.stdout)["test_accuracy"] == result["test_accuracy"]
    assert "test accuracy" in run("evaluate", "last", cwd=folder).stdout
    done = run("predict", "last", "--index", "0", "--json", cwd=folder)
    assert len(json.loads(done.stdout)["predictions"]) == 1
    np.save(folder / "x.npy", np.zeros((2, 8, 8), dtype=np.float32))
    done = run("predict", result["run"], "--input", "x.npy", cwd=folder)
    assert len(done.stdout.splitlines()) == 2


def test_check_and_estimate(tmp_path: Path) -> None:
    done = run("check", "mlp", "--input", "1x8x8", "--batch", "16", "--chip", "m1,m4", "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert [chip["fits"] for chip in json.loads(done.stdout)["chips"]] == [True, True]
    done = run("estimate", "mlp", "--input", "1x8x8", "--batch", "16", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["latency_us"] > 0
    assert "most expensive ops" in run("estimate", "mlp", "--input", "1x8x8", cwd=tmp_path).stdout


UNSUPPORTED = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
    def forward(self, x):
        a = torch.linalg.det(self.layer.weight[:, :10])
        return torch.fft.fft(self.layer(x.flatten(1))).real + torch.linalg.inv(torch.eye(10) + a).sum()
"""


def test_unsupported_model_lists_every_op_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(UNSUPPORTED)
    done = run("check", "net.py:Net", "--input", "1x8x8", "--batch", "4", cwd=tmp_path)
    assert done.returncode == 3
    assert "net.py:8" in done.stdout
    assert "net.py:9" in done.stdout
    done = run(*TINY[:2], *TINY[4:], "--model", "net.py:Net", "--json", cwd=tmp_path)
    assert done.returncode == 3
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error["code"].startswith("ANE30")
    assert len(error["findings"]) >= 2


def test_data_list_and_doctor(tmp_path: Path) -> None:
    rows = json.loads(run("data", "list", "--json", cwd=tmp_path).stdout)["datasets"]
    assert {row["name"] for row in rows} >= {"mnist", "fashion-mnist", "digits"}
    done = run("doctor", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 0
    assert {"simulator", "python", "machine"} <= {check["subject"] for check in found["checks"]}
    assert " ok " in run("doctor", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code", "words"),
    [
        (["trian"], 1, "ANE100", "train"),
        (["train"], 1, "ANE100", "train mnist"),
        (["train", "digits", "--no-such"], 1, "ANE100", "--no-such"),
        (["train", "digits", "--epochs", "many"], 1, "ANE104", "--epochs"),
        (["train", "digits", "--epochs", "0"], 1, "ANE104", "epochs"),
        (["train", "digits", "--lr", "-1", "--momentum", "2"], 1, "ANE104", "momentum"),
        (["train", "digits", "--hidden", "a"], 1, "ANE104", "--hidden"),
        (["train", "mnsit"], 1, "DATA101", "mnist"),
        (["train", "digits", "--model", "mpl"], 1, "ANE102", "mlp"),
        (["train", "digits", "--model", "nowhere.py:Net"], 1, "ANE102", "nowhere.py"),
        (["train", "digits", "--chip", "m44"], 1, "ANE100", "m4"),
        (["train", "digits", "--device", "gpu"], 1, "ANE101", "cpu"),
        (["train", "digits", "--device", "e5rt"], 2, "ANE202", "sim"),
        (["train", "digits", "--fidelity", "exat"], 1, "ANE104", "exact"),
        (["train", "digits", "--optimizer", "lion"], 1, "ANE104", "adam"),
        (["train", "digits", "--loss", "crossentropy"], 1, "ANE100", "cross_entropy"),
        (["train", "digits", "--out", "/dev/null/x"], 2, "ANE204", "--out"),
        (["train", "digits", "--config", "none.toml"], 1, "ANE105", "none.toml"),
        (["train", "digits", "--batch-size", "100000"], 1, "DATA102", "batch"),
        (["train", "--resume", "nowhere"], 1, "CKPT101", "nowhere"),
        (["train", "--resume", "nowhere", "--lr", "1"], 1, "ANE107", "lr"),
        (["evaluate", "nowhere"], 1, "CKPT101", "nowhere"),
        (["predict", "nowhere"], 1, "ANE108", "--index"),
        (["check", "mlp", "--input", "1y8"], 1, "ANE104", "--input"),
        (["estimate", "mlp", "--chip", "m9"], 1, "ANE100", "m5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_have_code_exit_code_and_no_traceback(
    arguments: list[str], exit_code: int, code: str, words: str, tmp_path: Path
) -> None:
    done = run(*arguments, "--json", cwd=tmp_path)
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error["exit_code"] == exit_code
    assert done.stderr.endswith(f"{error['code']} {error['message']}\n")
    assert error["code"] == code
    assert words in error["message"]


def test_config_file_and_options_on_top(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        'dataset = "digits"\nhidden = [16]\nlimit = 128\nbatch_size = 64\nepochs = 3\n'
    )
    done = run(
        "train",
        "--config",
        "c.toml",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--json",
        "--out",
        "r",
        cwd=tmp_path,
    )
    assert json.loads(done.stdout.splitlines()[-1])["epochs"] == 1
    assert "hidden = [16]" in (tmp_path / "r" / "config.toml").read_text()


def test_diverging_run_exits_with_4(tmp_path: Path) -> None:
    done = run_process(*TINY, "--device", "cpu", "--optimizer", "sgd", "--lr", "1e38", cwd=tmp_path)
    assert done.returncode == 4
    assert done.stderr.startswith("ANE401 ")
    assert "Traceback" not in done.stderr


def test_ctrl_c_writes_a_checkpoint_and_resume_gives_the_same_bits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ane_trainer", *TINY[:-2], "--epochs", "100000", "--out", "cut"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "ANE130" in stderr
    found = re.search(r"stopped at epoch (\d+), .* --resume cut", stderr)
    assert found is not None, stderr
    epochs = str(int(found[1]) + 2)
    done = run("train", "--resume", "cut", "--epochs", epochs, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(json.loads(done.stdout.splitlines()[-1])["epochs"]) == epochs
    assert run(*TINY[:-2], "--epochs", epochs, "--out", "whole", cwd=tmp_path).returncode == 0
    cut, whole = (load_file(tmp_path / name / "weights.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_example_runs(tmp_path: Path) -> None:
    example = ROOT / "example.py"
    text = example.read_text().replace('"mnist", batch_size=128, seed=0', '"digits", 64, 0, limit=128')
    text = text.replace(
        "nn.Linear(784, 256), nn.GELU(), nn.Linear(256, 10)",
        "nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10)",
    )
    assert "digits" in text
    assert "Linear(64, 16)" in text
    done = subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert "predicted" in done.stdout


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_ctrl_c_and_a_reader_that_left_end_without_a_traceback(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stopped() -> None:
        raise error(errno.EPIPE, "gone") if error is BrokenPipeError else error

    monkeypatch.setattr("ane_trainer.commands.data.dataset_rows", stopped)
    code = run_command(["data", "list"])
    told = capfd.readouterr().err
    assert (code, told.count("\n")) == ((130, 1) if error is KeyboardInterrupt else (141, 0))


def test_prose_is_wrapped_below_its_label_and_tables_stay() -> None:
    from ane_trainer.commands.options import wrapped

    text = "chip  verdict  ops  first step\n  1  note    [m4] a long line of words\nM4: some words"
    assert wrapped(text, 24).split("\n") == [
        "chip  verdict  ops  first step",
        "  1  note    [m4] a long",
        "             line of",
        "             words",
        "M4: some words",
    ]
