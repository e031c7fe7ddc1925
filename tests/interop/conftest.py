"""ANEForge on the simulated M5 for every test of this folder, with a cache of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("aneforge")

from ane_trainer.interop.aneforge import install, uninstall


@pytest.fixture(scope="session", autouse=True)
def aneforge_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANEFORGE_CACHE_DIR", str(tmp_path_factory.mktemp("aneforge")))
        patch.setenv("ANEFORGE_TARGET", "")
        yield
    uninstall()


@pytest.fixture(autouse=True)
def m5(aneforge_cache: None) -> None:
    """Programs that ANEForge keeps (its FFT plans) stay loaded from test to test."""
    install("m5", threads=1)
