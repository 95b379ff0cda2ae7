"""Planted faults: each detector finds its own, at the right line; the clean kernels raise nothing.

A fault is an edit of a clean kernel of tests/ptx: the text to replace, what replaces it, the kind
of finding and the instruction that must be named.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mirage_hello.ptx.emulator import KINDS, EmulatorError, launch, parse
from mirage_hello.ptx.tensor_map import tensor_map

PTX = Path(__file__).parent / "ptx"


def reverse(text, rows=2, **options):
    x = torch.randn(rows, 256)
    y = torch.full_like(x, float("nan"))
    report = launch(parse(text, "reverse.ptx"), "reverse", rows, 256, [x, y], **options)
    assert torch.equal(y, x.flip(1))
    return report


def tile_add_one(text, shape=(40, 36), **options):
    x = torch.arange(shape[0] * shape[1], dtype=torch.int32).view(shape)
    y = torch.full_like(x, -1)
    maps = [tensor_map(t, (32, 32), swizzle=0) for t in (x, y)]
    grid = (-(-shape[1] // 32), -(-shape[0] // 32))
    report = launch(parse(text, "tile_add_one.ptx"), "tile_add_one", grid, 128, maps, **options)
    assert torch.equal(y, x + 1)
    return report


def wgmma_tile(text, **options):
    a, b = torch.randn(64, 32).bfloat16(), torch.randn(16, 32).bfloat16()
    c = torch.full((64, 16), float("nan"))
    report = launch(parse(text, "wgmma_tile.ptx"), "wgmma_tile", 1, 128, [a, b, c], **options)
    assert torch.allclose(c, a.float() @ b.float().T, atol=1e-4)
    return report


def mma_tile(text, **options):
    a, b = torch.randn(2, 16, 16).bfloat16(), torch.randn(2, 8, 16).bfloat16()
    c = torch.full((2, 16, 8), float("nan"))
    report = launch(parse(text, "mma_tile.ptx"), "mma_tile", 1, 64, [a, b, c], **options)
    assert torch.allclose(c, a.float() @ b.float().transpose(1, 2), atol=1e-4)
    return report


def cluster_sum(text, clusters=3, **options):
    x = torch.randn(4 * clusters, 64)
    out = torch.full((clusters, 64), float("nan"))
    report = launch(
        parse(text, "cluster_sum.ptx"), "cluster_sum", 4 * clusters, 64, [x, out], **options
    )
    assert torch.allclose(out, x.view(clusters, 4, 64).sum(1), atol=1e-5)
    return report


KERNELS = {f.__name__: f for f in (reverse, tile_add_one, wgmma_tile, mma_tile, cluster_sum)}


@dataclass(frozen=True)
class Fault:
    name: str
    kernel: str
    old: str
    new: str
    kind: str
    at: str  # a part of the line that the finding must name


FAULTS = [
    Fault("store past the tensor", "reverse", "st.global.f32   [%y]", "st.global.f32   [%y+1024]",
          "out-of-bounds", "st.global.f32   [%y+1024]"),
    Fault("load before the tensor", "reverse", "ld.global.f32   %value, [%x]",
          "ld.global.f32   %value, [%x-4]", "out-of-bounds", "[%x-4]"),
    Fault("null pointer", "reverse", "add.u64         %x, %x, %offset", "mov.b64 %x, 64",
          "out-of-bounds", "ld.global.f32"),
    Fault("shared index too large", "reverse", "st.shared.f32   [%at], %value",
          "st.shared.f32   [%at+8], %value", "out-of-bounds", "[%at+8]"),
    Fault("misaligned global", "reverse", "ld.global.f32   %value, [%x]",
          "ld.global.f32   %value, [%x+2]", "misaligned", "[%x+2]"),
    Fault("misaligned shared", "reverse", "ld.shared.f32   %value, [%at]",
          "ld.shared.f32   %value, [%at+1]", "misaligned", "[%at+1]"),
    Fault("store before the wait for the kernel before", "reverse", "bar.sync        0;",
          "bar.sync 0; st.global.f32 [%y], %value; griddepcontrol.wait;", "grid-dependency",
          "st.global.f32 [%y], %value"),
    Fault("no thread waits for the kernel before", "reverse", "bar.sync        0;",
          ".reg .pred %p; setp.gt.u32 %p, %i, 4096;\n    bar.sync 0; @%p griddepcontrol.wait;",
          "grid-dependency", "griddepcontrol.wait"),
    Fault("no barrier", "reverse", "bar.sync        0;", "", "shared-race", "ld.shared.f32"),
    Fault("only the warp waits", "reverse", "bar.sync        0;", "bar.warp.sync 0xFFFFFFFF;",
          "shared-race", "ld.shared.f32"),
    Fault("shared never written", "reverse", "st.shared.f32   [%at], %value;", "",
          "uninitialised-shared", "ld.shared.f32"),
    Fault("register never written", "reverse", "mov.u32         %row, %ctaid.x;", "",
          "uninitialised-register", "mad.lo.u32      %at, %row"),
    Fault("register written by half the threads", "reverse", "sub.u32         %back, 255, %i;",
          ".reg .pred %p; setp.lt.u32 %p, %i, 128;\n    @%p sub.u32 %back, 255, %i;",
          "uninitialised-register", "mad.lo.u32      %at, %back"),
    Fault("two writers", "reverse", "mad.lo.u32      %at, %i, 4, %at;",
          "and.b32 %back, %i, 127; mad.lo.u32 %at, %back, 4, %at;", "shared-race", "st.shared.f32"),
    Fault("half the block at the barrier", "reverse", "bar.sync        0;",
          ".reg .pred %p; setp.lt.u32 %p, %i, 128;\n    @%p bar.sync 0;\n    @!%p bar.sync 1;",
          "deadlock", "bar.sync"),
    Fault("barrier counts too many", "reverse", "bar.sync        0;", "bar.sync 0, 288;",
          "deadlock", "bar.sync 0, 288"),
    Fault("tile read before the copy landed", "tile_add_one", "@!%done bra     WAIT;",
          "", "async-race", "ld.shared.v4.b32"),
    Fault("no proxy fence before the store", "tile_add_one", "fence.proxy.async.shared::cta;", "",
          "missing-proxy-fence", "cp.async.bulk.tensor.2d.global"),
    Fault("one thread fences for all", "tile_add_one", "fence.proxy.async.shared::cta;",
          "@%leader fence.proxy.async.shared::cta;", "missing-proxy-fence", "cp.async.bulk"),
    Fault("no barrier before the store", "tile_add_one",
          "fence.proxy.async.shared::cta;          // every writer, before the barrier\n"
          "    bar.sync        0;", "fence.proxy.async.shared::cta;", "shared-race",
          "cp.async.bulk"),
    Fault("exit while the store reads", "tile_add_one", "cp.async.bulk.wait_group.read 0;", "",
          "copy-in-flight-at-exit", "cp.async.bulk.tensor.2d.global"),
    Fault("too many bytes expected", "tile_add_one", "[%bar], 4096;", "[%bar], 4160;",
          "deadlock", "mbarrier.try_wait"),
    Fault("no mbarrier.init", "tile_add_one", "mbarrier.init.shared::cta.b64 [%bar], 1;", "",
          "mbarrier", "mbarrier.arrive.expect_tx"),
    Fault("no cvta.param", "tile_add_one", "cvta.param.u64  %in, %in;", "", "tensor-map",
          "cp.async.bulk.tensor"),
    Fault("tile at an odd address", "tile_add_one", "mov.u32         %tile_at, tile;",
          "mov.u32 %tile_at, tile; add.u32 %tile_at, %tile_at, 32;", "tensor-map",
          "cp.async.bulk.tensor"),
    Fault("accumulator read early", "wgmma_tile", "wgmma.wait_group.sync.aligned 0;",
          "wgmma.wait_group.sync.aligned 1;", "accumulator-in-flight", "{%d0, %d1}"),
    Fault("accumulator written in flight", "wgmma_tile", "wgmma.wait_group.sync.aligned 0;",
          "mov.f32 %d3, 0f00000000;\n    wgmma.wait_group.sync.aligned 0;",
          "accumulator-in-flight", "mov.f32"),
    Fault("no wgmma.fence", "wgmma_tile", "wgmma.fence.sync.aligned;", "mov.f32 %d0, 0f00000000;",
          "missing-wgmma-fence", "wgmma.mma_async"),
    Fault("operand overwritten in flight", "wgmma_tile", "wgmma.wait_group.sync.aligned 0;",
          "st.shared.v4.b32 [%at], {%q0, %q1, %q2, %q3};\n    wgmma.wait_group.sync.aligned 0;",
          "async-race", "st.shared.v4.b32 [%at]"),
    Fault("no proxy fence before wgmma", "wgmma_tile", "fence.proxy.async.shared::cta;", "",
          "missing-proxy-fence", "wgmma.mma_async"),
    Fault("descriptor beyond shared memory", "wgmma_tile", "add.u64         %desc_b, %desc_a, 256;",
          "add.u64 %desc_b, %desc_a, 320;", "out-of-bounds", "wgmma.mma_async"),
    Fault("wgmma by one warp less", "wgmma_tile", "    wgmma.fence.sync.aligned;",
          "    setp.ge.u32 %is_first, %tx, 96;\n    @%is_first bra SKIP;\n"
          "    wgmma.fence.sync.aligned;",
          "divergent-aligned", "wgmma.fence"),
    Fault("cp.async not waited for", "mma_tile", "cp.async.wait_group 0;", "cp.async.wait_group 1;",
          "async-race", "ldmatrix"),
    Fault("ldmatrix by half a warp", "mma_tile", "    ldmatrix.sync.aligned.m8n8.x4",
          "    @%has_b ldmatrix.sync.aligned.m8n8.x4", "divergent-aligned", "ldmatrix"),
    Fault("ldmatrix row misaligned", "mma_tile", "[%at+512];\n    mov.f32",
          "[%at+520];\n    mov.f32", "misaligned", "ldmatrix"),
    Fault("shuffle from a lane elsewhere", "mma_tile", "    cp.async.commit_group;",
          "    @%has_b shfl.sync.down.b32 %t0, %t0, 1, 31, 0xFFFF;\n    cp.async.commit_group;",
          "shuffle-inactive", "shfl.sync"),
    Fault("no cluster barrier", "cluster_sum",
          "barrier.cluster.arrive.release.aligned;         // rows are written\n"
          "    barrier.cluster.wait.acquire.aligned;", "", "shared-race", "ld.shared::cluster"),
    Fault("block leaves before its row is read", "cluster_sum",
          "barrier.cluster.arrive.release.aligned;         // no block leaves while its row may be "
          "read\n    barrier.cluster.wait.acquire.aligned;", "", "exited-block", "ret;"),
    Fault("block leaves before its copy lands", "tile_add_one", "WAIT:\n",
          "    bra DONE;\nWAIT:\n", "copy-in-flight-at-exit", "ret;"),
    Fault("mbarrier.init not made visible to TMA", "tile_add_one",
          "fence.mbarrier_init.release.cluster;", "", "missing-proxy-fence",
          "cp.async.bulk.tensor"),
    Fault("mbarrier waited on before its init", "tile_add_one",
          "bar.sync        0;                      // the barrier object exists for everyone", "",
          "mbarrier", "mbarrier.try_wait"),
    Fault("no wgmma.fence at all", "wgmma_tile", "wgmma.fence.sync.aligned;", "",
          "missing-wgmma-fence", "wgmma.mma_async"),
    Fault("block rank outside the cluster", "cluster_sum", "setp.lt.u32     %more, %k, 4;",
          "setp.lt.u32     %more, %k, 5;", "out-of-bounds", "ld.shared::cluster"),
    Fault("cluster wait without arrive", "cluster_sum",
          "barrier.cluster.arrive.release.aligned;         // rows are written", "",
          "barrier-unbalanced", "barrier.cluster.wait"),
    Fault("arrivals that nobody waits for", "reverse", "    ret;",
          "    barrier.arrive 3, 512;\n    ret;", "barrier-unbalanced", "barrier.arrive 3"),
    Fault("a warp comes to a barrier in two parts", "reverse", "    ret;",
          "    .reg .pred %is_32;\n    setp.eq.u32 %is_32, %i, 32;\n    @%is_32 bra ALONE;\n"
          "    barrier.arrive 3, 256;\n    ret;\nALONE:\n    barrier.sync 3, 256;\n    ret;",
          "barrier-unbalanced", "barrier.sync 3"),
    Fault("one block does not come", "cluster_sum", "    ld.param.u64    %x, [p_x];",
          "    mov.u32 %rank, %cluster_ctarank;\n    setp.eq.u32 %is_other, %rank, 2;\n"
          "    @%is_other bra DONE;\n    ld.param.u64    %x, [p_x];", "uninitialised-shared",
          "ld.shared::cluster"),
]  # fmt: skip


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_clean_kernel_raises_nothing(kernel, early):
    """Copies that complete as late as legal, and at once."""
    report = KERNELS[kernel]((PTX / f"{kernel}.ptx").read_text(), early=early)
    assert report.findings == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_fault_is_found(fault):
    clean = (PTX / f"{fault.kernel}.ptx").read_text()
    assert clean.count(fault.old) >= 1, "the fault's anchor is not in the kernel"
    text = clean.replace(fault.old, fault.new)
    if "bra SKIP" in text:
        text = text.replace("    wgmma.wait_group.sync", "SKIP:\n    wgmma.wait_group.sync")
    with pytest.raises(EmulatorError) as caught:
        KERNELS[fault.kernel](text)
    hits = [f for f in caught.value.findings if f.kind == fault.kind]
    assert hits, f"expected {fault.kind}, found {[str(f) for f in caught.value.findings]}"
    named = [text.split("\n")[f.line - 1] for f in hits]
    assert any(fault.at in line for line in named), named
    for f in hits:
        assert f.text and len(f.block) == 3 and 0 <= f.thread < 256
        assert re.match(r"line \d+: ", str(f))


def test_every_kind_of_finding_has_a_planted_fault():
    assert {f.kind for f in FAULTS} == set(KINDS)


def test_unchecked_launch_reports_only_what_cannot_go_on():
    text = (PTX / "reverse.ptx").read_text().replace("bar.sync        0;", "")
    x, y = torch.randn(1, 256), torch.empty(1, 256)
    launch(parse(text, "reverse.ptx"), "reverse", 1, 256, [x, y], checks=False)
    text = (PTX / "reverse.ptx").read_text().replace("bar.sync        0;", "bar.sync 0, 288;")
    with pytest.raises(EmulatorError, match=r"barrier 0 has 256 of 288 arrivals; threads 0-255"):
        launch(parse(text, "reverse.ptx"), "reverse", 1, 256, [x, y], checks=False)


def test_copies_complete_as_late_as_legal_or_at_once():
    """Without the wait the late schedule reads old bytes, the early one hides the fault."""
    text = (PTX / "tile_add_one.ptx").read_text().replace("@!%done bra     WAIT;", "")
    text = text.replace("mbarrier.try_wait.parity.shared::cta.b64 %done, [%bar], 0;", "")
    x = torch.arange(1024, dtype=torch.int32).view(32, 32)
    results = []
    for early in (False, True):
        y = torch.full_like(x, -1)
        maps = [tensor_map(t, (32, 32), swizzle=0) for t in (x, y)]
        module = parse(text, "tile_add_one.ptx")
        launch(module, "tile_add_one", 1, 128, maps, checks=False, early=early)
        results.append(torch.equal(y, x + 1))
    assert results == [False, True]


@pytest.mark.parametrize("which", [0, 1], ids=["load", "store"])
def test_tensor_map_that_leaves_its_tensor(which):
    """A map that claims more rows than the storage has: the box is stopped, not the neighbour."""
    text = (PTX / "tile_add_one.ptx").read_text()
    tensors = [torch.zeros(32, 32, dtype=torch.int32) for _ in range(2)]
    maps = [tensor_map(t, (32, 32), swizzle=0) for t in tensors]
    maps[which] = tensor_map(tensors[which], (32, 32), swizzle=0, dims=(32, 64), strides=(160,))
    with pytest.raises(EmulatorError, match="out-of-bounds: the tensor map reaches byte"):
        launch(parse(text, "tile_add_one.ptx"), "tile_add_one", 1, 128, maps)


SPACES = {
    "local": (".local .b32 stack[4];", "mov.b32 %a, stack; ld.local.b32 %v, [%a+16];"),
    "const": ("", "mov.u64 %g, table; add.u64 %g, %g, 8; ld.const.b32 %v, [%g];"),
    "param": ("", "mov.u64 %g, p_x; cvta.param.u64 %g, %g; ld.param.b32 %v, [%g+64];"),
    "shared": (".shared .b32 tile[4];", "mov.b32 %a, tile; ld.shared.v2.b32 {%v, %v}, [%a+12];"),
    "generic": (".shared .b32 tile[4];",
                "mov.u64 %g, tile; cvta.shared.u64 %g, %g; st.b32 [%g+16], %v;"),
}  # fmt: skip


@pytest.mark.parametrize("space", SPACES)
def test_every_space_has_bounds(space):
    declaration, access = SPACES[space]
    text = f""".version 8.0
.target sm_90
.address_size 64
.const .b32 table[2] = {{1, 2}};
.visible .entry k(.param .u64 p_x) {{
    .reg .b32 %a, %v; .reg .b64 %g; {declaration} mov.b32 %v, 0;
    {access}
    ret; }}"""
    with pytest.raises(EmulatorError) as caught:
        launch(parse(text), "k", 1, 32, [None])
    kinds = {f.kind for f in caught.value.findings}
    assert kinds & {"out-of-bounds", "misaligned"}, caught.value
    assert all(f.line == 7 for f in caught.value.findings)
