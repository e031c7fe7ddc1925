"""Recall a step compiled before from the disk cache: no capture, lowering, passes or division.

A step is known by what its program is made of: the model's structure, code, Python values, weights and buffers, the
loss, the optimizer's settings, the example, options, versions. Entries are files named by the SHA-256 of all that. One
is used only while the files that Python had loaded are as they were, and if PyTorch's loss and gradients on the
example are those that were noted: what no key can see, a patched library, say, shows there. What cannot be compared
between processes is not kept: hooks, sparse tensors, optimizers of a user's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import os
import pickle
import platform
import sys
import sysconfig
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch

from ane_trainer.__version__ import __version__
from ane_trainer.ane.capture import StepCapture, get_loss
from ane_trainer.ane.capture.batches import Structure, program_form, tensors_of
from ane_trainer.ane.capture.buffers import BufferChanges
from ane_trainer.ane.capture.calibrate import witness
from ane_trainer.ane.capture.optimizers.table import RULES, plain, rule_for, uneven_groups
from ane_trainer.ane.capture.outside import numbers_kept
from ane_trainer.ane.capture.ports import find_parameters
from ane_trainer.ane.capture.randomness import PREFIX
from ane_trainer.ane.capture.range.calibration import Magnitudes
from ane_trainer.ane.capture.range.switch import is_watched
from ane_trainer.ane.dispatch.fingerprint import Fingerprints
from ane_trainer.ane.dispatch.frozen import quantized_kind
from ane_trainer.ane.dispatch.guards import Guards, code_text
from ane_trainer.ane.stages import Captured, Compiled
from ane_trainer.utils import added

#: Bytes that the folder may hold, and that one entry may.
LIMIT, LARGEST = 2 << 30, 1 << 29
#: How far loss and gradients may be from what was noted, as a share: less than fp16 shows, more than threads change.
_TOLERANCE = 5e-6
_PACKAGE = Path(__file__).parents[2]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Entry:
    """What is kept of a compiled step. `parameters`: (group, unit) by name; `files`: (size, time) by path."""

    witness: tuple[float, ...]
    files: Mapping[str, tuple[int, int]]
    draws: str
    loss_scale: float
    units: Mapping[str, float]
    parameters: Mapping[str, tuple[int | None, float]]
    changes: BufferChanges
    calibration: Magnitudes
    guarded: tuple[str, ...]
    compiled: Compiled


@dataclass(frozen=True)
class Question:
    """What is to be compiled, as far as an entry is known by it; `others` are options as text."""

    model: torch.nn.Module
    loss: Any
    optimizer: torch.optim.Optimizer
    example: tuple[object, object]
    batches: tuple[tuple[object, object], ...]
    others: str
    on_host: bool
    capture_again: Callable[[Entry], StepCapture]
    in_mode: Callable[[], contextlib.AbstractContextManager[None]]


def folder() -> Path:
    """Where compiled steps are kept."""
    return Path(platformdirs.user_cache_dir("ane_trainer")) / "steps"


@dataclass(frozen=True)
class Memory:
    """A place on the disk for one step."""

    question: Question
    path: Path

    def recalled(self) -> tuple[StepCapture, Compiled] | None:
        """The step, if it is there and all that it was made of is as it was."""
        entry = _read(self.path)
        if entry is None or not self._holds(entry):
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)
        asked = self.question
        parameters = [
            dataclasses.replace(p, group=entry.parameters[p.name][0], unit=entry.parameters[p.name][1])
            for p in find_parameters(asked.model, asked.optimizer)
        ]
        again = functools.cache(lambda: asked.capture_again(entry))

        def captured() -> Captured:
            return again().captured

        capture = StepCapture(
            captured, entry.loss_scale, entry.units, rule_for(asked.optimizer, asked.on_host), tuple(parameters),
            entry.changes, lambda batch: again().values(batch), None, entry.calibration,
            entry.guarded,
        )  # fmt: skip
        return capture, entry.compiled

    def keep(self, capture: StepCapture, compiled: Compiled) -> None:
        """Write the step, as far as the place can be written."""
        if capture.update is not None:
            return
        try:
            noted = capture.witness or self._witness()
        except RuntimeError:  # a forward that runs only as it is captured
            return
        draws = any(port.target.startswith(PREFIX) for port in compiled.inputs)
        entry = Entry(
            noted, _files(), _generator() if draws else "", capture.loss_scale, dict(capture.units),
            {p.name: (p.group, p.unit) for p in capture.parameters}, capture.changes,
            dict(capture.calibration), capture.guarded, compiled,
        )  # fmt: skip
        data = b""
        with contextlib.suppress(pickle.PicklingError, AttributeError, TypeError):
            data = pickle.dumps(entry, protocol=5)
        if not 0 < len(data) <= LARGEST:
            return
        scratch = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(prefix=f".{self.path.name[:16]}.", dir=self.path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            os.replace(scratch, self.path)
        except OSError:
            if scratch is not None:
                Path(scratch).unlink(missing_ok=True)
            return
        added(self.path.parent, len(data), LIMIT, keep=self.path)

    def _holds(self, entry: Entry) -> bool:
        """Whether files, draws, folders of programs, loss and gradients are those of the entry."""
        kept = [part.folder for part in entry.compiled.programs if part.folder is not None]
        if not all(each.is_dir() for each in kept) or entry.draws not in ("", _generator()):
            return False
        if any(_stamp(path) != stamp for path, stamp in entry.files.items()):
            return False
        try:
            found = self._witness()
        except RuntimeError:  # a forward that runs only as it is captured
            return False
        if len(found) != len(entry.witness):
            return False
        scale = max((abs(value) for value in entry.witness[1:] if math.isfinite(value)), default=0.0)
        bounds = [0.0] + [_TOLERANCE * scale] * (len(found) - 1)
        return all(
            math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=bound) or (a != a and b != b)
            for a, b, bound in zip(found, entry.witness, bounds, strict=True)
        )

    def _witness(self) -> tuple[float, ...]:
        asked = self.question
        example = (program_form(asked.example[0]), program_form(asked.example[1]))
        with warnings.catch_warnings(), asked.in_mode(), numbers_kept(asked.model, asked.loss):
            warnings.simplefilter("ignore")  # the user's code says it when it is captured
            return witness(
                asked.model, get_loss(asked.loss), find_parameters(asked.model, asked.optimizer), example
            )


def memory_of(question: Question) -> Memory | None:
    """The place of a step; None for one that is not kept."""
    key = None if is_watched() else _key(question)
    return None if key is None else Memory(question, folder() / key)


# The key -----------------------------------------------------------------------------------------------------


def _key(asked: Question) -> str | None:
    """The name of a step's entry; None where something counts that cannot be compared."""
    tensors = {**dict(asked.model.named_parameters()), **dict(asked.model.named_buffers())}
    for number, batch in enumerate((asked.example, *asked.batches)):
        leaves = chain(tensors_of(batch[0]), tensors_of(batch[1]))
        tensors |= {f"batch {number}/{i}": tensor for i, tensor in enumerate(leaves)}
    strided = all(t.layout == torch.strided and t.device.type == "cpu" for t in tensors.values())
    if not strided or (not asked.on_host and type(asked.optimizer) not in RULES) or _hooked(asked.model):
        return None
    digest = hashlib.sha256()
    for text in (*_versions(), *_texts(asked), *_layout(tensors)):
        digest.update(text.encode() + b"\0")
    digest.update(Fingerprints(tensors).digest())
    return digest.hexdigest()


