"""LatestFrame: a queue of depth one, where the latest frame wins.

Latency grows when queues back up. A producer that is faster than the model (a camera, a socket)
puts frames here and never waits; the model always takes the newest and the others are dropped.
"""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

Frame = TypeVar("Frame")


class LatestFrame(Generic[Frame]):
    """put() replaces what was not taken yet; get() waits for a frame. Safe between threads.

    Attributes: dropped, how many frames were replaced before anybody took them.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._frames: list[Frame] = []  # none or one
        self._closed = False
        self.dropped = 0

    def put(self, frame: Frame) -> None:
        """Offer a frame; never blocks. Raises ValueError after close()."""
        with self._changed:
            if self._closed:
                raise ValueError("LatestFrame: put after close")
            self.dropped += len(self._frames)
            self._frames = [frame]
            self._changed.notify()

    def get(self, timeout: float | None = None) -> Frame | None:
        """The newest frame, waiting up to `timeout` seconds (None: for ever).

        Returns None when the time is up, or when closed and empty.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._frames or self._closed, timeout)
            return self._frames.pop() if self._frames else None

    def close(self) -> None:
        """No more frames: a frame that waits is still handed out, then get() returns None."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
