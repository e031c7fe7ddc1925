"""A typed builder of LLVM IR: values that know their type, with operators; loops and conditions of one function.

    f = Function("scale", p=PTR, n=I64, s=F32)
    p, n, s = f.parameters
    with f.loop(0, n) as i:
        place = p.at(i, F32)
        place.store(place.load(F32) * s)
    compile_ir(module([f.definition()]), ["scale"])

Scalars and vectors read alike: `x + 1.0` is `fadd <16 x float>` where x has 16 lanes. A number beside a value is a
constant of the value's type, exact or refused by LLVM. Integers are without sign where that matters only for `>>`,
`below` and widening; comparisons are signed. Intrinsics declare themselves.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

_BYTES = {"float": 4, "double": 8, "half": 2, "i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "ptr": 8}


class Type:
    """An LLVM type: an element and its number of lanes (1: a scalar). Made by `of` only: equal types are one object."""

    __slots__ = ("bytes", "element", "is_float", "lanes", "suffix", "text")

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes, self.bytes = element, lanes, _BYTES[element]
        self.is_float = element in ("float", "double", "half")
        self.text = element if lanes == 1 else f"<{lanes} x {element}>"
        short = f"f{8 * self.bytes}" if self.is_float else element
        self.suffix = short if lanes == 1 else f"v{lanes}{short}"

    def of(self, lanes: int) -> Type:
        """A vector of so many of these elements; 1: the element."""
        return _type(self.element, lanes)

    def like(self, element: Type) -> Type:
        """Other elements in as many lanes."""
        return _type(element.element, self.lanes)


@cache
def _type(element: str, lanes: int) -> Type:
    return Type(element, lanes)


F32, F64, HALF = _type("float", 1), _type("double", 1), _type("half", 1)
I1, I8, I16, I32, I64, PTR = (_type(name, 1) for name in ("i1", "i8", "i16", "i32", "i64", "ptr"))

_COMPARE = {"lt": ("olt", "slt"), "le": ("ole", "sle"), "gt": ("ogt", "sgt"), "ge": ("oge", "sge"),
            "eq": ("oeq", "eq"), "ne": ("une", "ne")}  # fmt: skip


class Value:
    """A value of a function under construction: a constant, a parameter or the result of an instruction."""

    __slots__ = ("function", "name", "type")

    def __init__(self, function: Function, type_: Type, name: str) -> None:
        self.function, self.type, self.name = function, type_, name

    def _same(self, other: Value | float) -> str:
        return other.name if isinstance(other, Value) else constant(self.type, other)

    def _two(self, op: str, other: Value | float, type_: Type | None = None) -> Value:
        text = f"{op} {self.type.text} {self.name}, {self._same(other)}"
        return self.function.emit(type_ or self.type, text)

    def _arithmetic(self, op: str, other: Value | float) -> Value:
        return self._two(f"f{op}" if self.type.is_float else op, other)

    def __add__(self, other: Value | float) -> Value:
        return self._arithmetic("add", other)

    def __sub__(self, other: Value | float) -> Value:
        return self._arithmetic("sub", other)

    def __mul__(self, other: Value | float) -> Value:
        return self._arithmetic("mul", other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._two("fdiv", other)

    def __floordiv__(self, other: Value | int) -> Value:
        """Integer quotient, towards zero."""
        return self._two("sdiv", other)

    def __and__(self, other: Value | int) -> Value:
        return self._two("and", other)

    def __or__(self, other: Value | int) -> Value:
        return self._two("or", other)

    def __xor__(self, other: Value | int) -> Value:
        return self._two("xor", other)

    def __lshift__(self, other: int) -> Value:
        return self._two("shl", other)

    def __rshift__(self, other: int) -> Value:
        """Zeros come in from the left."""
        return self._two("lshr", other)

    def __invert__(self) -> Value:
        return self._two("xor", -1)

    def compare(self, how: str, other: Value | float) -> Value:
        """`lt`, `le`, `gt`, `ge`, `eq` (false for a NaN) or `ne`."""
        op = f"fcmp {_COMPARE[how][0]}" if self.type.is_float else f"icmp {_COMPARE[how][1]}"
        return self._two(op, other, self.type.like(I1))

    def __lt__(self, other: Value | float) -> Value:
        return self.compare("lt", other)

    def __gt__(self, other: Value | float) -> Value:
        return self.compare("gt", other)

    def __ge__(self, other: Value | float) -> Value:
        return self.compare("ge", other)

    def below(self, other: Value | int) -> Value:
        """Less, as numbers without sign."""
        return self._two("icmp ult", other, self.type.like(I1))

    def above(self, other: Value | int) -> Value:
        """Greater, as numbers without sign."""
        return self._two("icmp ugt", other, self.type.like(I1))

    def is_null(self) -> Value:
        """True of an address that is 0."""
        return self.function.emit(I1, f"icmp eq ptr {self.name}, null")

    def choose(self, yes: Value | float, no: Value | float) -> Value:
        """`yes` where this i1 holds, else `no`; at least one is a value."""
        known = yes if isinstance(yes, Value) else no
        assert isinstance(known, Value)
        kind = known.type
        text = f"select {self.type.text} {self.name}, {kind.text} {known._same(yes)}, {kind.text} {known._same(no)}"
        return self.function.emit(kind, text)

    def to(self, element: Type) -> Value:
        """The number as another type: exact or rounded to even between floats, truncated to integers, cut or
        filled with zeros between integers.
        """
        old, new = self.type, self.type.like(element)
        if old.is_float and new.is_float:
            op = "fpext" if new.bytes > old.bytes else "fptrunc"
        elif old.is_float or new.is_float:
            op = "fptosi" if old.is_float else "sitofp"
        else:
            op = "trunc" if new.bytes < old.bytes or element is I1 else "zext"
        return self.function.emit(new, f"{op} {old.text} {self.name} to {new.text}")

    def bits(self, element: Type) -> Value:
        """The bits read as another type of the same size."""
        new = self.type.like(element)
        return self.function.emit(new, f"bitcast {self.type.text} {self.name} to {new.text}")

    def call(self, intrinsic: str, *others: Value | float, flags: str = "") -> Value:
        """An LLVM intrinsic of operands and result of one type, such as `fma` or `floor`."""
        operands = ", ".join(f"{self.type.text} {self._same(x)}" for x in (self, *others))
        name = f"@llvm.{intrinsic}.{self.type.suffix}"
        kinds = ", ".join([self.type.text] * (1 + len(others)))
        self.function.declare(f"declare {self.type.text} {name}({kinds})")
        return self.function.emit(self.type, f"call {flags}{self.type.text} {name}({operands})")

    def splat(self, lanes: int) -> Value:
        """A vector of copies of this scalar; itself for one lane."""
        if lanes == 1:
            return self
        emit, new = self.function.emit, self.type.of(lanes)
        one = emit(new, f"insertelement {new.text} poison, {self.type.text} {self.name}, i32 0")
        zeros = f"<{lanes} x i32> zeroinitializer"
        return emit(new, f"shufflevector {new.text} {one.name}, {new.text} poison, {zeros}")

    def lane(self, number: int) -> Value:
        """One element of a vector; of a scalar itself."""
        if self.type.lanes == 1:
            return self
        return self.function.emit(
            self.type.of(1), f"extractelement {self.type.text} {self.name}, i32 {number}"
        )

    def each(self, first: int, step: int, lanes: int) -> Value:
        """The vector of elements `first`, `first + step`, ..."""
        order = ", ".join(f"i32 {first + step * lane}" for lane in range(lanes))
        old = self.type.text
        text = f"shufflevector {old} {self.name}, {old} poison, <{lanes} x i32> <{order}>"
        return self.function.emit(self.type.of(lanes), text)

    def interleaved(self, other: Value, high: bool) -> Value:
        """The low or the high halves of two vectors, element by element in turn."""
        lanes, old = self.type.lanes, self.type.text
        first = lanes // 2 if high else 0
        order = ", ".join(f"i32 {first + i // 2 + lanes * (i % 2)}" for i in range(lanes))
        text = f"shufflevector {old} {self.name}, {old} {other.name}, <{lanes} x i32> <{order}>"
        return self.function.emit(self.type, text)

    def reduce(self, how: str, flags: str = "") -> Value:
        """One number from all lanes by an LLVM vector reduction (`smax`, `fmax`, `or`, ...); sums start at 0.0."""
        one, old = self.type.of(1), self.type
        name = f"@llvm.vector.reduce.{how}.{old.suffix}"
        start, kind = (f"{one.text} 0.0, ", f"{one.text}, ") if how == "fadd" else ("", "")
        self.function.declare(f"declare {one.text} {name}({kind}{old.text})")
        return self.function.emit(one, f"call {flags}{one.text} {name}({start}{old.text} {self.name})")

    def at(self, index: Value | int, element: Type) -> Value:
        """The address of element `index` of an array of this address."""
        place = index.name if isinstance(index, Value) else str(index)
        return self.function.emit(PTR, f"getelementptr {element.text}, ptr {self.name}, i64 {place}")

    def load(self, type_: Type) -> Value:
        """What lies at this address, aligned as its elements are."""
        return self.function.emit(type_, f"load {type_.text}, ptr {self.name}, align {type_.bytes}")

    def store(self, value: Value) -> None:
        """Write a value at this address, aligned as its elements are."""
        kind = value.type
        self.function.do(f"store {kind.text} {value.name}, ptr {self.name}, align {kind.bytes}")


@dataclass(frozen=True)
class Variable:
    """A value that changes: a stack slot, which LLVM turns into registers."""

    place: Value
    type: Type

    @property
    def value(self) -> Value:
        """What it holds now."""
        return self.place.load(self.type)

    def set(self, value: Value) -> None:
        """Let it hold a value from here on."""
        self.place.store(value)


@dataclass(frozen=True)
class Definition:
    """The text of a finished function and the intrinsics that it calls."""

    text: str
    declarations: frozenset[str]


class Function:
    """A function under construction; its result is `void`. Keywords name the parameters and give their types.

    `internal`: called only within its module, not inlined; `disjoint`: what its addresses point to does not overlap.
    """

    def __init__(
        self, name: str, *, internal: bool = False, disjoint: bool = False, **parameters: Type
    ) -> None:
        kinds = {t: t.text + " noalias" * (disjoint and t is PTR) for t in set(parameters.values())}
        signature = ", ".join(f"{kinds[kind]} %{label}" for label, kind in parameters.items())
        linkage, attributes = ("internal ", " noinline") if internal else ("", "")
        self._head = f"define {linkage}void @{name}({signature}){attributes} {{\nentry:"
        self.parameters = tuple(Value(self, kind, f"%{label}") for label, kind in parameters.items())
        self._slots: list[str] = []
        self._body: list[str] = []
        self._declared: set[str] = set()
        self._count = 0
        self._block = "entry"

    def definition(self) -> Definition:
        """The finished function."""
        text = "\n".join([self._head, *self._slots, *self._body, "  ret void", "}", ""])
        return Definition(text, frozenset(self._declared))

    def emit(self, type_: Type, expression: str) -> Value:
        """Emit an instruction; its result."""
        self._count += 1
        name = f"%t{self._count}"
        self._body.append(f"  {name} = {expression}")
        return Value(self, type_, name)

    def do(self, instruction: str) -> None:
        """Emit an instruction without a result."""
        self._body.append(f"  {instruction}")

    def declare(self, declaration: str) -> None:
        """Note an intrinsic that the function calls."""
        self._declared.add(declaration)

    def constant(self, type_: Type, value: float) -> Value:
        """A number in every lane."""
        return Value(self, type_, constant(type_, value))

    def null(self) -> Value:
        """The address 0."""
        return Value(self, PTR, "null")

    def invoke(self, function: str | Value, *arguments: Value | int) -> None:
        """Call a function, by name or address, that returns nothing; ints are i64."""
        values = [a if isinstance(a, Value) else self.constant(I64, a) for a in arguments]
        callee = function.name if isinstance(function, Value) else f"@{function}"
        self.do(f"call void {callee}({', '.join(f'{v.type.text} {v.name}' for v in values)})")

    def clear(self, address: Value, num_bytes: Value | int) -> None:
        """Zero memory."""
        self.declare("declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)")
        size = num_bytes.name if isinstance(num_bytes, Value) else str(num_bytes)
        self.do(f"call void @llvm.memset.p0.i64(ptr {address.name}, i8 0, i64 {size}, i1 false)")

    def copy(self, target: Value, source: Value, num_bytes: Value) -> None:
        """Copy memory that does not overlap."""
        self.declare("declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)")
        where = f"ptr {target.name}, ptr {source.name}"
        self.do(f"call void @llvm.memcpy.p0.p0.i64({where}, i64 {num_bytes.name}, i1 false)")

    def room(self, element: Type, count: int) -> Value:
        """The address of zeroed stack memory for `count` elements."""
        place = self._slot(f"[{count} x {element.text}]")
        self.do(f"store [{count} x {element.text}] zeroinitializer, ptr {place.name}, align 1")
        return place

    def variable(self, value: Value) -> Variable:
        """A variable with a first value."""
        found = Variable(self._slot(value.type.text), value.type)
        found.set(value)
        return found

    def _slot(self, text: str) -> Value:
        self._count += 1
        self._slots.append(f"  %s{self._count} = alloca {text}")
        return Value(self, PTR, f"%s{self._count}")

    @contextmanager
    def loop(self, start: Value | int, end: Value | int, step: Value | int = 1) -> Iterator[Value]:
        """The body runs for i64 `start`, `start + step`, ... below `end`; yields the index."""
        self._count += 1
        tag, came_from = self._count, self._block
        index = Value(self, I64, f"%i{tag}")
        self._body += [f"  br label %head{tag}", f"head{tag}:", ""]
        phi = len(self._body) - 1
        self._branch(index < end, f"body{tag}", f"done{tag}")
        self._label(f"body{tag}")
        yield index
        after = index + step
        first = start.name if isinstance(start, Value) else str(start)
        self._body[phi] = (
            f"  {index.name} = phi i64 [ {first}, %{came_from} ], [ {after.name}, %{self._block} ]"
        )
        self._body.append(f"  br label %head{tag}")
        self._label(f"done{tag}")

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """The body runs if the i1 `condition` holds."""
        self._count += 1
        tag = self._count
        self._branch(condition, f"then{tag}", f"after{tag}")
        self._label(f"then{tag}")
        yield
        self._body.append(f"  br label %after{tag}")
        self._label(f"after{tag}")

    def _branch(self, condition: Value, yes: str, no: str) -> None:
        self._body.append(f"  br i1 {condition.name}, label %{yes}, label %{no}")

    def _label(self, name: str) -> None:
        self._body.append(f"{name}:")
        self._block = name


def constant(type_: Type, value: float) -> str:
    """A literal of a type, the number in every lane (a float in LLVM's hexadecimal form)."""
    if type_.is_float:
        return _literal(type_, f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}")
    return _literal(type_, str(int(value)) if type_.element != "i1" else str(bool(value)).lower())


@cache
def _literal(type_: Type, text: str) -> str:
    return text if type_.lanes == 1 else "<" + ", ".join([f"{type_.element} {text}"] * type_.lanes) + ">"


def module(definitions: Iterable[Definition]) -> str:
    """A module of these functions."""
    found = list(definitions)
    declared = sorted(set().union(*(d.declarations for d in found)))
    return "\n".join([*declared, *(d.text for d in found)])
