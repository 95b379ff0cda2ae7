"""Make the demo clip: a plain input view of one world, as an H.264 file.

    python -m mirage_hello.model.data.demo_clip assets/demo.mp4

The clip is what a game engine would send: geometry, flat colours and outlines. Every style and
every texture that a demo shows on it comes from the model.
"""

import argparse
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from mirage_hello.model.data.city import HELD_OUT
from mirage_hello.model.data.worlds import WorldConfig, Worlds

SEED = HELD_OUT + 2  # no training clip has it
FIRST_FRAME = 40
FRAMES, FPS = 84, 24


def write_video(path: Path | str, frames: Iterable[Tensor], fps: int = FPS, crf: int = 20) -> int:
    """Encode frames to H.264 in an MP4; returns how many there were.

    Args:
        path: the file, overwritten.
        frames: uint8 [H, W, 3] each, one size, H and W even.
        fps: frames per second; crf: quality, lower is better and larger.
    """
    import av

    count = 0
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "slow"}
        for frame in frames:
            if not count:  # the codec opens with the first frame and then keeps its size
                stream.height, stream.width = frame.shape[:2]
            picture = av.VideoFrame.from_ndarray(frame.cpu().numpy(), format="rgb24")
            container.mux(stream.encode(picture))
            count += 1
        if count:
            container.mux(stream.encode(None))
    return count


def to_bytes(frame: Tensor) -> Tensor:
    """float [3, H, W] in [-1, 1] -> uint8 [H, W, 3]."""
    return ((frame + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="demo_clip")
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--first", type=int, default=FIRST_FRAME)
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--style", help="write this style's truth instead of the input view")
    arguments = parser.parse_args(argv)
    size = arguments.size
    worlds = Worlds(WorldConfig(height=size, width=size))
    clips = worlds.clips([arguments.seed])

    def frames() -> Iterable[Tensor]:
        for frame in range(arguments.first, arguments.first + arguments.frames):
            shot = worlds.render(clips, [frame], [arguments.style] if arguments.style else None)
            yield to_bytes((shot.target if arguments.style else shot.view)[0])

    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    write_video(arguments.path, frames())
    print(f"{arguments.path}: {arguments.path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
