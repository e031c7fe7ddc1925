"""Builds the stand-in library and gives it the simulator as its engine."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.errors import AneTrainerError
from ane_trainer.ane.mil.program import Function, Op, Value
from ane_trainer.ane.simulator import Plan, make_context, prepare
from ane_trainer.interop.aneforge.reading import check, read_program

COMPILER = shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler (cc) to build the stand-in")
SOURCE = Path(__file__).with_name("e5rt_standin.c")

_Names, _Sizes = ctypes.POINTER(ctypes.c_char_p), ctypes.POINTER(ctypes.c_size_t)
_Memory = ctypes.POINTER(ctypes.c_void_p)
_COMPILE = ctypes.CFUNCTYPE(
    ctypes.c_int64, ctypes.c_char_p, ctypes.c_uint64,
    _Names, _Sizes, ctypes.c_size_t, _Names, _Sizes, ctypes.c_size_t,
)  # fmt: skip
_EXECUTE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, _Memory, ctypes.c_size_t, _Memory, ctypes.c_size_t)
_RELEASE = ctypes.CFUNCTYPE(None, ctypes.c_int64)


def build(folder: Path) -> Path:
    """Compile the C file; the path of the library."""
    assert COMPILER is not None
    target = folder / "libstandin.so"
    command = [COMPILER, "-std=gnu11", "-Wall", "-Werror", "-O1", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(target), str(SOURCE)], check=True)
    return target


class Engine:
    """The simulator behind the callbacks: compiled programs by id; `failing` runs are refused.

    An `eager` engine writes each output as soon as what it depends on is there, operation by operation, and
    reads inputs in the ports' memory whenever an operation needs them: a schedule that a compiler which knows
    nothing of shared buffers may choose.
    """

    def __init__(self, library: Path, chip: str = "m4") -> None:
        self.context = make_context(chip, "exact", 1)
        self.chip = get_chip(chip)
        self.plans: dict[int, tuple[Function, Plan, list[str], list[str]]] = {}
        self.compiled: list[tuple[str, list[tuple[str, int]], list[tuple[str, int]]]] = []
        self.failing = self.eager = False
        self._ids = count()
        self._handlers = _COMPILE(self._compile), _EXECUTE(self._execute), _RELEASE(self._release)
        self.library = ctypes.CDLL(str(library))
        self.library.standin_set_handlers(*self._handlers)

    @property
    def loaded(self) -> int:
        return int(self.library.standin_loaded())

    def _compile(self, path: bytes, mask: int, ins: Any, in_bytes: Any, n_in: int,
                 outs: Any, out_bytes: Any, n_out: int) -> int:  # fmt: skip
        inputs = [(ins[i].decode(), in_bytes[i]) for i in range(n_in)]
        outputs = [(outs[i].decode(), out_bytes[i]) for i in range(n_out)]
        self.compiled.append((path.decode(), inputs, outputs))
        try:
            program = read_program(Path(path.decode()))
            check(program, self.chip)
        except (AneTrainerError, OSError) as fault:
            _say(str(fault))
            return -1
        function = program.main
        wanted = [_spec(v) for v in function.inputs], [_spec(v) for v in function.outputs]
        if mask != 4 or (sorted(inputs), sorted(outputs)) != (sorted(wanted[0]), sorted(wanted[1])):
            _say("the ports are not the program's")
            return -1
        number = next(self._ids)
        plan = prepare(function, self.context)
        self.plans[number] = function, plan, [n for n, _ in inputs], [n for n, _ in outputs]
        return number

    def _execute(self, number: int, ins: Any, n_in: int, outs: Any, n_out: int) -> int:
        if self.failing:
            return -5
        function, plan, inputs, outputs = self.plans[number]
        shapes = {v.name: v.type.shape for v in (*function.inputs, *function.outputs)}
        given = {inputs[i]: _view(ins[i], shapes[inputs[i]]) for i in range(n_in)}
        taken = {outputs[i]: _view(outs[i], shapes[outputs[i]]) for i in range(n_out)}
        if self.eager:
            self._run_eagerly(function, given, taken)
            return 0
        for name, array in self.compute(plan, given).items():
            taken[name][...] = array
        return 0

    def compute(self, plan: Plan, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One run of a program."""
        return plan.run(feeds)

    def _run_eagerly(
        self, function: Function, given: dict[str, np.ndarray], taken: dict[str, np.ndarray]
    ) -> None:
        values: dict[str, np.ndarray] = {}
        for op in _outputs_first(function):
            operands = tuple(dict.fromkeys(op.operands()))
            single = prepare(Function("main", operands, (op,), op.results), self.context)
            results = single.run(
                {v.name: values[v.name] if v.name in values else given[v.name] for v in operands}
            )
            values |= results
            for name in results.keys() & taken.keys():
                taken[name][...] = results[name]

    def _release(self, number: int) -> None:
        del self.plans[number]


def _say(reason: str) -> None:
    """To the process's standard error, as a library does."""
    os.write(2, f"standin engine: {reason}\n".encode())


def _outputs_first(function: Function) -> list[Op]:
    """The operations in an order that makes each output as early as its dependencies allow."""
    producers = {value.name: op for op in function.ops for value in op.results}
    order: dict[str, Op] = {}

    def make(name: str) -> None:
        stack = [name]
        while stack:
            op = producers.get(stack[-1])
            wanted = (
                []
                if op is None or op.name in order
                else [
                    v.name
                    for v in op.operands()
                    if v.name in producers and producers[v.name].name not in order
                ]
            )
            if wanted:
                stack += wanted
                continue
            if op is not None:
                order.setdefault(op.name, op)
            stack.pop()

    for value in function.outputs:
        make(value.name)
    return list(order.values())


def _spec(value: Value) -> tuple[str, int]:
    return value.name, value.type.nbytes


def _view(address: int, shape: tuple[int, ...]) -> np.ndarray:
    words = (ctypes.c_uint16 * int(np.prod(shape))).from_address(address)
    return np.frombuffer(words, np.float16).reshape(shape)
