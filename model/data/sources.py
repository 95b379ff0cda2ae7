"""Where videos lie: files in folders, and members of WebDataset shards (plain .tar archives)."""

from __future__ import annotations

import glob
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".m4v", ".mkv", ".mov", ".webm", ".avi", ".mpg", ".mpeg", ".ts"]
)


class Window(io.RawIOBase):
    """Bytes [start, start + size) of a file as a file of its own: a shard member, read in place."""

    def __init__(self, path: str, start: int, size: int) -> None:
        self.file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self.start, self.size, self.at = start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer) -> int:
        self.file.seek(self.start + self.at)
        data = self.file.read(min(len(buffer), max(0, self.size - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


@dataclass(frozen=True)
class Source:
    """One video: a file, or `size` bytes from `start` of a shard. `name` is for people."""

    name: str
    path: str
    size: int
    start: int = 0
    member: bool = False

    def open(self) -> BinaryIO:
        """A new seekable binary stream; each process and thread opens its own."""
        if self.member:
            return io.BufferedReader(Window(self.path, self.start, self.size), 1 << 16)
        return open(self.path, "rb")


def shard_sources(path: Path) -> list[Source]:
    """The videos of a shard, in the archive's order.

    A shard that is cut off keeps the members before the cut; one that is no archive at all comes
    back as one empty source, which the prober reports and skips.
    """
    found = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile() and Path(member.name).suffix.lower() in VIDEO_SUFFIXES:
                    name = f"{path}!{member.name}"
                    found.append(Source(name, str(path), member.size, member.offset_data, True))
    except (tarfile.TarError, EOFError):
        found.append(Source(f"{path} (as a tar archive)", str(path), 0))
    return found


def find_sources(root: str) -> list[Source]:
    """All videos under a folder, in a shard, or matching a glob; sorted by name.

    Raises:
        FileNotFoundError: root matches nothing.
    """
    paths = [Path(p) for p in sorted(glob.glob(root))] or [Path(root)]
    if not paths[0].exists():
        raise FileNotFoundError(f"find_sources: {root!r} does not exist; give a folder or a .tar")
    files: list[Path] = []
    for path in paths:
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    sources: list[Source] = []
    for file in files:
        if file.suffix.lower() == ".tar":
            sources += shard_sources(file)
        elif file.suffix.lower() in VIDEO_SUFFIXES:
            sources.append(Source(str(file), str(file), file.stat().st_size))
    return sources
