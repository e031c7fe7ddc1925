"""Guards: what a compiled step read of Python (flags, numbers, tensor identities), compared before each step.

A program has the values that a forward and a loss saw when they were captured: modules' attributes, `training`,
`requires_grad`, numbers in lists, closures and globals of the user's functions, tensors that are no state. `Guards`
holds them; `changed` takes tens of microseconds for hundreds of modules, `differences` names what changed.
"""

from __future__ import annotations

import enum
import functools
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import nn

from ane_trainer.ane.capture.ports import float_buffers
from ane_trainer.ane.capture.trace.torch_private import version
from ane_trainer.ane.dispatch.fingerprint import Fingerprints
from ane_trainer.ane.dispatch.globals_read import global_names
from ane_trainer.ane.dispatch.harmless import trains

#: Values that are compared as such; of others it counts which object they are.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)
_CONTAINERS = (list, tuple, dict, set, deque)
#: torch's own entries of a module's `__dict__`: tensors and children, which are compared by themselves, and hooks.
_TORCHS = frozenset(vars(nn.Module())) - {"training"}
#: Lists of its parameters that a recurrent layer recreates when it runs on others, as a capture and the proof do.
_FLAT = frozenset(("_flat_weights", "_flat_weight_refs"))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DEEPEST = 6
#: Constant buffers of more bytes (masks) are compared by where they are and how often PyTorch wrote to them.
_LARGE = 1 << 18
#: What transformers keeps of Python's own hashes, which differ from process to process.
_SALTED = "_original_object_hash"


@dataclass(frozen=True)
class _Source:
    """Part of what was read: `read` gives its values now, `names` are what messages call them."""

    names: tuple[str, ...]
    read: Callable[[], Sequence[object]]
    values: tuple[object, ...]

    def changes(self) -> Iterator[str]:
        """`name: old -> new` of every value that is not as it was."""
        try:
            now = tuple(self.read())
        except (KeyError, ValueError):  # a name or a closure's variable that is gone
            now = ()
        for name, old, new in zip(self.names, self.values, now, strict=False):
            if not _same(old, new):
                plain = isinstance(old, _PLAIN) and isinstance(new, _PLAIN)
                yield f"{name}: {old!r} -> {new!r}" if plain else f"{name}: another {type(new).__name__}"
        if len(now) != len(self.values):
            place = self.names[0].rpartition(".")[0] if self.names else "a container"
            yield f"{place}: {len(self.values)} entries -> {len(now)}"


