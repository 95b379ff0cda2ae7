"""Pictures in e4m3 against those in bfloat16, both in closed loop at 512x512:
`python3.12 bench/sweeps/frame_e4m3_pictures.py OUT.json [PRESET ...]`, about 25 s.

    880m    random weights, a drifting pattern: how far rounding to e4m3 moves a frame, and whether
            the closed loop adds it up
    tiny    the weights that ship, a held-out street: the same, and both against the rendered truth

Calibrated on the first CALIBRATED frames. Error: ||e4m3 - bf16|| / ||bf16|| of uint8 levels; PSNR
of both in dB, of frame 1 and of the last.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage_hello.bench.sweeps.frame_e4m3 import compile_all
from mirage_hello.bench.sweeps.frame_growth import clip
from mirage_hello.model import FrameStream, build, shipped
from mirage_hello.model.data.city import HELD_OUT
from mirage_hello.model.data.styles import STYLES
from mirage_hello.model.data.worlds import WorldConfig, Worlds

SIZE = 512
FRAMES, CALIBRATED = 100, 8
STYLE = "watercolour"


def bytes_of(image: Tensor) -> np.ndarray:
    """[1, 3, H, W] in [-1, 1] -> uint8 [H, W, 3]."""
    levels = ((image[0].float() + 1) * 127.5).round().clamp(0, 255)
    return levels.permute(1, 2, 0).to(torch.uint8).cpu().numpy()


def street(size: int, count: int, device: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(what a model sees, what it should draw) of one world that no training saw."""
    worlds = Worlds(WorldConfig(size, size, fused=device == "cuda", motion=False), device)
    world = worlds.clips([HELD_OUT])
    shots = [worlds.render(world, [frame], [STYLE]) for frame in range(count)]
    return [bytes_of(s.view) for s in shots], [bytes_of(s.target) for s in shots]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * float(np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9)))


def compared(
    stream: FrameStream, frames: Sequence[np.ndarray], truth: Sequence[np.ndarray] | None
) -> dict[str, Any]:
    """The stream's pictures in its own dtype, then in e4m3."""
    plain = [stream.push(frame) for frame in frames]
    scales = stream.use_fp8(frames[:CALIBRATED])
    compile_all([lambda: stream.push_eagerly(frames[0])], stream.device.type)
    stream.reset()
    rounded = [stream.push(frame) for frame in frames]
    result: dict[str, Any] = {"frames": len(frames), "scales": len(scales)}
    for i in (0, len(frames) - 1):
        ours, theirs = rounded[i].astype(float), plain[i].astype(float)
        found = {"error": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))}
        found["psnr_db"] = psnr(ours, theirs)
        if truth is not None:
            found["psnr_of_truth_db"] = psnr(ours, truth[i])
            found["psnr_of_truth_bf16_db"] = psnr(theirs, truth[i])
        result[f"frame {i + 1}"] = found
    return result


def measure(preset: str, size: int = SIZE, count: int = FRAMES, **options: Any) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if preset == "tiny":
        frames, truth = street(size, count, device)
        pair = shipped.load(preset, torch.bfloat16, device)
        stream = FrameStream(*pair, size=(size, size), **options)
        stream.set_style(list(STYLES).index(STYLE))
        return compared(stream, frames, truth)
    drifting = clip((size, size))
    stream = FrameStream(*build(preset, 0, torch.bfloat16, device), size=(size, size), **options)
    return compared(stream, [drifting[i % len(drifting)] for i in range(count)], None)


def main(out: str, *presets: str) -> int:
    results: dict[str, Any] = {}
    for preset in presets or ("880m", "tiny"):
        started = time.perf_counter()
        results[preset] = measure(preset) | {"seconds": time.perf_counter() - started}
        print(f"{preset}: {json.dumps(results[preset])}", flush=True)
        Path(out).write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
