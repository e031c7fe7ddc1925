"""Stands in the place of ANEForge's invokers, the processes that run a netplist on a Mac.

`subprocess.run` of an invoker and `subprocess.Popen` of the persistent worker are answered within this process where
ANEForge itself starts them; anybody else who starts one gets a script that does the same in a process of its own:

    python -m ane_trainer.interop.aneforge.bridges CHIP FIDELITY NAME --net-plist ... --weights ... --input x=FILE ...

Flags, files, the JSON that is printed and the worker's pipe protocol are those of ANEForge 0.4.0 `_invokers/*.mm`.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np

from ane_trainer.ane.errors import AneTrainerError
from ane_trainer.ane.simulator import EngineContext, make_context
from ane_trainer.interop.aneforge.netplist import Netplist, read_netplist

WORKER = "persistent_worker"

INVOKERS = ("sdpa_invoker", "rank_invoker", "layer_invoker", WORKER)

#: What the real programs return when the compiler refuses a netplist.
_COMPILE_FAILED = 4


def write_invokers(folder: Path, context: EngineContext) -> dict[str, Path]:
    """Scripts with the invokers' names that run netplists on the simulated chip."""
    root = Path(__file__).resolve().parents[3]
    made = {}
    for name in INVOKERS:
        words = [sys.executable, "-m", __name__, context.chip.name, context.fidelity, name]
        made[name] = folder / name
        made[name].write_text(
            f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(root))}:$PYTHONPATH exec {shlex.join(words)} "$@"\n'
        )
        made[name].chmod(made[name].stat().st_mode | stat.S_IXUSR)
    return made


def invoke(name: str, arguments: Sequence[str], context: EngineContext) -> tuple[int, str, str]:
    """Run one netplist from files to files as an invoker does; its exit code, stdout and stderr."""
    try:
        flags = _flags(arguments)
        netplist = _load(flags, context)
        feeds = {symbol: np.fromfile(path, np.float16) for symbol, path in _pairs(flags, "--input")}
        outputs = netplist.run(feeds)
        for symbol, path in _pairs(flags, "--output"):
            outputs[symbol].tofile(path)
        for flag in ("--output-raw", "--raw-output"):
            for symbol, path in _pairs(flags, flag):
                outputs[symbol].tofile(path)
    except (AneTrainerError, OSError, KeyError, ValueError) as fault:
        failed = {"status": "compile_failed", "error": str(fault)}
        return _COMPILE_FAILED, json.dumps(failed) + "\n", f"{name}: compile failed: {fault}\n"
    done = {
        "status": "ok", "compile_ms": 0.0, "load_ms": 0.0, "eval_us": 0.0,
        "live_inputs": [_live(symbol, shape) for symbol, shape in netplist.inputs.items()],
        "live_outputs": [_live(symbol, array.shape) for symbol, array in outputs.items()],
    }  # fmt: skip
    return 0, json.dumps(done) + "\n", ""


def serve(arguments: Sequence[str], context: EngineContext, requests: BinaryIO, answers: BinaryIO) -> int:
    """The persistent worker: announce the sizes, then answer batches until the pipe ends; the exit code."""
    flags = _flags(arguments)
    try:
        netplist = _load(flags, context)
        shapes = netplist.shapes()
        into = [int(np.prod(netplist.inputs[symbol])) for symbol in flags["--input"]]
        out = [int(np.prod(shapes[symbol])) for symbol in flags["--output"]]
    except (AneTrainerError, OSError, KeyError) as fault:
        answers.write(json.dumps({"status": "compile_failed", "error": str(fault)}).encode() + b"\n")
        return _COMPILE_FAILED
    ready = {"status": "ready", "compile_ms": 0.0, "load_ms": 0.0, "input_elems": into, "output_elems": out}
    answers.write(json.dumps(ready).encode() + b"\n")
    while (head := _read(requests, 4)) is not None:
        (count,) = struct.unpack("<I", head)
        data = _read(requests, 2 * sum(into) * count)
        if data is None:
            break
        for row in np.frombuffer(data, np.float16).reshape(count, -1):
            parts = np.split(row, np.cumsum(into)[:-1])
            results = netplist.run(dict(zip(flags["--input"], parts, strict=True)))
            _write(answers, b"".join(results[symbol].tobytes() for symbol in flags["--output"]))
    return 0