class Guards:
    """A model's and a loss's Python state as it was when this was made; names in `ignored` do not count.

    `counted`: the model's buffers that the host counts and sends.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: object,
        ignored: frozenset[str] = frozenset(),
        counted: Collection[str] = (),
    ) -> None:
        walk = _Walk(ignored)
        walk.model(model, counted)
        walk.value(loss, "loss")
        self._sources = walk.sources
        self._saved = [source.values for source in walk.sources]
        self._reads = [source.read for source in walk.sources]
        self._empty, self._spaces = [s for s in walk.spaces if not s], [s for s in walk.spaces if s]
        self._entries = sum(map(len, self._spaces))
        self._homes = walk.homes
        self._held = list(chain.from_iterable(map(dict.values, self._homes)))
        self._parameters = [t for t in self._held if isinstance(t, torch.Tensor)]
        self._trained = list(map(_trained, self._parameters))
        self._hookable = [t for t in self._parameters if t.requires_grad]
        self._constants = Fingerprints(walk.constants)
        self._large = walk.large
        self._versions = _versions(self._large)
        self._codes = walk.codes

    def changed(self) -> bool:
        """Whether anything may have changed; quick, and right when it says no."""
        try:
            return (
                self._saved != [read() for read in self._reads]
                or self._grown()
                or self._moved()
                or self._trained != list(map(_trained, self._parameters))
                or any(map(_hooks, self._hookable))
                or any(map(_late_hooks, self._hookable))
                or bool(self._constants.changed())
                or self._versions != _versions(self._large)
            )
        except (KeyError, ValueError, RuntimeError, TypeError):  # gone, or not comparable: not as it was
            return True

    def differences(self) -> list[str]:
        """What changed, in words; empty if nothing did."""
        found = list(dict.fromkeys(text for source in self._sources for text in source.changes()))
        if self._moved():
            found.append("a parameter, buffer or submodule: another object")
        elif self._trained != list(map(_trained, self._parameters)):
            found.append("requires_grad")
        if self._grown():
            found.append("attributes or hooks of a module: more or fewer")
        now = zip(self._large, self._versions, _versions(self._large), strict=True)
        written = [*self._constants.changed(), *(name for name, old, new in now if old != new)]
        return found + [f"{name}: written to" for name in written]

    def _grown(self) -> bool:
        """Whether a namespace has more or fewer entries; most are hooks, of which there are none."""
        return any(self._empty) or self._entries != sum(map(len, self._spaces))

    def _moved(self) -> bool:
        """Whether a parameter, buffer or child is another object."""
        return len(self._held) != sum(map(len, self._homes)) or not all(
            map(is_, self._held, chain.from_iterable(map(dict.values, self._homes)))
        )

    def key(self) -> tuple[object, ...]:
        """Equal for equal states; holds the objects that it compares by identity."""
        values = tuple(tuple(map(_frozen, values)) for values in self._saved)
        hooked = any(map(_hooks, self._hookable)) or any(map(_late_hooks, self._hookable))
        held = tuple(map(id, self._held))
        constants = self._constants.digest(), tuple(self._versions)
        return values, self._entries, held, tuple(self._trained), hooked, constants

    def portable(self) -> list[str]:
        """The same as text that means the same to another process: values, kinds of objects, users' code."""
        found = []
        for source in self._sources:
            held = source.read.args[:1] if isinstance(source.read, functools.partial) else ()
            texts = [_text(value) for value in source.values]
            if held and isinstance(held[0], set):  # whose order differs from process to process
                texts.sort()
            pairs = zip(source.names, texts, strict=False)
            found += [f"{name}={text}" for name, text in pairs if not name.endswith(_SALTED)]
        return [*sorted(found), *self._codes, repr(self._trained), self._constants.digest().hex()]


