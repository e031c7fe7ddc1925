"""Whole training steps of twelve models: compile time, exact and fast mode as ratios to PyTorch, memory.

    python -m bench.models [NAME ...] [--rounds 5] [--threads 1] [--inductor] [--growth]
    python -m bench.models [NAME ...] --memory

Each model runs in a process of its own, eager, inductor (where asked for) and both modes in turn; figures are the
least of the rounds (processor time with one thread, which a busy machine disturbs little, else time on the wall).
`--growth` repeats each with twice the batch: the ratio of times to the first. `--memory` prints instead the most memory
of a process that trains three steps in eager mode, and of one that compiles an exact step and runs it three times, in
MB; the ratio, and that of what each needs beyond a process that has only built the model.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ane_trainer as at
from tests.models.zoo import CASES, hugging, next_token

Built = tuple[nn.Module, Any, Any]


class Block(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        same = inputs == outputs
        self.side = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(inner)) + self.side(x))


def small_resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(16, 16, 1), Block(16, 32, 2),
        Block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def large_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 1024))


def classes(model: nn.Module, shape: tuple[int, ...], count: int = 10) -> Built:
    return model, torch.randn(shape), torch.randint(0, count, shape[:1])


def gpt2() -> Built:
    from transformers import GPT2Config

    sizes = {"vocab_size": 2000, "n_positions": 64, "n_embd": 256, "n_layer": 4, "n_head": 4}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    ids = torch.randint(0, 2000, (4, 64))
    return hugging("GPT2LMHeadModel", GPT2Config(use_cache=False, **sizes, **dropouts, **ends)), ids, ids


def llama() -> Built:
    from transformers import LlamaConfig

    sizes = {"vocab_size": 2000, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    ids = torch.randint(0, 2000, (4, 64))
    return hugging("LlamaForCausalLM", LlamaConfig(use_cache=False, **sizes, **heads)), ids, ids


class Vit(nn.Module):
    """Patches of 4 x 4 of 32 x 32 images through four encoder layers."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).flatten(2).mT).mean(1))


class Recurrent(nn.Module):
    """The last state of an LSTM over 32 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(64, 128, batch_first=True), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


MODELS: dict[str, Callable[[], Built]] = {
    "mlp": lambda: classes(at.build_model("mlp"), (128, 1, 28, 28)),
    "large_mlp": lambda: classes(large_mlp(), (256, 1024), 1024),
    "cnn": lambda: classes(at.build_model("cnn"), (128, 1, 28, 28)),
    "small_resnet": lambda: classes(small_resnet(), (32, 3, 32, 32)),
    "resnet18": lambda: classes(CASES["resnet18"].build()[0], (8, 3, 64, 64)),
    "mobilenet_v3": lambda: classes(CASES["mobilenet_v3"].build()[0], (8, 3, 64, 64)),
    "convnext": lambda: classes(CASES["convnext"].build()[0], (8, 3, 32, 32)),
    "unet": CASES["unet"].build,
    "vit": lambda: classes(Vit(), (16, 3, 32, 32)),
    "gpt2": gpt2,
    "llama": llama,
    "lstm": lambda: classes(Recurrent(), (16, 32, 64)),
}

LOSSES: dict[str, Any] = {"gpt2": next_token, "llama": next_token, "unet": CASES["unet"].loss}


def doubled(built: Built) -> Built:
    """The same with twice the batch."""
    model, x, y = built
    twice = [torch.cat([v, v]) if isinstance(v, Tensor) else v for v in (x, y)]
    return model, *twice


def steps_of(
    built: Built, loss: Any, inductor: bool
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """A step in each mode, and seconds until the first had run."""
    model, x, y = built
    function = F.cross_entropy if loss == "cross_entropy" else loss

    runs, seconds = {}, {}
    makers: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
        "eager": lambda m: eager(m, function, x, y)
    }
    if inductor:
        makers["inductor"] = lambda m: eager(m, function, x, y, torch.compile(m))
    for fidelity in ("exact", "fast"):
        makers[fidelity] = lambda m, fidelity=fidelity: simulated(m, loss, x, y, fidelity)  # type: ignore[misc]
    for name, make in makers.items():
        start = time.perf_counter()
        runs[name] = make(copy.deepcopy(model))
        runs[name]()
        seconds[name] = time.perf_counter() - start
    return runs, seconds


def eager(
    model: nn.Module, function: Any, x: Any, y: Any, forward: Callable[..., Any] | None = None
) -> Callable[[], object]:
    """A step in PyTorch; `forward`: the model compiled."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        function((forward or model)(x), y).backward()
        optimizer.step()

    return step


