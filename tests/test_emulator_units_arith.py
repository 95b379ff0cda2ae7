"""Floating-point arithmetic of the emulator against exact rational arithmetic, rounded once."""

import math
from fractions import Fraction

import numpy as np
import pytest
from exact_rounding import random_bits, round_to

from mirage_hello.ptx.emulator import approx, arith, exact64, formats

MODES = ["rn", "rz", "rm", "rp"]
KINDS = ["f16", "bf16", "f32", "f64"]


def operands(kind, count, n, seed):
    """`count` register arrays; sums nearly cancel and products meet midpoints often."""
    rng = np.random.default_rng([seed, len(kind), count])
    source = "f32" if kind == "bf16" else kind
    arrays = [random_bits(rng, formats.register_dtype(source), n) for _ in range(count)]
    if kind == "bf16":
        arrays = [(a >> np.uint32(16)).astype(np.uint16) for a in arrays]
    return arrays


def check(kind, bits, exact, mode, zero_sign=None):
    """`bits` must hold the Fraction `exact` rounded once."""
    expected = round_to(kind, exact, mode)
    value = float(formats.decode(kind, np.array([bits]))[0])
    assert value == expected, (kind, mode, exact, value, expected)
    if expected != 0:
        return
    if exact != 0:
        assert np.signbit(value) == (exact < 0)
    elif zero_sign is not None:
        assert np.signbit(value) == zero_sign


def finite(*values):
    return all(math.isfinite(v) for v in values)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_add_mul_round_once(kind, mode):
    a, b = operands(kind, 2, 800, 1)
    x, y = formats.decode(kind, a), formats.decode(kind, b)
    total, product = arith.add(kind, a, b, mode), arith.mul(kind, a, b, mode)
    difference = arith.sub(kind, a, b, mode)
    for i in range(a.size):
        p, q = float(x[i]), float(y[i])
        if not finite(p, q):
            continue
        opposite = math.copysign(1, p) != math.copysign(1, q)
        minus = mode == "rm" if opposite else p < 0 or math.copysign(1, p) < 0
        check(kind, total[i], Fraction(p) + Fraction(q), mode, minus)
        check(kind, difference[i], Fraction(p) - Fraction(q), mode)
        check(kind, product[i], Fraction(p) * Fraction(q), mode, opposite)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_fma_rounds_once(kind, mode):
    a, b, c = operands(kind, 3, 1500, 2)
    # A third of the addends nearly cancel the product, where two roundings differ most.
    near = arith.mul(kind, a, b)
    flipped = near ^ near.dtype.type(1 << (8 * near.dtype.itemsize - 1))
    c = np.where(np.arange(c.size) % 3 == 0, flipped, c)
    x, y, z = (formats.decode(kind, o) for o in (a, b, c))
    got = arith.fma(kind, a, b, c, mode)
    for i in range(a.size):
        p, q, r = float(x[i]), float(y[i]), float(z[i])
        if finite(p, q, r):
            check(kind, got[i], Fraction(p) * Fraction(q) + Fraction(r), mode)


def test_fma_f32_double_rounding_case():
    """2**-24 + 2**-80 above 1 lies just above a midpoint; float64 drops the 2**-80."""
    one, tiny = 0x3F800000, 0x2B800000  # 1.0 and 2**-40
    a = np.array([tiny], np.uint32)
    c = np.array([0x33800000], np.uint32)  # 2**-24
    midpoint = arith.fma("f32", np.array([one], np.uint32), np.array([one], np.uint32), c)
    assert midpoint[0] == one  # a tie goes to even
    # (1 + 2**-12)**2 = 1 + 2**-11 + 2**-24, a tie broken upward only by the addend 2**-80.
    x = np.array([0x3F800800], np.uint32)
    addend = arith.mul("f32", a, a)
    assert formats.decode("f32", addend)[0] == 2.0**-80
    exact = Fraction(float(formats.decode("f32", x)[0])) ** 2 + Fraction(2) ** -80
    check("f32", arith.fma("f32", x, x, addend)[0], exact, "rn")
    assert arith.fma("f32", x, x, addend)[0] != arith.fma("f32", x, x, addend * 0)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_div_sqrt_rcp_round_once(kind, mode):
    a, b = operands(kind, 2, 600, 3)
    x, y = formats.decode(kind, a), formats.decode(kind, b)
    quotient, inverse = arith.div(kind, a, b, mode), arith.rcp(kind, b, mode)
    root = arith.sqrt(kind, a, mode)
    for i in range(a.size):
        p, q = float(x[i]), float(y[i])
        if finite(p, q) and q != 0:
            check(kind, quotient[i], Fraction(p) / Fraction(q), mode)
            check(kind, inverse[i], 1 / Fraction(q), mode)
        if finite(p) and p > 0:
            check_root(kind, root[i], Fraction(p), mode)


