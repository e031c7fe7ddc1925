"""Follows a user's `optimizer.step()` without running it: which operations it does, on what, with which numbers.

Parameters, gradients and the optimizer's tensors are *moving*: an operation on them is noted and its result is
a tensor without content. What does not hang on them (step counts, learning rates, also as tensors) is computed
as usual. So the code's own Python says, step after step, which number goes into which operation, while the
operations themselves are in the engine's program.

Whoever asks for a moving tensor's content (`item()`, `if`, `.numpy()`) is refused with place and reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ane_trainer.ane.capture.trace.sources import user_line

aten = torch.ops.aten
_CELL = "_ane_cell"
Atom = tuple[Any, ...]

#: The same numbers in another tensor: no operation of the engine.
_COPIES = frozenset({"clone", "contiguous", "_to_copy", "lift_fresh_copy"})
_ALIASES = frozenset({"detach", "alias", "lift_fresh"})
_FILLS = {"zeros": 0.0, "ones": 1.0, "full": None}
_READS = frozenset({"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique"})
#: Attributes and methods that would hand out a moving tensor's content past the dispatcher.
_LEAKS = frozenset({
    "numpy", "tolist", "data_ptr", "__array__", "__dlpack__", "untyped_storage", "storage", "_typed_storage",
    "__reduce_ex__", "__deepcopy__",
})  # fmt: skip


class NotFollowed(Exception):
    """Why a step cannot be followed: `reason` reads on after "the optimizer ..."."""

    def __init__(self, reason: str, place: bool = True) -> None:
        line = user_line() if place else None
        self.reason = f"{reason} ({line})" if line else reason
        super().__init__(self.reason)


class Outgrown(NotFollowed):
    """The step is the same, but a number is far larger than the ones that the scales were chosen for."""


@dataclass(frozen=True)
class Event:
    """One operation: ATen's name without overload, arguments by name (atoms for tensors and numbers)."""

    name: str
    args: tuple[tuple[str, Any], ...]
    shape: tuple[int, ...] = field(compare=False)
    dtype: torch.dtype = field(compare=False)
    place: str = field(default="", compare=False)


@dataclass
class Trace:
    """What a followed step did.

    Atoms: ("weight", i), ("gradient", i), ("slot", i, key), ("node", number of the event), ("number", leaf),
    ("fill", leaf, shape), ("undefined",); `values` are the leaves' values. `weights` and `slots` are the values at
    the end. `coarse`: some of it is in bf16 or fp16.
    """

    events: list[Event] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    weights: dict[int, Atom] = field(default_factory=dict)
    slots: dict[tuple[int, str], Atom] = field(default_factory=dict)
    shapes: dict[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)
    coarse: bool = False

    def same_form(self, other: Trace) -> bool:
        """Whether both do the same, up to the numbers."""
        return (self.events, self.weights, self.slots) == (other.events, other.weights, other.slots)

    def renumbered(self, leaves: Mapping[int, int]) -> Trace:
        """Only the values, as those of a trace whose leaf i is this one's `leaves[i]`."""
        count = max(leaves, default=-1) + 1
        return Trace(values=[self.values[leaves[i]] if i in leaves else 0.0 for i in range(count)])

    def used(self) -> set[int]:
        """The leaves that anything comes of."""
        found: set[int] = set()
        _collect([event.args for event in self.events], found)
        _collect([*self.weights.values(), *self.slots.values()], found)
        return found


@dataclass(eq=False)
class _Cell:
    """What tensors that share their content share: its present value, and the base if it is a view.

    `torn`: a view of it was written to, so its own value is not known any more.
    """

    run: Follower
    atom: Atom
    version: int = 0
    base: _Cell | None = None
    base_version: int = 0
    torn: bool = False


class Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations on moving tensors into `trace`; `model` is an earlier trace to take shapes from."""

    def __init__(self, model: Trace | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self._storages: set[int] = set()
        self._model = model.events if model is not None else []

    def mark(self, tensor: torch.Tensor, atom: Atom) -> None:
        """`tensor` moves from here on."""
        self._storages.add(tensor.untyped_storage()._cdata)
        setattr(tensor, _CELL, _Cell(self, atom))

    def value(self, tensor: torch.Tensor) -> Atom | None:
        """The atom of a moving tensor's present value, None for others."""
        return None if self._cell(tensor) is None else self._atom(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = _tensors(args) + _tensors(tuple(kwargs.values()))
        if not any(self._cell(t) is not None for t in tensors):
            return self._still(func, name, args, kwargs)
        if name.startswith("_foreach_"):
            return self._each(func, name, args, kwargs)
        if name in _READS:
            raise NotFollowed(f"looks at the content of a tensor to decide what to do ({name})")
        if torch.Tag.nondeterministic_seeded in func.tags and not name.startswith("empty"):
            raise NotFollowed(f"draws random tensors ({name})")
        if name in _ALIASES or (name in ("view", "expand") and list(args[0].shape) == list(args[1])):
            return self._alias(func, args, kwargs)
        if name in _COPIES and _floats(args[0].dtype, kwargs.get("dtype")):
            self.trace.coarse |= kwargs.get("dtype") in (torch.bfloat16, torch.float16)
            return self._result(args[0].shape, kwargs.get("dtype") or args[0].dtype, self._atom(args[0]))
        if (value := _fill_of(name, args, kwargs)) is not None:
            shape = args[1] if name in ("new_zeros", "new_ones", "new_full") else args[0].shape
            dtype = kwargs.get("dtype") or args[0].dtype
            return self._result(shape, dtype, ("fill", self._leaf(value), tuple(shape)))
        if name in ("empty_like", "new_empty"):
            shape = args[0].shape if name == "empty_like" else args[1]
            return self._result(shape, kwargs.get("dtype") or args[0].dtype, ("undefined",))
        written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if len(written) == 1 and written[0].name == "out":
            return self._event(
                func, name, args, {k: v for k, v in kwargs.items() if k != "out"}, kwargs["out"]
            )
        if written:
            return self._write(func, name, written[0].name, args, kwargs)
        return self._event(func, name, args, kwargs)

    # -- kinds of operations

    def _still(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        for tensor in _tensors(args):
            if tensor.untyped_storage()._cdata in self._storages:
                raise NotFollowed("uses a view of a parameter or state that was made outside of its step")
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if writes and any(t.numel() > 1 for t in _tensors(args[:1])):
            raise NotFollowed(f"changes a tensor that is not in its state ({name})")
        result = func(*args, **kwargs)
        value = _fill_of(name, args, kwargs)
        large = isinstance(result, torch.Tensor) and result.numel() > 1 and result.is_floating_point()
        if large and name in ("empty", "new_empty", "empty_like"):
            setattr(result, _CELL, _Cell(self, ("undefined",)))
        if large and value is not None:
            setattr(result, _CELL, _Cell(self, ("fill", self._leaf(value), tuple(result.shape))))
        return result

    def _each(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """`_foreach_` operations, one tensor at a time."""
        single = {"norm": "linalg_vector_norm"}.get(name[9:].removesuffix("_"), name[9:])
        packet = getattr(aten, single, None)
        if packet is None:
            raise NotFollowed(f"uses {func}, which has no rule")
        count = len(args[0])
        results = []
        for i in range(count):
            own = [a[i] if isinstance(a, (list, tuple)) else a for a in args]
            named = {k: v[i] if isinstance(v, (list, tuple)) else v for k, v in kwargs.items()}
            with self:
                results.append(packet(*own, **named))
        return None if name.endswith("_") else results

    def _alias(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        result = torch.empty(args[0].shape, dtype=args[0].dtype)
        setattr(result, _CELL, self._cell(args[0]))
        return result

    def _write(
        self, func: Any, name: str, target_name: str, args: Any, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        if func._schema.arguments[0].name != target_name or torch.Tag.inplace_view in func.tags:
            raise NotFollowed(f"changes a tensor in place in a way without a rule ({func})")
        target: torch.Tensor = args[0]
        cell = self._cell(target)
        if cell is None:  # a number's tensor takes up something moving
            cell = _Cell(self, self._atom(target))
            setattr(target, _CELL, cell)
        if cell.atom[0] == "foreign":
            self._atom(target)
        if cell.base is not None:  # its base may not be read any more
            self._atom(target)
            cell.base.torn, cell.base = True, None
        shape = tuple(target.shape)
        if name == "copy_":
            atom = self._atom(args[1])
            if tuple(args[1].shape) != shape or args[1].dtype == torch.bool:
                atom = self._note("expand", {"self": atom, "size": shape}, shape, target.dtype)
        elif name in ("zero_", "fill_"):
            value = 0.0 if name == "zero_" else args[1]
            if isinstance(value, torch.Tensor) and self._cell(value) is not None:
                raise NotFollowed("fills a tensor with a moving number (fill_)")
            atom = ("fill", self._leaf(float(value)), shape)
        elif name.endswith("_"):
            atom = self._note(name.removesuffix("_"), self._bound(func, args, kwargs), shape, target.dtype)
        else:
            raise NotFollowed(f"uses {func}, which has no rule")
        cell.atom, cell.version = atom, cell.version + 1
        return target

    def _event(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Note the operation; its result goes into `out` if there is one."""
        returns = func._schema.returns
        if len(returns) != 1 or str(returns[0].type) != "Tensor":
            raise NotFollowed(f"uses {func}, which has no rule")
        bound = self._bound(func, args, kwargs)
        number = len(self.trace.events)
        known = self._model[number] if number < len(self._model) else None
        if known is not None and (known.name, known.args) == (name, tuple(bound.items())):
            shape, dtype = known.shape, known.dtype
        else:
            function = func if out is None else getattr(aten, name)
            like = _without_content(function, args, kwargs)
            shape, dtype = tuple(like.shape), like.dtype
        if out is not None:
            cell = self._cell(out)
            if cell is None or cell.base is not None or tuple(out.shape) != shape:
                raise NotFollowed(f"writes into a given tensor ({func})")
            cell.atom, cell.version = self._note(name, bound, shape, dtype), cell.version + 1
            return out
        result = self._result(shape, dtype, self._note(name, bound, shape, dtype))
        if func._schema.arguments[0].alias_info is not None:
            base = self._cell(args[0])
            assert base is not None
            own = self._cell(result)
            assert own is not None
            own.base, own.base_version = base, base.version
        return result

    # -- atoms

    def _bound(self, func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name: atoms for tensors and for numbers that are values, the rest as it is."""
        schema = func._schema.arguments
        named = {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
        values = {a.name: str(a.type) for a in schema}
        return {
            k: self._argument(v, values[k]) for k, v in named.items() if k not in ("layout", "memory_format")
        }

    def _argument(self, value: Any, kind: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self._atom(value)
        valued = "number" in kind or "float" in kind or "Tensor" in kind
        if valued and isinstance(value, (int, float)) and not isinstance(value, bool):
            return ("number", self._leaf(value))
        if isinstance(value, (list, tuple)):
            return tuple(self._argument(v, "Tensor" if isinstance(v, torch.Tensor) else "") for v in value)
        return value

    def _atom(self, tensor: torch.Tensor) -> Atom:
        cell = self._cell(tensor)
        if cell is None:
            return self._number(tensor)
        stale = cell.base is not None and (cell.base.torn or cell.base.version != cell.base_version)
        if cell.torn or stale:
            raise NotFollowed(
                "changes a part or another view of a tensor in place and reads the tensor later"
            )
        if cell.atom[0] == "foreign":
            raise NotFollowed("works on a parameter without a gradient")
        return cell.atom

    def _number(self, tensor: torch.Tensor) -> Atom:
        """A tensor of the host among moving ones: one number."""
        if tensor.numel() == 1:
            leaf = self._leaf(float(tensor))
            return ("number", leaf) if tensor.ndim == 0 else ("fill", leaf, tuple(tensor.shape))
        low, high = torch.aminmax(tensor.detach().double())
        if float(low) != float(high):
            raise NotFollowed("uses a tensor of different numbers that is not in its state")
        return ("fill", self._leaf(float(low)), tuple(tensor.shape))

    def _leaf(self, value: float) -> int:
        self.trace.values.append(float(value))
        return len(self.trace.values) - 1

    def _note(self, name: str, args: dict[str, Any], shape: Any, dtype: torch.dtype) -> Atom:
        place = "" if self._model else user_line() or ""
        self.trace.events.append(Event(name, tuple(args.items()), tuple(shape), dtype, place))
        return ("node", len(self.trace.events) - 1)

    def _result(self, shape: Any, dtype: torch.dtype, atom: Atom) -> torch.Tensor:
        result = torch.empty(tuple(shape), dtype=dtype)
        setattr(result, _CELL, _Cell(self, atom))
        return result

    def _cell(self, tensor: torch.Tensor) -> _Cell | None:
        cell = getattr(tensor, _CELL, None)
        if cell is not None and cell.run is not self:
            raise NotFollowed("keeps tensors from step to step outside optimizer.state[parameter]")
        return cell


class Guard(TorchFunctionMode):
    """Refuses what would read a moving tensor's content without an operation."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LEAKS and args and getattr(args[0], _CELL, None) is not None:
            raise NotFollowed(f"reads the content of a tensor ({name})")
        if name == "__set__" and args and getattr(args[0], _CELL, None) is not None:
            descriptor = getattr(func, "__self__", None)
            if descriptor is torch.Tensor.data:
                args[0].detach().copy_(args[1])
                return None
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def following(follower: Follower) -> Iterator[None]:
    """What runs inside is followed; compiled functions run as they are written."""
    with torch.compiler.set_stance("force_eager"), follower, Guard():
        yield


def unmark(tensors: Sequence[torch.Tensor]) -> None:
    """The tensors' content counts again."""
    for tensor in tensors:
        if hasattr(tensor, _CELL):
            delattr(tensor, _CELL)


def is_marked(tensor: torch.Tensor) -> bool:
    """Whether a run left its mark on the tensor."""
    return hasattr(tensor, _CELL)


def _collect(value: Any, found: set[int]) -> None:
    if isinstance(value, (list, tuple)):
        if len(value) > 1 and value[0] in ("number", "fill") and isinstance(value[1], int):
            found.add(value[1])
        for part in value:
            _collect(part, found)


def _tensors(arguments: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += _tensors(argument)
    return found


def _floats(*dtypes: torch.dtype | None) -> bool:
    return all(d is None or d.is_floating_point for d in dtypes)


def _fill_of(name: str, args: Any, kwargs: dict[str, Any]) -> float | None:
    """The number that a creation fills its tensor with."""
    base = name.removeprefix("new_").removesuffix("_like")
    if base not in _FILLS:
        return None
    value = _FILLS[base]
    if value is None:
        value = args[1] if name in ("full", "full_like") else args[2]
    dtype = kwargs.get("dtype")
    return (
        float(value)
        if not isinstance(value, torch.Tensor) and (dtype is None or dtype.is_floating_point)
        else None
    )


def _without_content(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    def bare(argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return torch.empty(argument.shape, dtype=argument.dtype, device="meta")
        return [bare(a) for a in argument] if isinstance(argument, (list, tuple)) else argument

    try:
        result = func(*map(bare, args), **{k: bare(v) for k, v in kwargs.items() if k != "device"})
    except (NotImplementedError, RuntimeError) as error:
        raise NotFollowed(f"uses {func}, which has no rule ({type(error).__name__})") from None
    return result  # type: ignore[no-any-return]
