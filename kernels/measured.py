"""Measured times per GPU, op and shape, which `auto` chooses by.

`choices/<gpu>.json`: {"gpu": name, "commit": sha, "ops": {op: {call label: {backend: time_us}}}},
written by `mirage bench --save-choices` from a run on that GPU.
"""

import functools
import json
import math
from importlib import resources

import torch

from mirage_hello.kernels.call import Call

# Sum over all dimensions of |log2 size ratio| up to which a measured shape speaks for another.
NEAR = 2.0


def times_us(call: Call) -> dict[str, float]:
    """backend -> time in microseconds at the nearest measured shape of this op; {} if none."""
    if call.device.type != "cuda":
        return {}
    table = table_for(torch.cuda.get_device_name(call.device)).get(call.op, {})
    if call.label in table:
        return table[call.label]
    near = [(distance(call.label, label), label) for label in table]
    best = min(near, default=(math.inf, ""))
    return table[best[1]] if best[0] <= NEAR else {}


def file_name(gpu: str) -> str:
    """`NVIDIA H200` -> `nvidia-h200.json`."""
    return gpu.lower().replace(" ", "-").replace("/", "-") + ".json"


@functools.cache
def table_for(gpu: str) -> dict[str, dict[str, dict[str, float]]]:
    """op -> call label -> backend -> us, from the file shipped for this GPU, or {}."""
    path = resources.files("mirage_hello.kernels") / "choices" / file_name(gpu)
    return json.loads(path.read_text())["ops"] if path.is_file() else {}


def distance(label: str, other: str) -> float:
    """Sum of |log2 ratio| over the sizes in two call labels; inf where they are not comparable."""
    parts, others = label.split(), other.split()
    if len(parts) != len(others):
        return math.inf
    total = 0.0
    for a, b in zip(parts, others, strict=True):
        (sizes, _, layout), (other_sizes, _, other_layout) = a.partition(":"), b.partition(":")
        if layout != other_layout:
            return math.inf
        if a == b:
            continue
        total += _size_distance(sizes, other_sizes)
    return total


def _size_distance(sizes: str, others: str) -> float:
    """Shapes of different rank compare as if the shorter began with ones."""
    a, b = sizes.split("x"), others.split("x")
    a, b = ["1"] * (len(b) - len(a)) + a, ["1"] * (len(a) - len(b)) + b
    if not all(s.isdigit() and int(s) for s in a + b):
        return math.inf
    return sum(abs(math.log2(int(x) / int(y))) for x, y in zip(a, b, strict=True))
