"""Work of each op of a program: multiply-accumulates and streams of bytes.

Independent of any chip's rates: `cost.py` prices it, and `docs/_generate/cost/` fits the rates on it. Every
stream is named by the rate that it runs at:

| stream | what moves |
|---|---|
| read, write, large_write | inputs and outputs of the program; outputs of a tensor above 4 MiB |
| small_weight, weight, large_weight | constants of one op up to 1 MiB, up to 16 MiB (one kernel stream), above |
| compressed | constants as stored: int8, lookup tables, sparse |
| pass, spill | elementwise passes over operands and results; over those above 16 MiB |
| spread | passes that spread a row or a column over a tensor, as norms over the last axis do (a channel is free) |
| softmax, l2 | softmax over its result, reduce_l2_norm over its operand |
| wide, wide_spill | operands of rank 2 that the program makes, of contractions with a fan-in above 2,048; above 8 MiB |
| wide_near | the same up to 1 MiB: the operand and its new layout stay on the chip together |
| deep_spill | the same of rank 3 and more, above 64 MiB |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ane_trainer.ane.chips.counting import FREE, MOVES, constant, macs, shape_of
from ane_trainer.ane.mil.opset import family
from ane_trainer.ane.mil.program import Function, Literal, Op, Value

_MIB = 2**20
#: Bytes of weights that one core holds; a wider fan-in starves the array (M6 notes: output channel groups).
_CORE_WEIGHT_BYTES = 64 * 2**10
#: Output channels that a core computes at once, and the longest fan-in of which it holds as many.
_GROUP = 16
_FULL_FAN_IN = _CORE_WEIGHT_BYTES // (2 * _GROUP)
#: Nothing published lies between it and this much more: what a wide operand costs grows evenly from none to all.
_RAMP = 1024
#: Bytes of activations that stay on the chip (ANE guide app. A, M6 notes).
_ON_CHIP_BYTES = 2 * _MIB
#: All small constants together beyond which they no longer stay near the engine (ANE-Training, M3 Pro).
_NEAR_BYTES = 112 * _MIB
_PACKED_BITS = {"uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "int4": 4, "uint6": 6}

Streams = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class OpWork:
    """One op's work. `unit` is mac, elementwise, host, fused (rides on the output stage of the op before) or free.

    `mac_rate` is the share of the array's rate that a narrow weight buffer leaves; `winograd` and `int8` say
    that the op may run in that mode, `rectified` that its activations come out of a relu: about half are zero.
    `weights`, `passes` and `transfers` are streams: rate name and bytes.
    """

    op: Op
    unit: str
    macs: int = 0
    mac_rate: float = 1.0
    winograd: bool = False
    int8: bool = False
    rectified: bool = False
    weights: Streams = ()
    passes: Streams = ()
    transfers: Streams = ()

    @property
    def weight_bytes(self) -> int:
        return sum(size for _, size in self.weights)


def function_work(function: Function) -> list[OpWork]:
    """The work of each op in program order; every input is read once and every output written once."""
    return _Walk(function).run()


class _Walk:
    """State of one walk: who made what, who uses it, which inputs are not yet on the chip."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.uses = Counter(value.name for op in function.ops for value in op.operands())
        self.outputs = {value.name for value in function.outputs}
        self.makers = {value.name: op for op in function.ops for value in op.results}
        self.pending = {value.name: value.type.nbytes for value in function.inputs}
        self.encoded = {
            op.name: sum(stored_bytes(item) for _, item in op.literals())
            for op in function.ops
            if family(op.kind) == "constexpr"
        }
        small = sum(size for op in function.ops for size in [_plain_bytes(op)] if size <= _MIB)
        self.near = small <= _NEAR_BYTES
        self.riding: set[str] = set()  # ops on a product's output stage

    def run(self) -> list[OpWork]:
        return [self._work(op) for op in self.function.ops]

    def _work(self, op: Op) -> OpWork:
        work, operands = family(op.kind), {value.name: value for value in op.operands()}
        arriving = {name for name in operands if name in self.pending}
        read = sum(self.pending.pop(name) for name in arriving)
        written = [value.type.nbytes for value in op.results if value.name in self.outputs]
        transfers = _streams(
            ("read", read), *(("large_write" if size > 4 * _MIB else "write", size) for size in written)
        )
        if work in FREE or not op.results:
            return OpWork(op, "free", transfers=transfers)
        if work == "contraction":
            return self._contraction(op, operands, transfers)
        if self._fused(op, work):
            return OpWork(op, "fused", transfers=transfers)
        inner = [value.type for name, value in operands.items() if name not in arriving]
        inner += [value.type for value in op.results if value.name not in self.outputs]
        spread = work == "binary" and _spreads(op)
        named = [
            ("spread" if spread else "spill" if item.nbytes > 16 * _MIB else "pass", item.nbytes)
            for item in inner
        ]
        if work == "softmax":
            named = [("softmax", op.result.type.nbytes)]
        elif op.kind == "reduce_l2_norm":
            named.append(("l2", sum(value.type.nbytes for value in operands.values())))
        return OpWork(op, "elementwise", passes=_streams(*named), transfers=transfers)

    def _contraction(self, op: Op, operands: dict[str, Value], transfers: Streams) -> OpWork:
        encoded = sum(self.encoded.get(name, 0) for name in operands)
        plain = _plain_bytes(op)
        size = "large_weight" if plain > 16 * _MIB else "weight" if plain > _MIB else "small_weight"
        if size == "small_weight" and not self.near:
            size = "weight"
        fan_in, taps, winograd = _geometry(op)
        fits = max(_CORE_WEIGHT_BYTES // (2 * fan_in), 1)
        channels = min(_GROUP, 2 ** int(math.log2(fits)))
        out = op.result.type
        positions = out.size // max(out.shape[1] if op.kind == "conv" else out.shape[-1], 1)
        off_chip = positions * (fan_in // taps) * 2 >= _ON_CHIP_BYTES
        rate = min(channels * taps / _GROUP, 1.0) if off_chip else 1.0
        made = [self.makers[name] for name in operands if name in self.makers]
        quantized = encoded > 0 and any(maker.kind == "dequantize" for maker in made)
        wide = self._wide(operands.values(), fan_in) if channels < _GROUP and op.kind != "conv" else ()
        streams = _streams((size, plain), ("compressed", encoded))
        return OpWork(op, "mac", macs(op), rate, winograd, quantized, self._rectified(op), streams, _streams(*wide),
                      transfers)  # fmt: skip

    def _rectified(self, op: Op) -> bool:
        """Whether the activations come out of a relu, also through views and max pooling."""
        maker: Op | None = op
        while maker is not None:
            first = next(maker.operands(), None)
            maker = self.makers.get(first.name) if first is not None else None
            if maker is not None and maker.kind == "relu":
                return True
            if maker is not None and family(maker.kind) != "view" and maker.kind != "max_pool":
                return False
        return False

    def _wide(self, operands: Iterable[Value], fan_in: int) -> Iterator[tuple[str, int]]:
        """Streams of intermediates that a starved contraction takes in; less of them just beyond a full group."""
        for value in operands:
            maker, size = self.makers.get(value.name), value.type.nbytes
            if maker is None or family(maker.kind) == "constexpr":
                continue
            beyond = size * min(fan_in - _FULL_FAN_IN, _RAMP) // _RAMP
            if value.type.rank <= 2:
                near = size <= _ON_CHIP_BYTES // 2
                yield ("wide_near" if near else "wide" if size <= 8 * _MIB else "wide_spill"), beyond
            elif size > 64 * _MIB:
                yield "deep_spill", beyond

    def _fused(self, op: Op, work: str) -> bool:
        """Bias, scale and activation in a row ride on the MAC output stage; so do quantize and dequantize around it.

        A relu also rides on an elementwise op of two tensors, as after a residual sum.
        """
        if op.kind in ("quantize", "dequantize"):
            return True
        runtime = list(op.operands())
        if len(runtime) != 1 or op.result.type.shape != runtime[0].type.shape or work in MOVES:
            return False
        maker = self.makers.get(runtime[0].name)
        if maker is None or work in ("normalization", "softmax"):
            return False
        alone = self.uses[runtime[0].name] == 1 and runtime[0].name not in self.outputs
        behind_product = family(maker.kind) == "contraction" or maker.name in self.riding
        if alone and behind_product:
            self.riding.add(op.name)
        return alone and (behind_product or (op.kind == "relu" and family(maker.kind) == "binary"))


def _streams(*parts: tuple[str, int]) -> Streams:
    """The streams with bytes, one of each name."""
    sizes: dict[str, int] = {}
    for name, size in parts:
        if size:
            sizes[name] = sizes.get(name, 0) + size
    return tuple(sizes.items())


def _spreads(op: Op) -> bool:
    """Whether an operand of a binary op is broadcast, other than a scalar or one value a channel ([N, C, H, W])."""
    out = op.result.type.shape
    for name in ("x", "y"):
        shape = shape_of(op, name)
        padded = (1,) * (len(out) - len(shape)) + shape
        if padded != out and math.prod(shape) > 1 and not (len(out) == 4 and padded[2:] == (1, 1)):
            return True
    return False


def _plain_bytes(op: Op) -> int:
    """Bytes of an op's own constants that stream to the array."""
    return sum(
        item.type.nbytes for _, item in op.literals() if item.type.dtype not in ("string", "bool", "int32")
    )


def stored_bytes(item: Literal) -> int:
    """Bytes of a constant as stored; sub-byte types packed."""
    bits = _PACKED_BITS.get(item.type.dtype)
    return item.type.nbytes if bits is None else item.type.size * bits // 8


def constant_bytes(function: Function) -> int:
    """Bytes of a program's constants as they are stored."""
    found = [item for op in function.ops for _, item in op.literals() if isinstance(item.data, bytes)]
    return sum(stored_bytes(item) for item in found)


def held_bytes(function: Function) -> int:
    """Bytes that a program's constants, inputs and outputs take."""
    ports = {value.name: value.type.nbytes for value in (*function.inputs, *function.outputs)}
    return constant_bytes(function) + sum(ports.values())


def _geometry(op: Op) -> tuple[int, int, bool]:
    """Fan-in of one output, taps of the kernel, and whether Winograd's form applies (3 x 3, stride 1)."""
    if op.kind != "conv":
        return max(macs(op) // max(op.result.type.size, 1), 1), 1, False
    weight = shape_of(op, "weight")
    plain = all(constant(op, name) in (None, (1,) * len(weight[2:])) for name in ("strides", "dilations"))
    winograd = plain and weight[2:] == (3, 3) and constant(op, "groups") in (None, 1)
    return math.prod(weight[1:]), math.prod(weight[2:]), winograd
