"""Faults in a user's model file: a coded error that shows the user's lines, and nothing of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from ane_trainer.ane.errors import UsageError
from ane_trainer.cli import run_command
from ane_trainer.commands.blame import SHOW_ALL, UserFaults, users_line
from ane_trainer.utils import did_you_mean

HEAD = "import sys\nimport torch\nfrom torch import nn\n"
NET = (
    HEAD + "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    "        self.layer = nn.Linear(64, 10)\n"
)
FORWARD = "    def forward(self, x):\n        return self."

FILES = {
    "import": (
        HEAD + "raise RuntimeError('no weights')\n",
        "net.py, line 4, in <module>: RuntimeError: no weights",
    ),
    "syntax": (HEAD + "def (\n", "net.py cannot be imported"),
    "exit": (HEAD + "sys.exit(7)\n", "net.py, line 4, in <module>: sys.exit(7)"),
    "init": (
        NET + "        self.broken = {}['a']\n" + FORWARD + "layer(x)\n",
        "line 8, in __init__: KeyError: 'a'",
    ),
    "forward": (NET + FORWARD + "lair(x)\n", "line 9, in forward: AttributeError: 'Net'"),
    "a text that fails": (
        NET + "    class Odd(Exception):\n        def __str__(self):\n            raise OSError\n"
        "    def forward(self, x):\n        raise Net.Odd\n",
        "line 12, in forward: Odd: <exception str() failed>",
    ),
    "shape": (NET + FORWARD + "layer(x)\n", "mat1 and mat2 shapes cannot be multiplied"),
}
#: What `check` feeds is the user's to say: it names the line, and the option.
FED = "; net.py, line 9, in forward). Give --input, --dtype int for tokens, and --batch"
CHECK = ("check", "--input", "1x8x8")
TRAIN = ("train", "digits", "--limit", "256", "--out", "r")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("command", [CHECK, TRAIN], ids=["check", "train"])
def test_a_fault_in_the_users_file_shows_the_users_line(
    kind: str,
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, said = FILES[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(text)
    model = ("net.py:Net",) if command[0] == "check" else ("--model", "net.py:Net")
    assert run_command([command[0], *model, *command[1:]]) == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert "ane_trainer/" not in shown
    assert "site-packages" not in shown
    if (command[0], kind) == ("check", "shape"):
        assert shown.startswith("DATA105 ")
        assert FED in shown
    else:
        assert shown.startswith("ANE102 " if kind == "syntax" else "ANE119 ")


def test_a_fault_of_ours_stays_a_traceback() -> None:
    with pytest.raises(TypeError), UserFaults():
        did_you_mean("a", [1, "b"])  # type: ignore[list-item]  raised in our own file


def test_the_whole_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_a_user() -> None:
        raise ValueError("wrong")

    with pytest.raises(UsageError, match="in of_a_user: ValueError: wrong"), UserFaults():
        of_a_user()
    monkeypatch.setenv(SHOW_ALL, "1")
    with pytest.raises(ValueError, match="wrong"), UserFaults():
        of_a_user()


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_packages_are_not_the_users_wherever_they_are(folder: str) -> None:
    code = compile("raise LookupError", f"/home/someone/.local/lib/python3/{folder}/rich.py", "exec")
    with pytest.raises(LookupError) as caught:
        exec(code)
    assert "rich.py" not in users_line(caught.value)
    with pytest.raises(LookupError) as caught:
        exec(compile("raise LookupError", "/home/someone/net.py", "exec"))
    assert users_line(caught.value) == "/home/someone/net.py, line 1, in <module>"
