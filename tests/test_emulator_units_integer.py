"""Integer and bit instructions of the emulator against Python's unbounded integers."""

import numpy as np
import pytest

from mirage_hello.ptx.emulator import bits, formats, integer

KINDS = ["s16", "u16", "s32", "u32", "s64", "u64"]


def registers(kind, n=400, seed=0):
    """Random registers with short, long and extreme values, and the integers they stand for."""
    width = int(kind[1:])
    rng = np.random.default_rng([seed, width])
    raw = rng.integers(0, 1 << width, n, dtype=np.uint64) >> rng.integers(0, width, n).astype(
        np.uint64
    )
    raw[:6] = np.array(
        [0, 1, (1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1, 3], np.uint64
    )
    raw = raw[rng.permutation(n)]
    wrap = 1 << width
    signed = kind[0] == "s"
    values = [int(r) - (wrap if signed and int(r) >> (width - 1) else 0) for r in raw]
    return raw.astype(formats.register_dtype(kind)), values


def expect(kind, got, wanted):
    wrap = 1 << int(kind[1:])
    assert got.dtype == formats.register_dtype(kind)
    assert [int(g) for g in got] == [w % wrap for w in wanted]


def truncated(a, b):
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic(kind):
    (a, x), (b, y), (c, z) = (registers(kind, seed=s) for s in (1, 2, 3))
    width = int(kind[1:])
    triples = list(zip(x, y, z, strict=True))
    expect(kind, integer.add(kind, a, b), [p + q for p, q, _ in triples])
    expect(kind, integer.sub(kind, a, b), [p - q for p, q, _ in triples])
    expect(kind, integer.mul_lo(kind, a, b), [p * q for p, q, _ in triples])
    expect(kind, integer.mul_hi(kind, a, b), [p * q >> width for p, q, _ in triples])
    expect(kind, integer.mad_lo(kind, a, b, c), [p * q + r for p, q, r in triples])
    expect(kind, integer.mad_hi(kind, a, b, c), [(p * q >> width) + r for p, q, r in triples])
    expect(kind, integer.minimum(kind, a, b), [min(p, q) for p, q, _ in triples])
    expect(kind, integer.maximum(kind, a, b), [max(p, q) for p, q, _ in triples])
    expect(kind, integer.neg(kind, a), [-p for p in x])
    expect(kind, bits.sad(kind, a, b, c), [r + abs(p - q) for p, q, r in triples])
    if kind[0] == "s":
        expect(kind, integer.absolute(kind, a), [abs(p) for p in x])
    if width < 64:
        wide = kind[0] + str(2 * width)
        expect(wide, integer.mul_wide(kind, a, b), [p * q for p, q, _ in triples])
        (w, v) = registers("s" + str(2 * width), seed=4)
        got = integer.mad_wide(kind, a, b, w)
        expect(wide, got, [p * q + r for p, q, r in zip(x, y, v, strict=True)])


@pytest.mark.parametrize("kind", KINDS)
def test_division(kind):
    (a, x), (b, y) = registers(kind, seed=1), registers(kind, seed=2)
    keep = b != 0
    pairs = [(p, q) for p, q in zip(x, y, strict=True) if q]
    expect(kind, integer.div(kind, a, b)[keep], [truncated(p, q) for p, q in pairs])
    expect(kind, integer.rem(kind, a, b)[keep], [p - q * truncated(p, q) for p, q in pairs])


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "s32", "s64", "u32"])
def test_shifts(kind):
    a, x = registers(kind if kind[0] != "b" else "u" + kind[1:])
    width = int(kind[1:])
    counts = np.random.default_rng(5).integers(0, width + 9, a.size).astype(np.uint32)
    counts[:2] = 0xFFFFFFFF
    left = [p << int(c) if c < width else 0 for p, c in zip(x, counts, strict=True)]
    right = [p >> min(int(c), 200) for p, c in zip(x, counts, strict=True)]
    expect(kind, integer.shl(kind, a, counts), left)
    expect(kind, integer.shr(kind, a, counts), right)


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_funnel_shift(mode):
    (a, x), (b, y) = registers("u32", seed=1), registers("u32", seed=2)
    counts = np.random.default_rng(6).integers(0, 40, a.size).astype(np.uint32)
    left, right = integer.shf("l", mode, a, b, counts), integer.shf("r", mode, a, b, counts)
    for i, (p, q, c) in enumerate(zip(x, y, counts, strict=True)):
        n = min(int(c), 32) if mode == "clamp" else int(c) % 32
        pair = q << 32 | p
        assert int(left[i]) == (pair << n >> 32) & 0xFFFFFFFF
        assert int(right[i]) == (pair >> n) & 0xFFFFFFFF


