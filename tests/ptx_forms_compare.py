"""Comparison, predicate and selection instruction forms."""

from functools import partial

from ptx_forms import scalar

ORDERED = ("eq", "ne", "lt", "le", "gt", "ge")
FLOATING = (*ORDERED, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
COMBINED = [
    (f"{op}.{join}", kind)
    for kind in ("u32", "s32", "u64", "f32")
    for op in (FLOATING[:12] if kind == "f32" else ORDERED)
    for join in ("and", "or", "xor")
    if (op, kind) != ("lt", "s32")  # in predicates(), with both destinations
]


def comparisons():
    form = partial(scalar, results=["pred"], group="comparisons")
    for op in FLOATING:
        yield form(f"setp.{op}.f32", sources=["f32"] * 2)
    for op in ("lt", "geu", "eq"):
        yield form(f"setp.{op}.ftz.f32", sources=["f32"] * 2)
        yield form(f"setp.{op}.f64", sources=["f64"] * 2)
        yield form(f"setp.{op}.f16", sources=["f16"] * 2)
        yield form(f"setp.{op}.bf16", sources=["bf16"] * 2, target="sm_90")
        for kind in ("f16x2", "bf16x2"):
            name = f"setp.{op}.{kind}"
            text = f"{name} %d0|%d1, %a0, %a1;"
            options = {"group": "comparisons", "target": "sm_90"}
            yield scalar(name, ["pred", "pred"], [kind] * 2, text, **options)
    for kind in ("s16", "u16", "s32", "u32", "s64", "u64", "b32"):
        for op in ("eq", "ne") if kind[0] == "b" else ORDERED:
            yield form(f"setp.{op}.{kind}", sources=[kind] * 2)
    for op in ("lo", "ls", "hi", "hs"):
        yield form(f"setp.{op}.u32", sources=["u32"] * 2)


def predicates():
    group = "comparisons"
    for join in ("and", "or", "xor"):
        text = f"""cvt.u32.u16 %t6, %a2;
                   setp.ne.u32 %p0, %t6, 0;
                   setp.lt.{join}.s32 %d0|%d1, %a0, %a1, %p0;"""
        sources = ["s32", "s32", "u16"]
        yield scalar(f"setp.lt.{join}.s32", ["pred"] * 2, sources, text, group=group)
    for op, kind in COMBINED:
        name = f"setp.{op}.{kind}"
        text = f"setp.gt.u32 %p0, %a2, 999; {name} %d0, %a0, %a1, %p0;"
        yield scalar(name, ["pred"], [kind, kind, "u32"], text, group=group)
    text = "setp.gt.u32 %p0, %a0, 77; setp.lt.and.u32 %d0, %a0, %a1, !%p0;"
    yield scalar("setp.lt.and.u32 negated", ["pred"], ["u32"] * 2, text, group=group)
    for op in ("and", "or", "xor"):
        text = f"""setp.gt.u32 %p0, %a0, 77;
                   setp.lt.u32 %p1, %a0, %a1;
                   {op}.pred %d0, %p0, %p1;"""
        yield scalar(f"{op}.pred", ["pred"], ["u32"] * 2, text, group=group)
    text = "setp.gt.u32 %p0, %a0, 77; not.pred %d0, %p0;"
    yield scalar("not.pred", ["pred"], ["u32"], text, group=group)


def selections():
    form = partial(scalar, group="comparisons")
    for kind in ("u32", "f32"):
        yield form(f"set.lt.{kind}.f32", [kind], ["f32"] * 2)
    yield form("set.ge.u32.s32", ["u32"], ["s32"] * 2)
    for kind in ("b16", "b32", "b64", "f32", "f64", "u32"):
        text = f"setp.gt.u32 %p0, %a2, 999; selp.{kind} %d0, %a0, %a1, %p0;"
        yield form(f"selp.{kind}", [kind], [kind, kind, "u32"], text)
    yield form("slct.u32.s32", ["u32"], ["u32", "u32", "s32"])
    yield form("slct.f32.f32", ["f32"], ["f32"] * 3)
    for test in ("finite", "infinite", "number", "notanumber", "normal", "subnormal"):
        yield form(f"testp.{test}.f32", ["pred"], ["f32"])


def forms():
    """Every form that yields or uses a predicate."""
    yield from comparisons()
    yield from predicates()
    yield from selections()
