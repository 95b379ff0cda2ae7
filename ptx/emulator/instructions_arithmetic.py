"""Table: integer and floating-point arithmetic, one mnemonic for both as in PTX.

The arithmetic itself is in integer.py, arith.py and approx.py; here a mnemonic chooses the function
by the instruction's type and modifiers.
"""

import numpy as np

from mirage_hello.ptx.emulator import approx, arith, integer
from mirage_hello.ptx.emulator.formats import FORMATS
from mirage_hello.ptx.emulator.table import instruction


def is_float(kind):
    return kind in FORMATS or (kind.endswith("x2") and kind[:-2] in FORMATS)


def elementwise(op, function, kinds, result, first=1, widen=False):
    """run: destination 0 = function(*sources), sources from operand `first` with their `kinds`."""
    sources = [op.src(first + i, kind) for i, kind in enumerate(kinds)]
    put = op.dst(0, result, widen)
    if len(sources) == 1:
        (a,) = sources
        return lambda lanes: put(lanes, function(a(lanes)))
    if len(sources) == 2:
        a, b = sources
        return lambda lanes: put(lanes, function(a(lanes), b(lanes)))
    if len(sources) == 3:
        a, b, c = sources
        return lambda lanes: put(lanes, function(a(lanes), b(lanes), c(lanes)))
    return lambda lanes: put(lanes, function(*(s(lanes) for s in sources)))


def _float_binary(op, function):
    kind, rounding = op.kind, op.rounding()
    ftz, sat = op.has("ftz"), op.has("sat")

    def run(a, b):
        return function(kind, a, b, rounding=rounding, ftz=ftz, sat=sat)

    return elementwise(op, run, (kind, kind), kind)


def _integer_binary(op, function):
    kind = op.kind
    return elementwise(op, lambda a, b: function(kind, a, b), (kind, kind), kind)


def _carrying(op, subtract, use_carry):
    """add.cc, addc, sub.cc, subc: the carry flag is one bit per thread."""
    kind, sets = op.kind, op.has("cc")
    a, b, put = op.src(1, kind), op.src(2, kind), op.dst(0, kind)

    def run(lanes):
        carry = lanes.m.carry
        x, y = lanes.full(a(lanes)), lanes.full(b(lanes))
        extra = carry[lanes.sel].astype(x.dtype) if use_carry else x.dtype.type(0)
        if subtract:
            value = x - y - extra
            out = (x < y) | ((x == y) & (extra > 0))
        else:
            value = x + y + extra
            out = (value < x) | ((value == x) & (extra > 0) & (y > 0))
        put(lanes, value)
        if sets:
            carry[lanes.sel] = out

    return run


@instruction("add")
def add(op):
    if is_float(op.kind):
        return _float_binary(op, arith.add)
    if op.has("cc"):
        return _carrying(op, False, False)
    return _integer_binary(op, integer.add_sat if op.has("sat") else integer.add)


@instruction("sub")
def sub(op):
    if is_float(op.kind):
        return _float_binary(op, arith.sub)
    if op.has("cc"):
        return _carrying(op, True, False)
    return _integer_binary(op, integer.sub_sat if op.has("sat") else integer.sub)


@instruction("addc")
def addc(op):
    return _carrying(op, False, True)


@instruction("subc")
def subc(op):
    return _carrying(op, True, True)


def _wide(kind):
    return f"{kind[0]}{2 * int(kind[1:])}"


@instruction("mul")
def mul(op):
    if is_float(op.kind):
        return _float_binary(op, arith.mul)
    kind = op.kind
    if op.has("wide"):
        wide = _wide(kind)
        return elementwise(op, lambda a, b: integer.mul_wide(kind, a, b), (kind, kind), wide)
    return _integer_binary(op, integer.mul_hi if op.has("hi") else integer.mul_lo)


@instruction("mad")
def mad(op):
    if is_float(op.kind):
        return fma(op)
    kind = op.kind
    if op.has("cc"):
        op.unsupported("with .cc is not supported; extend instructions_arithmetic.py")
    if op.has("wide"):
        wide = _wide(kind)
        kinds = (kind, kind, wide)
        return elementwise(op, lambda a, b, c: integer.mad_wide(kind, a, b, c), kinds, wide)
    function, sat = (integer.mad_hi, op.has("sat")) if op.has("hi") else (integer.mad_lo, False)
    if sat:
        return elementwise(op, lambda a, b, c: function(kind, a, b, c, sat=True), (kind,) * 3, kind)
    return elementwise(op, lambda a, b, c: function(kind, a, b, c), (kind,) * 3, kind)


