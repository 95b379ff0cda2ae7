"""The shares of a frame: overlapping kernels are counted once, and gaps are idle."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mirage_hello.bench import frame_profile
from mirage_hello.tools import figure, growth, waterfall


def events() -> list[dict]:
    frame = {"cat": "user_annotation", "name": "frame 0", "ts": 0.0, "dur": 100.0}
    kernels = [
        ("kernel", "conv2d_bf16", 10.0, 20.0),
        ("kernel", "linear_bf16", 25.0, 15.0),  # 5 us under the convolution
        ("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 50.0, 10.0),  # after 10 us of nothing
        ("kernel", "conv2d_bf16", 150.0, 7.0),  # of the next frame
    ]
    return [frame, *({"cat": c, "name": n, "ts": t, "dur": d} for c, n, t, d in kernels)]


def test_shares_add_up_to_the_frame():
    found = frame_profile.summary(events())
    assert found["span_us"] == pytest.approx(50) and found["busy_us"] == pytest.approx(40)
    assert found["idle_share"] == pytest.approx(0.2) and found["launches"] == 3
    assert found["families"] == {"convolution": 20, "linear": 10, "copies over the bus": 10}
    assert found["kernels"][0] == {
        "name": "conv2d_bf16", "family": "convolution", "calls": 1, "us": 20,
    }  # fmt: skip


def test_kernels_of_torch_have_families():
    names = {
        "void at::native::elementwise_kernel<128, 4, ...>": "elementwise",
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": "linear",
        "sm90_xmma_fprop_implicit_gemm_bf16": "convolution",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy": "copies on the device",
        "something_new": "other",
    }
    assert {name: frame_profile.family(name) for name in names} == names


def test_the_waterfall_ends_at_the_frame():
    profile = frame_profile.summary(events())
    found = waterfall.steps(profile)
    assert found[0] == ("convolution", 20) and found[-1] == ("idle", pytest.approx(10))
    assert sum(us for _, us in found) == pytest.approx(profile["span_us"])
    drawn = waterfall.waterfall({"before": profile, "after": profile})
    assert [axis.get_title(loc="left") for axis in drawn.axes] == [
        "before: 50 us on the device", "after: 50 us on the device",
    ]  # fmt: skip


def test_a_waterfall_takes_a_sweep_or_a_run():
    profile = {"families": {}}
    assert waterfall.profiles([{"variant": "fp8", "profile": profile}]) == {"fp8": profile}
    device = {"ours": profile, "torch-compile": profile, "idle_share": 0.0}
    run = {"rows": [{"op": "silu"}, {"op": "frame", "device": device}]}
    assert waterfall.profiles(run) == {"ours": profile, "torch-compile": profile}


def test_growth_takes_what_was_measured():
    def took(ms: float) -> dict:
        return {"frame_us": {"p50": 1e3 * ms}}

    sizes = {
        "parameters": 10, "512x512": took(2.5), "1024x576": took(6.0), "512x512 guidance": took(4),
        "512x512 2 steps": took(4.7),
    }  # fmt: skip
    named = {name: value for name, value in sizes.items() if name != "parameters"}
    assert growth.by_pixels(named, guidance=False) == [(0.262144, 2.5), (0.589824, 6.0)]
    assert growth.by_pixels(named, guidance=True) == [(0.262144, 4)]
    assert growth.by_steps(named) == [(1, 2.5), (2, 4.7)]
    batch = {"8": {"auto": 1000.0, "torch": 4000.0}, "1": {"auto": 500.0, "torch": 1000.0}}
    assert growth.by_batch(batch, "auto") == [(0.5, 2000.0), (1.0, 8000.0)]
    figure = growth.growth({"sizes": sizes, "batch": batch})
    assert [len(axis.lines) for axis in figure.axes] == [2, 1, 2]
    assert [len(axis.lines) for axis in growth.growth({}).axes] == [0, 0, 0]


@pytest.mark.parametrize("found", [dict, waterfall.profiles])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: source, out"),
        (["x.json"], "required: out"),
        (["none.json", "x.png"], "none.json: expected JSON of the sweep"),
        (["list.json", "x.png"], "list.json: expected JSON of the sweep"),
        (["empty.json", "x.png"], "nothing to draw"),
        (["good.json", "x.qqq"], "x.qqq: cannot be written"),
    ],
)
def test_a_figure_of_bad_sources_is_refused(found, arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty, good = {} if found is dict else [], {"rows": [{"device": {"ours": {}}}]}
    for name, content in (("list", [1]), ("empty", empty), ("good", good)):
        Path(f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as left:
        figure.draw("", found, lambda _: growth.growth({}), arguments)
    assert left.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["growth", "waterfall"])
def test_a_figure_without_arguments_is_a_usage(tool):
    path = Path(growth.__file__).with_name(f"{tool}.py")
    done = subprocess.run([sys.executable, "-P", path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"usage: {tool}.py")
