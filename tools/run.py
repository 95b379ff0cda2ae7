"""`mirage run INPUT -o OUTPUT`: a video file through the model, frame by frame."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirage_hello.tools import arguments, terminal
from mirage_hello.tools.convert import Outcome, convert
from mirage_hello.tools.errors import BadInput, unknown_name
from mirage_hello.tools.video_reader import VideoReader
from mirage_hello.tools.video_writer import check_target

if TYPE_CHECKING:
    import torch

    from mirage_hello.model.stream import FrameStream
    from mirage_hello.model.unet import VideoUNet

INTERRUPTED = 130
UNTRAINED = "the weights are random: until they are trained the picture is meaningless"
EXAMPLES = """\
  mirage run clip.mp4 -o out.mp4
  mirage run phone.mov -o out.mkv --preset 880m --steps 4 --size 512x512 --device cuda
  mirage run clip.mp4 -o out.mp4 --backend ptx,auto            ptx where it can run
  mirage run clip.mp4 -o out.mp4 --backend attention=triton,conv2d=torch
  mirage run clip.mp4 -o out.mp4 --style neon_city
  mirage run clip.mp4 -o out.mp4 --max-frames 48 --json

exit codes: 0 done (a truncated input too: its frames are kept and a warning says so),
2 bad input, 130 interrupted (the file so far is kept and plays)
"""


def add_parser(subparsers: Any) -> None:
    parser = arguments.add_parser(
        subparsers, "run", "push a video file through the model, frame by frame", EXAMPLES
    )
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="any container and codec that FFmpeg reads")
    add("-o", "--output", type=Path, required=True, help="H.264 in .mp4, .m4v, .mov or .mkv")
    add("--preset", help="tiny (trained), 391m or 880m (random weights); default: tiny")
    add("--checkpoint", type=Path, help="trained weights (.safetensors); they bring their preset")
    add("--steps", type=int, default=1, help="denoising steps a frame (default: 1)")
    add("--size", metavar="WxH", help="scale to this size (default: the input's own)")
    add("--dtype", help="fp32, fp16 or bf16 (default: bf16 on a GPU, fp32 on a CPU)")
    add("--backend", default="auto", help=arguments.BACKEND_HELP)
    add("--style", help="by name or number (default: the first); clay:2+snow_night mixes two")
    add("--seed", type=int, default=0, help="of the weights and the noise (default: 0)")
    add("--max-frames", type=int, help="stop after this many frames")
    arguments.add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, then say what was done.  Raises BadInput for everything that a user can mend."""
    _check_numbers(args)
    check_target(args.output, args.input)
    reader = VideoReader(args.input, size=arguments.size(args.size))
    with reader:
        stream = open_stream(args, (reader.height, reader.width))
        if not args.json:
            _introduce(reader, stream, args)
        with sentences((reader.height, reader.width)):
            outcome = convert(reader, args.output, stream.push, args.max_frames)
    for warning in outcome.warnings:
        terminal.warn(warning)
    if args.json:
        terminal.print_json(as_dict(args, reader, stream, outcome))
    else:
        _conclude(outcome, args.output)
    return INTERRUPTED if outcome.interrupted else 0


def open_stream(args: argparse.Namespace, size: tuple[int, int]) -> FrameStream:
    """The model as the arguments describe it, its memory predicted before it is built.

    Args:
        args: preset, checkpoint, device, dtype, backend, steps, seed, style, as `add_parser` makes.
        size: (height, width) of the frames.

    Raises:
        BadInput: an unknown name, a checkpoint that cannot be read, a backend that cannot run
            here, or a model that does not fit into the memory (with the size that would).
    """
    from mirage_hello.model import budget, presets
    from mirage_hello.model.stream import FrameStream

    device = arguments.device(args.device)
    dtype = arguments.dtype(args.dtype or ("bf16" if device.type == "cuda" else "fp32"))
    policy = arguments.backend_policy(args.backend)
    name = args.preset or "tiny"
    if name not in presets.PRESETS:
        raise BadInput("--preset: " + unknown_name("preset", name, presets.PRESETS))
    if not -(2**63) <= args.seed < 2**63:
        raise BadInput(f"--seed: must be a number of 64 bits (got {args.seed})")
    with sentences(size):
        if args.checkpoint is None:
            budget.check(name, size, dtype, args.steps, device, weights_loaded=False)
        denoiser, autoencoder = _networks(args, name, dtype, device)
        stream = FrameStream(
            denoiser, autoencoder, steps=args.steps, size=size, policy=policy, seed=args.seed
        )
        if args.style is not None:
            stream.set_context(style_tokens(args.style, denoiser.unet))
    return stream


