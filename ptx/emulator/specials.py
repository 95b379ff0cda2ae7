"""Special registers: %tid, %ctaid, %laneid, %cluster_ctarank, %clock, ..."""

import numpy as np

CLOCKS = frozenset(("%clock", "%clock64", "%globaltimer"))
SPECIALS = CLOCKS.union(
    ("%tid", "%ntid", "%ctaid", "%nctaid", "%clusterid", "%nclusterid", "%cluster_ctaid",
     "%cluster_nctaid", "%laneid", "%warpid", "%nwarpid", "%cluster_ctarank", "%cluster_nctarank",
     "%is_explicit_cluster", "%smid", "%nsmid", "%gridid", "%lanemask_eq", "%lanemask_le",
     "%lanemask_lt", "%lanemask_ge", "%lanemask_gt", "%dynamic_smem_size", "%total_smem_size")
)  # fmt: skip


class Specials:
    """Values of the special registers of a batch, one array per register, made when first read."""

    def __init__(self, machine):
        self.m, self._cache, self._clock = machine, {}, 0

    def get(self, name, dtype):
        """Array [threads] of the register `name`, e.g. "%tid.x"."""
        base = name.split(".")[0]
        if base in CLOCKS:
            self._clock += 32
            return np.full(self.m.size, self._clock, dtype=dtype)
        key = name, dtype
        if key not in self._cache:
            value = np.asarray(self._value(base, name.partition(".")[2] or "x"))
            self._cache[key] = np.broadcast_to(value, (self.m.size,)).astype(dtype)
        return self._cache[key]

    def _value(self, base, axis):
        m, launch = self.m, self.m.launch
        k = "xyz".find(axis)
        if k < 0:  # .w of a vector register is 0
            return 0
        bx, by, _ = launch.block
        gx, gy, gz = (np.asarray(launch.grid) // launch.cluster).tolist()
        ids = m.block_ids[m.block]
        lane = np.arange(m.size) & 31
        one = np.uint64(1)
        bit = one << lane.astype(np.uint64)
        values = {
            "%tid": lambda: (m.tid % bx, m.tid // bx % by, m.tid // (bx * by))[k],
            "%ntid": lambda: launch.block[k],
            "%ctaid": lambda: ids[:, k],
            "%nctaid": lambda: launch.grid[k],
            "%clusterid": lambda: ids[:, k] // launch.cluster[k],
            "%nclusterid": lambda: (gx, gy, gz)[k],
            "%cluster_ctaid": lambda: ids[:, k] % launch.cluster[k],
            "%cluster_nctaid": lambda: launch.cluster[k],
            "%cluster_ctarank": lambda: m.rank,
            "%cluster_nctarank": lambda: m.cluster_size,
            "%is_explicit_cluster": lambda: int(m.cluster_size > 1),
            "%laneid": lambda: lane,
            "%warpid": lambda: m.tid // 32,
            "%nwarpid": lambda: m.warps_per_block,
            "%smid": lambda: m.launch.first_block + m.block,
            "%nsmid": lambda: 132,
            "%gridid": lambda: 0,
            "%lanemask_eq": lambda: bit,
            "%lanemask_lt": lambda: bit - one,
            "%lanemask_le": lambda: (bit << one) - one,
            "%lanemask_gt": lambda: 0xFFFFFFFF & ~((bit << one) - one),
            "%lanemask_ge": lambda: 0xFFFFFFFF & ~(bit - one),
            "%dynamic_smem_size": lambda: launch.smem_bytes,
            "%total_smem_size": lambda: m.shared_end,
        }
        return values[base]()
