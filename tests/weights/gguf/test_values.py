"""What the bytes of each tensor type mean: the library's dequantisers against the format, value by value.

Each function says in plain Python what one value of a block is, after the structs and comments of ggml-common.h and the
reference loops of ggml-quants.c: `at(n)` is byte n of the block, `half(n)` the float16 there. Products and sums are
rounded to float32 one by one, in ggml's order.
"""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxhybrid.weights.gguf import model as gguf_model
from jaxhybrid.weights.gguf.head import TENSOR_TYPES
from jaxhybrid.weights.gguf.model import open_gguf
from tests.weights.gguf.make import SCALES, Draft, random_blocks

f32 = np.float32


def nibble(at, start, i):
    """Value i of 32: the low halves of 16 bytes, then the high ones."""
    return at(start + i % 16) >> 4 * (i // 16) & 15


def fifth_bit(at, start, i):
    return at(start + i // 8) >> i % 8 & 1


def six_bits(at, start, j):
    """(scale, minimum) j of the eight in 12 bytes: four whole ones, then four that borrow two bits each."""
    if j < 4:
        return at(start + j) & 63, at(start + 4 + j) & 63
    low = at(start + 4 + j)
    return low & 15 | at(start + j - 4) >> 6 << 4, low >> 4 | at(start + j) >> 6 << 4


def q4_0(at, half, i):
    return half(0) * f32(nibble(at, 2, i) - 8)


def q4_1(at, half, i):
    return half(0) * f32(nibble(at, 4, i)) + half(2)


def q5_0(at, half, i):
    return half(0) * f32((nibble(at, 6, i) | fifth_bit(at, 2, i) << 4) - 16)


def q5_1(at, half, i):
    return half(0) * f32(nibble(at, 8, i) | fifth_bit(at, 4, i) << 4) + half(2)


def q8_0(at, half, i):
    return half(0) * f32((at(2 + i) ^ 128) - 128)


def q4_k(at, half, i):
    scale, minimum = six_bits(at, 4, i // 32)
    quant = at(16 + 32 * (i // 64) + i % 32) >> 4 * (i // 32 % 2) & 15
    return half(0) * f32(scale) * f32(quant) - half(2) * f32(minimum)


def q5_k(at, half, i):
    scale, minimum = six_bits(at, 4, i // 32)
    quant = at(48 + 32 * (i // 64) + i % 32) >> 4 * (i // 32 % 2) & 15 | (at(16 + i % 32) >> i // 32 & 1) << 4
    return half(0) * f32(scale) * f32(quant) - half(2) * f32(minimum)


def q6_k(at, half, i):
    place, part = i % 128, i // 128
    low = at(64 * part + place % 64) >> 4 * (place // 64) & 15
    high = at(128 + 32 * part + place % 32) >> 2 * (place // 32) & 3
    scale = (at(192 + i // 16) ^ 128) - 128
    return half(208) * f32(scale) * f32((low | high << 4) - 32)


VALUE = {"Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}


def one_tensor(path, values, kind):
    Draft("llama", {}, {"x": (values, kind)}).write(path)
    return open_gguf(str(path))


@pytest.mark.parametrize("kind", VALUE)
def test_quantised_values(kind, tmp_path):
    rng = np.random.default_rng(1)
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    stored = random_blocks(kind, 3, 512, rng)
    blocks = stored.reshape(-1, size)
    for place in SCALES[kind]:  # any finite float16, among them zeros and values below the normal range
        scales = rng.integers(0, 2**16, len(blocks), np.uint16)
        scales[:3] = 0, 1, 0x8000
        scales[np.isnan(scales.view(np.float16)) | np.isinf(scales.view(np.float16))] = 0x3C01
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    expected = np.empty((len(blocks), block), np.float32)
    for number, row in enumerate(blocks):
        halves = {n: f32(row[n : n + 2].view(np.float16)[0]) for n in SCALES[kind]}
        expected[number] = [VALUE[kind](lambda n, row=row: int(row[n]), halves.__getitem__, i) for i in range(block)]
    found = one_tensor(tmp_path / "x.gguf", stored, kind).values("x")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.reshape(3, 512), strict=True)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_values(kind, tmp_path):
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**16, 96, np.uint16)
    if kind == "BF16":
        bits[bits >> 7 & 255 == 255] = 0x3F81
        expected, stored = (bits.astype(np.uint32) << 16).view(np.float32), bits.view(np.uint8)
    elif kind == "F16":
        bits[bits >> 10 & 31 == 31] = 0x3C01
        sign, exponent, fraction = bits >> 15, (bits >> 10 & 31).astype(int), (bits & 1023).astype(np.float64)
        magnitude = np.where(exponent, (1 + fraction / 1024) * 2.0 ** (exponent - 15), fraction / 1024 * 2.0**-14)
        expected, stored = np.where(sign, -magnitude, magnitude).astype(np.float32), bits.view(np.float16)
    else:
        expected = stored = rng.standard_normal(96).astype(np.float32)
    model = one_tensor(tmp_path / "x.gguf", stored.reshape(4, -1), kind if kind == "BF16" else None)
    np.testing.assert_array_equal(model.values("x"), expected.reshape(4, 24), strict=True)


def test_every_type_is_held_against_the_format():
    assert {*VALUE, "F32", "F16", "BF16"} == set(TENSOR_TYPES)


def test_values_do_not_depend_on_the_chunks(tmp_path, monkeypatch):
    model = one_tensor(tmp_path / "x.gguf", random_blocks("Q4_K", 7, 512, np.random.default_rng(2)), "Q4_K")
    whole = model.values("x")
    monkeypatch.setattr(gguf_model, "CHUNK_VALUES", 1100)
    chunks = list(model.rows("x"))
    assert [len(chunk) for chunk in chunks] == [2, 2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)