def test_saturating_and_24_bit():
    (a, x), (b, y) = registers("s32", seed=1), registers("s32", seed=2)
    clamp = lambda v: min(max(v, -(1 << 31)), (1 << 31) - 1)  # noqa: E731
    expect("s32", integer.add_sat("s32", a, b), [clamp(p + q) for p, q in zip(x, y, strict=True)])
    expect("s32", integer.sub_sat("s32", a, b), [clamp(p - q) for p, q in zip(x, y, strict=True)])
    low = [((p & 0xFFFFFF) ^ 0x800000) - 0x800000 for p in x]
    low2 = [((p & 0xFFFFFF) ^ 0x800000) - 0x800000 for p in y]
    expect("s32", integer.mul24_lo("s32", a, b), [p * q for p, q in zip(low, low2, strict=True)])


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    width = int(kind[1:])
    (a, _), (b, _) = registers(kind, seed=1), registers(kind, seed=2)
    rng = np.random.default_rng(7)
    position, length = (rng.integers(0, width + 20, a.size).astype(np.uint32) for _ in range(2))
    got = bits.bfe(kind, a, position, length)
    inserted = bits.bfi("b" + kind[1:], a, b, position, length)
    msb = width - 1
    for i in range(a.size):
        # The definitions of the PTX manual, bit by bit.
        p, n, x = int(position[i]), int(length[i]), int(a[i])
        sign = 0 if kind[0] == "u" or n == 0 else x >> min(p + n - 1, msb) & 1
        d = 0
        for bit in range(width):
            d |= (x >> (p + bit) & 1 if bit < n and p + bit <= msb else sign) << bit
        assert int(got[i]) == d, (kind, p, n, hex(x))
        f = int(b[i])
        for bit in range(min(n, max(0, width - p))):
            f = f & ~(1 << (p + bit)) | (x >> bit & 1) << (p + bit)
        assert int(inserted[i]) == f


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_counting(kind):
    width = int(kind[1:])
    a, x = registers("u" + kind[1:])
    assert [int(v) for v in bits.popc(kind, a)] == [p.bit_count() for p in x]
    assert [int(v) for v in bits.clz(kind, a)] == [width - p.bit_length() for p in x]
    assert [int(v) for v in bits.brev(kind, a)] == [int(f"{p:0{width}b}"[::-1], 2) for p in x]
    found = [(p.bit_length() - 1) % (1 << 32) for p in x]
    assert [int(v) for v in bits.bfind("u" + kind[1:], a)] == found


def test_prmt_lop3_dp4a():
    (a, x), (b, y), (c, z) = (registers("u32", seed=s) for s in (1, 2, 3))
    for i, got in enumerate(bits.prmt(a, b, c)):
        pool = (y[i] << 32 | x[i]).to_bytes(8, "little")
        want = 0
        for k in range(4):
            pick = z[i] >> 4 * k & 15
            byte = pool[pick & 7]
            want |= ((0xFF if byte & 0x80 else 0) if pick & 8 else byte) << 8 * k
        assert int(got) == want
    for table in (0x96, 0xE8, 0x00, 0xFF, 0xCA, 0x1D):
        ta, tb, tc = 0xF0, 0xCC, 0xAA
        names = [ta, tb, tc]
        got = bits.lop3(*(np.array([n], np.uint32) for n in names), table)
        assert int(got[0]) & 0xFF == table
    signed = lambda v: (v & 0xFF ^ 0x80) - 0x80  # noqa: E731
    got = bits.dp4a("s32", "u32", a, b, c)
    for i in range(a.size):
        total = sum(signed(x[i] >> s) * (y[i] >> s & 0xFF) for s in (0, 8, 16, 24))
        assert int(got[i]) == (z[i] + total) % (1 << 32)


def test_prmt_modes():
    a, b = np.array([0x33221100], np.uint32), np.array([0x77665544], np.uint32)
    wanted = {"f4e": 0x44332211, "b4e": 0x66770011, "rc8": 0x11111111, "ecl": 0x33221111,
              "ecr": 0x11111100, "rc16": 0x33223322}  # fmt: skip
    for mode, want in wanted.items():
        assert int(bits.prmt(a, b, np.array([1]), mode)[0]) == want, mode
