"""Shared memory ends with its block: who still uses it then?

Peers of a cluster, copies on their way in or out.  A use is over for a block when one of its warps
knows the user's clock (clocks.py), through a cluster barrier or the mbarrier of the copy.
"""

import numpy as np

from mirage_hello.ptx.emulator.clocks import Clocks


class Lifetimes(Clocks):
    """`uses[block][agent]`: clock and instruction of the agent's last use from outside."""

    def __init__(self, machine):
        super().__init__(machine)
        self.on, self.uses = False, {}

    def touch(self, lanes, offsets, pc):
        if self.m.cluster_size > 1:
            target = offsets // self.m.shared_stride
            remote = target != self.m.block[lanes.sel]
            for block in np.unique(target[remote]):
                self.touch_remote(lanes.where(remote & (target == block)), int(block), pc)

    def touch_remote(self, lanes, block, pc):
        """These threads use shared memory of `block`, a peer in their cluster."""
        if not self.on or int(self.m.block[lanes.thread(0)]) == block:
            return
        if not self.m.living[block]:
            self.m.findings.add(
                "exited-block", pc, lanes.thread(0), None,
                "the block whose shared memory this uses has exited", lanes.n,
            )  # fmt: skip
        for warp in lanes.warps:
            local = int(self.warp_local[warp])
            self.use(block, local, int(self.clocks[self.warp_cluster[warp], local, local]), pc)

    def use(self, block, agent, clock, pc):
        self.uses.setdefault(block, {})[agent] = clock, pc

    def block_ends(self, block, lanes, pc):
        """The last thread of a block exits: every use of its memory by others must be over."""
        if not self.on or block not in self.uses:
            return
        first = block % self.m.cluster_size * self.m.warps_per_block
        mine = self.clocks[block // self.m.cluster_size, first : first + self.m.warps_per_block]
        known = mine.max(axis=0)
        thread = lanes.thread(int(np.argmax(self.m.block[lanes.sel] == block)))
        for agent, (clock, use_pc) in self.uses[block].items():
            if clock <= known[agent]:
                continue
            line = self.m.program.ops[use_pc].line
            peer = agent < self.copy_base
            self.m.findings.add(
                "exited-block" if peer else "copy-in-flight-at-exit", pc, thread, None,
                "the block exits and nothing orders that after the use of its shared memory at "
                f"line {line} by {'a peer block' if peer else self.agent_name(agent)}",
            )  # fmt: skip
