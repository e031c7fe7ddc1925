"""SmolLM2-135M tuned for many steps, in PyTorch's fp32 and in the engine's arithmetic: validation loss of both.

    python -m bench.language [--model FILE.gguf] [--layers 4] [--steps 300] [--rows 4] [--tokens 128] [--rank 8]
                             [--frozen fp16] [--lr 2e-4] [--schedule linear] [--seed 0] [--fidelity exact]

The same start, batches and AdamW for both, in one process. The rate falls linearly to 0 and the norm of all gradients
is clipped at 1.0, as Transformers' Trainer does; it starts at 2e-4, as QLoRA's paper has it. The text is Python's own
language reference (`pydoc_data.topics`, which every installation has), its last tenth held out. `--rank 0` trains all
weights. Each line: steps done, validation loss of fp32 and of the simulated step (its weights read back, in PyTorch),
their difference, and processor seconds. Exits with 1 where the last difference is above `--bound`.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import ane_trainer as at
from ane_trainer.ane.capture.losses import model_loss
from ane_trainer.training.language.lora import adapted
from ane_trainer.training.language.models import load_language_model
from bench.smollm2 import installed_model

Batch = dict[str, Tensor]


def rows(tokenizer: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Rows of running text [N, T] to train on, and held out."""
    stream = torch.tensor(tokenizer("\n".join(topics[name] for name in sorted(topics)))["input_ids"])
    whole = stream[: len(stream) // tokens * tokens].reshape(-1, tokens)
    return whole[: len(whole) * 9 // 10], whole[len(whole) * 9 // 10 :]


def batch_of(ids: Tensor) -> Batch:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@torch.no_grad()
def validation(model: torch.nn.Module, held_out: Tensor, count: int) -> float:
    """The mean loss over the first rows that were held out."""
    model.eval()
    losses = [float(model(**batch_of(ids)).loss) for ids in held_out[:count].split(4)]
    model.train()
    return sum(losses) / len(losses)


def main() -> int:
    """Train both side by side and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=installed_model())
    for name, value in (
        ("layers", 4),
        ("steps", 300),
        ("rows", 4),
        ("tokens", 128),
        ("rank", 8),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--validate", type=int, default=32, help="rows held out that are used")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--schedule", default="linear", choices=["linear", "constant"])
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of all gradients; 0: none")
    parser.add_argument("--bound", type=float, default=0.01)
    parser.add_argument("--frozen", default="fp16", choices=["fp16", "int8", "int4"])
    parser.add_argument("--fidelity", default="exact", choices=["exact", "fast"])
    return compare(parser.parse_args())


def compare(options: argparse.Namespace) -> int:
    """1 where the last difference of validation losses is beyond the bound."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, tokenizer = load_language_model(str(options.model))
    held: Any = model
    held.config.use_cache, held.config.num_hidden_layers = False, options.layers
    held.model.layers = held.model.layers[: options.layers]
    if options.rank:
        model = adapted(model, at.LoraOptions(rank=options.rank, frozen=options.frozen), seed=options.seed)
    train, held_out = rows(tokenizer, options.tokens)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.seed))
    own, plain = model.train(), copy.deepcopy(model).train()
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=options.lr) for m in (own, plain)
    ]
    decay = options.steps if options.schedule == "linear" else math.inf
    schedulers = [LambdaLR(optimizer, lambda done: 1 - done / decay) for optimizer in optimizers]
    start = time.process_time()
    step: Any = at.compile_step(
        own, lambda output, _: model_loss(output), optimizers[0], example=(batch_of(train[: options.rows]), ()),
        device="sim", fidelity=options.fidelity, threads=1, chip="m4", clip_grad_norm=options.clip or None,
    )  # fmt: skip
    print(f"compiled in {time.process_time() - start:.1f} s, {len(step.program.main.ops)} ops", flush=True)
    print(f"{'steps':>6}{'fp32':>10}{'engine':>10}{'difference':>12}{'s fp32':>9}{'s engine':>9}", flush=True)
    seconds, difference = [0.0, 0.0], 0.0
    for number in range(options.steps + 1):
        if number % options.every == 0 or number == options.steps:
            step.sync()
            losses = [validation(m, held_out, options.validate) for m in (plain, own)]
            difference = losses[1] - losses[0]
            text = f"{number:6d}{losses[0]:10.4f}{losses[1]:10.4f}{difference:12.4f}"
            print(text + f"{seconds[0]:9.0f}{seconds[1]:9.0f}", flush=True)
        if number == 1 and step.agreement is not None:
            print(
                f"first step: loss {100 * step.agreement.loss:.3f} %, update {100 * step.agreement.update:.2f} %"
            )
        places = [order[(number * options.rows + i) % len(order)] for i in range(options.rows)]
        batch = batch_of(train[torch.stack(places)])
        begun = time.process_time()
        optimizers[1].zero_grad()
        plain(**batch).loss.backward()
        if options.clip:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), options.clip)
        optimizers[1].step()
        between = time.process_time()
        step(batch, ())
        seconds = [seconds[0] + between - begun, seconds[1] + time.process_time() - between]
        for scheduler in schedulers:
            scheduler.step()
    print(f"skipped {step.skipped_steps}", flush=True)
    return int(abs(difference) > options.bound)


if __name__ == "__main__":
    sys.exit(main())