@contextlib.contextmanager
def sentences(size: tuple[int, int]) -> Iterator[None]:
    """Within the block, what the model refuses becomes a BadInput with the same words.

    Args:
        size: (height, width) of the frames, named where the memory is too small.
    """
    import torch

    from mirage_hello.kernels import BackendError

    try:
        yield
    except (ValueError, BackendError) as error:
        raise BadInput(str(error).removeprefix("FrameStream: ")) from error
    except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, its parent class on a CPU
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise BadInput(
            f"{size[1]}x{size[0]} does not fit into the memory "
            f"({str(error).splitlines()[0]}); choose a smaller --size or --preset"
        ) from error


def _networks(
    args: argparse.Namespace, name: str, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any]:
    from mirage_hello.model import checkpoint, presets, shipped

    if args.checkpoint is None and name in shipped.names():
        return shipped.load(name, dtype, device)
    if args.checkpoint is None:
        return presets.build(name, args.seed, dtype, device)
    try:
        networks = checkpoint.load(args.checkpoint, dtype, device)
    except OSError as error:
        raise BadInput(f"--checkpoint: {error}; give the path of a .safetensors file") from error
    if args.preset and networks[0].unet.config != presets.PRESETS[name].unet:
        raise BadInput(
            f"--preset {name} does not describe {str(args.checkpoint)!r}; leave --preset out, "
            "since a checkpoint brings its own"
        )
    return networks


def style_tokens(text: str, unet: VideoUNet) -> torch.Tensor:
    """Tokens [1, L, D] of a style, or of a mixture: a:w+b:v is (w a + v b) / (w + v), w, v > 0."""
    parts = []
    for part in text.split("+"):
        name, colon, weight = part.partition(":")
        try:
            share = float(weight) if colon else 1.0
        except ValueError:
            share = 0.0
        if not 0 < share < float("inf"):
            raise BadInput(f"--style: a share must be a positive number (got {part!r})")
        parts.append((share, unet.style(_style(name.strip(), unet.config.styles))))
    total = sum(share for share, _ in parts)
    first = parts[0][0] / total * parts[0][1].detach()
    return sum((share / total * tokens.detach() for share, tokens in parts[1:]), start=first)


def _style(text: str, count: int) -> int:
    """The number of a style given by name or number."""
    from mirage_hello.model.data.styles import STYLES

    if count == 0:
        raise BadInput(f"--style: this preset has no styles (got {text!r}); leave --style out")
    names = list(STYLES)[:count]
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < count:
        return int(text)
    raise BadInput(
        "--style: " + unknown_name("style", text, names) + f"; or a number from 0 to {count - 1}"
    )


def _check_numbers(args: argparse.Namespace) -> None:
    for name, value in (("--steps", args.steps), ("--max-frames", args.max_frames)):
        if value is not None and value < 1:
            raise BadInput(f"{name}: must be at least 1 (got {value})")


def describe(stream: FrameStream) -> dict[str, Any]:
    """The model in words: parameters, dtype, device, steps, trained or not."""
    modules = (stream.denoiser, stream.autoencoder)
    return {
        "parameters": sum(p.numel() for m in modules for p in m.parameters()),
        "dtype": str(stream.dtype).removeprefix("torch."),
        "device": str(stream.device),
        "steps": stream.steps,
        "trained": stream.trained,
    }


def _introduce(reader: VideoReader, stream: FrameStream, args: argparse.Namespace) -> None:
    model = describe(stream)
    sound = f", sound {reader.audio_streams[0].codec_context.name}" if reader.audio_streams else ""
    print(
        f"input   {reader.path}: {reader.width}x{reader.height}, {float(reader.rate):.4g} fps, "
        f"{reader.stream.codec_context.name}{sound}"
    )
    print(
        f"model   {model['parameters'] / 1e6:.1f}M parameters, {model['steps']} "
        f"step{'s' * (model['steps'] > 1)} a frame, {model['dtype']} on {model['device']}, "
        f"backend {args.backend}"
    )
    if not model["trained"]:
        print(f"note    {UNTRAINED}")


def _conclude(outcome: Outcome, target: Path) -> None:
    for note in outcome.notes:
        print(f"note    {note}")
    if not outcome.frames:
        print("nothing written: interrupted before the first frame")
        return
    result = outcome.as_dict()
    times = ", ".join(f"{name} {value:.4g} ms" for name, value in result["frame_ms"].items())
    print(f"frames  {outcome.frames} in {result['seconds']:.1f} s, {result['fps']} fps ({times})")
    print(f"output  {target}" + (" (interrupted: the part so far)" * outcome.interrupted))


def as_dict(
    args: argparse.Namespace, reader: VideoReader, stream: FrameStream, outcome: Outcome
) -> dict[str, Any]:
    """The run for --json."""
    return {
        "input": str(args.input),
        "output": str(args.output) if outcome.frames else None,
        "width": reader.width,
        "height": reader.height,
        "backend": args.backend,
        "seed": args.seed,
        **describe(stream),
        **outcome.as_dict(),
    }