@instruction("fma")
def fma(op):
    kind, rounding = op.kind, op.rounding()
    ftz, sat, relu = op.has("ftz"), op.has("sat"), op.has("relu")
    if not is_float(kind):
        op.fail("needs a floating-point type")

    def run(a, b, c):
        return arith.fma(kind, a, b, c, rounding=rounding, ftz=ftz, sat=sat, relu=relu)

    return elementwise(op, run, (kind,) * 3, kind)


@instruction("mul24")
def mul24(op):
    if op.has("hi"):
        op.unsupported("is not supported; extend instructions_arithmetic.py")
    return _integer_binary(op, integer.mul24_lo)


@instruction("div")
def div(op):
    kind, ftz = op.kind, op.has("ftz")
    if not is_float(kind):
        return _integer_binary(op, integer.div)
    mode = next((m for m in op.mods if m in ("approx", "full")), None)
    if mode:
        return elementwise(op, lambda a, b: approx.div(mode, a, b, ftz), (kind, kind), kind)
    rounding = op.rounding()
    return elementwise(
        op, lambda a, b: arith.div(kind, a, b, rounding=rounding, ftz=ftz), (kind, kind), kind
    )


@instruction("rem")
def rem(op):
    return _integer_binary(op, integer.rem)


def _extreme(op, of_integers, of_floats):
    kind = op.kind
    if len(op.operands) > 3:
        op.fail("with three sources needs sm_100")
    if op.has("relu"):
        if kind != "s32":
            op.fail("with .relu takes s32")
        return _integer_binary(op, lambda k, a, b: integer.maximum(k, of_integers(k, a, b), 0 * a))
    if not is_float(kind):
        return _integer_binary(op, of_integers)
    ftz, nan, xorsign = op.has("ftz"), op.has("NaN"), op.has("xorsign")

    def run(a, b):
        return of_floats(kind, a, b, ftz=ftz, nan=nan, xorsign=xorsign)

    return elementwise(op, run, (kind, kind), kind)


@instruction("min")
def minimum(op):
    return _extreme(op, integer.minimum, arith.minimum)


@instruction("max")
def maximum(op):
    return _extreme(op, integer.maximum, arith.maximum)


@instruction("abs")
def absolute(op):
    kind, ftz = op.kind, op.has("ftz")
    if is_float(kind):
        return elementwise(op, lambda a: arith.absolute(kind, a, ftz=ftz), (kind,), kind)
    return elementwise(op, lambda a: integer.absolute(kind, a), (kind,), kind)


@instruction("neg")
def neg(op):
    kind, ftz = op.kind, op.has("ftz")
    if is_float(kind):
        return elementwise(op, lambda a: arith.neg(kind, a, ftz=ftz), (kind,), kind)
    return elementwise(op, lambda a: integer.neg(kind, a), (kind,), kind)


@instruction("rcp", "sqrt")
def exact_or_approximate(op):
    kind, ftz, name = op.kind, op.has("ftz"), op.base
    if op.has("approx"):
        return _approximate(op)
    function, rounding = getattr(arith, name), op.rounding()
    return elementwise(op, lambda a: function(kind, a, rounding=rounding, ftz=ftz), (kind,), kind)


@instruction("ex2", "lg2", "rsqrt", "tanh", "sin", "cos")
def _approximate(op):
    name, kind, ftz = op.base, op.kind, op.has("ftz")
    if not op.has("approx"):
        op.fail("exists only as .approx")
    return elementwise(op, lambda a: approx.unary(name, kind, a, ftz), (kind,), kind)


@instruction("copysign")
def copysign(op):
    kind = op.kind
    bits = FORMATS[kind].bits

    def run(a, b):
        sign = b.dtype.type(1 << (bits - 1))
        return (a & sign) | (b & ~sign)

    return elementwise(op, run, (kind, kind), kind)


@instruction("testp")
def testp(op):
    kind, fmt = op.kind, FORMATS[op.kind]
    test = next((m for m in op.mods if m != kind), "")

    def run(a):
        magnitude = a & a.dtype.type((1 << (fmt.bits - 1)) - 1)
        top, least = a.dtype.type(fmt.infinity), a.dtype.type(1 << fmt.mantissa)
        answers = {
            "finite": magnitude < top,
            "infinite": magnitude == top,
            "number": magnitude <= top,
            "notanumber": magnitude > top,
            "normal": (magnitude == 0) | ((magnitude >= least) & (magnitude < top)),
            "subnormal": (magnitude < least) & (magnitude > 0),
        }
        if test not in answers:
            op.fail(f"knows the tests {', '.join(answers)}")
        return np.asarray(answers[test])

    return elementwise(op, run, (kind,), "pred")
