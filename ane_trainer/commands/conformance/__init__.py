"""Conformance: a fixed set of programs run on an engine and on the simulator, compared bit for bit."""

from ane_trainer.commands.conformance.commands import read, run
from ane_trainer.commands.conformance.engines import DeviceEngine
from ane_trainer.commands.conformance.evidence import rows_as_text, rows_of
from ane_trainer.commands.conformance.report import as_text, examine, headline, read_report, write_report
from ane_trainer.commands.conformance.suite import VERSION

__all__ = [
    "VERSION", "DeviceEngine", "as_text", "examine", "headline", "read", "read_report", "rows_as_text", "rows_of",
    "run", "write_report",
]  # fmt: skip
