"""The C interface of ANEForge's dispatch library over the simulator: same functions and error returns.

Arguments arrive as ctypes passes them (bytes, integers, pointers, arrays, `byref`). Failures print their
reason to stderr and return what the library returns: no handle from a failed compile, -1 elsewhere (ANEForge
0.4.0, `ane_e5rt_dispatch.mm`). At most 128 programs are loaded at a time (ANEForge e5rt reference: the 129th
load fails).
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ane_trainer.ane.chips.lookup import Chip, get_chip, limit
from ane_trainer.ane.errors import AneTrainerError, UsageError
from ane_trainer.ane.simulator import EngineContext, make_context
from ane_trainer.interop.aneforge.loaded import LoadedProgram, Operation, PortSpec, bind_operation
from ane_trainer.interop.aneforge.reading import check, read_program

ANE_MASK = 0x4
"""Bit of the device mask that asks for the engine."""

_Result = TypeVar("_Result")

_FAILED = -1
_NEVER_SUBMITTED = -2


class SimulatedLibrary:
    """Stands where the loaded macOS library would; `ane_e5rt_*` attributes are its functions.

    The functions take `restype` and `argtypes` like those of a ctypes library and ignore them. Loaded
    programs belong to the process, not to one library: after another `install` they still run, on their chip.
    """

    #: Loaded programs by handle, and the handles to come.
    loaded: ClassVar[dict[int, LoadedProgram]] = {}
    _handles: ClassVar[Iterator[int]] = count(0x10000, 0x10)
    _blocks: ClassVar[dict[int, tuple[object, object]]] = {}
    _lane: ClassVar[threading.RLock] = threading.RLock()

    #: Operations that were loaded before the process whose limit counts began (see `start_counting`).
    _uncounted: ClassVar[int] = 0

    def __init__(self, chip: str, fidelity: str = "exact", threads: int | None = None) -> None:
        self.context: EngineContext = make_context(chip, fidelity, threads)
        for name in dir(type(self)):
            if name.startswith("_c_"):
                setattr(self, f"ane_e5rt_{name[3:]}", partial(getattr(self, name)))

    def functions(self) -> dict[str, Callable[..., object]]:
        """The functions of the C interface by their names."""
        return {name: value for name, value in vars(self).items() if name.startswith("ane_e5rt_")}

    @classmethod
    def start_counting(cls) -> None:
        """From here on the limit of loaded programs counts as in a new process."""
        cls._uncounted = cls._loaded_operations()

    @classmethod
    def _loaded_operations(cls) -> int:
        return sum(len(program.operations) for program in cls.loaded.values())

    # -- compile and release --------------------------------------------------------------------------

    def _c_program_compile(
        self, mil_path: object, cache_dir: object, device_mask: object,
        input_names: object, input_sizes: object, n_inputs: object,
        output_names: object, output_sizes: object, n_outputs: object,
    ) -> int | None:  # fmt: skip
        """Compile a MIL file and load it; the handle, or None."""
        inputs = _specs(input_names, input_sizes, n_inputs)
        outputs = _specs(output_names, output_sizes, n_outputs)
        mask = _number(device_mask)
        operation = self._guarded(lambda: self._compile(_text(mil_path), mask, inputs, outputs))
        if operation is None:
            return None
        handle = next(self._handles)
        self.loaded[handle] = LoadedProgram([operation], _text(cache_dir), mask)
        return handle

    def _compile(self, path: str, mask: int, inputs: list[PortSpec], outputs: list[PortSpec]) -> Operation:
        if not mask & ANE_MASK:
            raise UsageError(
                f"device mask: needs the engine ({ANE_MASK:#x}); got {mask:#x}. Nothing else is simulated."
            )
        room = limit(self.context.chip, "loaded_programs")
        if room is not None and self._loaded_operations() - self._uncounted >= room.value:
            raise UsageError(
                f"programs: needs at most {room.value:g} loaded in a process ({room.evidence.source}). "
                "Release one."
            )
        program = read_program(Path(path))
        check(program, self.context.chip)
        return bind_operation(program.main, self.context, inputs, outputs)

    def _c_program_release(self, program: object) -> None:
        """Free a program and its place among the loaded ones."""
        self.loaded.pop(_number(program), None)

    def _c_compile_check(
        self, mil_path: object, cache_dir: object, device_mask: object, options: object
    ) -> int:
        """0 if the chip of `TargetArchitecture=...` (by default the installed one) takes the program."""
        chip = _target_chip(_text(options), self.context.chip)

        def compiles() -> bool:
            check(read_program(Path(_text(mil_path))), chip)
            return True

        return 0 if self._guarded(compiles) else _FAILED

    # -- ports ----------------------------------------------------------------------------------------

    def _c_program_set_input_fp16(self, program: object, name: object, data: object, words: object) -> int:
        """Copy `words` 16-bit words into an input port."""
        return self._c_program_set_input_fp16_op(program, 0, name, data, words)

    def _c_program_set_input_fp16_op(
        self, program: object, index: object, name: object, data: object, words: object
    ) -> int:
        def copy(loaded: LoadedProgram) -> int:
            port, nbytes = loaded.find("inputs", _number(index), _text(name)), 2 * _number(words)
            if nbytes > port.nbytes:
                raise UsageError(f"input {_text(name)} overflow ({nbytes} > {port.nbytes})")
            port.buffer.write(data, nbytes)
            return 0

        return self._with(program, copy)

    def _c_program_get_output_fp16(self, program: object, name: object, target: object, words: object) -> int:
        """Copy at most `words` 16-bit words out of an output port."""
        return self._c_program_get_output_fp16_op(program, 0, name, target, words)

    def _c_program_get_output_fp16_op(
        self, program: object, index: object, name: object, target: object, words: object
    ) -> int:
        def copy(loaded: LoadedProgram) -> int:
            port = loaded.find("outputs", _number(index), _text(name))
            port.buffer.read(target, min(2 * _number(words), port.nbytes))
            return 0

        return self._with(program, copy)

    def _c_program_input_buffer(self, program: object, name: object, address: object, nbytes: object) -> int:
        """The memory that an input port reads; valid until the program is released."""
        return self._with(program, lambda loaded: _expose(loaded, "inputs", _text(name), address, nbytes))

    def _c_program_output_buffer(self, program: object, name: object, address: object, nbytes: object) -> int:
        """The memory that an output port writes."""
        return self._with(program, lambda loaded: _expose(loaded, "outputs", _text(name), address, nbytes))

    def _c_program_share_buffer(
        self, program: object, source: object, out: object, target: object, into: object
    ) -> int:
        """Bind an input port of operation `target` to the buffer of an output port of operation `source`."""

        def share(loaded: LoadedProgram) -> int:
            loaded.share((_number(source), _text(out)), (_number(target), _text(into)))
            return 0

        return self._with(program, share)

    # -- execution ------------------------------------------------------------------------------------

    def _c_program_execute(self, program: object) -> int:
        """Run all operations of a program."""

        def run(loaded: LoadedProgram) -> int:
            loaded.execute()
            return 0

        return self._with(program, run)

    _c_program_execute_multi = _c_program_execute

    def _c_program_execute_async(self, program: object) -> int:
        """Run all operations; the simulator's runs end before they return. The events count the run."""

        def run(loaded: LoadedProgram) -> int:
            loaded.execute_async()
            return 0

        return self._with(program, run)

    def _c_program_wait_for_completion(self, program: object) -> int:
        """0 for a run that `execute_async` began, once; -2 when there is none to wait for."""
        loaded = self.loaded.get(_number(program))
        if loaded is None or not loaded.submitted:
            return _NEVER_SUBMITTED
        loaded.submitted = False
        return 0

    # -- events: they count runs of execute_async, as on macOS (e5rt reference, section 5) ---------------

    def _c_program_chain_ops(self, program: object, source: object, target: object, name: object) -> int:
        """`target` waits for `source`; operations of a stream run in order anyway."""

        def chain(loaded: LoadedProgram) -> int:
            loaded.chain(_number(source), _number(target))
            return 0

        return self._with(program, chain)

    def _c_program_get_chain_event_last_signaled(self, program: object, index: object, value: object) -> int:
        """How many runs of `execute_async` operation `index` has ended."""

        def read(loaded: LoadedProgram) -> int:
            if value is None:
                return _FAILED
            _store(value, loaded.operation(_number(index)).signaled)
            return 0

        return self._with(program, read)

    _c_program_get_event_last_signaled = _c_program_get_chain_event_last_signaled

    def _c_program_get_final_event_signaled(self, program: object, before: object, after: object) -> int:
        """The last operation's count, before the latest `execute_async` and now; -1 before any run."""

        def read(loaded: LoadedProgram) -> int:
            if not loaded.committed:
                return _FAILED
            _store(before, loaded.signaled_before)
            _store(after, loaded.operations[-1].signaled)
            return 0

        return self._with(program, read)

    def _c_make_completion_block(self, callback: object, context: object) -> int | None:
        """A handle of a callback that nobody calls: there is no queue to hand it to. None for no callback."""
        if not callback:
            return None
        block = next(self._handles)
        self._blocks[block] = (callback, context)
        return block

    def _c_free_completion_block(self, block: object) -> None:
        """Forget a callback."""
        self._blocks.pop(_number(block), None)

    def _c_program_get_op_count(self, program: object) -> int:
        loaded = self.loaded.get(_number(program))
        return len(loaded.operations) if loaded else 0

    def _c_program_add_op(
        self,
        program: object,
        mil_path: object,
        in_name: object,
        in_size: object,
        out_name: object,
        out_size: object,
    ) -> int:
        """Compile one more single-input, single-output operation onto the program's stream; its index."""

        def add(loaded: LoadedProgram) -> int:
            inputs, outputs = [(_text(in_name), _number(in_size))], [(_text(out_name), _number(out_size))]
            loaded.operations.append(self._compile(_text(mil_path), loaded.device_mask, inputs, outputs))
            loaded.committed = False
            return len(loaded.operations) - 1

        return self._with(program, add)

    # -- error returns --------------------------------------------------------------------------------

    def _with(self, program: object, action: Callable[[LoadedProgram], int]) -> int:
        loaded = self.loaded.get(_number(program))
        if loaded is None:
            return _FAILED
        result = self._guarded(lambda: action(loaded))
        return _FAILED if result is None else result

    def _guarded(self, action: Callable[[], _Result]) -> _Result | None:
        """The action's result; None, with the reason on stderr, when it is refused. One at a time, as on the
        engine's single lane (ANEForge: concurrency does not amortize a dispatch).
        """
        try:
            with self._lane:
                return action()
        except (AneTrainerError, OSError, UnicodeDecodeError) as fault:
            print(f"ane_trainer simulator ({self.context.chip.title}): {fault}", file=sys.stderr)
            return None


