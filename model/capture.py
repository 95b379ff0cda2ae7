"""A training step as a CUDA graph: one launch in place of about 2500, which would bound the time.

    run = Captured(device, generator)
    metrics, batch = run(number % 2, body)       # body() -> (metrics, batch), dicts of tensors

Each kind of step runs in the ordinary way a few times, on a stream of its own (libraries make their
workspaces then), is captured once, and from then on replayed. A body must draw from `generator`
alone, change tensors in place, and never wait for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from mirage_hello.ptx import capture_mode

WARM_UP = 4  # ordinary steps of a kind before it is captured

Tensors = dict[str, Tensor]
Body = Callable[[], tuple[Tensors, Tensors]]


class Captured:
    """Runs bodies, by graphs where it can.

    The batch of a replayed step lies in the memory of its graph, so it lasts until the next step of
    the same kind: two kinds in turn give the caller one step's time to look at a batch.

    Args:
        device: graphs exist on CUDA; elsewhere each body is simply called.
        generator: what the bodies draw from; a replay advances it as a call would.
        enabled: False calls each body. A body may talk to other processes through NCCL.
    """

    def __init__(
        self, device: torch.device, generator: torch.Generator, enabled: bool = True
    ) -> None:
        self.enabled = enabled and device.type == "cuda"
        self.generator = generator
        self.calls: Counter[Hashable] = Counter()
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensors, Tensors]] = {}
        self.memory: Any = None  # one pool for all graphs: they never run at the same time
        self.stream = torch.cuda.Stream(device) if self.enabled else None

    def __call__(self, kind: Hashable, body: Body) -> tuple[Tensors, Tensors]:
        """(metrics of this step, its batch)."""
        if not self.enabled:
            return body()
        self.calls[kind] += 1
        if kind not in self.graphs:
            if self.calls[kind] <= WARM_UP:
                return self.aside(body)
            self.graphs[kind] = self.capture(body)
        graph, metrics, batch = self.graphs[kind]
        graph.replay()
        return {k: v.clone() for k, v in metrics.items()}, batch

    def release(self) -> None:
        """Let the graphs go; the next call of each kind captures it anew."""
        if self.graphs:
            torch.cuda.synchronize()
        for graph, _, _ in self.graphs.values():
            graph.reset()
        self.graphs.clear()
        self.memory = None

    def aside(self, body: Body) -> tuple[Tensors, Tensors]:
        """An ordinary call on the stream of the captures."""
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = body()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, body: Body) -> tuple[torch.cuda.CUDAGraph, Tensors, Tensors]:
        """Record a body without running it."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        # Thread by thread: NCCL's watchdog asks for its events while this thread captures.
        with torch.cuda.graph(
            graph, pool=self.memory, stream=self.stream, capture_error_mode="thread_local"
        ):
            metrics, batch = body()
        self.memory = graph.pool()
        capture_mode.ends_with(self, graph)
        return graph, metrics, batch
