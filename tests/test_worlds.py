"""The procedural worlds: random access, determinism, memory, motion, cuts, and how they look."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mirage_hello.model.data import city
from mirage_hello.model.data.demo_clip import to_bytes, write_video
from mirage_hello.model.data.noise import fractal_textures, sample_texture, uniform
from mirage_hello.model.data.styles import STYLES
from mirage_hello.model.data.worlds import WorldConfig, Worlds

SMALL = WorldConfig(height=48, width=64, supersample=1)


def warp(previous: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    """previous frame sampled where each pixel was one frame earlier."""
    height, width = motion.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid_x = (x + motion[:, 0] + 0.5) * 2 / width - 1
    grid_y = (y + motion[:, 1] + 0.5) * 2 / height - 1
    return F.grid_sample(previous, torch.stack((grid_x, grid_y), -1), align_corners=False)


def test_uniform_is_uniform_and_keyed():
    keys = torch.arange(20000, dtype=torch.int32)
    a, b = uniform(keys, 1), uniform(keys, 2)
    assert a.min() >= 0 and a.max() < 1
    assert abs(a.mean().item() - 0.5) < 0.01 and abs(a.var().item() - 1 / 12) < 0.005
    assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1].item()) < 0.03
    assert torch.equal(uniform(keys[5:6], 1), a[5:6])


def test_textures_tile_without_a_seam():
    maps = fractal_textures(torch.tensor([3, 4], dtype=torch.int32), channels=2, size=64)
    u = torch.tensor([[0.0, 9.999, 10.0, -0.001]]).expand(2, -1)
    value = sample_texture(maps, 0, u, torch.full_like(u, 2.5), 10.0)
    assert torch.allclose(value, value[:, :1].expand_as(value), atol=0.02)
    assert not torch.allclose(maps[0], maps[1])


def test_a_frame_does_not_depend_on_the_batch_or_the_order():
    worlds = Worlds(SMALL)
    seeds, frames = [5, 6, 7], [10, 300, 77]
    styles = ["clay", "neon_city", "clay"]
    together = worlds.render(worlds.clips(seeds), frames, styles)
    for i in (2, 0, 1):
        alone = worlds.render(worlds.clips(seeds[i : i + 1]), frames[i : i + 1], styles[i : i + 1])
        torch.testing.assert_close(alone.target[0], together.target[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.view[0], together.view[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("style", list(STYLES))
def test_every_style_is_a_picture_that_the_input_does_not_hold(style):
    worlds = Worlds(SMALL)
    shot = worlds.render(worlds.clips([4, 9]), [60, 60], [style, style])
    assert shot.target.shape == shot.view.shape == (2, 3, 48, 64)
    assert torch.isfinite(shot.target).all() and shot.target.abs().max() <= 1
    assert shot.target.std((1, 2, 3)).min() > 0.08  # contrast: not a flat or a burnt image
    assert (shot.target.abs() > 0.995).float().mean() < 0.3
    other = worlds.clips([4, 9])
    other.scalars, other.textures = other.scalars.flip(0), other.textures.flip(0)
    changed = worlds.render(other, [60, 60], [style, style])
    assert torch.equal(changed.view, shot.view)  # same geometry, other private dice
    assert (changed.target - shot.target).abs().mean() > 0.02


def test_motion_warps_one_frame_onto_the_next():
    # Full size: at 48 pixels one edge pixel is a large share of the frame.
    worlds = Worlds(WorldConfig(height=128, width=128, supersample=2))
    for seed in (4, 0):  # a pan and an orbit
        clips = worlds.clips([seed])
        before, after = (worlds.render(clips, [f], ["clay"]) for f in (120, 121))
        depth = warp(before.depth, after.motion)
        seen = ((depth / after.previous_depth - 1).abs() < 0.02).float()
        assert seen.mean() > 0.6
        warped = (warp(before.target, after.motion) - after.target).abs() * seen
        still = (before.target - after.target).abs() * seen
        assert warped.sum() < 0.5 * still.sum()


def test_details_stay_put_when_they_come_back():
    worlds = Worlds(SMALL)
    clips = worlds.clips([4])
    shots = {f: worlds.render(clips, [f], ["watercolour"]) for f in (0, 1)}
    pose = city.camera_at(clips.seeds, torch.tensor([0]), 0)
    later = [city.camera_at(clips.seeds, torch.tensor([f]), 0) for f in range(150, 520)]
    turned = torch.stack([(p.axes - pose.axes).abs().max() for p in later])
    assert turned.max() > 0.5 and turned.min() < 0.1  # it looks away, and comes back
    assert not torch.equal(shots[0].target, shots[1].target)


def test_snow_and_puddles_grow_with_time():
    worlds = Worlds(SMALL)
    clips = worlds.clips([4])
    clips.scalars[:] = 0.5
    early, late = (worlds.render(clips, [f], ["snow_night"]).target.mean() for f in (0, 2000))
    assert late > early + 0.02


def test_cuts_happen_when_told_and_only_then():
    seeds = torch.full((400,), 11, dtype=torch.int32)
    frames = torch.arange(400)
    scene, first = city.scene_of(seeds, frames, 50)
    changes = (scene[1:] != scene[:-1]).nonzero().flatten() + 1
    assert 5 <= len(changes) <= 9 and ((changes[1:] - changes[:-1]) >= 20).all()
    assert torch.equal(first[changes].long(), changes)
    assert (city.scene_of(seeds, frames, 0)[0] == 0).all()
    worlds = Worlds(WorldConfig(height=32, width=32, supersample=1, cut_frames=50))
    at = int(changes[0])
    clips = worlds.clips([11, 11])
    shot = worlds.render(clips, [at, at - 1], ["clay", "clay"])
    assert shot.cut.tolist() == [True, False]
    assert (shot.view[0] - shot.view[1]).abs().mean() > 0.1


def test_cars_move_at_their_speed():
    seeds = torch.tensor([[3]], dtype=torch.int32)
    lane, middle = torch.tensor([[7]], dtype=torch.int32), torch.tensor([[55.0]])
    a, k = city.car_near(seeds, torch.tensor([[100]]), lane, middle, 0)
    b, _ = city.car_near(seeds, torch.tensor([[101]]), lane, a, 0)
    torch.testing.assert_close(b - a, city.car_speed(seeds, lane, 0), atol=1e-3, rtol=0)
    assert k.dtype == torch.int32 and (a - middle).abs() <= city.CAR_PERIOD / 2


def test_camera_view_and_view_only():
    worlds = Worlds(WorldConfig(height=32, width=32, supersample=1, view="camera"))
    clips = worlds.clips([1])
    only = worlds.render(clips, [5], None)
    both = worlds.render(clips, [5], ["clay"])
    assert torch.equal(only.view, both.view) and torch.equal(only.target, only.view)


def test_bad_arguments_name_the_known_ones():
    worlds = Worlds(SMALL)
    clips = worlds.clips([1])
    with pytest.raises(ValueError, match="unknown style 'clayy'; known: neon_city"):
        worlds.render(clips, [0], ["clayy"])
    with pytest.raises(ValueError, match="one length"):
        worlds.render(clips, [0, 1], ["clay"])
    with pytest.raises(ValueError, match="known views: plain, camera"):
        Worlds(WorldConfig(view="wide"))


def test_write_video_reads_back(tmp_path):
    av = pytest.importorskip("av")
    frames = [torch.full((32, 48, 3), 20 * i, dtype=torch.uint8) for i in range(6)]
    assert write_video(tmp_path / "a.mp4", frames) == 6
    with av.open(str(tmp_path / "a.mp4")) as container:
        decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(decoded) == 6 and abs(float(decoded[3].mean()) - 60) < 4
    assert to_bytes(torch.ones(3, 2, 2)).max() == 255


INTERPRETED = """
import torch
from mirage_hello.model.data import city, raycast, raycast_triton
from mirage_hello.model.data.worlds import WorldConfig, Worlds

