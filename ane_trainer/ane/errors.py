"""Every error a user can see: a documented code, an exit code, and a message that says what to do.

Messages read `where: needs X; got Y. Do Z.`; all findings of one kind are reported together
(`findings`). `docs/errors.md` has one entry per code; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


class AneTrainerError(Exception):
    """Base of all errors raised on purpose. `code` is documented, `exit_code` is what the CLI returns."""

    code = "ANE000"
    exit_code = 1

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.code} {super().__str__()}"


class UsageError(AneTrainerError):
    """The call or the command line asks for something that does not exist (unknown chip, device, model)."""

    code = "ANE100"
    exit_code = 1


class DataError(AneTrainerError):
    """The data cannot be used: missing, corrupt, of the wrong shape, or not finite."""

    code = "DATA100"
    exit_code = 1


class CheckpointError(AneTrainerError):
    """A run or checkpoint cannot be read or written; what was on disk before is left as it was."""

    code = "CKPT100"
    exit_code = 1


class EnvironmentFault(AneTrainerError):
    """This machine lacks what was asked for: no engine here, no network, a folder that cannot be written."""

    code = "ANE200"
    exit_code = 2


class MissingDependency(EnvironmentFault):
    """An optional package is not installed; the message names the extra that brings it."""

    code = "ANE201"


class PeerLost(EnvironmentFault):
    """Another process of a data parallel training ended, or does not answer."""

    code = "ANE212"


class ProgramError(AneTrainerError):
    """A MIL program is not well-formed: a type rule refuses an op, a name is undefined, text does not parse."""

    code = "MIL100"
    exit_code = 1


class SimulationError(AneTrainerError):
    """A program cannot be run as asked: an input is missing or has another shape, an op has no kernel."""

    code = "SIM100"
    exit_code = 1


@dataclass(frozen=True)
class Finding:
    """One reason why a model or program is refused, with its place and a way out.

    `where` is the user's module path and source line where known, otherwise the op's name.
    """

    where: str
    op: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.op}: {self.reason} {self.fix}".rstrip()


class UnsupportedModel(AneTrainerError):
    """The model, loss or optimizer does not fit the engine or the chip; `findings` lists every reason."""

    code = "ANE300"
    exit_code = 3

    def __init__(self, summary: str, findings: Iterable[Finding], *, code: str | None = None) -> None:
        self.findings = tuple(findings)
        lines = [summary, *(f"  {number}. {finding}" for number, finding in enumerate(self.findings, 1))]
        super().__init__("\n".join(lines), code=code)


class BrokenModel(UnsupportedModel):
    """The model or the loss raises an error in plain PyTorch, too; `__cause__` is that error."""

    code = "ANE303"


class Diverged(AneTrainerError):
    """Training stopped making sense: the loss stayed non-finite although steps were skipped and rescaled."""

    code = "ANE400"
    exit_code = 4


class Interrupted(AneTrainerError):
    """The user stopped the run; a checkpoint was written."""

    code = "ANE130"
    exit_code = 130


class NumericsWarning(UserWarning):
    """Numbers left the engine's range; the message names the module and what was done."""


def error_json(error: AneTrainerError) -> dict[str, Any]:
    """An error as the JSON object that `--json` prints."""
    found = {"code": error.code, "message": error.args[0], "exit_code": error.exit_code}
    findings = [asdict(finding) for finding in error.findings] if isinstance(error, UnsupportedModel) else []
    return {"error": {**found, **({"findings": findings} if findings else {})}}