class Processes(ModuleType):
    """`subprocess` as ANEForge's bridges see it: the invokers are answered here, all else is the real module.

    Once someone has put another `run` or `Popen` into the real module (a test that plays the process), theirs is asked.
    """

    def __init__(self, context: EngineContext, invokers: dict[str, Path]) -> None:
        super().__init__("subprocess", subprocess.__doc__)
        self._context = context
        self._names = {str(path): name for name, path in invokers.items()}
        self._real: tuple[object, object] = subprocess.run, subprocess.Popen

    def __getattr__(self, name: str) -> object:
        return getattr(subprocess, name)

    def run(self, command: object, *rest: object, **options: object) -> object:
        """`subprocess.run`."""
        name = self._names.get(str(command[0])) if isinstance(command, list) else None
        run: Callable[..., object] = subprocess.run
        if name is None or not isinstance(command, list) or run is not self._real[0]:
            return run(command, *rest, **options)
        code, out, err = invoke(name, command[1:], self._context)
        return subprocess.CompletedProcess(command, code, out, err)

    def Popen(self, command: object, *rest: object, **options: object) -> object:
        """`subprocess.Popen`."""
        name = self._names.get(str(command[0])) if isinstance(command, list) else None
        start: Callable[..., object] = subprocess.Popen
        if name != WORKER or not isinstance(command, list) or start is not self._real[1]:
            return start(command, *rest, **options)
        return WorkerThread(command[1:], self._context)


class WorkerThread:
    """The persistent worker on a thread, with what its user needs of a process: pipes, `poll`, `wait`, `kill`."""

    def __init__(self, arguments: Sequence[str], context: EngineContext) -> None:
        requests, self.stdin = _pipe()
        self.stdout, answers = _pipe()
        self.stderr = io.BytesIO()
        self.returncode: int | None = None
        self.pid = os.getpid()

        def work() -> None:
            with requests, answers:
                try:
                    self.returncode = serve(arguments, context, requests, answers)
                except OSError:
                    self.returncode = 1

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the input ends; raises `subprocess.TimeoutExpired` when it does not."""
        self._thread.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(WORKER, timeout or 0.0)
        return self.returncode

    def kill(self) -> None:
        """End it."""
        if not self.stdin.closed:
            self.stdin.close()
        self._thread.join(1.0)
        self.returncode = -9 if self.returncode is None else self.returncode


def _pipe() -> tuple[BinaryIO, BinaryIO]:
    read, write = os.pipe()
    return os.fdopen(read, "rb", buffering=0), os.fdopen(write, "wb", buffering=0)


def _load(flags: dict[str, list[str]], context: EngineContext) -> Netplist:
    weights = [Path(path).read_bytes() for path in flags.get("--weights", ())]
    return read_netplist(Path(flags["--net-plist"][0]).read_bytes(), weights, context)


def _flags(arguments: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for flag, value in zip(arguments[::2], arguments[1::2], strict=True):
        found.setdefault(flag, []).append(value)
    return found


def _pairs(flags: dict[str, list[str]], flag: str) -> list[list[str]]:
    return [entry.split("=", 1) for entry in flags.get(flag, ())]


def _live(symbol: str, shape: Sequence[int]) -> dict[str, int | str]:
    """What the engine says of a port; rows here follow each other without padding."""
    batches, channels, height, width = shape
    return {
        "Symbol": symbol, "Batches": batches, "Channels": channels, "Depth": 1, "Height": height, "Width": width,
        "Interleave": 1, "Type": "Float16", "RowStride": 2 * width, "PlaneStride": 2 * width * height,
        "DepthStride": 2 * width * height, "BatchStride": 2 * width * height * channels,
    }  # fmt: skip


def _read(stream: BinaryIO, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        part = stream.read(count - len(data))
        if not part:
            return None
        data += part
    return data


def _write(stream: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def main(arguments: Sequence[str]) -> int:
    """One invoker as a process: chip, fidelity, the invoker's name, its flags."""
    chip, fidelity, name, *rest = arguments
    context = make_context(chip, fidelity)
    if name == WORKER:
        with os.fdopen(0, "rb", buffering=0) as requests, os.fdopen(1, "wb", buffering=0) as answers:
            return serve(rest, context, requests, answers)
    code, out, err = invoke(name, rest, context)
    sys.stdout.write(out)
    sys.stderr.write(err)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
