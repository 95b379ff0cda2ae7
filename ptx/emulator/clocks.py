"""Vector clocks: what each warp knows of everybody's progress.

Who acts is an agent: a warp (its ordinary accesses), the warp's cp.async engine, its bulk-copy
engine, a warpgroup's wgmma engine, or an mbarrier (standing for the copies that complete on it).
`clocks[cluster, warp, agent]` is the last time of `agent` that the warp knows of; barriers and
mbarriers carry clocks from those who arrive to those who wait.  Agents and warps are numbered
within their cluster.
"""

import numpy as np


class Clocks:
    """The clocks of a batch of blocks, and its proxy fences."""

    def __init__(self, machine):
        m = self.m = machine
        self.warps = m.cluster_size * m.warps_per_block
        groups = m.cluster_size * -(-m.warps_per_block // 4)
        self.copy_base, self.bulk_base, self.wgmma_base = (self.warps * k for k in (1, 2, 3))
        self.barrier_base = self.wgmma_base + groups
        self.agents = self.barrier_base + 32
        self._slots = [0] * m.clusters
        self.clocks = np.zeros((m.clusters, self.warps, self.agents), np.int32)
        for w in range(self.warps):
            self.clocks[:, w, w] = 1
        # Up to here a warp's cp.async are known to all its lanes, not only to the issuing ones.
        self.copies_shared = np.zeros((m.clusters, self.warps), np.int32)
        self.fence_clocks = np.zeros_like(self.clocks)
        self.fence_time = np.zeros(m.size, np.int32)
        self.init_fence_time = np.zeros(m.size, np.int32)
        self.now = 1
        # Per warp of the batch (thread index // 32): its cluster, and its index in the cluster.
        self.warp_cluster = m.cluster[::32].copy()
        self.warp_local = m.warp_in_cluster[::32].copy()

    def snapshot(self, warps):
        """Clock rows [n][agents] of batch warps."""
        return self.clocks[self.warp_cluster[warps], self.warp_local[warps]]

    def acquire(self, warps, rows):
        """The warps learn `rows` ([agents], or one row per warp)."""
        c, w = self.warp_cluster[warps], self.warp_local[warps]
        n = rows.shape[-1]
        known = self.clocks[c, w]
        known[:, :n] = np.maximum(known[:, :n], rows)
        self.clocks[c, w] = known

    def tick(self, warps):
        """A release: later accesses of these warps are no longer covered by what others learnt."""
        c, w = self.warp_cluster[warps], self.warp_local[warps]
        self.clocks[c, w, w] += 1
        self.copies_shared[c, w] = self.clocks[c, w, self.copy_base + w]

    def new_barrier_agent(self, cluster):
        self._slots[cluster] += 1
        agent = self.barrier_base + self._slots[cluster] - 1
        if agent >= self.agents:
            more = ((0, 0), (0, 0), (0, self.agents))
            self.clocks, self.fence_clocks = (
                np.pad(a, more) for a in (self.clocks, self.fence_clocks)
            )
            self.agents *= 2
        return agent

    def wgmma_engine(self, group):
        """Agent of the wgmma engine of batch warpgroup `group` (thread index // 128)."""
        rank = group % self.m.blocks % self.m.cluster_size
        return self.wgmma_base + rank * -(-self.m.warps_per_block // 4) + group // self.m.blocks

    def learn(self, warps, agents, clock):
        """The warps know `agents` (per warp) up to `clock`."""
        c, w = self.warp_cluster[warps], self.warp_local[warps]
        self.clocks[c, w, agents] = np.maximum(self.clocks[c, w, agents], clock)

    def proxy_fence(self, lanes):
        """fence.proxy.async: fences these threads' earlier writes and what their warps know."""
        self.now += 1
        self.fence_time[lanes.sel] = self.init_fence_time[lanes.sel] = self.now
        c, w = self.warp_cluster[lanes.warps], self.warp_local[lanes.warps]
        self.fence_clocks[c, w] = self.clocks[c, w]

    def init_fence(self, lanes):
        """fence.mbarrier_init: the async proxy sees what these threads initialised."""
        self.now += 1
        self.init_fence_time[lanes.sel] = self.now

    def warp_name(self, local):
        """Number of a warp within its block."""
        return int(local) % self.m.warps_per_block

    def agent_name(self, agent):
        """An engine or mbarrier, for a message."""
        if agent < self.bulk_base:
            return f"cp.async of warp {self.warp_name(agent)}"
        if agent < self.wgmma_base:
            return f"a bulk copy issued by warp {self.warp_name(agent)}"
        if agent < self.barrier_base:
            return (
                f"wgmma of warpgroup {(agent - self.wgmma_base) % -(-self.m.warps_per_block // 4)}"
            )
        return "an asynchronous copy that completes on an mbarrier"
