"""Instruction forms of cvt: every pair of types and every rounding that the project uses."""

from functools import partial

import numpy as np
from ptx_forms import scalar

INTEGERS = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
ROUNDINGS = ("rn", "rz", "rm", "rp")


def as_result(kind):
    """8-bit results are stored as the 32-bit register they live in."""
    return {"s8": "b32", "u8": "b32"}.get(kind, kind)


def near_integers(arrays, rng):
    """Half of the f32 operands are near integers and their halves, up to 2**69."""
    a = arrays[0]
    exact = rng.integers(-600, 600, len(a)) / 2
    big = rng.integers(-8, 8, len(a)) * 2.0 ** rng.integers(0, 66, len(a)).astype(float)
    values = np.where(rng.random(len(a)) < 0.5, exact, big).astype(np.float32)
    near = values.view(np.uint32) + rng.integers(0, 2, len(a)).astype(np.uint32)
    return [np.where(np.arange(len(a)) % 2 == 0, near, a)]


def small_exponents(low, high, count=1):
    """f32 operands that fall inside and around the range of a narrow format."""

    def adjust(arrays, rng):
        out = []
        for a in arrays[:count]:
            field = rng.integers(127 + low, 127 + high, len(a)).astype(np.uint32) << np.uint32(23)
            keep = rng.integers(0, 20, len(a)).astype(np.uint32)
            fraction = (a & np.uint32(0x7FFFFF)) >> keep << keep
            spread = (a & np.uint32(0x80000000)) | field | fraction
            out.append(np.where(np.arange(len(a)) % 8 == 0, a, spread))
        return out + list(arrays[count:])

    return adjust


def to_half():
    form = partial(scalar, group="cvt_float")
    narrow, pair = small_exponents(-28, 18), small_exponents(-28, 18, 2)
    for mode in ("rn", "rz"):
        for suffix in ("", ".relu"):
            cvt = f"cvt.{mode}{suffix}"
            yield form(f"{cvt}.f16.f32", ["f16"], ["f32"], adjust=narrow)
            yield form(f"{cvt}.bf16.f32", ["bf16"], ["f32"])
            yield form(f"{cvt}.bf16x2.f32", ["bf16x2"], ["f32"] * 2)
            yield form(f"{cvt}.f16x2.f32", ["f16x2"], ["f32"] * 2, adjust=pair)
    for suffix in ("rm", "rp", "rn.ftz", "rn.sat", "rn.ftz.sat"):
        yield form(f"cvt.{suffix}.f16.f32", ["f16"], ["f32"], adjust=narrow)
    yield form("cvt.rna.tf32.f32", ["tf32"], ["f32"])
    for suffix in ("rn", "rz", "rn.relu", "rz.relu"):
        yield form(f"cvt.{suffix}.tf32.f32", ["tf32"], ["f32"], target="sm_90")


def between_floats():
    form = partial(scalar, group="cvt_float")
    for mode in ROUNDINGS:
        yield form(f"cvt.{mode}.f32.f64", ["f32"], ["f64"])
        yield form(f"cvt.{mode}.f16.f64", ["f16"], ["f64"])
    for suffix in ("rn.ftz", "rn.sat"):
        yield form(f"cvt.{suffix}.f32.f64", ["f32"], ["f64"])
    for suffix in ("", ".ftz"):
        yield form(f"cvt{suffix}.f64.f32", ["f64"], ["f32"])
        yield form(f"cvt{suffix}.f32.f16", ["f32"], ["f16"])
    yield form("cvt.f64.f16", ["f64"], ["f16"])
    yield form("cvt.f32.bf16", ["f32"], ["bf16"], target="sm_90")
    yield form("cvt.sat.f32.f32", ["f32"], ["f32"])
    yield form("cvt.ftz.sat.f32.f32", ["f32"], ["f32"])
    for mode in ("rni", "rzi", "rmi", "rpi", "rni.ftz"):
        yield form(f"cvt.{mode}.f32.f32", ["f32"], ["f32"], adjust=near_integers)
    yield form("cvt.rni.f16.f16", ["f16"], ["f16"])
    yield form("cvt.rzi.f64.f64", ["f64"], ["f64"])


def fp8():
    form = partial(scalar, group="cvt_fp8", target="sm_90", version="8.1", n=1024)
    for kind, low, high in (("e4m3x2", -12, 11), ("e5m2x2", -19, 18)):
        adjust = small_exponents(low, high, 2)
        for relu in ("", ".relu"):
            narrow = f"cvt.rn.satfinite{relu}.{kind}"
            yield form(f"{narrow}.f32", [kind], ["f32"] * 2, adjust=adjust)
            yield form(f"{narrow}.f16x2", [kind], ["f16x2"])
            yield form(f"cvt.rn{relu}.f16x2.{kind}", ["f16x2"], [kind])


def to_integer():
    form = partial(scalar, group="cvt_integer")
    for dst in INTEGERS:
        out = [as_result(dst)]
        for mode in ("rni", "rzi", "rmi", "rpi"):
            yield form(f"cvt.{mode}.{dst}.f32", out, ["f32"], adjust=near_integers)
        yield form(f"cvt.rzi.ftz.{dst}.f32", out, ["f32"], adjust=near_integers)
        yield form(f"cvt.rzi.{dst}.f64", out, ["f64"])
        yield form(f"cvt.rni.{dst}.f16", out, ["f16"])
    for dst in ("s32", "u32", "s64"):
        yield form(f"cvt.rzi.{dst}.bf16", [dst], ["bf16"], target="sm_90")
        yield form(f"cvt.rpi.sat.{dst}.f32", [dst], ["f32"], adjust=near_integers)


def from_integer():
    form = partial(scalar, group="cvt_from_integer")
    for src in INTEGERS:
        for mode in ROUNDINGS:
            yield form(f"cvt.{mode}.f32.{src}", ["f32"], [src])
        yield form(f"cvt.rn.f64.{src}", ["f64"], [src])
        yield form(f"cvt.rn.f16.{src}", ["f16"], [src])
        if src[1:] != "8":
            yield form(f"cvt.rn.bf16.{src}", ["bf16"], [src], target="sm_90")
    for mode in ("rz", "rm", "rp"):
        for src in ("s64", "u64"):
            yield form(f"cvt.{mode}.f64.{src}", ["f64"], [src])
    yield form("cvt.rn.sat.f32.s32", ["f32"], ["s32"])


def holds(dst, src):
    """Whether every value of `src` fits `dst`; ptxas refuses .sat there."""
    wide, narrow = int(dst[1:]), int(src[1:])
    if dst[0] == src[0]:
        return wide >= narrow
    return dst[0] == "s" and wide > narrow


def between_integers():
    form = partial(scalar, group="cvt_between_integers", n=256)
    for dst in INTEGERS:
        for src in INTEGERS:
            if dst != src:
                yield form(f"cvt.{dst}.{src}", [as_result(dst)], [src])
            if not holds(dst, src):
                yield form(f"cvt.sat.{dst}.{src}", [as_result(dst)], [src])
    for dst in ("s8", "u8"):
        yield form(f"cvt.pack.sat.{dst}.s32.b32", ["b32"], ["s32", "s32", "b32"])
    for dst in ("s16", "u16"):
        yield form(f"cvt.pack.sat.{dst}.s32", ["b32"], ["s32", "s32"])


def forms():
    """Every form of cvt."""
    yield from to_half()
    yield from between_floats()
    yield from fp8()
    yield from to_integer()
    yield from from_integer()
    yield from between_integers()