def simulated(model: nn.Module, loss: Any, x: Any, y: Any, fidelity: str) -> Callable[[], object]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step = at.compile_step(model, loss, optimizer, example=(x, y), chip="m4", device="sim", fidelity=fidelity)
    return lambda: step(x, y)


def _peak_megabytes() -> float:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << (20 if sys.platform == "darwin" else 10))


def measure(name: str, rounds: int, threads: int, inductor: bool, growth: bool) -> None:
    """Print one model's line."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    clock = time.thread_time if threads == 1 else time.perf_counter
    loss = LOSSES.get(name, "cross_entropy")
    built = MODELS[name]()
    runs, seconds = steps_of(built, loss, inductor)
    least = fastest(runs, rounds, clock)
    peak = _peak_megabytes()
    modes = [m for m in runs if m != "eager"]
    text = f"{name:14}{least['eager'] * 1e3:9.1f}"
    text += "".join(f"{least[m] / least['eager']:10.2f}" for m in modes)
    text += "".join(f"{seconds[m]:11.1f}" for m in modes) + f"{peak:9.0f}"
    if growth:
        again = fastest(steps_of(doubled(built), loss, inductor)[0], rounds, clock)
        text += "".join(f"{again[m] / least[m]:10.2f}" for m in runs)
    print(text, flush=True)


_MEMORY_MODES = ("", "eager", "exact")


def memory(name: str, mode: str) -> None:
    """Print the most memory of this process, in MB: with the model alone, or after three steps in a mode."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    loss = LOSSES.get(name, "cross_entropy")
    model, x, y = MODELS[name]()
    run: Callable[[], object] = lambda: None  # noqa: E731
    if mode == "eager":
        run = eager(model, F.cross_entropy if loss == "cross_entropy" else loss, x, y)
    elif mode == "exact":
        run = simulated(model, loss, x, y, mode)
    for _ in range(3):
        run()
    print(_peak_megabytes())


def memory_row(name: str) -> str:
    """A line of the table of memory, from three processes."""
    command = [sys.executable, "-m", "bench.models", name, "--here", "--memory"]
    alone, plain, own = (
        float(subprocess.run([*command, "--mode", mode], check=True, capture_output=True, text=True).stdout)
        for mode in _MEMORY_MODES
    )
    beyond = (own - alone) / max(plain - alone, 1.0)
    return f"{name:14}{alone:9.0f}{plain:9.0f}{own:9.0f}{own / plain:8.2f}{beyond:9.1f}"


def fastest(
    runs: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """The least time of each, called in turn."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            least[name] = min(least[name], clock() - start)
    return least


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inductor", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--mode", default="", help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.names or list(MODELS)
    if options.memory:
        if options.here:
            memory(names[0], options.mode)
            return
        titles = f"{'alone':>9}{'eager':>9}{'exact':>9}{'ratio':>8}{'beyond':>9}"
        print(f"{'model':14}{titles}", flush=True)
        for name in names:
            print(memory_row(name), flush=True)
        return
    if options.here:
        measure(names[0], options.rounds, options.threads, options.inductor, options.growth)
        return
    modes = ["inductor"] * options.inductor + ["exact", "fast"]
    title = f"{'model':14}{'eager ms':>9}" + "".join(f"{m:>10}" for m in modes)
    title += "".join(f"{m + ' s':>11}" for m in modes) + f"{'peak MB':>9}"
    print(title + "".join(f"{'2x ' + m:>10}" for m in ["eager", *modes]) * options.growth, flush=True)
    rest = [a for a in sys.argv[1:] if a not in options.names]
    for name in names:
        subprocess.run([sys.executable, "-m", "bench.models", name, *rest, "--here"], check=True)


if __name__ == "__main__":
    main()