def _expose(loaded: LoadedProgram, kind: str, name: str, address: object, nbytes: object) -> int:
    port = loaded.find(kind, 0, name)
    _store(address, port.buffer.expose())
    _store(nbytes, port.nbytes)
    return 0


def _target_chip(options: str, host: Chip) -> Chip:
    """The chip of `TargetArchitecture=h13`; e5rt takes the host's for a name that it does not know."""
    found = re.search(r"TargetArchitecture=(\w+)", options)
    if found is None:
        return host
    try:
        return get_chip(found[1])
    except UsageError:
        return host


def _specs(names: Any, sizes: Any, how_many: object) -> list[PortSpec]:
    return [(_text(names[i]), _number(sizes[i])) for i in range(_number(how_many))]


def _number(value: Any) -> int:
    """An integer from an int, a ctypes integer or pointer, or None."""
    value = getattr(value, "value", value)
    return int(value) if value is not None else 0


def _text(value: Any) -> str:
    value = getattr(value, "value", value)
    return value.decode() if isinstance(value, bytes) else (value or "")


def _store(target: Any, value: int) -> None:
    """Write through an out-parameter: `byref(x)`, `pointer(x)`, or NULL."""
    if target is not None:
        place = getattr(target, "_obj", None)
        (target.contents if place is None else place).value = value
