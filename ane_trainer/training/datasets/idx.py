"""Read and write IDX, the file format of MNIST: big-endian header, then unsigned bytes."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

_UNSIGNED_BYTE = 0x08


def parse_idx(raw: bytes) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes; ValueError if header and length do not agree."""
    if len(raw) < 4 or raw[:2] != b"\x00\x00" or raw[2] != _UNSIGNED_BYTE:
        raise ValueError(f"not an IDX file of unsigned bytes: starts with {raw[:4].hex()}")
    header_bytes = 4 + 4 * raw[3]
    if len(raw) < header_bytes:
        raise ValueError(f"IDX header is cut off: needs {header_bytes} bytes, got {len(raw)}")
    shape = struct.unpack(f">{raw[3]}I", raw[4:header_bytes])
    values = np.frombuffer(raw, dtype=np.uint8, offset=header_bytes)
    expected = 1
    for size in shape:
        expected *= size
    if values.size != expected:
        raise ValueError(
            f"IDX data is cut off or too long: shape {shape} needs {expected} bytes, got {values.size}"
        )
    return values.reshape(shape)


def build_idx(array: NDArray[np.uint8]) -> bytes:
    """The IDX file holding an array of unsigned bytes; the inverse of `parse_idx`."""
    if array.dtype != np.uint8:
        raise ValueError(f"IDX: needs uint8; got {array.dtype}")
    header = struct.pack(f">HBB{array.ndim}I", 0, _UNSIGNED_BYTE, array.ndim, *array.shape)
    return header + array.tobytes()
