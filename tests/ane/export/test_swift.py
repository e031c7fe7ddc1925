"""The Swift package around a step: its sources parse, its generated arithmetic is that of the trainer's Python."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from ane_trainer import Trainer
from ane_trainer.ane.capture.optimizers.formulas import evaluate
from ane_trainer.ane.export.manifest import read_manifest
from ane_trainer.ane.export.swift import (
    camel,
    expression,
    folding_vector,
    mean_vector,
    scalars_source,
    vectors_source,
)
from ane_trainer.ane.mil.loading import load_program
from ane_trainer.ane.simulator import make_context, prepare
from ane_trainer.commands.conformance.evidence import rows_of
from ane_trainer.commands.conformance.report import FORMAT
from ane_trainer.commands.conformance.suite import VERSION

pytest.importorskip("coremltools")
tree_sitter = pytest.importorskip("tree_sitter")
grammar = pytest.importorskip("tree_sitter_swift")

DRIVER = Path(__file__).parents[3] / "examples" / "drive_step.py"
PARSER = tree_sitter.Parser(tree_sitter.Language(grammar.language()))


def parse(source: str) -> Any:
    root = PARSER.parse(source.encode()).root_node
    assert not root.has_error, source
    return root


def driver() -> Any:
    spec = importlib.util.spec_from_file_location("drive_step", DRIVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(i)
    return torch.randn(8, 1, 8, 8, generator=draw), torch.randint(0, 4, (8,), generator=draw)


@pytest.fixture(scope="module")
def trained() -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 16), nn.GELU(),
        nn.Linear(16, 4),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        [{"params": model[:4].parameters()}, {"params": model[4:].parameters(), "lr": 1e-2}], lr=1e-3
    )
    trainer = Trainer(model, loss="cross_entropy", optimizer=optimizer, device="sim", chip="m4")
    trainer.fit([batch(i) for i in range(3)], epochs=1)
    return trainer


@pytest.fixture(scope="module")
def app(trained: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    report = trained.export(folder, "app", data=[batch(0)])
    assert report.largest_difference == 0
    assert "Swift" in str(report.unverified)
    return folder


RESOURCES = Path("Sources/EngineTraining/Resources")


def test_every_source_parses_and_uses_apples_frameworks_only(app: Path) -> None:
    sources = sorted(app.rglob("*.swift"))
    assert {p.name for p in sources} >= {
        "Package.swift",
        "TrainingStep.swift",
        "Scalars.swift",
        "Vectors.swift",
    }
    known = {
        "Foundation",
        "AppKit",
        "CoreML",
        "SwiftUI",
        "Charts",
        "Observation",
        "XCTest",
        "PackageDescription",
        "EngineTraining",
    }
    for path in sources:
        text = path.read_text()
        parse(text)
        assert {
            line.split()[-1] for line in text.splitlines() if line.startswith(("import", "@testable"))
        } <= known


def test_no_module_has_a_type_of_its_own_name(app: Path) -> None:
    """`Name.Type` then means a member of the type, and nothing outside can name what else the module holds."""
    for folder in (app / "Sources").iterdir():
        text = "".join(path.read_text() for path in folder.glob("*.swift"))
        kinds = re.findall(r"\b(?:class|struct|enum|actor|protocol|typealias) (\w+)", text)
        assert len(kinds) > 2
        assert folder.name not in kinds


def test_the_resources_are_those_that_the_sources_name(app: Path) -> None:
    names = {p.name for p in (app / RESOURCES).iterdir()}
    assert names == {
        "step.mlpackage", "step.json", "step.safetensors", "conformance.safetensors", "run.json", "run.safetensors",
        "predict.mlpackage",
    }  # fmt: skip
    manifest = json.loads((app / RESOURCES / "step.json").read_text())
    state = load_file(app / RESOURCES / "step.safetensors")
    assert set(state) == set(manifest["aliases"].values())
    fed = {f"in/{row['name']}" for row in manifest["inputs"]}
    vectors = load_file(app / RESOURCES / "conformance.safetensors")
    assert set(vectors) == fed | {f"out/{row['name']}" for row in manifest["outputs"]}


def test_the_predictor_with_the_steps_weights_gives_the_models_answer(app: Path, trained: Trainer) -> None:
    (function,) = load_program(app / RESOURCES / "predict.mlpackage").functions
    state = load_file(app / RESOURCES / "step.safetensors")
    wanted = {v.name for v in function.inputs} - {"x"}
    assert wanted <= set(state)
    x, _ = batch(7)
    got = prepare(function, make_context("m4")).run(
        {"x": x[:1].numpy().astype(np.float16), **{name: state[name] for name in wanted}}
    )["output"]
    want = trained.model.eval()(x[:1]).detach().numpy()
    np.testing.assert_allclose(got, want, atol=2e-2)


def test_the_recorded_run_is_what_the_step_does_from_its_files(
    app: Path, tmp_path: Path, trained: Trainer
) -> None:
    """Driven by the manifest alone: losses, counts, units and state; of an MLP units move, batches run again."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = Trainer(model, loss="cross_entropy", optimizer=sgd, device="sim", chip="m4")
    plain.fit([batch(i) for i in range(2)], epochs=1)
    before = {name: value.clone() for name, value in plain.model.state_dict().items()}
    plain.export(tmp_path, "app", data=[batch(0), batch(1)])
    assert all(torch.equal(value, before[name]) for name, value in plain.model.state_dict().items())
    moved = []
    for folder in (app, tmp_path):
        driven = driver().open_package(folder / RESOURCES / "step.mlpackage")
        tensors = load_file(folder / RESOURCES / "run.safetensors")
        steps = json.loads((folder / RESOURCES / "run.json").read_text())["steps"]
        assert len(steps) == 4
        for i, want in enumerate(steps):
            head = f"{i}/"
            fed = {name.removeprefix(head): a for name, a in tensors.items() if name.startswith(head)}
            assert driven.step(fed) == want["loss"]
            assert driven.updates == want["updates"]
            assert [p["unit"] for p in driven.parameters.values()] == want["units"]
        for port, value in driven.state.items():
            assert value.tobytes() == tensors[f"state/{port}"].astype(value.dtype).tobytes(), port
        moved.append(steps[1]["units"] != steps[2]["units"])
    assert moved[1]
    assert trained.step is not None


