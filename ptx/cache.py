"""The on-disk cache of compiled kernels: atomic, verified, shared by any number of processes.

An entry is one file: 32 bytes of SHA-256 of the payload, then the payload. It is written beside
its place and renamed into it, so a reader sees a whole entry or none; an entry that does not
match its sum is built again. Two processes that build the same kernel both succeed: the second
rename replaces the first with the same bytes.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("mirage_hello")


def folder() -> Path:
    """$MIRAGE_CACHE, or mirage-hello in the user's cache folder."""
    own = os.environ.get("MIRAGE_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mirage-hello"


def get_or_build(parts: tuple[str, ...], build: Callable[[], bytes]) -> bytes:
    """The payload for this key, from disk or from `build`.

    Args:
        parts: everything the payload depends on: source, options, architecture, compiler version.
        build: called when there is no whole entry.

    A cache that cannot be written (disk full, read-only) costs the next process a build, no more:
    it is logged, never raised.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.encode())
    path = folder() / f"{digest.hexdigest()[:40]}.cubin"
    payload = _read(path)
    if payload is None:
        payload = build()
        _write(path, payload)
    return payload


def _read(path: Path) -> bytes | None:
    try:
        entry = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("kernel cache %s cannot be read (%s); building again", path, error)
        return None
    payload = entry[32:]
    if hashlib.sha256(payload).digest() == entry[:32]:
        return payload
    log.warning("kernel cache entry %s is damaged (%d bytes); building again", path, len(entry))
    return None


def _write(path: Path, payload: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as f:
            try:
                f.write(hashlib.sha256(payload).digest() + payload)
                f.flush()
                os.replace(f.name, path)
            except OSError:
                os.unlink(f.name)
                raise
    except OSError as error:
        log.warning("kernel cache %s cannot be written (%s); going on without", path, error)
