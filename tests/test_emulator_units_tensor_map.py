"""Tensor copies of the emulator against padding and slicing in torch."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from mirage_hello.ptx.emulator import tensor_map as tma
from mirage_hello.ptx.tensor_map import TensorMap, im2col_map, tensor_map


def load(made, coordinates, offsets=(), shared=0):
    """Shared memory after a load, raw bytes of the box un-swizzled by the documented rule."""
    moved = tma.transfer(made, coordinates, shared, offsets, base=0)
    source = made.tensor.contiguous() if made.kind != "im2col" else made.tensor.permute(0, 2, 3, 1)
    flat = source.contiguous().reshape(-1).view(torch.uint8).numpy()
    memory = np.full(moved.nbytes + shared, 0xEE, np.uint8)
    where = np.where(moved.inside, moved.address, 0)[:, None] + np.arange(moved.itemsize)
    data = np.where(moved.inside[:, None], flat[where], 0).astype(np.uint8)
    memory[tma.expand(moved.shared, moved.itemsize)] = data
    return unswizzle(memory[shared:], made.swizzle)


def unswizzle(raw, span):
    if not span:
        return raw
    rows = raw.reshape(-1, span // 16, 16)
    row = np.arange(len(rows))[:, None]
    phase = {128: row & 7, 64: row >> 1 & 3, 32: row >> 2 & 1}[span]
    return rows[row, np.arange(span // 16) ^ phase].reshape(-1)


def window(x, starts, sizes, steps):
    """Zero-padded strided box of a tensor, outermost dimension first."""
    for axis, (start, size, step) in enumerate(zip(starts, sizes, steps, strict=True)):
        index = start + np.arange(size) * step
        inside = (index >= 0) & (index < x.shape[axis])
        taken = x.index_select(axis, torch.from_numpy(np.where(inside, index, 0)))
        mask = torch.from_numpy(inside).view([-1 if a == axis else 1 for a in range(x.ndim)])
        x = torch.where(mask, taken, torch.zeros((), dtype=x.dtype))
    return x


CASES = [
    # tensor shape (outermost first), box (innermost first), element strides, swizzle, dtype
    ((40,), (64,), (1,), 0, torch.float32),
    ((50, 72), (64, 16), (1, 1), 128, torch.bfloat16),
    ((50, 72), (32, 24), (1, 1), 64, torch.float16),
    ((9, 33, 48), (16, 8, 3), (1, 1, 1), 32, torch.bfloat16),
    ((3, 12, 20, 64), (64, 8, 8, 1), (1, 2, 2, 1), 128, torch.bfloat16),
    ((2, 3, 4, 5, 16), (16, 4, 3, 2, 2), (1, 3, 1, 1, 1), 0, torch.float32),
    ((20, 128), (128, 8), (1, 1), 128, torch.uint8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiled_load_is_a_zero_padded_window(case):
    shape, box, steps, span, dtype = case
    x = torch.randint(0, 120, shape).to(dtype)
    made = tensor_map(x, box, span, steps)
    tma.check_map(made)
    rng = np.random.default_rng(len(shape))
    for trial in range(5):
        coordinates = [
            int(rng.integers(-b, d + 1)) for b, d in zip(box, reversed(shape), strict=True)
        ]
        coordinates[0] -= coordinates[0] % (16 // x.element_size())
        coordinates = [0] * len(shape) if trial == 0 else coordinates
        sizes = tma.box_shape(made)
        got = load(made, coordinates, shared=2048)
        want = window(x, coordinates[::-1], sizes[::-1], (*steps[:0:-1], 1))
        np.testing.assert_array_equal(got, want.contiguous().reshape(-1).view(torch.uint8).numpy())
        assert tma.box_bytes(made) == got.size


def test_swizzle_depends_on_the_absolute_address():
    x = torch.arange(64 * 64).reshape(64, 64).to(torch.bfloat16)
    made = tensor_map(x, (64, 8), 128)
    moved = tma.transfer(made, (0, 0), 3072, base=0)
    assert moved.shared[0] == 3072 and moved.shared[64] == 3072 + 128 + 16
    with pytest.raises(ValueError, match="multiple of 1024 bytes for swizzle 128"):
        tma.transfer(made, (0, 0), 128, base=0)


def test_store_is_clipped():
    x = torch.zeros(10, 24, dtype=torch.float32)
    made = tensor_map(x, (16, 4), 64)
    moved = tma.transfer(made, (16, 8), 0, base=x.data_ptr())
    assert moved.inside.sum() == 8 * 2
    assert moved.address[moved.inside].max() == x.data_ptr() + (10 * 24 - 1) * 4


@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_im2col_walks_the_pixels_of_a_convolution(pad, stride, dilation):
    torch.manual_seed(pad)
    n, c, h, w, taps = 2, 64, 9, 13, 3
    x = torch.randn(n, c, h, w).to(torch.bfloat16).to(memory_format=torch.channels_last)
    upper = pad - (taps - 1) * dilation
    made = im2col_map(x, (-pad, -pad), (upper, upper), 32, 40, 64, (1, stride, stride, 1))
    padded = functional.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    out_h = (h + 2 * pad - (taps - 1) * dilation - 1) // stride + 1
    out_w = (w + 2 * pad - (taps - 1) * dilation - 1) // stride + 1
    total = n * out_h * out_w
    for first in (0, 7, total // 2, total - 9):
        image, y, column = first // (out_h * out_w), first // out_w % out_h, first % out_w
        for s, r in ((0, 0), (2, 1), (1, 2)):
            at = (32, column * stride - pad, y * stride - pad, image)
            got = load(made, at, (s * dilation, r * dilation)).reshape(40, 64)
            rows = padded[:, r * dilation :, s * dilation :][:, ::stride, ::stride]
            rows = rows[:, :out_h, :out_w, 32:64].reshape(total, 32)[first : first + 40]
            want = rows.contiguous().view(torch.uint8).numpy().reshape(len(rows), 64)
            np.testing.assert_array_equal(got[: len(want)], want)
            assert not got[len(want) :].any()


def field(made, **changes):
    return TensorMap(**{**{f: getattr(made, f) for f in made.__dataclass_fields__}, **changes})


def test_limits_are_named():
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    made = tensor_map(x, (64, 8), 128)
    for changes, words in [
        ({"box": (64, 257)}, "1..256"),
        ({"box": (128, 8)}, "must not exceed the swizzle"),
        ({"box": (12, 8)}, "multiple of 16 bytes"),
        ({"strides": (120,)}, "multiples of 16"),
        ({"element_strides": (1, 9)}, "1..8"),
        ({"dims": (64,) * 6}, "rank must be 1..5"),
        ({"swizzle": 16}, "swizzle must be"),
        ({"kind": "im2col", "channels": 64, "pixels": 8}, "im2col rank must be 3..5"),
    ]:
        with pytest.raises(ValueError, match=words):
            tma.check_map(field(made, **changes))
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        tma.check_map(made, base=8)
    with pytest.raises(ValueError, match="rank 2 needs 2 coordinates"):
        tma.transfer(made, (0,), 0)
    with pytest.raises(ValueError, match="takes no im2col offsets"):
        tma.transfer(made, (0, 0), 0, (1, 1))
    for inner in (1, -3, 4):
        with pytest.raises(ValueError, match="innermost coordinate must be a multiple of 16 bytes"):
            tma.transfer(made, (inner, 0), 0)


def test_reduce():
    old, new = np.array([5, 0, 9], np.uint32), np.array([3, 7, 9], np.uint32)
    wanted = {"add": [8, 7, 18], "min": [3, 0, 9], "max": [5, 7, 9], "inc": [0, 1, 0],
              "dec": [3, 7, 8], "and": [1, 0, 9], "or": [7, 7, 9], "xor": [6, 7, 0]}  # fmt: skip
    for operation, want in wanted.items():
        np.testing.assert_array_equal(tma.reduce(operation, "u32", old, new), want)
    halves = torch.tensor([1.0, 2.5, -3.0]).to(torch.bfloat16).view(torch.int16).numpy()
    halves = halves.view(np.uint16)
    got = torch.from_numpy(tma.reduce("add", "bf16", halves, halves).view(np.int16))
    assert got.view(torch.bfloat16).tolist() == [2.0, 5.0, -6.0]
    with pytest.raises(ValueError, match="not defined for f32"):
        tma.reduce("xor", "f32", old, new)
    for operation in ("inc", "dec"):
        with pytest.raises(ValueError, match=f"{operation} is not defined for s32"):
            tma.reduce(operation, "s32", old, new)