# -- The Swift arithmetic


_TOKEN = re.compile(r"\s*(\d[\d.]*(?:e[+-]?\d+)?|[A-Za-z_][\w.]*|<=|[-+*/?:(){},])")
_CALLS = {"pow": math.pow, "sqrt": math.sqrt, "min": min, "max": max, "abs": abs}


class Swift:
    """Evaluates an expression of Swift: conditions, sums, products, signs, calls, and `product(n) { i in ... }`."""

    def __init__(self, text: str, known: dict[str, float]) -> None:
        self.tokens, self.known = [*_TOKEN.findall(text), ""], known

    def take(self, *wanted: str) -> str:
        if wanted and self.tokens[0] not in wanted:
            return ""
        return self.tokens.pop(0)

    def value(self) -> float:
        condition = self.sum()
        if self.take("<="):
            condition = condition <= self.sum()
        if not self.take("?"):
            return condition
        first = self.value()
        assert self.take(":")
        second = self.value()
        return first if condition else second

    def sum(self) -> float:
        total = self.term()
        while sign := self.take("+", "-"):
            total = total + self.term() if sign == "+" else total - self.term()
        return total

    def term(self) -> float:
        total = self.factor()
        while sign := self.take("*", "/"):
            total = total * self.factor() if sign == "*" else total / self.factor()
        return total

    def factor(self) -> float:
        if self.take("-"):
            return -self.factor()
        if self.take("("):
            value = self.value()
            assert self.take(")")
            return value
        word = self.take()
        if not self.take("("):
            return self.known[word] if word[0].isalpha() else float(word)
        given = [self.value()]
        while self.take(","):
            given.append(self.value())
        assert self.take(")")
        return self.product(int(given[0])) if word == "product" else _CALLS[word](*given)

    def product(self, count: int) -> float:
        assert (self.take(), self.take(), self.take()) == ("{", "i", "in")
        body, result = self.tokens, 1.0
        for i in range(1, count + 1):
            self.tokens, self.known["i"] = list(body), float(i)
            result *= self.value()
        assert self.take("}")
        return result


def bodies(source: str) -> dict[str, str]:
    """The expressions of functions of one line, by name."""
    found = re.findall(r"static func (\w+)\(_ o: [^{]*\{\n\s+(.*)\n", source)
    return dict(found)


def test_the_scalars_in_swift_are_those_of_the_trainer(app: Path, trained: Trainer) -> None:
    source = (app / "Sources/EngineTraining/Scalars.swift").read_text()
    assert re.search(r"\bSelf\.units\(", source), (
        "a bare name is the argument `units`, which cannot be called"
    )
    functions = bodies(source)
    manifest = read_manifest(app / RESOURCES / "step.mlpackage")
    step = trained.step
    assert step is not None
    wanted = step.scalars()
    groups = manifest["settings"]
    for target, row in manifest["scalars"].items():
        parameters = [p for p in manifest["parameters"] if p["name"] in row.get("parameters", ())]
        own = parameters or [{"group": row["group"], "unit": 1.0}]
        got = []
        for p in own:
            name = camel(target) + (str(p["group"]) if len(row.get("formula_by_group", [])) > 1 else "")
            known = {"t": float(step.applied_steps + 1), "unit": p["unit"], "shift": manifest["shift"]}
            known |= {f"o.{camel(key)}": value for key, value in groups[p["group"]].items()}
            known["common"] = min(q["unit"] for q in manifest["parameters"])
            got.append(Swift(functions[name], known).value())
        assert got == wanted[target], target


