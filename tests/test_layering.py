"""The levels of docs/architecture.md: imports only go to lower levels, units of one level never import each other.

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
            ("core",),
            ("", "commands"),
            ("cli", "testing"),
        )
    )
    for unit in units
}

#: What may be imported from anywhere, also from its own level.
LEAVES = {"__version__", "ane.errors"}


def unit_of(module: str) -> str:
    """The longest unit that `module` (dotted, without the package's name) belongs to."""
    if module == "__main__":  # the same door as cli
        return "cli"
    parts = module.split(".") if module else []
    for length in range(len(parts), 0, -1):
        if (unit := ".".join(parts[:length])) in LEVELS:
            if unit == "ane" and len(parts) > 1:
                break
            return unit
    if not parts:
        return ""
    pytest.fail(f"ane_trainer.{module}: has no level; add it to LEVELS in {Path(__file__).name}")


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


def test_imports_only_go_to_lower_levels() -> None:
    wrong = []
    for path in SOURCES:
        own = unit_of(module_of(path))
        for module, line in sorted(imported_by(path)):
            unit = unit_of(module)
            if unit != own and unit not in LEAVES and LEVELS[unit] >= LEVELS[own]:
                wrong.append(
                    f"{path.relative_to(ROOT)}:{line}: {own or 'ane_trainer'} imports {unit or 'ane_trainer'}"
                )
    assert not wrong, "\n".join(wrong)


def imported_below(*folders: str) -> set[str]:
    return {
        module
        for folder in folders
        for path in PACKAGE.joinpath(*folder.split(".")).rglob("*.py")
        for module, _ in imported_by(path)
    }


def test_the_simulator_shares_nothing_with_the_compiler_nor_with_its_witness() -> None:
    modules = imported_below("ane.simulator")
    assert {unit_of(m) for m in modules} <= {"ane.simulator", "ane.errors", "ane.mil", "ane.chips", "utils"}
    assert not [m for m in modules if m.startswith("ane.mil.semantics")]


def test_capture_imports_nothing_of_the_compiler() -> None:
    assert not [m for m in imported_below("ane.capture") if unit_of(m) == "ane.compiler"]


def test_relative_and_nested_imports_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def f():\n    from ..stages import Port\n    import ane_trainer.utils\n    import numpy\n"
    monkeypatch.setattr(Path, "read_text", lambda self: source)
    assert imported_by(PACKAGE / "ane" / "simulator" / "made_up.py") == {("ane.stages", 2), ("utils", 3)}
