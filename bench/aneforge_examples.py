"""ANEForge's published training results against the simulator's, from its own example programs.

    python -m bench.aneforge_examples EXAMPLES_FOLDER [--only cnn,mlp,full,blocks,charlm] [--chips m1,m2-pro,m5]

EXAMPLES_FOLDER is `examples/` of ANEForge's source distribution (0.4.0). Nothing is downloaded: the
examples bring a 1,000-sample MNIST subset; `full` needs MNIST in the cache (`ane-trainer data mnist`).
Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

#: Accuracy after 300 steps on silicon (ANEForge 0.4.0, docs/training.md, "Cross-chip parity").
CNN_PUBLISHED = {"m1": "0.9080", "m2-pro": "0.9080", "m5": "0.9070"}

#: Mode of the trainer -> published accuracy of the 784-256-10 GELU network on MNIST (docs/training.md).
FULL_PUBLISHED = {"resident_state": 97.79, "device_optimizer": 97.57, "host": 98.05}


def run_example(folder: Path, name: str, chip: str = "m5") -> tuple[str, float]:
    """Output and seconds of one example on the simulator."""
    command = [sys.executable, "-W", "ignore", "-m", "ane_trainer.interop.aneforge", "--chip", chip, name]
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=_environment()
    )
    if done.returncode:
        raise SystemExit(f"{name}: needs exit code 0; got {done.returncode}.\n{done.stderr}")
    return done.stdout, time.perf_counter() - start


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    folders = filter(None, [root, os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}


def cnn(folder: Path, chips: list[str]) -> None:
    """`train_mnist_cnn.py`: accuracy after every 50 steps."""
    print("\n### train_mnist_cnn.py (seeded, 300 Adam steps on the engine)\n")
    print("| chip | 50 | 100 | 150 | 200 | 250 | 300 | published after 300 | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for chip in chips:
        text, seconds = run_example(folder, "train_mnist_cnn.py", chip)
        figures = re.findall(r"^ +[1-9]\d* \| +\d+ \| +([\d.]+)", text, re.M)
        published = CNN_PUBLISHED.get(chip, "-")
        print(f"| {chip} | {' | '.join(figures)} | {published} | {seconds:.0f} |", flush=True)


def mlp(folder: Path) -> None:
    """`train_mnist_mlp.py`: accuracy on the 1,000-sample subset; no figure is published for it."""
    text, seconds = run_example(folder, "train_mnist_mlp.py")
    (final,) = re.findall(r"final test accuracy ([\d.]+)", text)
    print("\n### train_mnist_mlp.py (1,000 samples, 400 steps)\n")
    print(f"accuracy {final}, {seconds:.0f} s", flush=True)


def full() -> None:
    """The documented network on all of MNIST (GELU, Adam, batch 128, 5 epochs), each trainer mode."""
    print("\n### 784-256-10 GELU network, MNIST, 5 epochs (m5)\n")
    print("| optimizer | simulated % | published % | s |\n|---|---|---|---|")
    data = _mnist()
    for mode, published in FULL_PUBLISHED.items():
        start = time.perf_counter()
        accuracy = _train_full(data, {} if mode == "host" else {mode: True})
        seconds = time.perf_counter() - start
        print(f"| {mode} | {100 * accuracy:.2f} | {published} | {seconds:.0f} |", flush=True)


def _mnist() -> list[Any]:
    from ane_trainer.data import load_dataset

    parts: list[Any] = []
    for split in load_dataset("mnist", batch_size=1000, seed=0):
        batches = [(x.reshape(len(x), -1).numpy(), y.numpy()) for x, y in split]
        parts += [np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])]
    return parts


def _train_full(data: list[Any], mode: dict[str, bool]) -> float:
    import aneforge as af

    from ane_trainer.interop.aneforge import install

    install("m5")
    warnings.simplefilter("ignore")
    images, labels, test_images, test_labels = data
    rng = np.random.default_rng(0)
    weights = [
        af.parameter((rng.standard_normal((784, 256)) * np.sqrt(2 / 784)).astype(np.float32)),
        af.parameter(np.zeros((1, 256), np.float32)),
        af.parameter((rng.standard_normal((256, 10)) * np.sqrt(2 / 256)).astype(np.float32)),
        af.parameter(np.zeros((1, 10), np.float32)),
    ]
    x, target = af.input((128, 784)), af.input((128, 10))
    logits = ((x @ weights[0] + weights[1]).gelu() @ weights[2]) + weights[3]
    objective = af.softmax_cross_entropy(logits, target)
    trainer = af.Trainer(objective, weights, lr=1e-3, loss_scale=1024.0, optimizer="adam", **mode)
    trainer.set_dataset(x, images, target, np.eye(10, dtype=np.float32)[labels])
    for _ in range(5 * (len(images) // 128)):
        trainer.step()
    accuracy = trainer.accuracy(test_images, test_labels)
    trainer.release()
    return float(accuracy)


def blocks(folder: Path) -> None:
    """The transformer blocks: first and last loss."""
    print("\n### Transformer blocks\n\n| example | first | last | s |\n|---|---|---|---|")
    for name in ("train_transformer.py", "train_transformer_prenorm.py", "train_llama_block.py"):
        text, seconds = run_example(folder, name)
        losses = re.findall(r"\| +(\d+\.\d+)$", text, re.M)
        print(f"| {name} | {losses[0]} | {losses[-1]} | {seconds:.0f} |", flush=True)


def charlm(folder: Path) -> None:
    """`train_charlm.py`; published: cross-entropy near zero, 100% of next characters."""
    text, seconds = run_example(folder, "train_charlm.py")
    (span,) = re.findall(r"cross-entropy ([\d.]+ -> [\d.]+)", text)
    (accuracy,) = re.findall(r"positions: ([\d.]+)%", text)
    print("\n### train_charlm.py (4 layers, 150 steps)\n")
    print(f"cross-entropy {span}, next character {accuracy}%, {seconds:.0f} s")
    print("\n" + text.strip().splitlines()[-1].strip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("examples", type=Path)
    parser.add_argument("--only", default="cnn,mlp,full,blocks,charlm")
    parser.add_argument("--chips", default="m1,m2-pro,m5")
    given = parser.parse_args()
    folder, wanted = given.examples.resolve(), given.only.split(",")
    if "cnn" in wanted:
        cnn(folder, given.chips.split(","))
    if "mlp" in wanted:
        mlp(folder)
    if "full" in wanted:
        full()
    if "blocks" in wanted:
        blocks(folder)
    if "charlm" in wanted:
        charlm(folder)


if __name__ == "__main__":
    main()
