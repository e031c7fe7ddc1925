"""Core ML states as resident inputs: reads and writes of a state become plain data flow.

before: read_state(s) -> a; add(a, x) -> b; coreml_update_state(state=s, value=b) -> c; mul(c, x) -> out
after:  add(s, x) -> b; mul(b, x) -> out; identity(b) -> s_next       with the alias (s_next, s)
"""

from __future__ import annotations

from dataclasses import replace

from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, TensorType, Value

_STATE_OPS = ("read_state", "write_state", "coreml_update_state")


def without_states(function: Function) -> tuple[Function, tuple[tuple[str, str], ...]]:
    """The function with plain inputs for its states, and the (output, input) aliases that keep them."""
    states = [v for v in function.inputs if v.type.state]
    if not states:
        return function, ()
    plain = {v.name: Value(v.name, TensorType(v.type.dtype, v.type.shape)) for v in states}
    held: dict[str, Arg] = dict(plain)  # what each state holds at this point
    same: dict[str, Arg] = {}  # results of state ops -> what they stand for
    ops: list[Op] = []
    for op in function.ops:
        args = tuple((name, _substituted(arg, same)) for name, arg in op.args)
        if op.kind not in _STATE_OPS:
            ops.append(replace(op, args=args))
            continue
        names = {"read_state": ("input", ""), "write_state": ("input", "data")}.get(
            op.kind, ("state", "value")
        )
        given = dict(args)
        state = given[names[0]]
        assert isinstance(state, Value)
        if names[1]:
            held[state.name] = given[names[1]]
        for result in op.results:
            same[result.name] = held[state.name]
    outputs, aliases = [_output(v, same, ops) for v in function.outputs], []
    taken = {v.name for v in function.inputs} | {v.name for op in ops for v in op.results}
    for name, value in held.items():
        if value != plain[name]:
            kept = Value(_fresh(f"{name}_next", taken), plain[name].type)
            ops.append(Op("identity", (("x", value),), (kept,)))
            outputs.append(kept)
            aliases.append((kept.name, name))
    inputs = tuple(plain.get(v.name, v) for v in function.inputs)
    return replace(function, inputs=inputs, ops=tuple(ops), outputs=tuple(outputs)), tuple(aliases)


def _fresh(name: str, taken: set[str]) -> str:
    """`name`, with underscores until no other value is called so; it is taken from then on."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _substituted(arg: Arg, same: dict[str, Arg]) -> Arg:
    """An argument with results of state ops replaced by what they stand for."""
    if isinstance(arg, tuple):
        items = (_substituted(item, same) for item in arg)
        return tuple(item for item in items if not isinstance(item, tuple))
    return same.get(arg.name, arg) if isinstance(arg, Value) else arg


def _output(value: Value, same: dict[str, Arg], ops: list[Op]) -> Value:
    """An output under its own name, also where a state op made it."""
    source = same.get(value.name)
    if source is None:
        return value
    kind, param = ("const", "val") if isinstance(source, Literal) else ("identity", "x")
    ops.append(Op(kind, ((param, source),), (value,)))
    return value
