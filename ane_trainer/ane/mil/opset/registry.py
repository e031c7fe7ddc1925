"""The op registry: what parameters and dtypes each MIL op takes, its family, and how its result types follow.

A type rule is a function `Call -> tuple[TensorType, ...]` registered with `@rule`; it refuses an
ill-formed operation with a `ProgramError`, so an illegal op cannot be built. Tables elsewhere that need a group of
ops (passes, cost model) ask for the family given here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil.program import Arg, Literal, Scalar, TensorType, Value, literal

Default = Scalar | tuple[Scalar, ...] | None
RuleFunction = Callable[["Call"], tuple[TensorType, ...]]

_REQUIRED = object()

#: Largest extent of an axis anywhere in a program (sizes are signed 32-bit numbers in MIL).
MAX_EXTENT = 2**31 - 1


@dataclass(frozen=True)
class Param:
    """One parameter of an op.

    `role` is "tensor" (a value or a literal), "const" (a literal that must be known at compile time),
    "tensors" (a tuple of values) or "state" (a Core ML state input). `dtype` is used to turn a Python
    scalar into a literal.
    """

    name: str
    role: str = "tensor"
    dtype: str = "fp16"
    required: bool = True
    default: Default = None


def tensor(name: str, dtype: str = "fp16", *, required: bool = True) -> Param:
    """A parameter that takes a runtime value (or a literal)."""
    return Param(name, "tensor", dtype, required)


def const(name: str, dtype: str = "int32", default: object = _REQUIRED) -> Param:
    """A compile-time parameter; optional when a default is given (`None`: absent means absent)."""
    if default is _REQUIRED:
        return Param(name, "const", dtype)
    return Param(name, "const", dtype, False, default)  # type: ignore[arg-type]


def tensors(name: str) -> Param:
    """A variadic parameter: a tuple of values."""
    return Param(name, "tensors")


def state(name: str) -> Param:
    """A parameter that takes a Core ML state input."""
    return Param(name, "state")


#: Sets of dtypes by the letters that `dtypes` specifications use; dtypes as coremltools 9 has them for iOS 15 to 18.
_SETS = {
    "F": "fp16 fp32",
    "FI": "fp16 fp32 int32",
    "FIB": "fp16 fp32 int32 bool",
    "ALL": "fp16 fp32 int8 int16 int32 uint8 uint16 bool",
    "I": "int8 int16 int32",
    "N": "int8 int16 int32 uint8 uint16",
    "FN": "fp16 fp32 int8 int16 int32 uint8 uint16",
    "Q": "int8 uint8",
    "W": "fp16 fp32 int4 int8 uint4 uint8",
    "P": "uint1 uint2 uint3 uint4 uint6 uint8",
    "L": "fp16 fp32 int8 uint8",
    "S": "fp32 int32",
    "U": "int16 int32 uint16 uint32",
}


@dataclass(frozen=True)
class Domain:
    """The dtypes a parameter takes; parameters of one op with the same `letter` need one dtype."""

    dtypes: tuple[str, ...]
    letter: str | None = None


def _domains(params: tuple[Param, ...], spec: str) -> dict[str, Domain]:
    """Domains by parameter; a compile-time integer, flag or string that `spec` leaves out has its own dtype."""
    found = {p.name: Domain((p.dtype,)) for p in params if p.role == "const" and not p.dtype.startswith("fp")}
    for entry in spec.split():
        name, rest = entry.split(":")
        dtypes, _, letter = rest.partition(".")
        found[name] = Domain(tuple(_SETS.get(dtypes, dtypes.replace("|", " ")).split()), letter or None)
    return found


@dataclass(frozen=True)
class OpDef:
    """One MIL op: parameters, type rule, the dtypes that parameters take, and what kind of work it is.

    `family` is "unary" (elementwise on one tensor), "binary" (elementwise, broadcasting), "select", "view" (renames
    elements, takes no time), "movement", "reduction", "arg_reduction", "softmax", "normalization", "contraction",
    "pooling", "constexpr", "random" or "". `flops` counts floating-point operations an element.
    """

    kind: str
    params: tuple[Param, ...]
    infer: RuleFunction
    domains: Mapping[str, Domain]
    family: str = ""
    flops: int = 1

    def param(self, name: str) -> Param | None:
        return next((p for p in self.params if p.name == name), None)


@dataclass(frozen=True)
class Call:
    """An operation's arguments as a type rule or a kernel sees them: typed, with defaults filled in."""

    op: OpDef
    args: Mapping[str, Arg]

    def has(self, name: str) -> bool:
        return name in self.args

    def type(self, name: str = "x") -> TensorType:
        """The type of a tensor argument."""
        argument = self.args[name]
        if isinstance(argument, tuple):
            raise self.refuse(f"{name} needs one tensor; got {len(argument)}")
        return argument.type

    def types(self, name: str = "values") -> tuple[TensorType, ...]:
        """The types of a variadic argument."""
        argument = self.args[name]
        return tuple(item.type for item in (argument if isinstance(argument, tuple) else (argument,)))

    def const(self, name: str) -> Scalar | tuple[Scalar, ...] | None:
        """A compile-time argument as Python values, or its default."""
        argument = self.args.get(name)
        if argument is None:
            param = self.op.param(name)
            return param.default if param else None
        if isinstance(argument, Literal):
            return argument.to_python()
        raise self.refuse(f"{name} needs a constant; got a runtime value")

    def integer(self, name: str) -> int:
        value = self.const(name)
        if isinstance(value, tuple) and len(value) == 1:
            value = value[0]
        if isinstance(value, (int, float)) and int(value) == value:
            return int(value)
        raise self.refuse(f"{name} needs an integer; got {value!r}")

    def integers(self, name: str) -> tuple[int, ...]:
        value = self.const(name)
        items = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(item, (int, float)) for item in items):
            raise self.refuse(f"{name} needs integers; got {value!r}")
        return tuple(int(item) for item in items)  # type: ignore[arg-type]

    def number(self, name: str) -> float:
        value = self.const(name)
        if isinstance(value, tuple) and len(value) == 1:
            value = value[0]
        if isinstance(value, (int, float)):
            return float(value)
        raise self.refuse(f"{name} needs a number; got {value!r}")

    def flag(self, name: str) -> bool:
        value = self.const(name)
        return bool(value[0] if isinstance(value, tuple) else value)

    def text(self, name: str) -> str:
        value = self.const(name)
        if isinstance(value, str):
            return value
        raise self.refuse(f"{name} needs a string; got {value!r}")

    def refuse(self, reason: str) -> ProgramError:
        """The error for an ill-formed call; `raise call.refuse("x needs rank 4; got 3")`."""
        return ProgramError(f"{self.op.kind}: {reason}.", code="MIL101")


