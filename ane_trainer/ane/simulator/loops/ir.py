"""A small builder for LLVM IR text: values, variables, loops and conditions of one function.

    f = Function("scale", [("ptr", "p"), ("i64", "n"), ("float", "s")])
    with f.loop("0", "%n") as i:
        place = f.element("float", "%p", i)
        f.store("float", f.op(f"fmul float {f.load('float', place)}, %s"), place)
    text = f.text()

Values are their IR names (`"%t3"`, `"%n"`) or literals (`"0"`). Variables are stack slots that LLVM
turns into registers, so loops need no hand-written phi nodes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Function:
    """One function under construction; `parameters` are (type, name without %) pairs, result `void`."""

    def __init__(self, name: str, parameters: Sequence[tuple[str, str]], *, internal: bool = False) -> None:
        signature = ", ".join(f"{kind} %{label}" for kind, label in parameters)
        linkage, attributes = ("internal ", " noinline") if internal else ("", "")
        self._head = f"define {linkage}void @{name}({signature}){attributes} {{\nentry:"
        self._slots: list[str] = []
        self._body: list[str] = []
        self._count = 0

    def text(self) -> str:
        """The finished function."""
        return "\n".join([self._head, *self._slots, *self._body, "  ret void", "}", ""])

    def op(self, expression: str) -> str:
        """Emit an instruction with a result; returns the result's name."""
        name = self._fresh("t")
        self._body.append(f"  %{name} = {expression}")
        return f"%{name}"

    def do(self, instruction: str) -> None:
        """Emit an instruction without a result."""
        self._body.append(f"  {instruction}")

    def element(self, kind: str, base: str, index: str) -> str:
        """Address of element `index` (i64) of an array of `kind`."""
        return self.op(f"getelementptr {kind}, ptr {base}, i64 {index}")

    def load(self, kind: str, address: str, align: int = 4) -> str:
        """Load a value; `align` is in bytes."""
        return self.op(f"load {kind}, ptr {address}, align {align}")

    def store(self, kind: str, value: str, address: str, align: int = 4) -> None:
        """Store a value; `align` is in bytes."""
        self.do(f"store {kind} {value}, ptr {address}, align {align}")

    def add(self, x: str, y: str) -> str:
        """i64 sum."""
        return self.op(f"add i64 {x}, {y}")

    def mul(self, x: str, y: str) -> str:
        """i64 product."""
        return self.op(f"mul i64 {x}, {y}")

    def min(self, x: str, y: str) -> str:
        """Smaller of two i64."""
        return self.op(f"call i64 @llvm.smin.i64(i64 {x}, i64 {y})")

    def splat(self, kind: str, value: str, lanes: int) -> str:
        """Vector of `lanes` copies of a scalar."""
        one = self.op(f"insertelement <{lanes} x {kind}> poison, {kind} {value}, i32 0")
        return self.op(
            f"shufflevector <{lanes} x {kind}> {one}, <{lanes} x {kind}> poison, "
            f"<{lanes} x i32> zeroinitializer"
        )

    def variable(self, kind: str, value: str) -> str:
        """A variable with a first value; use `load` and `store` on it."""
        name = self._fresh("v")
        self._slots.append(f"  %{name} = alloca {kind}")
        self.store(kind, value, f"%{name}", 1)
        return f"%{name}"

    @contextmanager
    def loop(self, start: str, end: str, step: str = "1") -> Iterator[str]:
        """Body runs for i64 `start`, `start` + `step`, ... below `end`; yields the index."""
        slot = self.variable("i64", start)
        head, body, done = self._fresh("head"), self._fresh("body"), self._fresh("done")
        self._body += [f"  br label %{head}", f"{head}:"]
        index = self.load("i64", slot, 8)
        more = self.op(f"icmp slt i64 {index}, {end}")
        self._body += [f"  br i1 {more}, label %{body}, label %{done}", f"{body}:"]
        yield index
        self.store("i64", self.add(index, step), slot, 8)
        self._body += [f"  br label %{head}", f"{done}:"]

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """Body runs if the i1 `condition` holds."""
        body, done = self._fresh("then"), self._fresh("after")
        self._body += [f"  br i1 {condition}, label %{body}, label %{done}", f"{body}:"]
        yield
        self._body += [f"  br label %{done}", f"{done}:"]

    def negate(self, condition: str) -> str:
        """The opposite of an i1."""
        return self.op(f"xor i1 {condition}, true")

    def _fresh(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"


def constant(value: float) -> str:
    """A float or double literal, exact (LLVM's hexadecimal form; `value` must be exact in the type)."""
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"


def vector_constant(kind: str, value: str, lanes: int) -> str:
    """A literal vector of equal lanes."""
    return "<" + ", ".join([f"{kind} {value}"] * lanes) + ">"
