"""Matrix instructions of the emulator against the element tables of the PTX manual and NumPy."""

import numpy as np
import pytest

from mirage_hello.ptx.emulator import formats, matrix, wgmma
from mirage_hello.ptx.emulator.swizzle import Descriptor, swizzle


def random_matrix(kind, rows, columns, seed=0):
    """Raw bits of small values of a type, exact in every accumulator, and the values."""
    rng = np.random.default_rng([seed, rows, columns])
    if kind in ("s8", "u8"):
        raw = rng.integers(0, 256, (rows, columns)).astype(np.uint8)
        return raw, matrix.values(kind, raw).astype(float)
    values = rng.integers(-8, 9, (rows, columns)) / 4
    return formats.encode(kind, values), values


def a_position(kind, i, lane):
    """(row, k) of element i of an A fragment, as the PTX manual words it."""
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        return group + 8 * (i % 2), thread + 4 * (i // 2)
    if kind in ("f16", "bf16"):
        row = group if i < 2 or 4 <= i < 6 else group + 8
        return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)
    row = group if i < 4 or 8 <= i < 12 else group + 8
    return row, thread * 4 + (i & 3) + (16 if i >= 8 else 0)


def b_position(kind, i, lane):
    """(k, column) of element i of a B fragment."""
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        return thread + 4 * i, group
    if kind in ("f16", "bf16"):
        return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group
    return thread * 4 + (i & 3) + (16 if i >= 4 else 0), group


