"""Detect writes to tensors, also through `.data`, which leaves their version counters as they are.

A fingerprint is read from memory by one compiled loop over all tensors: 32 running products a tensor, each of every
32nd number, so that any single change shows. Memory is read once, at the speed of memory. The upper half of a product
goes to its lower half: a product alone carries nothing down, and an even number of changed signs left it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ane_trainer.ane.simulator.loops import jit
from ane_trainer.ane.simulator.loops.ir import I32, I64, PTR, Function, module

_LANES = 32
_START, _PRIME = -2128831035, 16777619  # FNV-1a
_HALF = 16


class Fingerprints:
    """Fingerprints of named tensors as they were at the last `note`; sparse ones are left out."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        strided = {name: t for name, t in tensors.items() if t.layout == torch.strided}
        self._names, self._tensors = list(strided), list(strided.values())
        self._out = np.empty((len(self._tensors), _LANES), np.int32)
        self._find()
        self._noted = self._read().copy()

    def note(self, names: Collection[str] | None = None) -> None:
        """Take the tensors as they are now; with `names` these, the others being as they were noted."""
        if names is None or [t.data_ptr() for t in self._tensors] != self._places:
            self._noted = self._read().copy()
            return
        for row, name in enumerate(self._names):
            if name in names:
                whole = _whole(self._tensors[row])
                address, noted = np.array([whole.data_ptr()], np.int64), self._noted[row:]
                _kernel()(address.ctypes.data, self._sizes[row:].ctypes.data, 1, noted.ctypes.data)

    def digest(self) -> bytes:
        """The fingerprints as they were noted."""
        return self._noted.tobytes()

    def changed(self) -> list[str]:
        """The tensors that are not as they were."""
        if not self._tensors:
            return []
        found = self._read()
        if found.data.tobytes() == self._noted.data.tobytes():
            return []
        rows = np.flatnonzero((found != self._noted).any(1))
        return [self._names[row] for row in rows]

    def _find(self) -> None:
        """Note where the tensors' memory is; a tensor with gaps, or that ends within a word, is copied."""
        self._places = [t.data_ptr() for t in self._tensors]
        self._gaps = [not t.is_contiguous() or t.nbytes % 4 != 0 for t in self._tensors]
        self._addresses = np.array(self._places, np.int64)
        self._sizes = np.array([t.nbytes + -t.nbytes % 4 for t in self._tensors], np.int64)

    def _read(self) -> NDArray[np.int32]:
        if [t.data_ptr() for t in self._tensors] != self._places:
            self._find()
        held, addresses = [], self._addresses
        if any(self._gaps):
            held = [_whole(t) for t in self._tensors]
            addresses = np.array([t.data_ptr() for t in held], np.int64)
        _kernel()(addresses.ctypes.data, self._sizes.ctypes.data, len(self._tensors), self._out.ctypes.data)
        del held
        return self._out


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without gaps, and with zeros up to a whole word."""
    found = tensor.detach().contiguous()
    rest = -found.nbytes % 4
    return found if not rest else F.pad(found.reshape(-1).view(torch.uint8), (0, rest))


@cache
def _kernel() -> Callable[..., None]:
    """`fingerprint(addresses, sizes in bytes, count, out)`; sizes are of whole words."""
    f = Function("fingerprint", addresses=PTR, sizes=PTR, count=I64, out=PTR)
    addresses, sizes, count, out = f.parameters
    lanes = I32.of(_LANES)
    mixed = f.variable(f.constant(lanes, _START))
    with f.loop(0, count) as i:
        data, words = addresses.at(i, PTR).load(PTR), sizes.at(i, I64).load(I64) >> 2
        whole, place = words & -_LANES, out.at(i * _LANES, I32)
        mixed.set(f.constant(lanes, _START))
        with f.loop(0, whole, _LANES) as j:
            product = (mixed.value ^ data.at(j, I32).load(lanes)) * _PRIME
            mixed.set(product ^ (product >> _HALF))
        place.store(mixed.value)
        with f.loop(whole, words) as j:
            one = place.at(j - whole, I32)
            one.store((one.load(I32) ^ data.at(j, I32).load(I32)) * _PRIME)
    return jit.compile_ir(module([f.definition()]), ["fingerprint"])["fingerprint"]
