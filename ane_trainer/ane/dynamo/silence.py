"""Report code under torch.compile of which Dynamo makes no graph, and which PyTorch therefore runs on the CPU.

Dynamo calls a backend with graphs only: of a frame that it gives up (recurrent layers, sparse tensors, a break within a
loop) the backend never hears. So the end of each frame's compilation is watched, from the first time on that
torch.compile asks for the backend by name.
"""

from __future__ import annotations

import warnings

from ane_trainer.ane.capture.trace.sources import FAULTS
from ane_trainer.ane.dynamo import torch_private
from ane_trainer.ane.dynamo.graphs import graph_fault
from ane_trainer.ane.dynamo.report import GraphBreakWarning, report
from ane_trainer.ane.errors import AneTrainerError, Finding, UnsupportedModel, UsageError

_ALLOW_RNN = "torch._dynamo.config.allow_rnn = True makes Dynamo take recurrent layers. "


def watch(backend: object) -> None:
    """From here on, until Dynamo is reset: warn of frames and parts of frames that `backend` never sees.

    Masks as indices and gradients asked for within stay in the graph, hooks that are added to modules later are found,
    and what fails in Dynamo or the backend is raised as an error of this package.
    """
    known: set[str] = set(torch_private.break_reasons())
    before: dict[str, bool] = {}

    def start() -> None:
        if torch_private.compiles_for(backend):
            before.update(torch_private.settings_of_dynamo(torch_private.OWN_SETTINGS))

    def end() -> None:
        given_up, error = torch_private.given_up(), torch_private.failure()
        fresh = [text for text in torch_private.break_reasons() if text not in known]
        known.update(fresh)
        if not torch_private.compiles_for(backend):
            return
        torch_private.settings_of_dynamo(before)
        if isinstance(error, AneTrainerError):
            error.__suppress_context__ = True
            torch_private.leave_with(error)
        if isinstance(error, FAULTS):
            torch_private.leave_with(graph_fault(error, torch_private.user_line()))
        if given_up is not None and torch_private.wants_one_graph():
            torch_private.leave_with(_broken(*given_up))
        if given_up is not None:
            tell_of_cpu(*given_up)
            return
        for reason in fresh:
            text = torch_private.gist(reason)
            if not any(told.startswith(reason.strip().splitlines()[0]) for told in report().graph_breaks):
                tell_of_cpu(text, "")

    def limit(setting: str, function: str, reason: str) -> bool:
        if torch_private.compiles_for(backend):
            cause = reason.partition(":")[2].partition("#")[0].strip() or reason
            if torch_private.wants_one_graph():
                raise UsageError(
                    f"torch.compile: needs fewer programs of {function} (torch._dynamo.config.{setting}, which "
                    f"fullgraph=True makes an error); got another one, for {cause}. Feed what changes as a tensor, or "
                    "raise the limit.",
                    code="ANE114",
                )
            again = (
                f"recompiled too often (torch._dynamo.config.{setting}, torch._dynamo.reset() begins again)"
            )
            tell_of_cpu(f"{function}: {again}, last for {cause}", "")
        return torch_private.compiles_for(backend)

    torch_private.causal_masks_as_given()
    torch_private.around_frames(start, end)
    torch_private.at_recompile_limit(limit)


def _broken(reason: str, place: str) -> UnsupportedModel:
    """What ends the one graph that was asked for."""
    fix = "Take it out of the forward, or leave fullgraph=True out: the parts are programs, the rest runs on the CPU."
    finding = Finding(
        place or "model", "fullgraph=True", f"needs code that Dynamo makes a graph of; got: {reason}.", fix
    )
    return UnsupportedModel("torch.compile: the model is not one graph:", [finding], code="ANE301")


def tell_of_cpu(text: str, place: str) -> None:
    """Warn once of code that PyTorch runs on the CPU."""
    line = f"{text}, at {place}" if place else text.removesuffix(".")
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
