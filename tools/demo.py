"""`mirage demo [CLIP]`: the whole path on one clip: every style, parity, speed, plot, report.

It runs the same commands that a user would, in this process, and prints each before it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import time
from pathlib import Path
from typing import Any

from mirage_hello.tools import arguments, cli
from mirage_hello.tools.errors import BadInput
from mirage_hello.tools.video_writer import CONTAINERS

SHIPPED_CLIP = Path(__file__).resolve().parent.parent / "assets" / "demo.mp4"
# The shipped clip is 512x512; on two cores five styles of it take about 60 s at this size.
CPU_SIZE = "384x384"
# On two cores parity takes 20 s; the speed run begins nothing after this.
BENCH_SECONDS = {"cpu": 45, "cuda": 240}
EXAMPLES = """\
  mirage demo                          the shipped clip, results in out/
  mirage demo holiday.mov --output-folder results

exit codes: 0 done, 1 a kernel failed its check, 2 bad input, 130 interrupted
"""


def add_parser(subparsers: Any) -> None:
    parser = arguments.add_parser(
        subparsers, "demo", "the whole path on one clip: styles, parity, speed, report", EXAMPLES
    )
    add = parser.add_argument
    add("clip", type=Path, nargs="?", metavar="CLIP", help="a video (default: the shipped clip)")
    add("--output-folder", type=Path, default=Path("out"), help="default: out")
    add("--max-frames", type=int, help="push only this many frames")
    arguments.add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Run each part in turn.

    Returns:
        0 when every part ended well, else the first code that is not 0 (130 ends at once).

    Raises:
        BadInput: no clip, or a folder that cannot be made.
    """
    clip = args.clip or SHIPPED_CLIP
    if args.clip is None and not clip.exists():
        raise BadInput("the shipped clip lies in the repository only; name one: mirage demo CLIP")
    folder: Path = args.output_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"--output-folder: cannot make {str(folder)!r} ({error.strerror})"
        ) from error
    start, worst = time.perf_counter(), 0
    for title, command in parts(clip, folder, args):
        if not args.json:
            print(f"\n== {title}\n$ mirage {shlex.join(command)}", flush=True)
        # --json promises one object: what the parts print stays out of it.
        quiet = contextlib.redirect_stdout(io.StringIO()) if args.json else contextlib.nullcontext()
        with quiet:
            code = cli.main(command)
        if code in (cli.BAD_INPUT, cli.INTERRUPTED):
            return code
        worst = worst or code
    videos = [video(clip, folder, style) for style in styles()]
    if all(path.exists() for path in videos):
        from mirage_hello.tools.demo_sheet import write_sheet

        write_sheet(sheet(clip, folder), [clip, *videos])
    _conclude(args, clip, folder, time.perf_counter() - start)
    return worst


def parts(clip: Path, folder: Path, args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(title, arguments of `mirage`) of every part, in order."""
    device = arguments.device(args.device)
    speed = str(folder / "speed.json")
    more = ["--device", str(device)]
    if args.max_frames is not None:
        more += ["--max-frames", str(args.max_frames)]
    if clip == SHIPPED_CLIP and device.type == "cpu":
        more += ["--size", CPU_SIZE]
    runs = [
        (f"the clip as {style.replace('_', ' ')}",
         ["run", str(clip), "-o", str(video(clip, folder, style)), "--style", style, *more])
        for style in styles()
    ]  # fmt: skip
    seconds = str(BENCH_SECONDS[device.type])
    bench = ["bench", "--quick", "--device", device.type, "--budget-seconds", seconds]
    return [
        *runs,
        ("does every kernel compute what it should?", ["parity", "--device", str(device)]),
        ("how fast are they?", [*bench, "--out", speed]),
        ("plots and the report", ["report", "--results", speed, "--out", str(folder)]),
    ]


def styles() -> list[str]:
    """The styles that the shipped model has learned."""
    from mirage_hello.model.data.styles import STYLES

    return list(STYLES)


def video(clip: Path, folder: Path, style: str) -> Path:
    """Where a style's result lies: the clip's name, in a container that holds it."""
    ending = clip.suffix if clip.suffix.lower() in CONTAINERS else ".mp4"
    return folder / f"{clip.stem}-{style.replace('_', '-')}{ending}"


def sheet(clip: Path, folder: Path) -> Path:
    """Where the picture of all styles lies."""
    return folder / f"{clip.stem}-styles.png"


def _conclude(args: argparse.Namespace, clip: Path, folder: Path, seconds: float) -> None:
    from mirage_hello.tools import terminal

    found = {
        "videos": [str(video(clip, folder, style)) for style in styles()],
        "sheet": str(sheet(clip, folder)),
        "speed": str(folder / "speed.json"),
        "report": str(folder / "index.html"),
        "plots": sorted(str(p) for p in folder.glob("*") if p.suffix in (".png", ".svg")),
    }
    if args.json:
        terminal.print_json({**found, "seconds": round(seconds, 1)})
        return
    print(f"\ndone in {seconds:.0f} s:")
    for made in found["videos"]:
        print(f"  video   {made}")
    print(f"  styles  {found['sheet']}   (the input and every style side by side)")
    print(f"  report  {found['report']}   (open it in a browser)")
    print(f"  speed   {found['speed']}")
    for plot in found["plots"]:
        print(f"  plot    {plot}")