worlds = Worlds(WorldConfig(height=8, width=8, supersample=1))
clips, frames = worlds.clips([4, 0]), torch.tensor([50, 300], dtype=torch.int32)
look = worlds.first_look(clips, frames, city.camera_at(clips.seeds, frames, 0), 8, 8)
origin = tuple(k[:, None].expand(-1, 64) for k in
               city.camera_at(clips.seeds, frames, 0).position.unbind(1))
expected = raycast.trace(look.scene, origin, look.directions, 6)
got = raycast_triton.trace(look.scene, origin, look.directions, 6)
torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
for a, b in zip(got[1:], expected[1:], strict=True):
    assert torch.equal(a, b)
assert len(expected[1].unique()) >= 4
"""


def test_fused_rays_hit_what_plain_rays_hit():
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mirage_hello.model.data.raycast_triton import trace_kernel

floats = {"cells", "balloons", "origin", "direction", "distance"}
integers = {"seeds", "frames", "code_out", "cell_x_out", "cell_z_out"}
types = {n: "*fp32" if n in floats else "*i32" if n in integers else "i32"
         for n in trace_kernel.arg_names}
fixed = {"balloon_count": 3, "block": 128}
source = ASTSource(trace_kernel, types | dict.fromkeys(fixed, "constexpr"), fixed)
assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


def test_fused_rays_compile_for_a_gpu_that_is_not_here():
    pytest.importorskip("triton")
    # The interpreter accepts what the compiler does not: names that change their shape in a loop.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
def test_the_gpu_draws_what_the_cpu_draws():
    for style in STYLES:
        shots = []
        for device in ("cpu", "cuda"):
            config = WorldConfig(64, 64, supersample=1, fused=device == "cuda")
            worlds = Worlds(config, device)
            shots.append(worlds.render(worlds.clips([4, 7, 0]), [60, 300, 9], [style] * 3))
        for name in ("view", "target"):
            a, b = getattr(shots[0], name), getattr(shots[1], name).cpu()
            # A ray that grazes an edge may fall on either side of it.
            assert ((a - b).abs() > 0.02).float().mean() < 0.01, (style, name)
