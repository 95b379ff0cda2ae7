"""Number formats and cvt of the emulator, against exact rational rounding, torch and NumPy."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from exact_rounding import random_bits, round_to

from mirage_hello.ptx.emulator import cvt, formats

TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16}


@pytest.mark.parametrize("kind", ["e4m3", "e5m2", "f16", "bf16"])
def test_decode_every_value(kind):
    dtype = formats.register_dtype(kind)
    bits = np.arange(1 << (8 * dtype.itemsize), dtype=np.uint32).astype(dtype)
    as_torch = torch.from_numpy(bits.view(f"i{dtype.itemsize}"))
    expected = as_torch.view(TORCH.get(kind, torch.float16)).double().numpy()
    np.testing.assert_array_equal(formats.decode(kind, bits), expected)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2", "f16", "bf16", "tf32", "f32"])
def test_encode_inverts_decode(kind):
    fmt = formats.FORMATS[kind]
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 1 << fmt.bits, 4096, dtype=np.uint64).astype(fmt.dtype)
    bits = (bits >> fmt.dtype.type(fmt.shift)) << fmt.dtype.type(fmt.shift)
    values = formats.decode(kind, bits)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(formats.encode(kind, values)[number], bits[number])
    assert (formats.encode(kind, values)[~number] == fmt.nan).all()


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp", "rna"])
@pytest.mark.parametrize("kind", ["e4m3", "e5m2", "f16", "bf16", "tf32", "f32"])
def test_encode_rounds_like_exact_arithmetic(kind, mode):
    rng = np.random.default_rng([2, len(mode), ord(mode[-1])])
    source = random_bits(rng, np.uint64 if kind == "f32" else np.uint32, 1500)
    x = source.view(np.float64 if kind == "f32" else np.float32)
    x = x[np.isfinite(x)].astype(np.float64)
    bits = formats.encode(kind, x, mode)
    values = formats.decode(kind, bits)
    for value, got, raw in zip(x, values, bits, strict=True):
        expected = round_to(kind, Fraction(float(value)), mode)
        if isinstance(expected, float) and kind == "e4m3":  # no infinity in e4m3
            assert np.isnan(got)
            continue
        assert got == expected and np.signbit(got) == np.signbit(value), (value, got, hex(raw))


@pytest.mark.parametrize("kind", ["bf16", "e4m3", "e5m2"])
def test_cvt_rn_matches_torch(kind):
    rng = np.random.default_rng(3)
    x = random_bits(rng, np.uint32, 20000).view(np.float32)
    if kind != "bf16":
        x = (x.view(np.uint32) & np.uint32(0x83FFFFFF) | np.uint32(0x38000000)).view(np.float32)
        x = x * np.float32(2.0) ** rng.integers(-10, 12, x.size).astype(np.float32)
        x = x[np.abs(x) <= (448 if kind == "e4m3" else 57344)]
    got = cvt.convert(kind, "f32", (x.view(np.uint32),), "rn")
    expected = torch.from_numpy(x).to(TORCH[kind]).double().numpy()
    np.testing.assert_array_equal(formats.decode(kind, got), expected)


def test_satfinite_relu_and_nan():
    x = np.array([1e9, -1e9, np.inf, -np.inf, np.nan, -3.0, -0.0, 464.0])
    for kind, top in (("e4m3", 0x7E), ("e5m2", 0x7B), ("f16", 0x7BFF), ("tf32", 0x7F7FE000)):
        fmt = formats.FORMATS[kind]
        got = formats.encode(kind, x, satfinite=True)
        sign = 1 << (fmt.bits - 1)
        infinity = [top, top | sign] if kind != "tf32" else [None, None]
        assert got[2] == top and got[3] == top | sign and got[4] == fmt.nan
        if kind != "tf32":
            assert got[0] == infinity[0] and got[1] == infinity[1]
    relu = formats.encode("f16", x, relu=True)
    np.testing.assert_array_equal(relu, [0x7C00, 0, 0x7C00, 0, 0x7FFF, 0, 0, 0x5F40])


def test_flush_and_saturate():
    bits = np.array([0x00000001, 0x807FFFFF, 0x00800000, 0x3F800001, 0x7FC00000, 0xBF800000])
    flushed = formats.flush("f32", bits.astype(np.uint32))
    np.testing.assert_array_equal(flushed, [0, 0x80000000, 0x00800000, *bits[3:]])
    saturated = formats.saturate("f32", bits.astype(np.uint32))
    np.testing.assert_array_equal(saturated, [1, 0, 0x00800000, 0x3F800000, 0, 0])


@pytest.mark.parametrize("dst", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_float_to_integer_saturates(dst, mode):
    rng = np.random.default_rng(4)
    x = np.concatenate(
        [
            random_bits(rng, np.uint32, 500).view(np.float32),
            (2.0 ** np.arange(-2, 70) * 1.4142135).astype(np.float32),
            np.array([0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 255.5, 2147483648.0], np.float32),
        ]
    )
    got = cvt.convert(dst, "f32", (x.view(np.uint32),), mode)
    low, high = cvt.integer_range(dst)
    operation = {
        "rni": round,
        "rzi": int,
        "rmi": lambda q: q.__floor__(),
        "rpi": lambda q: q.__ceil__(),
    }
    for value, bits in zip(x, got, strict=True):
        if np.isnan(value):
            expected = 1 << 63 if dst[1:] == "64" else 0
        elif np.isinf(value):
            expected = high if value > 0 else low
        else:
            expected = min(max(operation[mode](Fraction(float(value))), low), high)
        assert int(bits) == expected % (1 << int(dst[1:])), (value, mode)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("src", ["s32", "u32", "s64", "u64", "u8", "s16"])
@pytest.mark.parametrize("dst", ["f16", "bf16", "f32", "f64"])
def test_integer_to_float_rounds_once(dst, src, mode):
    rng = np.random.default_rng(5)
    width = int(src[1:])
    shift = rng.integers(0, width, 400).astype(np.uint64)
    raw = rng.integers(0, 1 << width, 400, dtype=np.uint64) >> shift
    # Values one above and below a midpoint of f32 and f64, where rounding twice would show.
    ties = [
        (1 << width - 1) + (1 << max(width - 1 - m, 0)) + d
        for m in (24, 25, 53, 54)
        for d in (-1, 0, 1)
    ]
    raw = np.concatenate([raw, np.array([t % (1 << width) for t in ties], np.uint64)])
    register = raw.astype(formats.register_dtype(src))
    got = formats.decode(dst, cvt.convert(dst, src, (register,), mode))
    for bits, value in zip(raw, got, strict=True):
        exact = int(bits) - ((1 << width) if src[0] == "s" and int(bits) >> (width - 1) else 0)
        assert value == round_to(dst, Fraction(exact), mode), (exact, mode)


@pytest.mark.parametrize("dst", ["s8", "u8", "s16", "u32", "s64", "u64"])
@pytest.mark.parametrize("src", ["s8", "u8", "s16", "u32", "s64", "u64"])
@pytest.mark.parametrize("sat", [False, True])
def test_integer_to_integer(dst, src, sat):
    width = int(src[1:])
    raw = [
        0,
        1,
        127,
        128,
        255,
        32768,
        65535,
        1 << 31,
        (1 << 31) - 1,
        (1 << 63) - 1,
        1 << 63,
        (1 << 64) - 5,
    ]
    raw = [r % (1 << width) for r in raw]
    got = cvt.convert(
        dst, src, (np.array(raw, np.uint64).astype(formats.register_dtype(src)),), sat=sat
    )
    low, high = cvt.integer_range(dst)
    for bits, result in zip(raw, got, strict=True):
        value = bits - ((1 << width) if src[0] == "s" and bits >> (width - 1) else 0)
        expected = min(max(value, low), high) if sat else value
        assert int(result) == expected % (1 << int(dst[1:]))


def test_packed_conversions_put_the_first_source_above():
    a, b = (np.array([v], np.float32).view(np.uint32) for v in (1.0, -2.0))
    assert cvt.convert("bf16x2", "f32", (a, b), "rn")[0] == 0x3F80C000
    assert cvt.convert("f16x2", "f32", (a, b), "rn")[0] == 0x3C00C000
    packed = cvt.convert("e4m3x2", "f32", (a, b), "rn", satfinite=True)
    assert packed.dtype == np.uint16 and packed[0] == 0x38C0
    assert cvt.convert("f16x2", "e4m3x2", (packed,), "rn")[0] == 0x3C00C000
    assert cvt.convert("bf16x2", "f32", (b, a), "rn", relu=True)[0] == 0x3F80


def test_round_to_integral_value_keeps_the_format():
    x = np.array([0.5, 1.5, -2.5, 3.7, -0.2], np.float32).view(np.uint32)
    got = cvt.convert("f32", "f32", (x,), "rni").view(np.float32)
    np.testing.assert_array_equal(got, [0.0, 2.0, -2.0, 4.0, -0.0])


def test_f64_to_f32_with_every_mode():
    rng = np.random.default_rng(6)
    x = random_bits(rng, np.uint64, 1000).view(np.float64)
    x = np.concatenate([x[np.isfinite(x)], np.float64(1.5) ** np.arange(-280, -200)])
    for mode in ("rn", "rz", "rm", "rp"):
        got = formats.decode("f32", cvt.convert("f32", "f64", (x.view(np.uint64),), mode))
        for value, result in zip(x, got, strict=True):
            assert result == round_to("f32", Fraction(float(value)), mode)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="expected one of e4m3"):
        formats.register_dtype("float8")
    with pytest.raises(ValueError, match="rounding must be one of rn"):
        formats.encode("f16", np.ones(2), "rx")
    with pytest.raises(ValueError, match="needs rni, rzi, rmi or rpi"):
        cvt.convert("s32", "f32", (np.zeros(1, np.uint32),), "rn")
