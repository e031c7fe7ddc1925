"""What an installer reads: lowest versions, pins with hashes, extras, the jobs of the workflow file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lines(name: str) -> list[str]:
    """The requirements of a list, each with its hashes on one line."""
    text = (ROOT / "requirements" / name).read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_command_has_the_name_of_the_package_as_well() -> None:
    """`uvx NAME` and `pipx run NAME` look for a command of the package's name."""
    assert PROJECT["scripts"][PROJECT["name"]] == PROJECT["scripts"]["ane-trainer"]


def test_the_lowest_versions_are_those_that_the_package_admits() -> None:
    admitted = {}
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        (lowest,) = [s.version for s in requirement.specifier if s.operator == ">="]
        admitted[requirement.name] = lowest
    written = dict(line.split("==") for line in lines("lowest.txt"))
    assert written.keys() == admitted.keys()
    for name, version in written.items():
        assert version == admitted[name] or version == f"{admitted[name]}.0", name


def test_every_pin_has_hashes_and_torch_is_chosen_by_the_machine() -> None:
    for name in ("base.txt", "dev.txt"):
        pins = lines(name)
        assert all(re.match(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", line) for line in pins)
        assert not [line for line in pins if line.startswith(("torch==", "nvidia-", "triton"))]
    assert [line.split("==")[0] for line in lines("torch.txt")] == ["torch"]


def test_pins_are_versions_that_the_package_admits() -> None:
    pinned = {
        m[1].lower().replace("_", "-"): m[2]
        for m in (
            re.match(r"([\w.-]+)==([^\s;]+)", line) for line in [*lines("dev.txt"), *lines("torch.txt")]
        )
        if m
    }
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for text in wanted:
        requirement = Requirement(text)
        version = pinned[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version, prereleases=True), text


def test_extras_resolve_on_every_python_that_the_package_admits() -> None:
    """coremltools has no release for 3.14, so its extras leave it out there."""
    for texts in PROJECT["optional-dependencies"].values():
        for requirement in map(Requirement, texts):
            if requirement.name == "coremltools":
                assert requirement.marker is not None
                assert not requirement.marker.evaluate({"python_version": "3.14"})
                assert requirement.marker.evaluate({"python_version": "3.13"})


def test_the_workflow_runs_targets_of_the_makefile() -> None:
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    targets = re.findall(r"(?:target: |make )([a-z-]+)", workflow)
    assert {"test-lowest", "check", "test-newest", "test-next"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text()
    assert all(
        re.search(rf"^[a-z -]*\b{target}\b[a-z -]*:", makefile, flags=re.MULTILINE) for target in targets
    )
