"""ANEForge on the simulator: `install(chip="m5")`, and the installed `aneforge` runs without a Mac."""

from __future__ import annotations

from ane_trainer.interop.aneforge.host import Installation, put_in
from ane_trainer.interop.aneforge.library import SimulatedLibrary

__all__ = ["SimulatedLibrary", "install", "installed", "uninstall"]

_current: list[Installation] = []


def install(chip: str = "m5", fidelity: str = "exact", *, threads: int | None = None) -> None:
    """From here on the installed `aneforge` (0.4.x) compiles and dispatches to the simulated `chip`.

    ANEForge then also sees that chip as its host (op floors, limits, decompositions). Installing again
    changes the chip; programs that are loaded go on running on the chip they were compiled for.

    Args:
        chip: a name that `chips.get_chip` knows.
        fidelity: `exact` (Q15.16 accumulation, bit for bit) or `fast` (fp32 accumulation).
        threads: worker threads; by default the machine's cores.

    Raises:
        UsageError: unknown chip or fidelity.
        MissingDependency: ANEForge is not installed, or not 0.4.x.
    """
    library = SimulatedLibrary(chip, fidelity, threads)
    uninstall()
    _current.append(put_in(library))


def uninstall() -> None:
    """Give ANEForge its own library back; without an installation nothing happens."""
    while _current:
        _current.pop().undo()


def installed() -> SimulatedLibrary | None:
    """The library in use, or None."""
    return _current[-1].library if _current else None
