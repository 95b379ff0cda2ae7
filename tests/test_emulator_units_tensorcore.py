"""Tensor-core arithmetic of the emulator against its definition in Python's integers.

Whether the definition is the hardware's is what test_ptx_forms.py checks on recorded answers.
"""

import numpy as np
import pytest
from ptx_forms_oracle import dot

from mirage_hello.ptx.emulator import formats, tensorcore


def operand(kind, shape, rng):
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 7, shape)
    bits = formats.encode(kind, np.where(rng.random(shape) < 0.1, 0.0, values), satfinite=True)
    return formats.decode(kind, bits)


@pytest.mark.parametrize(("a_kind", "b_kind", "k"), [
    ("bf16", "bf16", 16), ("f16", "f16", 16), ("tf32", "tf32", 8), ("f16", "f16", 8),
])  # fmt: skip
def test_f32_accumulation_aligns_to_25_bits_and_truncates(a_kind, b_kind, k):
    rng = np.random.default_rng(k)
    a, b = operand(a_kind, (8, k), rng), operand(b_kind, (k, 6), rng)
    c = rng.standard_normal((8, 6)).astype(np.float32)
    got = tensorcore.accumulate(a, b, c.view(np.uint32), "f32", a_kind, b_kind)
    for i in range(8):
        for j in range(6):
            exact = dot(
                a[i].tolist(), b[:, j].tolist(), float(c[i, j]), (a_kind, b_kind, "f32"), 25, 23
            )
            assert float(got.view(np.float32)[i, j]) == exact


@pytest.mark.parametrize("b_kind", ["e4m3", "e5m2"])
def test_fp8_accumulation_keeps_13_bits(b_kind):
    rng = np.random.default_rng(3)
    a, b = operand("e4m3", (4, 32), rng), operand(b_kind, (32, 5), rng)
    c = rng.standard_normal((4, 5)).astype(np.float32)
    got = tensorcore.accumulate(a, b, c.view(np.uint32), "f32", "e4m3", b_kind, short=True)
    for i in range(4):
        for j in range(5):
            exact = dot(
                a[i].tolist(), b[:, j].tolist(), float(c[i, j]), ("e4m3", b_kind, "f32"), 13, 13
            )
            assert float(got.view(np.float32)[i, j]) == exact
    assert not (got & np.uint32(0x3FF)).any()  # 23 - 13 low bits are never set


def test_accumulation_loses_small_terms():
    """2**13 + 1 is exact in f32, but the fp8 accumulator drops a term 2**14 times smaller."""
    a, b = np.zeros((1, 32)), np.zeros((32, 1))
    a[0, :2], b[:2, 0] = 1.0, (128.0, 2.0**-7)
    kept = tensorcore.accumulate(a, b, None, "f32", "e4m3", "e4m3")
    lost = tensorcore.accumulate(a, b, None, "f32", "e4m3", "e4m3", short=True)
    assert kept.view(np.float32)[0, 0] == 128.0 + 2.0**-7
    assert lost.view(np.float32)[0, 0] == 128.0


def test_non_finite_values_follow_ieee():
    a, b = np.ones((4, 16)), np.ones((16, 1))
    a[0, 3], a[1, 3], a[2, 5] = np.inf, np.nan, np.inf
    b[7, 0] = 0.0
    a[3, 7] = np.inf  # infinity times zero
    got = tensorcore.accumulate(a, b, None, "f32", "bf16", "bf16")
    np.testing.assert_array_equal(got[:, 0], [0x7F800000, 0x7FFFFFFF, 0x7F800000, 0x7FFFFFFF])


def test_mma_fp8_is_two_f16_products_and_an_addition():
    rng = np.random.default_rng(5)
    a, b = operand("e4m3", (16, 32), rng), operand("e4m3", (32, 8), rng)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    got = tensorcore.accumulate_fp8_mma(a, b, c.view(np.uint32)).view(np.float32)
    low = np.arange(32) % 4 < 2
    first = tensorcore.accumulate(a[:, low], b[low], None, "f32", "f16", "f16")
    both = tensorcore.accumulate(a[:, ~low], b[~low], first, "f32", "f16", "f16").view(np.float32)
    np.testing.assert_array_equal(got, c + both)