@pytest.mark.parametrize(
    "formula", ["1.0 - beta1 ** t", "-(lr * 2.0) / (1.0 - (beta1 - lr))", "1.0 if t <= 5 else lr / t",
                "product(lambda i: beta1 * (1.0 - 0.5 * 0.96 ** i), t)", "min(lr, 1.0 / sqrt(t)) * -4.0"],
)  # fmt: skip
def test_expressions_keep_their_meaning(formula: str) -> None:
    text = expression(formula, ["lr", "beta1"])
    parse(f"let f = {text}\n")
    for t in (1.0, 5.0, 6.0):
        known = {"lr": 0.3, "beta1": 0.9, "t": t}
        assert Swift(text, {"o.lr": 0.3, "o.beta1": 0.9, "t": t}).value() == evaluate(formula, known)


def nodes(node: Any, kind: str) -> Iterator[Any]:
    if node.type == kind:
        yield node
    for child in node.children:
        yield from nodes(child, kind)


def numbers(node: Any) -> Any:
    """Literals of an array or tuple in Swift as Python values."""
    match node.type:
        case "array_literal":
            return [numbers(child) for child in node.named_children]
        case "tuple_expression":
            return [numbers(child) for child in node.named_children if child.type != "simple_identifier"]
        case "prefix_expression":
            return -numbers(node.named_children[-1])
    return float(node.text)


def test_vectors_of_folding_and_averaging_hold_against_python(app: Path) -> None:
    """The literals in the Swift tests, given to the reference that they came from and to PyTorch."""
    root = parse((app / "Tests/EngineTrainingTests/Vectors.swift").read_text())
    tables = {}
    for node in nodes(root, "property_declaration"):
        name = next(nodes(node, "pattern")).text.decode()
        tables[name] = node.child_by_field_name("value") or node.named_children[-1]
    ((high, residual, factor, folded),) = numbers(tables["folding"])
    again = folding_vector(np.array(folded, np.float32), factor)
    for got, want in zip(again, (high, residual, folded), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    ((models, examples, mean),) = numbers(tables["averaging"])
    stacked = torch.tensor(models, dtype=torch.float64)
    share = torch.tensor(examples, dtype=torch.float64) / sum(examples)
    np.testing.assert_allclose((share[:, None] * stacked).sum(0).numpy(), mean, rtol=1e-7)
    own = mean_vector([np.array(m, np.float32) for m in models], [int(n) for n in examples])
    np.testing.assert_array_equal(own, np.array(mean, np.float32))


def test_generated_sources_are_the_same_each_time(app: Path) -> None:
    manifest = read_manifest(app / RESOURCES / "step.mlpackage")
    assert scalars_source(manifest, "m4") == (app / "Sources/EngineTraining/Scalars.swift").read_text()
    assert vectors_source(manifest) == (app / "Tests/EngineTrainingTests/Vectors.swift").read_text()


def test_the_apps_report_is_one_that_conformance_read_takes() -> None:
    """The keys of the report in `Conformance.swift`, filled in, are evidence."""
    source = (files("ane_trainer.ane.export") / "app/Sources/EngineTraining/Conformance.swift").read_text()
    literal = source[source.index("let report: [String: Any] = [") :]
    keys = set(re.findall(r'"(\w+)":', literal[: literal.index("        ]\n")]))
    assert f'"suite": {VERSION}' in literal
    assert f'"format": "{FORMAT}"' in literal
    assert {
        "machine",
        "machine_chip",
        "device",
        "compared_with",
        "equal",
        "different",
        "failed",
        "skipped",
    } <= keys
    report = {
        "format": FORMAT, "suite": VERSION, "machine_chip": "m4", "equal": {"app: loss": 1},
        "machine": {"system": "Darwin", "release": "26.5.0", "build": "25F71", "chip": "Apple M4"},
        "device": {"name": "coreml", "chip": "m4"}, "compared_with": {"name": "sim", "chip": "m4"},
        "different": [{"case": "app: health", "values": 3, "count": 1, "max_ulp": 2}],
    }  # fmt: skip
    rows = rows_of(report)
    assert [(row.case, row.differences, row.max_ulp) for row in rows] == [
        ("app: loss", 0, 0),
        ("app: health", 1, 2),
    ]
