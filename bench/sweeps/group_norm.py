"""Plan sweep of group_norm_silu on a GPU: parity first, then time beside eager and a copy.

    python bench/sweeps/group_norm.py [CASE-SUBSTRING]      writes $OUT/sweep-group-norm.json

A case is a shape of a Stable Diffusion U-Net or autoencoder and a layout. Of the plans that fit
(group_norm_plan.plans) the cheapest by the model are tried, at most two of a kind; the one that
`plan` would take is marked, so that the model's constants can be corrected. Each case runs in a
process of its own.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from mirage_hello.bench import harness
from mirage_hello.bench.sweeps import runner
from mirage_hello.kernels import group_norm as page
from mirage_hello.kernels import ops, parity
from mirage_hello.kernels.group_norm_plan import Plan, Shape, plan, plans
from mirage_hello.ptx import loader

LIMIT_S = 120
# How many plans of each kind: (passes, staging) -> count.
MOST = {(1, "registers"): 7, (1, "shared"): 9, (2, "registers"): 3}
# Of a slab in shared memory: vectors a turn of the loops, and parts of it that are waited for.
TURNS: list[dict] = [
    {"TURN": t, "PARTS": p} for t, p in ((4, 1), (4, 3), (2, 2), (2, 3), (2, 4), (1, 4), (2, 6))
]
# When the next kernel may start: as this one begins to read, with its statistics, or at its end.
TRIGGERS: list[dict] = [{"TRIGGER": t} for t in ("early", "late", "none")]
# Plans that the model would not try.
EXTRA = {
    "960 @64 nhwc": [
        Plan(1, 4, 2, 2, 15, 32, 16, 8, staging="shared"),
        Plan(1, 4, 2, 2, 15, 64, 8, 8, staging="shared"),
        Plan(1, 4, 2, 2, 15, 32, 24, 6, staging="shared"),
        Plan(1, 8, 2, 4, 15, 32, 16, 8, staging="shared"),
        Plan(1, 8, 2, 4, 15, 64, 8, 8, staging="shared"),
        Plan(1, 8, 2, 4, 15, 64, 8, 8),
    ]
}
TWO_PASS_HINTS = ({"STORE": ".cs"}, {"LOAD": ".cs", "STORE": ".cs"})
GROUPS = 32
SHAPES = {
    "320 @64": (1, 320, 64),
    "960 @64": (1, 960, 64),
    "640 @32": (1, 640, 32),
    "1920 @32": (1, 1920, 32),
    "1280 @16": (1, 1280, 16),
    "2560 @16": (1, 2560, 16),
    "1280 @8": (1, 1280, 8),
    "128 @512": (1, 128, 512),
    "512 @128": (1, 512, 128),
    "n8 320 @64": (8, 320, 64),
}
CASES = [f"{shape} {layout}" for layout in ("nhwc", "nchw") for shape in SHAPES]


def label(p: Plan) -> str:
    sizes = f"{p.columns}x{p.lanes} threads, {p.vecs} x {p.elements} elements"
    if p.passes == 2:
        blocks = f"{p.slices} slices, {p.apply_blocks} blocks"
        return f"two passes, {blocks}, {sizes}, {p.slab_groups} groups"
    return f"cluster {p.cluster}, {p.slab_groups} groups, {sizes}, {p.staging}"


def candidates(shape: Shape) -> list[Plan]:
    """The cheapest by the model, at most two of one cluster, slab and staging."""
    taken: list[Plan] = []
    for p in sorted(plans(shape), key=lambda p: p.estimate_us):
        alike = [q for q in taken if (q.passes, q.staging) == (p.passes, p.staging)]
        same_cut = [q for q in alike if (q.cluster, q.slab_groups) == (p.cluster, p.slab_groups)]
        if len(alike) < MOST[p.passes, p.staging] and (p.passes == 2 or len(same_cut) < 2):
            taken.append(p)
    return taken


def run_case(name: str) -> dict:
    shape_name, layout = name.rsplit(" ", 1)
    images, channels, edge = SHAPES[shape_name]
    x = torch.randn(images, channels, edge, edge, device="cuda").bfloat16() + 1
    if layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    weight, bias = (torch.randn(channels, device="cuda").bfloat16() for _ in range(2))
    shape = page.shape_of(x, GROUPS, 16, *page.device_limits(0))
    tried = candidates(shape)
    arch = loader.device_arch(0)

    def program(p: Plan) -> loader.Program:
        return page.ptx_program("group_norm_silu", shape, p, x.dtype)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda p: program(p).compile(arch), tried))
    truth = ops.group_norm_silu.reference(x.double(), GROUPS, weight.double(), bias.double())
    plain = ops.group_norm_silu.torch_kernel.run(x, GROUPS, weight, bias)
    wrong, good = {}, {}
    for p in tried:
        call = contender(shape, p, x, weight, bias)
        result = parity.judge(call(), plain, truth)
        if result.passed:
            good[label(p)] = call
        else:
            wrong[label(p)] = str(result)
            print(f"{name} {label(p)} WRONG {result}", flush=True)
    variants = {}
    if layout == "nhwc":
        variants = one_pass_variants(name, shape, tried, x, weight, bias)
    for key, call in variants.items():
        result = parity.judge(call(), plain, truth)
        if not result.passed:
            wrong[key] = str(result)
            print(f"{name} {key} WRONG {result}", flush=True)
    del truth, plain
    peers = {
        "copy": lambda: x.clone(),
        "eager": lambda: torch.nn.functional.silu(
            torch.nn.functional.group_norm(x, GROUPS, weight, bias)
        ),
    }
    extra = {"exact silu": contender(shape, tried[0], x, weight, bias, ACTIVATION="silu")}
    two = next(p for p in tried if p.passes == 2)
    if layout == "nhwc" and x.nbytes > 8e6:
        for hints in TWO_PASS_HINTS:
            extra[f"{label(two)} {hints}"] = contender(shape, two, x, weight, bias, **hints)
    extra |= {key: call for key, call in variants.items() if key not in wrong}
    effort = harness.Effort(rounds=8, sample_us=600.0)
    timed = harness.measure({**peers, **extra, **good}, "cuda", effort=effort)
    medians = {key: t.median_us for key, t in timed.items()}
    chosen = label(plan(shape))  # type: ignore[arg-type]
    print(f"{name}: eager {medians['eager']:.2f} us, copy {medians['copy']:.2f} us", flush=True)
    estimates = {label(p): p.estimate_us for p in tried}
    ranked = sorted((us, key) for key, us in medians.items() if key not in peers)
    for us, key in ranked[:30] + [pair for pair in ranked[30:] if pair[1] == chosen]:
        mark = "<- plan" if key == chosen else ""
        model = f"(model {estimates.get(key, 0.0):6.2f})  {medians['eager'] / us:5.2f} x eager"
        print(f"   {us:8.2f} us {model}  {key} {mark}", flush=True)
    return {
        "case": name,
        "time_us": medians,
        "estimate_us": estimates,
        "plan": chosen,
        "wrong": wrong,
    }


def one_pass_variants(name: str, shape: Shape, tried: list[Plan], x, weight, bias) -> dict:
    """The cheapest plans of each staging and EXTRA's: triggered and divided in other ways."""
    found = {}
    for staging in ("registers", "shared"):
        able = [p for p in tried if (p.passes, p.staging) == (1, staging)][:2]
        able += [p for p in EXTRA.get(name, []) if p.staging == staging]
        ways = TRIGGERS
        if staging == "shared":
            ways = [turns | trigger for turns in TURNS for trigger in TRIGGERS]
        for p in able:
            for way in ways:
                turns = p.vecs // way.get("TURN", 1)
                if turns and turns % way.get("PARTS", 1) == 0:
                    call = contender(shape, p, x, weight, bias, **way)
                    found[f"{label(p)} {way}"] = call
    return found


def contender(shape: Shape, p: Plan, x, weight, bias, **others: str | int):
    """A call of plan p with template variables replaced, its output newly allocated."""

    def program(op, shape, p, dtype):
        return page.ptx_program(op, shape, p, dtype, **others)

    def call():
        out = torch.empty_like(x)
        page.launch(program, "group_norm_silu", shape, p, (x, weight, bias, out), 1e-5)
        return out

    return call


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "group-norm", CASES, run_case, LIMIT_S))
