"""A row in words: the line that is printed as it is measured, and what it says of the best peer."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def best_peer(row: Row) -> tuple[str, float] | None:
    """(name, time_us) of the fastest peer that computes the op; `copy` is a ceiling, not a peer."""
    rivals = {name: time_us for name, time_us in row["peers"].items() if name != "copy"}
    return min(rivals.items(), key=lambda item: item[1]) if rivals else None


def speedup(row: Row, peer: str | None = None) -> float | None:
    """peer's time / ours; the best peer's by default. None when it was not measured."""
    best = best_peer(row)
    peer_us = row["peers"].get(peer) if peer else best[1] if best else None
    return peer_us / row["time_us"]["p50"] if peer_us and row["time_us"]["p50"] else None


def row_line(row: Row) -> str:
    """`silu  64 MiB  float32  ptx  31.5 us  4.26 TB/s  98 % of the ceiling  1.02 x torch-eager`."""
    time_us = row["time_us"]
    parts = [
        f"{row['op']:16} {row['case']:24} {row['dtype']:9} {row['backend']:8}",
        f"{row.get('cache', 'hot'):12} {time_us['p50']:10.2f} us",
        f"[{time_us['p10']:.2f}, {time_us['p90']:.2f}]",
    ]
    if row["tflops"] is not None:
        parts.append(f"{row['tflops']:8.2f} TFLOP/s {row['gbps']:8.1f} GB/s")
    if row["fraction_of_ceiling"] is not None:
        parts.append(f"{100 * row['fraction_of_ceiling']:5.1f} % of the ceiling")
    best, ratio = best_peer(row), speedup(row)
    if best and ratio:
        parts.append(f"{ratio:.2f} x {best[0]}")
    return "  ".join(parts)