def _texts(asked: Question) -> Iterator[str]:
    """Structure, code, Python values, settings of the optimizer and options."""
    names = {id(p): name for name, p in asked.model.named_parameters()}
    yield from (f"{path} {_kind(type(module))}" for path, module in asked.model.named_modules())
    yield from Guards(asked.model, asked.loss).portable()
    yield asked.loss if isinstance(asked.loss, str) else _kind(asked.loss)
    yield _kind(type(asked.optimizer))
    for group in asked.optimizer.param_groups:
        yield repr(sorted((key, repr(value)) for key, value in plain(group).items()))
        yield repr([names.get(id(p)) for p in group["params"]])
    yield repr(uneven_groups(asked.optimizer, rule_for(asked.optimizer, asked.on_host)))
    for batch in (asked.example, *asked.batches):
        for part in map(Structure.of, batch):
            yield f"{part.spec} {part.constants!r}"
    yield asked.others
    main = sys.modules.get("__main__")
    if main is not None and getattr(main, "__file__", None) is None:  # typed in: no file has it
        yield from _typed_in(vars(main))


def _layout(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name, t in tensors.items():
        yield f"{name} {tuple(t.shape)} {t.stride()} {t.dtype} {t.requires_grad} {quantized_kind(t)}"


def _versions() -> Iterator[str]:
    """What computes: packages, processor, and what of torch's settings changes numbers."""
    yield from (__version__, torch.__version__, np.__version__, sys.version)
    yield f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {torch.get_default_dtype()}"
    yield f"{torch.is_autocast_enabled('cpu')} {torch.are_deterministic_algorithms_enabled()}"
    yield from _own_files()


@functools.cache
def _own_files() -> tuple[str, ...]:
    """This package's files with size and time: it may be an editable one."""
    return tuple(f"{file.name} {_stamp(str(file))}" for file in sorted(_PACKAGE.rglob("*.py")))


def _typed_in(space: Mapping[str, object]) -> Iterator[str]:
    """The functions, and the methods of classes, of a namespace that no file has."""
    for name, value in space.items():
        if isinstance(value, types.FunctionType):
            yield f"{name} {code_text(value.__code__)}"
        elif isinstance(value, type) and value.__module__ == "__main__":
            yield f"class {name} {[_kind(base) for base in value.__bases__]}"
            yield from _typed_in(vars(value))


def _kind(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _hooked(model: torch.nn.Module) -> bool:
    """Whether code of the user's runs on gradients, or in hooks of modules, which have no place in a key."""
    on_tensors = any(
        p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters()
    )
    return on_tensors or any(vars(module)[name] for module in model.modules() for name in _HOOKS)


def _generator() -> str:
    """The state of torch's generator: what a calibration draws with."""
    return hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()


def _files() -> dict[str, tuple[int, int]]:
    """(size, time) of the files that Python has loaded, but for those whose versions are in the key."""
    standard, packages = (f"{sysconfig.get_paths()[name]}{os.sep}" for name in ("stdlib", "purelib"))
    known = tuple(f"{place}{os.sep}" for place in (*torch.__path__, *np.__path__, _PACKAGE))
    paths = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    found = {}
    for path in sorted(path for path in paths if isinstance(path, str)):
        of_python = path.startswith(standard) and not path.startswith(packages)
        if not of_python and not path.startswith(known) and (stamp := _stamp(path)) is not None:
            found[path] = stamp
    return found


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


# The file ----------------------------------------------------------------------------------------------------


class _Reader(pickle.Unpickler):
    """Makes values of this package's engine part, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN_CLASSES:
            return super().find_class(module, name)
        if module.startswith("ane_trainer.ane.") and name.isidentifier():
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"{module}.{name}")


_PLAIN_CLASSES = frozenset(
    [
        *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath")),
        *(("pathlib._local", name) for name in ("Path", "PosixPath", "WindowsPath")),
    ]
)


def _read(path: Path) -> Entry | None:
    """The entry in a file; None where there is none, or one that is damaged."""
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return None
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    with contextlib.suppress(pickle.UnpicklingError, AttributeError, ImportError, TypeError, EOFError):
        found = _Reader(io.BytesIO(content[32:])).load()
        return found if isinstance(found, Entry) else None
    return None
