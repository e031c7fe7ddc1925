"""Tell of code under torch.compile of which Dynamo makes no graph, so that PyTorch runs it on the CPU without a word.

Dynamo calls a backend with graphs only: of a frame that it gives up (recurrent layers, sparse tensors, a break within a
loop) the backend never hears. So the end of each frame's compilation is watched, from the first time on that
torch.compile asks for the backend by name.
"""

from __future__ import annotations

import warnings

from ane_trainer.ane.dynamo import torch_private
from ane_trainer.ane.dynamo.report import GraphBreakWarning, report

_ALLOW_RNN = "torch._dynamo.config.allow_rnn = True makes Dynamo take recurrent layers. "


def watch(backend: object) -> None:
    """Warn from here on, until Dynamo is reset, of frames and parts of frames that `backend` never sees."""
    known = set(torch_private.break_reasons())

    def end() -> None:
        given_up = torch_private.given_up()
        fresh = [text for text in torch_private.break_reasons() if text not in known]
        known.update(fresh)
        if not torch_private.compiles_for(backend):
            return
        if given_up is not None:
            _tell(*given_up)
            return
        for reason in fresh:
            text = torch_private.gist(reason)
            if not any(told.startswith(reason.strip().splitlines()[0]) for told in report().graph_breaks):
                _tell(text, "")

    torch_private.at_end_of_frames(end)


def _tell(text: str, place: str) -> None:
    line = f"{text}, at {place}" if place else text
    if line in report().on_cpu:
        return
    report().on_cpu.append(line)
    hint = _ALLOW_RNN if "RNN" in text else ""
    warnings.warn(
        f'torch.compile(backend="ane"): Dynamo made no graph of this: {line}. PyTorch runs it on the CPU, '
        f"not the engine. {hint}compile_step takes the model where the program can be made at once.",
        GraphBreakWarning,
        stacklevel=2,
    )