class _Walk:
    """Collects the sources that a step may read."""

    def __init__(self, ignored: frozenset[str]) -> None:
        self._ignored = ignored
        self.sources: list[_Source] = []
        self.spaces: list[Any] = []  # dicts whose number of entries counts
        self.homes: list[Any] = []  # dicts of parameters, buffers and children
        self.constants: dict[str, torch.Tensor] = {}
        self.large: dict[str, torch.Tensor] = {}  # buffers of which not every byte is compared
        self.codes: list[str] = []  # users' functions in the order of the walk
        self._state: set[int] = set()
        self._seen: set[int] = set()

    def model(self, model: nn.Module, counted: Collection[str]) -> None:
        """The trained model: what the step holds of its tensors is compared elsewhere, the others are constants."""
        held = {*dict(model.named_parameters()), *float_buffers(model, dense=False), *counted}
        self._tensors(model, type(model).__name__, held)
        self._modules(model, type(model).__name__)

    def _tensors(self, root: nn.Module, label: str, held: Collection[str]) -> None:
        """Parameters and buffers; those that are not `held` as constants."""
        for name, tensor in chain(root.named_parameters(), root.named_buffers()):
            if id(tensor) in self._state:  # of a module that a method of it leads to again
                continue
            self._state.add(id(tensor))
            if name not in held and tensor.device.type == "cpu" and tensor.layout == torch.strided:
                place = self.large if tensor.nbytes > _LARGE else self.constants
                place[f"{label}.{name}"] = tensor

    def _modules(self, root: nn.Module, label: str) -> None:
        """All modules: attributes, flags, children, hooks, and what their classes' code reads."""
        for path, module in root.named_modules():
            self._module(module, f"{label}.{path}" if path else label)

    def _module(self, module: nn.Module, label: str) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        space = vars(module)
        self.homes += [home for home in (space["_parameters"], space["_buffers"], space["_modules"]) if home]
        self.spaces += [space, *(space[name] for name in _HOOKS)]
        known = _TORCHS | _FLAT if isinstance(module, nn.RNNBase) else _TORCHS
        self._names(space, [name for name in space if name not in known], label, 0)
        self._class(type(module), label)

    def value(self, value: object, label: str, depth: int = 0) -> None:
        """Whatever a user's code may hold on to."""
        known = id(value) in self._seen or id(value) in self._state
        if known or isinstance(value, _PLAIN) or depth > _DEEPEST:
            return
        if isinstance(value, nn.Module):
            self._tensors(value, label, ())
            self._modules(value, label)
            return
        self._seen.add(id(value))
        if trains(value):
            for number, group in enumerate(getattr(value, "param_groups", ())):
                names = [name for name in group if name != "params"]
                self._names(group, names, f"{label}.param_groups[{number}]", depth)
        elif isinstance(value, torch.Tensor):
            if value.device.type == "cpu" and value.layout == torch.strided:
                self.constants[label] = value
        elif isinstance(value, np.ndarray):
            if value.dtype.kind in "fiub" and value.flags.writeable:
                self.constants[label] = torch.from_numpy(value)
        elif isinstance(value, dict):
            self.spaces.append(value)
            self._names(value, list(value), label, depth)
        elif isinstance(value, (list, tuple, set, deque)):
            self._items(value, label, depth)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.value(part, label, depth + 1)
        elif isinstance(value, types.MethodType):
            self.value(value.__self__, label, depth + 1)
            self.value(value.__func__, label, depth + 1)
        elif isinstance(value, types.FunctionType):
            self._function(value, label, depth)
        elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(
            value, (type, types.ModuleType)
        ):
            self.spaces.append(vars(value))
            self._names(vars(value), list(vars(value)), label, depth)
            self._class(type(value), label)
        elif _own(type(value).__module__):
            self._slots(value, label, depth)

    def _slots(self, value: object, label: str, depth: int) -> None:
        """Attributes of an object that has slots in the place of a namespace."""
        names = [
            n for kind in type(value).__mro__ for n in getattr(kind, "__slots__", ()) if hasattr(value, n)
        ]
        if names:
            read = functools.partial(attrgetter(*names, names[0]), value)
            self.sources.append(_Source(tuple(f"{label}.{n}" for n in names), read, read()))
        for name in names:
            self.value(getattr(value, name), f"{label}.{name}", depth + 1)

    def _items(self, value: Collection[object], label: str, depth: int) -> None:
        held = tuple(value)
        if not isinstance(value, tuple):
            names = tuple(f"{label}[{i}]" for i in range(len(held)))
            self.sources.append(_Source(names, functools.partial(tuple, value), held))
        for number, item in enumerate(held):
            self.value(item, f"{label}[{number}]", depth + 1)

    def _names(self, space: Mapping[Any, object], names: Sequence[object], label: str, depth: int) -> None:
        """Some entries of a namespace or dict."""
        names = [name for name in names if f"{label}.{name}" not in self._ignored]
        if names:
            # one name alone would be read as a value, no tuple
            twice = [*names, *names][: max(len(names), 2)]
            labels = tuple(f"{label}.{name}" for name in twice)
            read = functools.partial(itemgetter(*twice), space)
            self.sources.append(_Source(labels, read, read()))
        for name in names:
            self.value(space[name], f"{label}.{name}", depth + 1)

    def _class(self, kind: type, label: str) -> None:
        """Class attributes, and what the methods of the user's classes read."""
        for base in kind.__mro__:
            if _own(base.__module__) and id(base) not in self._seen:
                self._seen.add(id(base))
                space = vars(base)
                kinds = (*_PLAIN, *_CONTAINERS)
                plain = [n for n, v in space.items() if isinstance(v, kinds) and not n.startswith("__")]
                self._names(space, plain, label, 1)
                for function in space.values():
                    if isinstance(function, types.FunctionType):
                        self.value(function, label, 1)

    def _function(self, function: types.FunctionType, label: str, depth: int) -> None:
        """Variables of the closure, defaults, and the globals that the code names."""
        if _written_by_user(function.__code__):
            self.codes.append(f"{label} {function.__qualname__} {code_text(function.__code__)}")
        cells = [cell for cell in function.__closure__ or () if _filled(cell)]
        if cells:
            names = [
                name
                for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
                if _filled(cell)
            ]
            read = functools.partial(_contents, cells)
            self.sources.append(_Source(tuple(f"{label}: {name}" for name in names), read, read()))
            for name, held in zip(names, read(), strict=True):
                self.value(held, f"{label}: {name}", depth + 1)
        for held in (function.__defaults__, function.__kwdefaults__):
            self.value(held, label, depth + 1)
        if _own(function.__module__ or "") and _written_by_user(function.__code__):
            space = function.__globals__
            for code in _codes(function.__code__):
                if {"environ", "getenv"} & set(code.co_names):
                    self._names(os.environ, list(os.environ), "os.environ", depth)
                named = [n for n in global_names(code) if n in space]
                self._names(
                    space,
                    [n for n in named if isinstance(space[n], (*_PLAIN, *_CONTAINERS))],
                    "global",
                    depth,
                )
                for name in named:
                    if not isinstance(space[name], (type, types.ModuleType)):
                        self.value(space[name], f"global {name}", depth + 1)
                    elif isinstance(space[name], types.ModuleType) and _own(space[name].__name__):
                        plain = [n for n in code.co_names if isinstance(vars(space[name]).get(n), _PLAIN)]
                        plain = [n for n in plain if n in vars(space[name])]
                        self._names(vars(space[name]), plain, f"module {name}", depth)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _versions(tensors: Mapping[str, torch.Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), version(t)) for t in tensors.values()]