_OPS: dict[str, OpDef] = {}


def rule(
    kinds: str, *params: Param, dtypes: str = "", family: str = "", flops: int = 1
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a type rule for the space-separated op `kinds`, which share parameters and attributes (`OpDef`).

    `dtypes` has entries `parameter:dtypes` or `parameter:dtypes.letter`; parameters of one op with the same letter need
    the same dtype (the letters are the type variables of coremltools' definitions). A parameter without an entry takes
    any dtype. Where coremltools took a dtype only in a later version of an op, the later version is meant.
    """
    domains = _domains(params, dtypes)

    def register(function: RuleFunction) -> RuleFunction:
        for kind in kinds.split():
            if kind in _OPS:
                raise ValueError(f"type rule for {kind} is registered twice")
            _OPS[kind] = OpDef(kind, params, function, domains, family, flops)
        return function

    return register


def known_ops() -> tuple[str, ...]:
    """Every op kind that has a type rule, sorted."""
    return tuple(sorted(_OPS))


def family(kind: str) -> str:
    """The family of an op kind (`OpDef.family`)."""
    return op_def(kind).family


def op_def(kind: str) -> OpDef:
    """The definition of `kind`; `ProgramError` with a suggestion when there is none."""
    try:
        return _OPS[kind]
    except KeyError:
        close = difflib.get_close_matches(kind, _OPS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ProgramError(f"{kind}: needs a known MIL op.{hint}", code="MIL102") from None


def bind(kind: str, args: Mapping[str, Arg]) -> Call:
    """Check argument names and roles of an operation and return the call its rule sees."""
    definition = op_def(kind)
    call = Call(definition, args)
    known = {p.name for p in definition.params}
    for name in args:
        if name not in known:
            raise call.refuse(f"needs parameters among {', '.join(sorted(known))}; got {name}")
    for param in definition.params:
        argument = args.get(param.name)
        if argument is None:
            if param.required:
                raise call.refuse(f"needs the parameter {param.name}; it is missing")
            continue
        _check_role(call, param, argument)
    _check_dtypes(call)
    return call


def _check_role(call: Call, param: Param, argument: Arg) -> None:
    if param.role == "const" and not isinstance(argument, Literal):
        raise call.refuse(f"{param.name} needs a constant; got a runtime value")
    if (param.role == "tensors") != isinstance(argument, tuple):
        raise call.refuse(
            f"{param.name} needs {'several tensors' if param.role == 'tensors' else 'one tensor'}"
        )
    for item in argument if isinstance(argument, tuple) else (argument,):
        if item.type.state != (param.role == "state"):
            wanted = "a state" if param.role == "state" else "a tensor; read the state first"
            raise call.refuse(f"{param.name} needs {wanted}; got {item.type}")


def _check_dtypes(call: Call) -> None:
    """Each argument's dtype is one its parameter takes; parameters that share a type variable agree."""
    bound: dict[str, tuple[str, str]] = {}
    for name, domain in call.op.domains.items():
        argument = call.args.get(name)
        if argument is None or isinstance(argument, tuple):
            continue
        dtype = argument.type.dtype
        if dtype not in domain.dtypes:
            raise call.refuse(f"{name} needs {' or '.join(domain.dtypes)}; got {dtype}")
        if domain.letter is not None:
            first, wanted = bound.setdefault(domain.letter, (name, dtype))
            if dtype != wanted:
                raise call.refuse(f"needs {first} and {name} of one dtype; got {wanted} and {dtype}")


def infer(kind: str, args: Mapping[str, Arg]) -> tuple[TensorType, ...]:
    """The result types of an operation; `ProgramError` when it is ill-formed."""
    call = bind(kind, args)
    try:
        types = call.op.infer(call)
    except (ArithmeticError, LookupError, TypeError, ValueError) as fault:
        raise call.refuse(f"needs arguments that fit each other; got {shown(args)} ({fault})") from fault
    for type_ in types:
        if any(not 1 <= extent <= MAX_EXTENT for extent in type_.shape):
            raise call.refuse(f"needs a result without empty axes, extents to {MAX_EXTENT}; got {type_}")
    return types


def shown(args: Mapping[str, Arg]) -> str:
    """Arguments and their types, for a message."""
    pairs = ((name, "a tuple" if isinstance(arg, tuple) else arg.type) for name, arg in args.items())
    return ", ".join(f"{name}: {text}" for name, text in pairs)


def as_arg(param: Param, value: object) -> Arg:
    """Turn a Python value into an argument: numbers and lists become literals of the parameter's dtype."""
    if isinstance(value, (Value, Literal)):
        return value
    if param.role == "tensors" and isinstance(value, (tuple, list)):
        return tuple(item for item in value if isinstance(item, (Value, Literal)))
    if isinstance(value, str):
        return literal(value, "string")
    if isinstance(value, bool):
        return literal(value, "bool")
    if isinstance(value, (int, float)):
        return literal(value, param.dtype)
    if isinstance(value, (tuple, list)):
        dtype = "bool" if value and isinstance(value[0], bool) else param.dtype
        return literal(list(value), dtype)
    raise TypeError(f"cannot use {type(value).__name__} as the argument {param.name}")
