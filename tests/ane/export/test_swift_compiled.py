"""The Swift package of an export compiled and run by Swift itself, its Core ML answered by the simulator.

Skipped where there is no `swift` (Debian 13: `apt install swiftlang`). `swift_stand_in/CoreML.swift` has those types
of Core ML that the package uses; its model hands each prediction to this process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ane_trainer import Trainer
from ane_trainer.ane.mil.loading import load_program
from ane_trainer.ane.simulator import make_context, prepare

pytest.importorskip("coremltools")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("swift") is None, reason="needs a Swift compiler"),
]

STAND_IN = Path(__file__).parent / "swift_stand_in" / "CoreML.swift"
PACKAGE = """// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "EngineTraining",
    targets: [
        .target(name: "CoreML"),
        .target(name: "EngineTraining", dependencies: ["CoreML"], resources: [.copy("Resources")]),
        .target(name: "Sample", dependencies: ["EngineTraining", "CoreML"]),
        .executableTarget(name: "Runner", dependencies: ["EngineTraining"]),
        .testTarget(name: "EngineTrainingTests", dependencies: ["EngineTraining"]),
    ]
)
"""
RUNNER = """import Foundation
import EngineTraining

@main
enum Runner {
    static func main() async throws {
        let step = try await TrainingStep.bundled()
        await step.adjust { settings in settings[0].lr *= 0.5 }
        try await step.setWeights(Federated.average([(await step.weights(), 1), (await step.weights(), 3)]))
        FileHandle.standardOutput.write(try await Conformance.run(chip: "m4"))
    }
}
"""
#: What Foundation has on Apple's systems alone.
MISSING = """import Foundation
extension URL { static var documentsDirectory: URL { URL(fileURLWithPath: NSTemporaryDirectory()) } }
"""


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(i)
    return torch.randn(8, 1, 8, 8, generator=draw), torch.randint(0, 4, (8,), generator=draw)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported package, with the stand-in and a program that runs the conformance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(
        [{"params": model[:2].parameters()}, {"params": model[2:].parameters(), "lr": 1e-2}], lr=1e-3
    )
    trainer = Trainer(model, loss="cross_entropy", optimizer=optimizer, device="sim", chip="m4")
    trainer.fit([batch(i) for i in range(3)], epochs=1)
    folder = tmp_path_factory.mktemp("app")
    trainer.export(folder, "app", data=[batch(0)])
    sample = folder / "Sources" / "Sample"
    (folder / "Sources" / "DigitTrainer").rename(sample)
    for view in ("TrainingView.swift", "ConformanceView.swift", "DigitTrainerApp.swift"):  # need SwiftUI
        (sample / view).unlink()
    for name in ("CoreML", "Runner"):
        (folder / "Sources" / name).mkdir()
    shutil.copy(STAND_IN, folder / "Sources" / "CoreML")
    (folder / "Sources" / "Runner" / "Runner.swift").write_text(RUNNER)
    (sample / "Missing.swift").write_text(MISSING)
    (folder / "Package.swift").write_text(PACKAGE)
    return folder


def swift(package: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        ["swift", *arguments], cwd=package, env=os.environ | environment, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def answer(pipes: Path, package: Path) -> None:
    """Answer predictions until a request is empty."""
    known = {}
    while data := (pipes / "request").read_bytes():
        line, _, body = data.partition(b"\n")
        asked = json.loads(line)
        name = Path(asked["model"]).name
        if name not in known:
            (file,) = (package / "Sources").rglob(name)
            (main, *_) = load_program(file).functions
            known[name] = main, prepare(main, make_context("m4"))
        main, plan = known[name]
        found: dict[str, np.ndarray] = {}
        shapes = {value.name: list(value.type.shape) for value in main.inputs}
        if "inputs" in asked:
            feeds, at = {}, 0
            for port in sorted(asked["inputs"]):
                shape = asked["inputs"][port]
                count = int(np.prod(shape))
                feeds[port] = np.frombuffer(body, np.float16, count, at).reshape(shape)
                at += 2 * count
            found = plan.run(feeds)
            shapes = {port: list(array.shape) for port, array in found.items()}
        numbers = b"".join(np.ascontiguousarray(found[port], np.float16).tobytes() for port in sorted(found))
        (pipes / "reply").write_bytes(json.dumps(shapes).encode() + b"\n" + numbers)


def test_the_arithmetic_passes_its_own_tests(package: Path) -> None:
    assert "testScalars" in swift(package, "test")


def test_the_step_in_swift_trains_to_the_trainers_bits(package: Path) -> None:
    """One call and four steps with a batch that is too large: losses, counts, units and state, as recorded."""
    pipes = package / "pipes"
    pipes.mkdir()
    for name in ("request", "reply"):
        os.mkfifo(pipes / name)
    server = threading.Thread(target=answer, args=(pipes, package), daemon=True)
    server.start()
    report = json.loads(swift(package, "run", "-q", "Runner", ANE_STAND_IN="pipes"))
    (pipes / "request").write_bytes(b"")
    server.join(10)
    assert report["different"] == []
    assert report["cases"] > 40
    assert {"app: step 3 of a run, units", "app: loss"} <= set(report["equal"])
