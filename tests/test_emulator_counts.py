"""Counts of a launch, the annotated listing, and the `mirage ptx` command."""

import json
from pathlib import Path

import numpy as np
import pytest

from mirage_hello.ptx.emulator import launch, listing, parse
from mirage_hello.tools import cli

PTX = Path(__file__).parent / "ptx"
HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"


def strided(space, stride, width=1):
    """Each of 32 lanes reads `width` words, `stride` bytes apart."""
    vector = "" if width == 1 else f".v{width}"
    into = ", ".join(f"%v{i}" for i in range(width))
    into = into if width == 1 else f"{{{into}}}"
    fill = "mov.u32 %a, tile; mad.lo.u32 %a, %t, 128, %a;\n" + "".join(
        f"st.shared.v4.b32 [%a+{16 * i}], {{%t, %t, %t, %t}};\n" for i in range(8)
    )
    text = f"""{HEAD}.visible .entry k(.param .u64 p_x) {{
    .shared .align 128 .b8 tile[4096];
    .reg .b32 %t, %a, %v<4>; .reg .b64 %x, %w;
    mov.u32 %t, %tid.x; ld.param.u64 %x, [p_x]; mul.wide.u32 %w, %t, {stride}; add.u64 %x, %x, %w;
    {fill} bar.warp.sync 0xFFFFFFFF;
    mov.u32 %a, tile; mad.lo.u32 %a, %t, {stride}, %a;
    ld.{space}{vector}.b32 {into}, [{"%x" if space == "global" else "%a"}];
    ret; }}"""
    report = launch(parse(text), "k", 1, 32, [np.zeros(4096, np.uint8)])
    line = next(i for i, s in enumerate(text.split("\n"), 1) if f"ld.{space}" in s)
    return report.counts.by_line()[line]


@pytest.mark.parametrize(
    ("stride", "width", "passes"),
    [(4, 1, 1), (8, 1, 2), (128, 1, 32), (0, 1, 1), (16, 4, 4), (32, 4, 8), (8, 2, 2), (12, 1, 1)],
)
def test_bank_conflicts(stride, width, passes):
    assert strided("shared", stride, width)["wavefronts"] == passes


@pytest.mark.parametrize(
    ("stride", "width", "sectors"),
    [(4, 1, 4), (8, 1, 8), (32, 1, 32), (0, 1, 1), (16, 4, 16), (128, 1, 32)],
)
def test_sectors_of_a_global_access(stride, width, sectors):
    found = strided("global", stride, width)
    assert found["sectors"] == sectors
    assert found["global_read"] == 32 * 4 * width


def test_flops_bytes_and_classes():
    import torch

    a, b = torch.randn(2, 16, 16).bfloat16(), torch.randn(2, 8, 16).bfloat16()
    c = torch.empty(2, 16, 8)
    module = parse((PTX / "mma_tile.ptx").read_text(), "mma_tile.ptx")
    counts = launch(module, "mma_tile", 1, 64, [a, b, c]).counts
    totals = counts.totals()
    assert totals["tensor_flops"] == 2 * (2 * 16 * 8 * 16)
    assert totals["global_bytes_read"] == (a.numel() + b.numel()) * 2
    assert totals["global_bytes_written"] == c.numel() * 4
    assert counts.by_class()["tensor"] == 2
    assert sum(counts.by_class().values()) == totals["warp_instructions"]


def test_divergence_is_counted_per_branch():
    text = f"""{HEAD}.visible .entry k() {{ .reg .b32 %t; .reg .pred %p;
    mov.u32 %t, %tid.x; setp.lt.u32 %p, %t, 40;
    @%p bra LOW;
    add.u32 %t, %t, 1;
    LOW: ret; }}"""
    report = launch(parse(text), "k", 1, 128, [])
    assert report.counts.totals()["divergent_branches"] == 1
    assert report.counts.by_line()[7]["threads"] == 88


def test_listing_is_one_page_with_counts_and_findings():
    from test_emulator_faults import PTX as folder

    module = parse((folder / "reverse.ptx").read_text(), "reverse.ptx")
    x, y = np.zeros((1, 256), np.float32), np.zeros((1, 256), np.float32)
    page = listing.page(module, launch(module, "reverse", 1, 256, [x, y]))
    assert "http" not in page and page.count("<tr") == module.text.count("\n") + 2
    assert "st.shared.f32" in page and "0 finding(s)" in page


def test_command_runs_a_kernel(tmp_path, capsys):
    out = tmp_path / "y.npy"
    code = cli.main(
        ["ptx", "run", str(PTX / "reverse.ptx"), "--tensor", "x=f32[2,256]:arange", "--tensor",
         "y=f32[2,256]:nan", "--args", "x", "y", "--grid", "2", "--save", f"y={out}"]
    )  # fmt: skip
    assert code == 0 and "0 finding(s)" in capsys.readouterr().out
    assert np.array_equal(np.load(out), np.arange(512.0).reshape(2, 256)[:, ::-1])


def test_command_finds_a_fault(tmp_path, capsys):
    bad = tmp_path / "bad.ptx"
    bad.write_text((PTX / "reverse.ptx").read_text().replace("bar.sync        0;", ""))
    tensors = ["--tensor", "x=f32[256]:randn", "--tensor", "y=f32[256]:nan", "--args", "x", "y"]
    code = cli.main(["ptx", "check", str(bad), *tensors, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 1 and found["findings"][0]["kind"] == "shared-race"


def test_command_counts_and_writes_the_listing(tmp_path, capsys):
    page = tmp_path / "tile.html"
    code = cli.main(
        ["ptx", "count", str(PTX / "tile_add_one.ptx"), "--grid", "2,2", "--json",
         "--tensor", "x=s32[64,64]:arange", "--tensor", "y=s32[64,64]:zeros",
         "--args", "map(x,box=32x32,swizzle=0)", "map(y,box=32x32,swizzle=0)", "--html", str(page)]
    )  # fmt: skip
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert code == 0 and totals["bulk_copy_bytes"] == 2 * 64 * 64 * 4
    assert "cp.async.bulk.tensor" in page.read_text()


def test_command_checks_without_arguments(capsys):
    assert cli.main(["ptx", "check", str(PTX / "wgmma_tile.ptx")]) == 0
    assert "every instruction is supported" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.ptx"], "no file nowhere.ptx"),
        (["run", str(PTX / "reverse.ptx"), "--args", "x", "y"], "unknown tensor 'x'"),
        (["run", str(PTX / "reverse.ptx"), "--tensor", "x=q8[4]"], "expected DTYPE"),
        (["check", str(PTX / "reverse.ptx"), "--entry", "other"], "no kernel 'other'"),
    ],
)
def test_command_says_what_is_wrong(arguments, message, capsys):
    assert cli.main(["ptx", *arguments]) == 2
    assert message in capsys.readouterr().err
