"""Apple's Core AI runtime behind ordinary calls: its coroutines run on one event loop in a thread of its own.

On Linux (and macOS 26) the runtime of the `coreai-core` wheel runs on the CPU. On macOS 27 with
`USE_OS_COREAI=1` the system's runtime is used and asked to prefer the Neural Engine; Core AI then runs
everything there that can run there and the rest elsewhere, and no interface tells which (Apple engineer,
developer forum thread 831967). That branch is unverified on hardware.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import importlib.util
import os
import threading
import time
import weakref
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ane_trainer.ane.errors import MissingDependency, SimulationError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.utils import without_lines

T = TypeVar("T")

EXTRA = 'pip install "ane_trainer[coreai]"'


def missing() -> str | None:
    """None if the runtime is installed, else the reason and what to type."""
    if importlib.util.find_spec("coreai") is None:
        return f"the package coreai-core is not installed. Install it: {EXTRA}"
    return None


def require() -> None:
    """Raises: MissingDependency (ANE201) if the runtime is not installed."""
    reason = missing()
    if reason is not None:
        raise MissingDependency(f"coreai: needs Apple's Core AI runtime; {reason}")


def prefers_neural_engine() -> bool:
    """True where the system's runtime is used, which takes a preference for the Neural Engine (macOS 27)."""
    if missing() is not None:
        return False
    from coreai.runtime import SpecializationOptions

    return bool(SpecializationOptions.is_supported())


class _Loop:
    """The event loop of a process, started when first used; a forked child starts its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._thread: threading.Thread | None = None

    def run(self, work: Coroutine[object, object, T]) -> T:
        """The coroutine's result; safe from any thread, also from one that has a running loop."""
        return asyncio.run_coroutine_threadsafe(work, self._running()).result()

    def finish(self, stack: contextlib.AsyncExitStack) -> None:
        """Close a stack that was opened here; the loop's own thread (a collector's call) does not wait."""
        if self._pid == os.getpid():
            closing = asyncio.run_coroutine_threadsafe(stack.aclose(), self._running())
            if threading.current_thread() is not self._thread:
                closing.result()

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
                self._thread = threading.Thread(target=self._loop.run_forever, name="coreai", daemon=True)
                self._thread.start()
                atexit.register(self.stop)
            return self._loop

    def stop(self) -> None:
        """Release what is open, end the thread and let the runtime's threads come to rest, at the end of a process.

        A thread of the runtime that asks for the interpreter while that ends is unwound by it, which Swift answers
        with abort(): so ended 34 of 597 processes, their work done, with two cores busy with four of them.
        """
        for asset in list(_OPEN):
            asset.close()
        with self._lock:
            loop, thread = self._loop, self._thread
            if loop is None or thread is None or self._pid != os.getpid():
                return
            self._loop = self._thread = None
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        gc.collect()
        _rest()


def _rest(at_most: float = 1.0) -> None:
    """Wait until the process's other threads have been asleep twice, 2 ms apart; where no /proc tells, 50 ms."""
    own, asleep, end = threading.get_native_id(), 0, time.monotonic() + at_most
    while asleep < 2 and time.monotonic() < end:
        time.sleep(0.002 if _TASKS.is_dir() else 0.025)
        asleep = 0 if _running_threads(own) else asleep + 1


def _running_threads(own: int) -> bool:
    """Whether a thread of this process but `own` runs or is ready to (Linux: proc_pid_stat(5), field 3)."""
    for task in _TASKS.glob("[0-9]*") if _TASKS.is_dir() else ():
        with contextlib.suppress(OSError):
            if int(task.name) != own and (task / "stat").read_text().rpartition(")")[2].split()[0] == "R":
                return True
    return False


_TASKS = Path("/proc/self/task")
_LOOP = _Loop()
_OPEN: weakref.WeakSet[LoadedAsset] = weakref.WeakSet()


class LoadedAsset:
    """An `.aimodel` in memory: its functions can be called until `close`."""

    def __init__(self, path: Path) -> None:
        require()
        self._stack = contextlib.AsyncExitStack()
        self._functions: dict[str, object] = {}
        self._model: object = _LOOP.run(self._open(path))
        self._release = weakref.finalize(self, _LOOP.finish, self._stack)
        _OPEN.add(self)

    async def _open(self, path: Path) -> Any:
        from coreai.authoring import AIModelAsset

        return await self._stack.enter_async_context(AIModelAsset.load(path).executable(_options()))

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of the asset's functions."""
        return tuple(self._opened().function_names)

    def describe(self, function: str) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes by name of a function's `inputs`, `outputs` and `states`."""
        descriptor = self._function(function).desc
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for kind in ("input", "output", "state"):
            names = getattr(descriptor, f"{kind}_names")
            shape_of = getattr(descriptor, f"{kind}_descriptor")
            found[f"{kind}s"] = {name: tuple(shape_of(name).shape) for name in names}
        return found

    def call(
        self, function: str, inputs: Mapping[str, Array], state: Mapping[str, object] | None = None
    ) -> dict[str, Array]:
        """Run a function: NumPy arrays in and out; `state` holds `make_state` arrays, updated in place."""
        from coreai.runtime import NDArray as CoreAIArray

        ready = {name: CoreAIArray(np.ascontiguousarray(array)) for name, array in inputs.items()}
        results = _LOOP.run(_invoke(self._function(function), ready, dict(state or {})))
        return {name: np.array(array.numpy()) for name, array in results.items()}

    def close(self) -> None:
        """Release the model; closing twice is fine."""
        if self._model is not None:
            self._model, self._functions = None, {}
            self._release()

    def _function(self, name: str) -> Any:
        if name not in self._functions:
            with without_lines("ODIE [default]: Loading function"):
                self._functions[name] = self._opened().load_function(name)
        return self._functions[name]

    def _opened(self) -> Any:
        if self._model is None:
            raise SimulationError("session: needs to be open; it was closed. Compile the step again.")
        return self._model


def make_state(array: Array) -> Any:
    """Memory for one state, holding a copy of `array`."""
    from coreai.runtime import NDArray as CoreAIArray

    return CoreAIArray(np.array(array, order="C"))


def read_state(state: Any) -> Array:
    """The live memory of a state."""
    view: Array = state.numpy()
    return view


async def _invoke(function: Any, inputs: Mapping[str, object], state: Mapping[str, object]) -> Any:
    return await function(inputs=inputs, state=state)


def _options() -> Any:
    """Prefer the Neural Engine where the runtime takes preferences (macOS 27, unverified on hardware)."""
    if not prefers_neural_engine():
        return None
    from coreai.runtime import ComputeUnitKind, SpecializationOptions

    return SpecializationOptions.from_preferred_compute_unit_kind(ComputeUnitKind.neural_engine())