def check_root(kind, bits, exact, mode):
    """The neighbours of the root in the format bracket it, by squaring."""
    got = Fraction(float(formats.decode(kind, np.array([bits]))[0]))
    code = np.array([bits], formats.register_dtype(kind))
    one = code.dtype.type(1)
    below, above = (Fraction(float(formats.decode(kind, c)[0])) for c in (code - one, code + one))
    if mode in ("rz", "rm"):
        assert got**2 <= exact < above**2
    elif mode == "rp":
        assert below**2 < exact <= got**2
    else:
        assert ((below + got) / 2) ** 2 <= exact <= ((got + above) / 2) ** 2


def test_special_values_of_division_and_roots():
    inf, nan, one = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF), np.uint32(0x3F800000)
    a = np.array([0, one, 0x80000000, inf, inf, one, 0xBF800000], np.uint32)
    b = np.array([0, 0, one, inf, one, inf, 0x80000000], np.uint32)
    np.testing.assert_array_equal(arith.div("f32", a, b), [nan, inf, 1 << 31, nan, inf, 0, inf])
    roots = arith.sqrt("f32", np.array([0x80000000, 0xBF800000, inf, nan], np.uint32))
    np.testing.assert_array_equal(roots, [0x80000000, nan, inf, nan])


def test_packed_arithmetic_is_elementwise():
    rng = np.random.default_rng(7)
    for kind in ("f16", "bf16"):
        a, b, c = (
            rng.integers(0, 1 << 32, 500, dtype=np.uint64).astype(np.uint32) for _ in range(3)
        )
        split = [formats.split2(v, kind) for v in (a, b, c)]
        got = formats.split2(arith.fma(f"{kind}x2", a, b, c), kind)
        for half in (0, 1):
            np.testing.assert_array_equal(got[half], arith.fma(kind, *(s[half] for s in split)))
        lows = formats.split2(arith.maximum(f"{kind}x2", a, b), kind)[0]
        np.testing.assert_array_equal(lows, arith.maximum(kind, split[0][0], split[1][0]))
        for unary in (arith.neg, arith.absolute):
            low, high = formats.split2(unary(f"{kind}x2", a), kind)
            np.testing.assert_array_equal(low, unary(kind, split[0][0]))
            np.testing.assert_array_equal(high, unary(kind, split[0][1]))


def test_neg_and_abs_touch_only_the_sign_of_numbers():
    a = np.array([0x3F800000, 0x80000000, 0xFF800000, 0xFFC00001, 0x00000001], np.uint32)
    want = [0xBF800000, 0, 0x7F800000, 0x7FFFFFFF, 0x80000001]
    np.testing.assert_array_equal(arith.neg("f32", a), want)
    want = [0x3F800000, 0, 0x7F800000, 0x7FFFFFFF, 1]
    np.testing.assert_array_equal(arith.absolute("f32", a), want)
    nan = np.array([0xFFF0000000000001], np.uint64)
    assert arith.neg("f64", nan)[0] == arith.absolute("f64", nan)[0] == 0xFFF8000000000001


def test_min_max_nan_and_signed_zero():
    nan, one, minus = 0x7FC00001, 0x3F800000, 0xBF800000
    a = np.array([0, 0x80000000, nan, one, nan, minus], np.uint32)
    b = np.array([0x80000000, 0, one, nan, nan, one], np.uint32)
    low = arith.minimum("f32", a, b)
    high = arith.maximum("f32", a, b)
    np.testing.assert_array_equal(low, [1 << 31, 1 << 31, one, one, 0x7FFFFFFF, minus])
    np.testing.assert_array_equal(high, [0, 0, one, one, 0x7FFFFFFF, one])
    strict = arith.maximum("f32", a, b, nan=True)
    np.testing.assert_array_equal(strict[2:5], [0x7FFFFFFF] * 3)
    folded = arith.minimum("f32", a[5:], b[5:], xorsign=True)
    assert folded[0] == minus


