"""Conformance: a fixed set of programs run on an engine and on the simulator, compared bit for bit."""

from ane_trainer.conformance.commands import read, run
from ane_trainer.conformance.engines import DeviceEngine
from ane_trainer.conformance.evidence import rows_as_text, rows_of
from ane_trainer.conformance.report import as_text, examine, headline, read_report, write_report
from ane_trainer.conformance.suite import VERSION

__all__ = [
    "VERSION", "DeviceEngine", "as_text", "examine", "headline", "read", "read_report", "rows_as_text", "rows_of",
    "run", "write_report",
]  # fmt: skip
