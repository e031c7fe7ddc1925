"""`finetune`: a language model on one's own text or pairs, with an adapter, answers before and after."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ane_trainer.ane.errors import UsageError
from ane_trainer.commands.options import Output, takes_train_options
from ane_trainer.training.config import RESUMABLE, TrainConfig, make_config
from ane_trainer.training.language.defaults import DEFAULTS, HELP, check_found
from ane_trainer.training.reporting.report import ConsoleReporter, summary

#: Options of `train` that say nothing about a language model.
_OTHER = frozenset(
    {
        "dataset", "target", "task", "test_split", "size", "channels", "context", "tokens", "augment", "hidden",
        "activation", "model_arg", "loss", "compare_fp32", "last_batch", "ema", "shards",
    }
) & TrainConfig.model_fields.keys()  # fmt: skip


_Model = Annotated[
    str | None,
    typer.Argument(
        help="A model's folder, a GGUF file, or a name on the hub.", metavar="MODEL", show_default=False
    ),
]
_Data = Annotated[
    str | None,
    typer.Option(
        help="FILE.jsonl with text, prompt and completion, or messages; FILE.txt; hf:NAME.", metavar="DATA"
    ),
]
_Lora = Annotated[int, typer.Option(help="Rank of the adapter; 0: train all weights.", metavar="N", min=0)]
_Targets = Annotated[
    str, typer.Option(help="attention, all-linear, or names of modules.", metavar="NAME,...")
]
_Alpha = Annotated[
    float | None, typer.Option(help="The adapter's scale (default: twice the rank).", metavar="X")
]
_Dropout = Annotated[float, typer.Option(help="Of what goes into the adapter.", metavar="X")]
_Dora = Annotated[bool, typer.Option("--dora", help="Train the weights' magnitudes apart.")]
_Frozen = Annotated[str, typer.Option(help="What the base is kept in: fp16, int8 or int4.", metavar="KIND")]
_Row = Annotated[
    int | None,
    typer.Option("--context", help="Tokens of a row (default: as the data needs).", metavar="N", min=2),
]
_Packed = Annotated[
    bool | None, typer.Option("--pack/--no-pack", help="Rows run on over records (default: of plain texts).")
]
_Chat = Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template.")]
_Prompt = Annotated[
    list[str] | None, typer.Option(help="Ask this before and after; as often as needed.", metavar="TEXT")
]
_Answers = Annotated[
    int, typer.Option(help="Held-out records answered before and after.", metavar="N", min=0)
]
_Out = Annotated[
    Path | None, typer.Option(help="Folder for the run (default: a new one in runs/).", metavar="DIR")
]
_Resume = Annotated[str | None, typer.Option(help="Go on with an interrupted run.", metavar="RUN")]
_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show more of the training.")]


@functools.partial(takes_train_options, without=_OTHER, told=HELP)
def finetune(
    model: _Model = None, data: _Data = None, lora: _Lora = 8, lora_targets: _Targets = "attention",
    lora_alpha: _Alpha = None, lora_dropout: _Dropout = 0.0, dora: _Dora = False, frozen: _Frozen = "fp16",
    row: _Row = None,
    packed: _Packed = None, chat: _Chat = True, prompt: _Prompt = None, answers: _Answers = 16, out: _Out = None,
    resume: _Resume = None, verbose: _Verbose = False, as_json: bool = False, options: Mapping[str, object] = {},
) -> Output:  # fmt: skip
    """Tune a language model on your own text, with an adapter that PEFT reads.

    ane-trainer finetune SmolLM2/ --data pairs.jsonl

    ane-trainer finetune model.gguf --data notes.txt --lora 16 --epochs 3

    ane-trainer finetune --resume last
    """
    report = ConsoleReporter(sys.stderr if as_json else sys.stdout, verbose=verbose)
    if resume is not None:
        _only_resumable(options)
    elif model is None or data is None:
        raise UsageError(
            "finetune: needs a model and --data. Try: ane-trainer finetune MODEL --data pairs.jsonl",
            code="ANE100",
        )
    report.activity("importing PyTorch")
    from ane_trainer.training.language import finetune as tuning  # PyTorch is imported only for what can run

    if resume is not None:
        result = tuning.resume_finetuning(resume, report=report, **options)
    else:
        targets = (
            lora_targets if lora_targets in ("attention", "all-linear") else tuple(lora_targets.split(","))
        )
        chosen = tuning.TuningOptions(
            lora,
            targets,
            lora_alpha,
            lora_dropout,
            dora,
            row,
            packed,
            chat,
            tuple(prompt or ()),
            answers,
            frozen=frozen,
        )
        settings = make_config({**DEFAULTS, **options, "dataset": data, "model": model}, where="finetune")
        check_found(settings)
        result = tuning.run_finetuning(settings, chosen, out=out, report=report)
    text = "\n".join([summary(result, report=report), *tuning.outcome_lines(result)])
    return Output(result.to_json(), text)


def _only_resumable(options: Mapping[str, object]) -> None:
    if others := sorted(options.keys() - RESUMABLE):
        raise UsageError(
            f"finetune: --resume keeps the run's options; got {', '.join(others)} as well. Leave them out. "
            f"These may change: {', '.join(sorted(RESUMABLE))}.",
            code="ANE107",
        )
