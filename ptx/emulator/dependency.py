"""griddepcontrol.wait: before it, the kernel before this one may still run.

The emulator runs one kernel at a time, so the wait changes no value. What it orders is checked: a
cluster that writes global memory before any of its threads has waited may overwrite what the
kernel before still reads or writes, and a kernel in which no thread waits may end before the one
before it, which the kernel after it relies on.
"""

import numpy as np

WAIT = "griddepcontrol.wait"


class Dependency:
    """Which clusters of a batch have waited. `on`: the kernel has a wait."""

    def __init__(self, machine):
        self.m = machine
        self.on = bool(machine.launch.waits)
        self.waited = np.zeros(machine.clusters, bool)

    def wait(self, lanes):
        self.waited[self.m.cluster[lanes.sel]] = True
        self.m.launch.has_waited = True

    def write(self, lanes, segments, pc):
        """Ordinary stores and atomics, as resolved by buffer."""
        if self.on and not self.waited.all():
            for s in segments:
                if s.space == "global":
                    threads = lanes.idx if s.positions is None else lanes.idx[s.positions]
                    self.threads_write(threads, pc)

    def threads_write(self, threads, pc):
        early = threads[~self.waited[self.m.cluster[threads]]] if self.on else ()
        if len(early):
            text = f"global memory is written before {WAIT}; the kernel before may still use it"
            self.m.findings.add("grid-dependency", pc, int(early[0]), None, text, len(early))


def report_end(launch):
    """After the last batch: some thread must have waited."""
    if launch.waits and not launch.has_waited:
        text = f"no thread executed {WAIT}: the kernel may end before the one before it"
        launch.findings.add("grid-dependency", launch.waits[0], 0, None, text)
