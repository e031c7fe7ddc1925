"""The weight blob: layout byte by byte, packing, sharing, refusals; literals and arrays."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil.program import TensorType, literal
from ane_trainer.ane.mil.weights import (
    BLOB_CODES,
    SUB_BYTE_BITS,
    BlobWriter,
    from_array,
    integer_range,
    pack,
    packed_bytes,
    read_weight,
    to_array,
)


def test_layout_is_the_published_one() -> None:
    """64-byte header {count, 2}; 64-byte descriptor with the mark; data 64-byte aligned (Orion, ANEForge)."""
    blob = BlobWriter()
    first = blob.add(from_array(np.array([1.0, -2.0, 0.5], np.float16)))
    second = blob.add(from_array(np.arange(70, dtype=np.int8)))
    data = blob.finish()
    assert (first, second) == (64, 192)
    assert struct.unpack_from("<II", data, 0) == (2, 2)
    assert struct.unpack_from("<IIQQ", data, 64) == (0xDEADBEEF, 1, 6, 128)
    assert struct.unpack_from("<IIQQ", data, 192) == (0xDEADBEEF, 4, 70, 256)
    assert data[128:134] == np.array([1.0, -2.0, 0.5], np.float16).tobytes()
    assert len(data) == 256 + 128


def test_equal_contents_are_stored_once_and_dtypes_apart() -> None:
    blob = BlobWriter()
    a = blob.add(from_array(np.zeros((2, 3), np.float16)))
    assert blob.add(from_array(np.zeros((3, 2), np.float16))) == a
    assert blob.add(from_array(np.zeros(12, np.int8))) != a
    assert struct.unpack_from("<I", blob.finish(), 0) == (2,)


def test_nibbles_pack_low_first_and_masks_lsb_first() -> None:
    assert pack(bytes([1, 2, 15]), "uint4") == bytes([0x21, 0x0F])
    assert pack(bytes([1, 0, 0, 0, 0, 0, 0, 0, 1]), "uint1") == bytes([0x01, 0x01])


def test_spare_bits_of_a_packed_weight_are_recorded() -> None:
    blob = BlobWriter()
    blob.add(from_array(np.ones(3, np.uint8), dtype="uint4"))
    assert struct.unpack_from("<Q", blob.finish(), 64 + 24) == (4,)


@given(st.data(), st.sampled_from(sorted(BLOB_CODES)), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_blob_gives_back_every_dtype(data: st.DataObject, dtype: str, shape: list[int]) -> None:
    size = math.prod(shape)
    if dtype.startswith("fp"):
        size_bytes = size * int(dtype[2:]) // 8
        values = data.draw(st.binary(min_size=size_bytes, max_size=size_bytes))
        array = np.frombuffer(values, f"<f{int(dtype[2:]) // 8}").reshape(shape)
    else:
        low, high = integer_range(dtype)
        drawn = data.draw(st.lists(st.integers(low, high), min_size=size, max_size=size))
        array = np.array(drawn).reshape(shape)
    lit = from_array(array, dtype=dtype)
    blob = BlobWriter()
    offset = blob.add(lit)
    assert read_weight(blob.finish(), offset, lit.type) == lit.data
    if not dtype.startswith("fp"):
        np.testing.assert_array_equal(to_array(lit), array)


@pytest.mark.parametrize(
    ("offset", "length", "words"),
    [(63, 4, "mark"), (128, 4, "mark"), (-1, 4, "descriptor"), (10**9, 4, "descriptor"), (64, 5, "10 bytes")],
)
def test_refuses_a_reference_that_does_not_fit(offset: int, length: int, words: str) -> None:
    blob = BlobWriter()
    blob.add(from_array(np.ones(4, np.float16)))
    with pytest.raises(ProgramError, match=words):
        read_weight(blob.finish(), offset, TensorType("fp16", (length,)))


def test_a_descriptor_without_offset_is_followed_by_its_data() -> None:
    """The blobs of maderix/ANE's benchmarks leave the data offset 0 and the byte count at a template's."""
    data = np.arange(4, dtype=np.float16).tobytes()
    blob = bytes(64) + struct.pack("<IIQQ40x", 0xDEADBEEF, 1, 0x80000, 0) + data
    assert read_weight(blob, 64, TensorType("fp16", (4,))) == data
    with pytest.raises(ProgramError, match="the blob has"):
        read_weight(blob, 64, TensorType("fp16", (5,)))


def test_refuses_data_beyond_the_end() -> None:
    blob = BlobWriter()
    offset = blob.add(from_array(np.ones(100, np.float16)))
    with pytest.raises(ProgramError, match="the blob has"):
        read_weight(blob.finish()[:200], offset, TensorType("fp16", (100,)))


def test_refuses_integers_that_the_dtype_cannot_hold() -> None:
    assert to_array(from_array(np.array([15]), dtype="uint4")).tolist() == [15]
    with pytest.raises(ProgramError, match="0 to 15"):
        from_array(np.array([16]), dtype="uint4")


def test_strings_have_no_place_in_a_blob() -> None:
    with pytest.raises(ProgramError, match="numeric"):
        BlobWriter().add(literal("custom", "string"))


def test_sub_byte_sizes() -> None:
    assert {d: packed_bytes(TensorType(d, (9,))) for d in SUB_BYTE_BITS} == {
        "int4": 5, "uint1": 2, "uint2": 3, "uint3": 4, "uint4": 5, "uint6": 7,
    }  # fmt: skip


def test_strings_and_scalars_as_arrays() -> None:
    assert to_array(literal(("a", "b"), "string")).tolist() == ["a", "b"]
    assert to_array(literal(2.5, "fp16")).shape == ()
    assert from_array(np.array(["a", "b"])) == literal(("a", "b"), "string")
