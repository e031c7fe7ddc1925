"""The layers of docs/architecture.md: imports only go to lines above, siblings never import each other.

Every import counts, also one inside a function or under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ane_trainer"

#: Unit (a module or a whole package) -> its level. A unit may import units of lower levels, and itself.
LEVELS: dict[str, int] = {
    unit: level
    for level, units in enumerate(
        (
            ("__version__", "ane.errors", "utils"),
            ("ane.mil",),
            ("ane.chips", "ane.stages"),
            ("ane.simulator", "ane.capture", "ane.compiler"),
            ("ane.dispatch", "ane.verify", "interop"),
            ("ane.dynamo", "ane.export"),
            ("ane", "training"),
            ("data", "models"),
            ("core", "commands"),
            ("", "cli"),
            ("__main__",),
        )
    )
    for unit in units
}

#: Line 0 for everyone: what may be imported from anywhere besides the lines above.
LEAVES = {"__version__", "ane.errors"}


def unit_of(module: str) -> str:
    """The longest unit that `module` (dotted, without the package's name) belongs to."""
    parts = module.split(".") if module else []
    for length in range(len(parts), 0, -1):
        if (unit := ".".join(parts[:length])) in LEVELS:
            if unit == "ane" and len(parts) > 1:
                break
            return unit
    if not parts:
        return ""
    pytest.fail(
        f"ane_trainer.{module}: not in the table of layers; add it to LEVELS in {Path(__file__).name}"
    )


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split(".")) if name else PACKAGE
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imported_by(path: Path) -> set[tuple[str, int]]:
    """Modules of the package (without its name) that a file imports, with the line number."""
    own = module_of(path)
    package = own.split(".") if path.name == "__init__.py" else own.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join(
                    ["ane_trainer", *(part for part in above if part), *filter(None, [node.module])]
                )
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] != "ane_trainer":
                continue
            inner = name.removeprefix("ane_trainer").removeprefix(".")
            found.add((inner if is_module(inner) else inner.rpartition(".")[0], node.lineno))
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_lines_above(path: Path) -> None:
    own = unit_of(module_of(path))
    wrong = []
    for module, line in sorted(imported_by(path)):
        unit = unit_of(module)
        if unit != own and unit not in LEAVES and LEVELS[unit] >= LEVELS[own]:
            wrong.append(
                f"{path.relative_to(ROOT)}:{line}: {own or 'ane_trainer'} imports {unit or 'ane_trainer'}"
            )
    assert not wrong, "\n".join(wrong)


def test_simulator_shares_nothing_with_the_compiler() -> None:
    units = {
        unit_of(module)
        for path in (PACKAGE / "ane" / "simulator").rglob("*.py")
        for module, _ in imported_by(path)
    }
    assert units <= {"ane.simulator", "ane.errors", "ane.mil", "ane.opset", "ane.chips"}


def test_relative_and_nested_imports_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def f():\n    from ..stages import Port\n    import ane_trainer.utils\n    import numpy\n"
    monkeypatch.setattr(Path, "read_text", lambda self: source)
    assert imported_by(PACKAGE / "ane" / "simulator" / "made_up.py") == {("ane.stages", 2), ("utils", 3)}


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=str)
def test_every_file_says_its_job(path: Path) -> None:
    text = path.read_text()
    if text.strip():
        assert (ast.get_docstring(ast.parse(text)) or "").strip(), (
            f"{path}: needs a docstring that says the file's job"
        )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_exceeds_the_hard_stop(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 500 or path.stem.endswith("_data"), (
        f"{path}: {lines} lines; split it (tables end in _data.py)"
    )
