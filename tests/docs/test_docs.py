"""The documents say what the code does: error codes, commands, links and the README's first screen."""

import os
import re
from pathlib import Path

import pytest

from ane_trainer.ane import errors
from ane_trainer.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
CODE = re.compile(r'"((?:ANE|DATA|CKPT|MIL|SIM)\d{3})"')
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def sections() -> dict[str, str]:
    """Error code -> the group that docs/errors.md has it in."""
    group, found = "", {}
    for line in (ROOT / "docs" / "errors.md").read_text().splitlines():
        if line.startswith("## "):
            group = line[3:]
        elif line.startswith("### "):
            assert line[4:] not in found, f"{line[4:]} is documented twice"
            found[line[4:]] = group
    return found


def test_every_error_code_is_documented_and_no_other() -> None:
    used = {code for path in (ROOT / "ane_trainer").rglob("*.py") for code in CODE.findall(path.read_text())}
    assert used == set(sections())


def test_exit_codes_are_those_of_the_documented_groups() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.AneTrainerError)
    ]
    groups = sections()
    for kind in kinds:
        allowed = re.search(r"\(exit codes? ([^)]*)\)", groups[kind.code])
        assert allowed is not None
        assert str(kind.exit_code) in re.findall(r"\d+", allowed[1]), kind


def test_readme_begins_with_the_two_commands() -> None:
    first_screen = (ROOT / "README.md").read_text().splitlines()[:25]
    assert any("make train" in line for line in first_screen)
    assert any("make test" in line for line in first_screen)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for path in DOCUMENTS:
        named = set(re.findall(r"(?:^\$ |`)make ([a-z0-9-]+)", path.read_text(), flags=re.MULTILINE))
        assert named <= targets, path.name


def test_readme_names_every_command() -> None:
    listed = {command.name.split()[0] for command in COMMANDS} - {"conformance-read"}
    named = set(re.findall(r"ane-trainer ([a-z]+)", (ROOT / "README.md").read_text()))
    assert "train" in listed
    assert listed == named


def test_readme_shows_real_output() -> None:
    shown = (
        (ROOT / "README.md").read_text().split("<!-- output: begin -->")[1].split("<!-- output: end -->")[0]
    )
    assert "test accuracy 9" in shown
    assert "device: SIMULATOR of M4" in shown


def test_ci_runs_a_command_of_the_readme() -> None:
    command = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1].removeprefix("exec ")
    assert command in (ROOT / "README.md").read_text()


def test_architecture_names_places_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([\w./<>]+)`", text)) | set(re.findall(r"  (ane/[\w./]+)$", text, re.MULTILINE))
    paths = sorted(name for name in named if "/" in name or name.endswith((".py", ".csv", ".md")))
    assert len(paths) > 25
    homes = (ROOT, ROOT / "docs", ROOT / "ane_trainer", ROOT / "ane_trainer" / "ane")
    missing = [
        path
        for path in paths
        if not any(any(home.glob(re.sub(r"<\w+>", "*", path).rstrip("/"))) for home in homes)
    ]
    assert not missing


def test_architecture_says_where_to_go_for_each_task() -> None:
    rows = re.findall(
        r"^\| (an? [\w ]+|the checkpoint format) \| (.*) \|$",
        (ROOT / "docs" / "architecture.md").read_text(),
        re.MULTILINE,
    )
    tasks = (
        "an op",
        "a chip",
        "a dataset",
        "a command",
        "a device",
        "a loss",
        "an optimizer",
        "the checkpoint format",
    )
    assert set(tasks) <= dict(rows).keys()
    assert all(".py`" in dict(rows)[task] for task in tasks)