def test_compare_ordered_and_unordered():
    a = np.array([0x3F800000, 0x7FC00000, 0x80000000], np.uint32)
    b = np.array([0x40000000, 0x3F800000, 0x00000000], np.uint32)
    expected = {
        "lt": [1, 0, 0],
        "ltu": [1, 1, 0],
        "eq": [0, 0, 1],
        "ne": [1, 0, 0],
        "neu": [1, 1, 0],
        "geu": [0, 1, 1],
        "num": [1, 0, 1],
        "nan": [0, 1, 0],
    }
    for operator, want in expected.items():
        np.testing.assert_array_equal(arith.compare(operator, "f32", a, b), np.array(want, bool))
    with pytest.raises(ValueError, match="unknown comparison"):
        arith.compare("almost", "f32", a, b)


def test_ftz_flushes_operands_and_results():
    tiny, half = np.array([0x00400000], np.uint32), np.array([0x3F000000], np.uint32)
    smallest = np.array([0x00800000], np.uint32)
    assert arith.add("f32", tiny, tiny)[0] == 0x00800000
    assert arith.add("f32", tiny, tiny, ftz=True)[0] == 0
    assert arith.mul("f32", smallest, half)[0] == 0x00400000
    assert arith.mul("f32", smallest, half, ftz=True)[0] == 0
    assert arith.fma("f32", smallest, half, smallest * 0, ftz=True, sat=True)[0] == 0


def test_f64_fma_matches_rational_arithmetic_at_the_edges():
    edges = [5e-324, 2.0**-1022, 1.0, 1 + 2.0**-52, 2.0**1023, 1.7e308, 3e-200, 1e200]
    rng = np.random.default_rng(8)
    x, y, z = (rng.choice(edges, 300) * rng.choice([-1, 1], 300) for _ in range(3))
    for mode in MODES:
        got = exact64.fma(x, y, z, mode)
        for p, q, r, g in zip(x, y, z, got, strict=True):
            exact = Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r))
            assert g == round_to("f64", exact, mode)


def test_approximations_have_the_documented_special_values():
    inf, nan, zero, minus0 = 0x7F800000, 0x7FFFFFFF, 0, 0x80000000
    one, minus_one, minus_inf, subnormal = 0x3F800000, 0xBF800000, 0xFF800000, 0x00400000
    table = {
        "ex2": [(minus_inf, zero), (inf, inf), (nan, nan), (zero, one), (minus0, one)],
        "lg2": [(zero, minus_inf), (minus0, minus_inf), (inf, inf), (minus_one, nan), (one, zero)],
        "rcp": [(zero, inf), (minus0, minus_inf), (inf, zero), (minus_inf, minus0), (one, one)],
        "rsqrt": [(zero, inf), (minus0, minus_inf), (inf, zero), (minus_one, nan), (one, one)],
        "sqrt": [(zero, zero), (minus0, minus0), (inf, inf), (minus_one, nan)],
        "tanh": [(minus_inf, minus_one), (inf, one), (minus0, minus0), (nan, nan)],
        "sin": [(zero, zero), (minus0, minus0), (inf, nan)],
        "cos": [(zero, one), (minus0, one), (minus_inf, nan)],
    }
    for name, pairs in table.items():
        a, want = (np.array(column, np.uint32) for column in zip(*pairs, strict=True))
        np.testing.assert_array_equal(approx.unary(name, "f32", a), want, err_msg=name)
    flushed = approx.unary("rcp", "f32", np.array([subnormal], np.uint32), ftz=True)
    assert flushed[0] == inf
    huge = np.array([0x7F000001], np.uint32)
    assert approx.div("approx", np.array([one], np.uint32), huge)[0] == 0
    assert approx.div("full", np.array([one], np.uint32), huge)[0] != 0
