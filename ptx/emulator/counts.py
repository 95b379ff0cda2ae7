"""What a launch did: instructions, bank conflicts, sectors, bytes, tensor FLOPs, divergence.

Everything is counted per instruction (program counter) and summed by class for the report.
"""

import numpy as np

CLASSES = (
    ("tensor", ("mma", "wgmma")),
    ("special function", ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos", "div")),
    ("async copy", ("cp",)),
    ("global memory", ()),
    ("shared memory", ("ldmatrix", "stmatrix")),
    ("synchronisation", ("bar", "barrier", "mbarrier", "fence", "membar", "elect", "griddepcontrol",
                         "setmaxnreg")),
    ("warp exchange", ("shfl", "vote", "match", "redux", "activemask", "movmatrix")),
    ("conversion", ("cvt", "cvta")),
    ("move", ("mov", "selp", "mapa")),
    ("control", ("bra", "ret", "exit", "trap")),
)  # fmt: skip


def instruction_class(op):
    """The class of CLASSES that an operation belongs to."""
    base = op.opcode.split(".")[0]
    if base in ("ld", "st", "atom", "red", "ldu"):
        shared = any(m.startswith("shared") for m in op.mods)
        if shared:
            return "shared memory"
        return "parameters" if op.has("param") else "global memory"
    for name, bases in CLASSES:
        if base in bases:
            return name
    return "float arithmetic" if op.kind and op.kind[0] in "fbt" and op.kind not in (
        "b16", "b32", "b64", "b8") else "integer arithmetic"  # fmt: skip


class Counts:
    """Counters per program counter of one launch."""

    FIELDS = ("threads", "warps", "divergent", "wavefronts", "ideal_wavefronts", "sectors",
              "ideal_sectors", "global_read", "global_written", "shared_bytes", "bulk_bytes",
              "flops")  # fmt: skip

    def __init__(self, program):
        self.program = program
        n = len(program.ops)
        for name in self.FIELDS:
            setattr(self, name, [0] * n)
        self._patterns = {}

    # ---- called while running ------------------------------------------------------------------
    def issued(self, pc, lanes, threads):
        """A warp counts even when its guard is false for every lane; a thread then does not."""
        self.threads[pc] += threads
        self.warps[pc] += len(lanes.warps)

    def parked(self, pc, lanes):
        """These threads did not execute yet; they will be counted when they do."""
        self.threads[pc] -= lanes.n
        self.warps[pc] -= len(lanes.warps)

    def split(self, pc, warps):
        self.divergent[pc] += warps

    def add_flops(self, pc, flops):
        self.flops[pc] += flops

    def bulk(self, pc, nbytes):
        self.bulk_bytes[pc] += nbytes

    def access(self, pc, lanes, segments, addresses, total, write):
        """One load or store of `total` bytes per thread."""
        if not segments:
            return
        if segments[0].space == "shared":
            self.shared_bytes[pc] += lanes.n * total
            wavefronts, ideal = self._pattern(lanes, addresses, total, self._wavefronts, 3)
            self.wavefronts[pc] += wavefronts
            self.ideal_wavefronts[pc] += ideal
        elif segments[0].space == "global":
            self.global_bytes(pc, lanes, addresses, total, write)

    def global_bytes(self, pc, lanes, addresses, total, write):
        (self.global_written if write else self.global_read)[pc] += lanes.n * total
        sectors, ideal = self._pattern(lanes, addresses, total, self._sectors, 31)
        self.sectors[pc] += sectors
        self.ideal_sectors[pc] += ideal

    def _pattern(self, lanes, addresses, total, measure, low):
        """`measure` of an address pattern, remembered by its shape relative to the first thread."""
        first = int(addresses[0])
        relative = addresses - (first & ~low)
        key = (total, low, relative.tobytes(), None if lanes.whole else (lanes.idx & 31).tobytes())
        found = self._patterns.get(key)
        if found is None:
            if len(self._patterns) > 20000:
                self._patterns.clear()
            found = self._patterns[key] = measure(lanes, relative, total)
        return found

    @staticmethod
    def _wavefronts(lanes, addresses, total):
        """Shared-memory passes: 32 lanes of 4 B, 16 of 8 B or 8 of 16 B at a time; each pass takes
        as many cycles as one bank has distinct words."""
        table = lanes.by_warp(addresses)
        phases = max(1, total // 4)
        words = (table >> 2).reshape(len(table) * phases, 32 // phases)
        words = (words[:, :, None] + np.arange(phases)).reshape(len(words), 32)
        words = np.sort(words, axis=1)
        distinct = np.ones(words.shape, bool)
        distinct[:, 1:] = words[:, 1:] != words[:, :-1]
        slot = np.arange(len(words))[:, None] * 32 + (words & 31)
        per_bank = np.bincount(slot[distinct], minlength=32 * len(words)).reshape(-1, 32)
        return int(per_bank.max(axis=1).sum()), len(words)

    @staticmethod
    def _sectors(lanes, addresses, total):
        """32-byte sectors per warp, and the fewest that could carry the bytes."""
        sectors = np.sort(lanes.by_warp(addresses) >> 5, axis=1)
        found = int((sectors[:, 1:] != sectors[:, :-1]).sum()) + len(sectors)
        warps = np.bincount(np.searchsorted(lanes.warps, lanes.idx >> 5))
        return found, int((-(-warps * total // 32)).sum())

    # ---- the report --------------------------------------------------------------------------
    def by_class(self):
        """Dynamic warp instructions per class, largest first."""
        out = {}
        for op, warps in zip(self.program.ops, self.warps, strict=True):
            if warps:
                name = instruction_class(op)
                out[name] = out.get(name, 0) + warps
        return dict(sorted(out.items(), key=lambda item: -item[1]))

    def totals(self):
        """Sums over all instructions, as a dict."""
        total = {name: int(sum(getattr(self, name))) for name in self.FIELDS}
        live = total["threads"] / (32 * total["warps"]) if total["warps"] else 1.0
        return {
            "thread_instructions": total["threads"],
            "warp_instructions": total["warps"],
            "lanes_active": round(live, 4),
            "divergent_branches": total["divergent"],
            "shared_wavefronts": total["wavefronts"],
            "shared_wavefronts_ideal": total["ideal_wavefronts"],
            "global_sectors": total["sectors"],
            "global_sectors_ideal": total["ideal_sectors"],
            "global_bytes_read": total["global_read"],
            "global_bytes_written": total["global_written"],
            "shared_bytes": total["shared_bytes"],
            "bulk_copy_bytes": total["bulk_bytes"],
            "tensor_flops": total["flops"],
        }

    def by_line(self):
        """{line: {field: count}} of every executed line."""
        lines = {}
        for pc, op in enumerate(self.program.ops):
            if self.warps[pc]:
                entry = lines.setdefault(op.line, dict.fromkeys(self.FIELDS, 0))
                for name in self.FIELDS:
                    entry[name] += int(getattr(self, name)[pc])
        return lines

    def as_dict(self):
        return {"totals": self.totals(), "classes": self.by_class()}