_trained = attrgetter("requires_grad")
_hooks, _late_hooks = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")


def _contents(cells: Sequence[types.CellType]) -> tuple[object, ...]:
    return tuple(cell.cell_contents for cell in cells)


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _own(module: str) -> bool:
    """Whether a module may be the user's: not of Python, torch, numpy or this package."""
    root = module.partition(".")[0]
    return (
        root not in sys.stdlib_module_names | {"torch", "numpy", "ane_trainer", "keras"} or root == "__main__"
    )


def _written_by_user(code: types.CodeType) -> bool:
    """Libraries' functions do not read globals that change."""
    return "site-packages" not in code.co_filename


def _same(old: object, new: object) -> bool:
    return old is new or (type(old) is type(new) and isinstance(old, _PLAIN) and old == new)


def code_text(code: types.CodeType) -> str:
    """What a function does, as text: instructions, names and constants, those of functions in it too."""
    constants = [code_text(c) if isinstance(c, types.CodeType) else _text(c) for c in code.co_consts]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return f"{code.co_name} {code.co_code.hex()} {names} {constants}"


def _text(value: object) -> str:
    if isinstance(value, (frozenset, set)):
        return f"{type(value).__name__}{sorted(map(_text, value))}"
    if isinstance(value, tuple):
        return f"tuple{[_text(item) for item in value]}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, types.FunctionType):
        return f"{kind} {value.__module__}.{value.__qualname__}"
    return f"{kind} {value!r}" if isinstance(value, _PLAIN) or value is ... else kind


def _frozen(value: object) -> object:
    if isinstance(value, _PLAIN):
        return type(value), value
    return id(value)
