"""Damaged files and impossible wishes on the command line: each ends in one coded line that names what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from ane_trainer.cli import run_command

NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1)
    def forward(self, x):
        return self.layer(x)
def build():
    return Net()
"""
SHORT = ("--limit", "128", "--epochs", "1", "--out", "r")
HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1048576, 6291456), }"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a damaged configuration of each kind, a run of each, a model, and an array with a false header."""
    monkeypatch.chdir(tmp_path)
    for name, content in (("bytes", b"\xff\x00\xfe" * 99), ("deep", b"a=" + b"[" * 100_000)):
        (tmp_path / f"{name}.toml").write_bytes(content)
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_bytes(content)
    (tmp_path / "net.py").write_text(NET)
    header = HEADER.ljust(117) + b"\n"
    (tmp_path / "huge.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(99)
    )
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("train", "--config", "bytes.toml"), 1, "ANE105 bytes.toml: not TOML"),
        (("train", "--config", "deep.toml"), 1, "ANE105 deep.toml: not TOML"),
        (("evaluate", "bytes"), 1, "ANE105 bytes/config.toml: not TOML"),
        (("train", "--resume", "deep"), 1, "ANE105 deep/config.toml: not TOML"),
        (("train", "digits", "--hidden", "1000000000000", *SHORT), 2, "ANE211 memory: needs more"),
        (("train", "digits", "--lr", "1e6", *SHORT), 1, "got a learning rate of 1000000, which is"),
        (("train", "digits", "--model", "net.py", *SHORT), 1, "got the file alone. It has: Net, build."),
        (("check", "nothing.py"), 1, "There is no such file"),
        (("train", "digits", "--model", "net.py:Net", *SHORT), 1, "the model's output needs the shape [128, classes]"),
        (("train", "digits", "--log", "nothing", *SHORT), 1, "ANE121 log: needs a known tracker"),
        (("init", "--out", "/dev/null/x.toml"), 2, "ANE204 /dev/null"),
        (("run", "net.py"), 1, "MIL111 net.py: needs a .mil text"),
        (("conformance-read", "huge.npy"), 1, "DATA113 huge.npy"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_it_ends_in_one_coded_line_and_leaves_nothing(
    words: tuple[str, ...], code: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(words) == code
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not (folder / "r").exists()