def fragment(raw, position, kind, registers):
    """Registers filled one element at a time."""
    per = 4 // raw.dtype.itemsize
    out = np.zeros((registers, 32, per), raw.dtype)
    for lane in range(32):
        for i in range(registers * per):
            out[i // per, lane, i % per] = raw[position(kind, i, lane)]
    return out.view(np.uint32).reshape(registers, 32)


MMA = [
    ((16, 8, 16), ("f32", "bf16", "bf16", "f32")),
    ((16, 8, 16), ("f32", "f16", "f16", "f32")),
    ((16, 8, 16), ("f16", "f16", "f16", "f16")),
    ((16, 8, 8), ("f32", "bf16", "bf16", "f32")),
    ((16, 8, 8), ("f32", "tf32", "tf32", "f32")),
    ((16, 8, 4), ("f32", "tf32", "tf32", "f32")),
    ((16, 8, 32), ("f32", "e4m3", "e5m2", "f32")),
    ((16, 8, 32), ("s32", "s8", "u8", "s32")),
    ((16, 8, 16), ("s32", "u8", "s8", "s32")),
]


@pytest.mark.parametrize(("shape", "kinds"), MMA)
def test_mma_computes_the_matrix_product(shape, kinds):
    m, n, k = shape
    d_kind, a_kind, b_kind, c_kind = kinds
    (a, x), (b, y) = random_matrix(a_kind, m, k, 1), random_matrix(b_kind, k, n, 2)
    bits = matrix.ELEMENT_BITS[a_kind]
    if c_kind == "s32":
        z = np.random.default_rng(3).integers(-1000, 1000, (m, n)).astype(float)
        c = z.astype(np.int32).view(np.uint32)
    else:
        c, z = random_matrix(c_kind, m, n, 3)
    c_registers = np.zeros((4 if c.dtype.itemsize == 4 else 2, 32), np.uint32)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(4):
            value = int(c[group + 8 * (i >= 2), thread * 2 + (i & 1)])
            if len(c_registers) == 4:
                c_registers[i, lane] = value
            else:
                c_registers[i >> 1, lane] |= np.uint32(value << 16 * (i & 1))
    ra, rb = k * bits // 64, k * bits // 128
    got = matrix.mma(
        shape,
        kinds,
        fragment(a, a_position, a_kind, ra),
        fragment(b, b_position, b_kind, rb),
        c_registers,
    )
    expected = x @ y + z
    d_bits = matrix.ELEMENT_BITS[d_kind]
    d = matrix.to_matrix(got, matrix.c_fragment(n, d_bits), (m, n), d_bits)
    np.testing.assert_array_equal(matrix.values(d_kind, d), expected)
    first = matrix.values(d_kind, d)[0, 2]  # row 0, column 2: lane 1, first element
    raw = got[0, 1] if d_bits == 32 else np.uint16(got[0, 1] & 0xFFFF)
    assert matrix.values(d_kind, np.array([raw]))[0] == first


def test_mma_works_on_many_warps_at_once():
    rng = np.random.default_rng(4)
    a, b, c = (rng.integers(0, 1 << 32, (3, r, 32), dtype=np.uint64) for r in (4, 2, 4))
    a, b = (v.astype(np.uint32) & np.uint32(0xBFFFBFFF) for v in (a, b))
    c = (c.astype(np.uint32) & np.uint32(0x3FFFFFFF)) | np.uint32(0x30000000)
    kinds = ("f32", "bf16", "bf16", "f32")
    together = matrix.mma((16, 8, 16), kinds, a, b, c)
    for w in range(3):
        np.testing.assert_array_equal(together[w], matrix.mma((16, 8, 16), kinds, a[w], b[w], c[w]))


def test_mma_integer_saturation_and_unknown_shape():
    a, b = np.full((4, 32), 0x7F7F7F7F, np.uint32), np.full((2, 32), 0x7F7F7F7F, np.uint32)
    c = np.full((4, 32), 0x7FFFFFFF, np.uint32)
    kinds = ("s32", "s8", "s8", "s32")
    assert (matrix.mma((16, 8, 32), kinds, a, b, c, satfinite=True) == 0x7FFFFFFF).all()
    wrapped = (0x7FFFFFFF + 32 * 127 * 127) & 0xFFFFFFFF
    assert (matrix.mma((16, 8, 32), kinds, a, b, c) == wrapped).all()
    with pytest.raises(ValueError, match="expected m16n8"):
        matrix.mma((8, 8, 4), ("f16", "f16", "f16", "f16"), a, b, c)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix_stmatrix(count, trans):
    rng = np.random.default_rng(5)
    memory = rng.integers(0, 256, 4096, dtype=np.uint64).astype(np.uint8)
    addresses = rng.permutation(256)[:32] * 16
    rows = matrix.ldmatrix_rows(addresses, count)
    assert rows.shape == (count, 8)
    data = memory[rows[..., None] + np.arange(16)]
    got = matrix.ldmatrix(data, trans)
    for i in range(count):
        tile = np.stack([memory[addresses[8 * i + j] :][:16].view(np.uint16) for j in range(8)])
        for lane in range(32):
            r, c = lane // 4, 2 * (lane % 4)
            low, high = (tile[c, r], tile[c + 1, r]) if trans else (tile[r, c], tile[r, c + 1])
            assert got[i, lane] == int(low) | int(high) << 16
    np.testing.assert_array_equal(matrix.stmatrix(got, trans), data)
    if not trans:
        np.testing.assert_array_equal(matrix.movmatrix(got), matrix.ldmatrix(data, True))


def test_ldmatrix_x4_fills_the_a_operand():
    a, _ = random_matrix("bf16", 16, 16)
    lane = np.arange(32)
    data = a[lane % 16].reshape(32, 2, 8)[lane, lane // 16].reshape(4, 8, 8).view(np.uint8)
    got = matrix.ldmatrix(data.reshape(4, 8, 16))
    np.testing.assert_array_equal(got, fragment(a, a_position, "bf16", 4))


@pytest.mark.parametrize("span", [32, 64, 128])
def test_swizzle_is_the_documented_permutation(span):
    chunks = span // 16
    for row in range(16):
        for chunk in range(chunks):
            address = row * span + chunk * 16
            phase = {128: row & 7, 64: row >> 1 & 3, 32: row >> 2 & 1}[span]
            assert swizzle(address + 5, span) == row * span + (chunk ^ phase) * 16 + 5


def test_descriptor_round_trip_and_reserved_bits():
    descriptor = Descriptor.decode(0x4000004002000000 | 0x1234 >> 4)
    assert (descriptor.span, descriptor.sbo, descriptor.lbo) == (128, 1024, 8192)
    assert Descriptor(0x2400, 16, 512, 3, 64) == Descriptor.decode(
        Descriptor(0x2400, 16, 512, 3, 64).encode()
    )
    with pytest.raises(ValueError, match="reserved bits"):
        Descriptor.decode(1 << 14)
    with pytest.raises(ValueError, match="MN-major"):
        descriptor.addresses(64, 32, 1, True)


def place(memory, raw, base, span, mn_major):
    """Write an operand [MN][K] the way a kernel would; returns (descriptor, bytes per K step).

    One tile per `span` bytes of the contiguous dimension; each tile is rows of `span` bytes, one
    row per index of the other dimension, 16-byte chunks permuted by the row (see the test above).
    """
    data = np.ascontiguousarray(raw.T if mn_major else raw)
    width = span or 16
    line = data.view(np.uint8).reshape(len(data), -1)
    line = np.pad(line, ((0, 0), (0, -line.shape[1] % width)))
    tile_bytes = -(-len(data) * width // 1024) * 1024
    for tile in range(line.shape[1] // width):
        for row in range(len(data)):
            for chunk in range(width // 16):
                phase = {128: row & 7, 64: row >> 1 & 3, 32: row >> 2 & 1, 0: 0}[span]
                at = base + tile * tile_bytes + row * width + (chunk ^ phase) * 16
                start = tile * width + chunk * 16
                memory[at : at + 16] = line[row, start : start + 16]
    group = 8 * width  # eight rows
    if not mn_major:
        step = 32 if span >= 64 else (tile_bytes if span else 2 * tile_bytes)
        return Descriptor(base, tile_bytes if span == 0 else 16, group, 0, span), step
    k_step = 16 * width  # 16 k
    if span:
        return Descriptor(base, tile_bytes, group, 0, span), k_step
    return Descriptor(base, group, tile_bytes, 0, 0), k_step


OPERANDS = [
    ("bf16", 0, 0),
    ("bf16", 0, 1),
    ("f16", 1, 0),
    ("f16", 1, 1),
    ("tf32", 0, 0),
    ("e4m3", 0, 0),
    ("s8", 0, 0),
]


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("n", [8, 40, 64, 160, 256])
@pytest.mark.parametrize(("kind", "a_major", "b_major"), OPERANDS)
def test_wgmma_matches_the_matrix_product(kind, a_major, b_major, n, span):
    size = matrix.ELEMENT_BITS[kind] // 8
    k = 64 // size  # two K steps
    (a, x), (b, y) = random_matrix(kind, 64, k, 1), random_matrix(kind, n, k, 2)
    if kind == "tf32":
        a, b = a | np.uint32(0x1FFF), b | np.uint32(0x1000)  # the unit ignores the low 13 bits
    memory = np.zeros(1 << 17, np.uint8)
    da, step_a = place(memory, a, 1024, span, a_major)
    db, step_b = place(memory, b, 1 << 16, span, b_major)
    d_kind = "s32" if kind == "s8" else "f32"
    shape, d = wgmma.Shape(n, k // 2, d_kind, kind, kind), None
    for s in range(2):
        # A K-major step of 32 bytes stays inside the row of a 64- or 128-byte atom.
        ea, eb = da.encode() + (s * step_a >> 4), db.encode() + (s * step_b >> 4)
        d, reads = wgmma.execute(shape, memory, ea, eb, d, trans_a=a_major, trans_b=b_major)
        assert reads[1].shape == (n, k // 2)
    got = matrix.values(d_kind, wgmma.d_from_registers(d, shape))
    np.testing.assert_array_equal(got, x @ y.T)


def test_wgmma_registers_signs_and_f16_accumulator():
    (a, x), (b, y) = random_matrix("f16", 64, 16, 1), random_matrix("f16", 24, 16, 2)
    memory = np.zeros(1 << 14, np.uint8)
    db, _ = place(memory, b, 1024, 32, 0)
    shape = wgmma.Shape(24, 16, "f16", "f16", "f16")
    registers = np.stack([fragment(a[16 * w :][:16], a_position, "f16", 4) for w in range(4)], 1)
    np.testing.assert_array_equal(wgmma.a_from_registers(registers.reshape(4, 128), "f16"), a)
    d, reads = wgmma.execute(shape, memory, registers.reshape(4, 128), db.encode())
    assert reads[0] is None and d.shape == (6, 128)
    d, _ = wgmma.execute(shape, memory, registers.reshape(4, 128), db.encode(), d, scale_a=-1)
    got = formats.decode("f16", wgmma.d_from_registers(d, shape))
    np.testing.assert_array_equal(got, np.zeros((64, 24)))
    d, _ = wgmma.execute(shape, memory, registers.reshape(4, 128), db.encode(), scale_b=-1)
    thread = 2 * 32 + 5  # warp 2, lane 5: rows 33 and 41, columns 2, 3 of each eight
    halves = formats.decode("f16", np.array([d[2, thread] & 0xFFFF, d[3, thread] >> 16], np.uint16))
    product = -(x @ y.T)
    np.testing.assert_array_equal(halves, [product[33, 10], product[41, 11]])


def test_wgmma_shape_errors_name_the_rule():
    with pytest.raises(ValueError, match="multiple of 8"):
        wgmma.Shape(12, 16, "f32", "bf16", "bf16")
    with pytest.raises(ValueError, match="K must be 32 for e4m3"):
        wgmma.Shape(64, 16, "f32", "e4m3", "e4m3")
