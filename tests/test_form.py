"""The form that the tree keeps (CONTRIBUTING.md): few entries a folder, short files and functions, few parameters."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ane_trainer"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}

#: Folder -> most entries, so that each can be read at a glance.
ENTRIES = {"": 14, "ane": 12}
HARD_STOP, LONG, MOST_LONG = 500, 400, 3
FUNCTION_LINES = 60
PARAMETERS = 8
#: Mentions of `Any`: not more than there are, which is less than half of what there were before the layers.
MOST_ANY = 695

#: Public constructors: every option has a name of its own (design: the public interface).
CONSTRUCTORS = {
    "Trainer.__init__", "Trainer.resume", "Trainer.export", "compile_step", "compile_forward", "run_training",
    "load_dataset",
}  # fmt: skip
#: Functions whose parameters are given from outside: torch's own functions, ANEForge's C interface; and, by their
#: decorators, lowering rules (ATen's schemas); commands have one parameter an option.
GIVEN_SIGNATURES = ("ane/capture/rewrites/", "interop/aneforge/library.py", "commands/")


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def functions() -> Iterator[tuple[Path, str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}{getattr(child, 'name', '')}"
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield name, child
            yield from walk(child, f"{name}." if hasattr(child, "name") else prefix)

    for path, tree in TREES.items():
        for name, node in walk(tree, ""):
            yield path, name, node


def test_folders_can_be_read_at_a_glance() -> None:
    for folder, most in ENTRIES.items():
        names = sorted(p.name for p in (PACKAGE / folder).iterdir() if p.name != "__pycache__")
        assert len(names) <= most, f"ane_trainer/{folder}: {len(names)} entries, at most {most}: {names}"


def test_every_file_says_its_job() -> None:
    silent = [
        path
        for path in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
        if (text := path.read_text()).strip() and not (ast.get_docstring(ast.parse(text)) or "").strip()
    ]
    assert not silent


def test_files_are_short() -> None:
    sizes = {path: lines_of(path) for path in SOURCES if path.name != "table.py"}
    assert not {path: n for path, n in sizes.items() if n > HARD_STOP}
    long = {str(path.relative_to(ROOT)): n for path, n in sizes.items() if n > LONG}
    assert len(long) <= MOST_LONG, long


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {name}: {node.end_lineno - node.lineno + 1} lines"
        for path, name, node in functions()
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_functions_have_few_parameters() -> None:
    many = []
    for path, name, node in functions():
        if node.decorator_list or str(path.relative_to(PACKAGE)).startswith(GIVEN_SIGNATURES):
            continue
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([a for a in given if a.arg not in ("self", "cls")])
        if count > PARAMETERS and name not in CONSTRUCTORS:
            many.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}: {count} parameters")
    assert not many, "\n".join(many)


def test_any_is_rare() -> None:
    assert sum(len(re.findall(r"\bAny\b", path.read_text())) for path in SOURCES) <= MOST_ANY


def test_nothing_hides_a_fault() -> None:
    hidden = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"except Exception|type: ignore\[override\]", line)
    ]
    assert not hidden, hidden
