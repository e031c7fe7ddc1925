"""The documentation site: builds without a warning, its pages run, and a newcomer finds what is looked for."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from ane_trainer.cli import COMMANDS, build_app
from docs._generate.reference import FOLDER, pages

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"(?:<!-- (not run|setup):(.*?)-->\n)?```(python|console)\n(.*?)```", re.DOTALL)
#: Blocks that are shown and not run, each with its reason in the page; none may be added without one going.
MOST_NOT_RUN = 7
#: What a newcomer looks for -> where it is, within one click of the start page.
LOOKED_FOR = {
    "own model": "tutorials/own-model.md",
    "own data": "data.md",
    "check a chip": "tutorials/own-model.md#check-a-chip",
    "export to an app": "export.md",
    "what the simulator promises": "fidelity.md",
    "what an error code means": "errors.md",
}


def blocks(page: Path, language: str) -> Iterator[tuple[str, str]]:
    """(hidden set-up before it, text) of each block that is to be run."""
    for kind, note, found, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if found == language and kind != "not run":
            yield (note.strip() if kind == "setup" else ""), text


def test_the_reference_is_current() -> None:
    for name, text in pages().items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, "run: python -m docs._generate.reference"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "site" / "reference" / "api" / "index.html").exists()
    for page in LOOKED_FOR.values():
        assert clicks(tmp_path / "site", page) <= 3


def clicks(site: Path, page: str) -> int:
    """How many links lead from the built start page to the page, and to its heading."""
    file, _, anchor = page.partition("#")
    wanted, seen = site / file.removesuffix(".md"), {site}
    pages = [site]
    for count in range(4):
        if wanted in pages:
            assert not anchor or f'id="{anchor}"' in (wanted / "index.html").read_text(encoding="utf-8")
            return count
        links = [
            (page / link.partition("#")[0]).resolve()
            for page in pages
            for link in re.findall(r'href="([^":]*)"', (page / "index.html").read_text(encoding="utf-8"))
        ]
        pages = [link for link in dict.fromkeys(links) if (link / "index.html").exists() and link not in seen]
        seen.update(pages)
    return 4


def test_every_page_has_its_place() -> None:
    named = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    assert named == {str(page.relative_to(DOCS)) for page in PAGES}


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", LOOKED_FOR.values(), ids=LOOKED_FOR.keys())
def test_a_newcomer_finds_it_from_the_start_page(page: str) -> None:
    assert f"]({page})" in (DOCS / "index.md").read_text(encoding="utf-8")
    file, _, anchor = page.partition("#")
    headings = re.findall(r"^#+ (.*)$", (DOCS / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert not anchor or anchor in {re.sub(r"\W+", "-", heading.lower()).strip("-") for heading in headings}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(blocks(p, "python"))], ids=lambda p: str(p.relative_to(DOCS))
)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem, "PAGE": page}
    with (
        warnings.catch_warnings(),
        (tmp_path / "printed").open("w") as printed,
        contextlib.redirect_stdout(printed),
    ):
        warnings.simplefilter("ignore")
        for setup, text in blocks(page, "python"):
            exec(compile(setup, f"{page.name}: setup", "exec"), namespace)
            exec(compile(text, str(page), "exec"), namespace)


def test_few_blocks_are_only_shown() -> None:
    notes = [
        note for page in PAGES for kind, note, *_ in BLOCK.findall(page.read_text()) if kind == "not run"
    ]
    assert all(note.strip() for note in notes)
    assert len(notes) <= MOST_NOT_RUN


def test_commands_of_the_pages_have_the_options_that_they_are_shown_with() -> None:
    names = sorted((command.name for command in COMMANDS), key=len, reverse=True)
    for page in [*PAGES, ROOT / "README.md"]:
        for _, text in blocks(page, "console"):
            for line in re.findall(
                r"^\$ (?:torchrun .*-m ane_trainer|ane-trainer) (.*)$", text, flags=re.MULTILINE
            ):
                words = shlex.split(line, comments=True)
                if words[:1] == ["--install-completion"]:
                    continue
                name = next((n for n in names if words[: len(n.split())] == n.split()), None)
                assert name is not None, f"{page.name}: {line}"
                options = [word.partition("=")[0] for word in words if word.startswith("--")]
                assert set(options) <= known_options(name), f"{page.name}: {line}"


def known_options(name: str) -> set[str]:
    """The long options of a command."""
    import typer.main

    command = typer.main.get_command(build_app(name.split()))
    for word in name.split():
        command = command.commands[word]  # type: ignore[attr-defined]
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "own_model", "language_model"])
def test_notebooks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    namespace: dict[str, object] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), name, "exec"), namespace)
