"""The Triton kernels without a GPU: run by Triton's interpreter, compiled for each architecture.

Interpreting is chosen when a kernel is defined, so it takes a process of its own, which runs the
op tests again: with TRITON_INTERPRET=1 the triton backend accepts CPU tensors.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mirage_hello.kernels.triton import H200, tiles
from mirage_hello.kernels.triton.attention import padded_width

TESTS = Path(__file__).parent
INTERPRETED = [
    "triton_interpreted.py",
    "test_attention.py",
    "test_conv2d.py",
    "test_linear.py",
    "test_layer_norm.py",
]


@pytest.mark.parametrize("file", INTERPRETED)
def test_interpreted(file):
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:warnings"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, str(TESTS / file)],
        cwd=TESTS,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]


@given(st.integers(1, 256))
def test_head_dimensions_are_padded_to_a_power_of_two(head_dim):
    width = padded_width(head_dim)
    assert width in (16, 32, 64, 128, 256)
    assert head_dim <= width < max(17, 2 * head_dim)


@given(st.integers(1, 300_000), st.integers(1, 4096), st.integers(1, 4096), st.sampled_from([1, 9]))
def test_every_tile_fits(m, n, k, taps):
    for dtype in (torch.bfloat16, torch.float32):
        for tile in tiles.ranked(m, n, k, dtype, H200, taps)[:8]:
            stage_bytes = dtype.itemsize * tile.block_k * (tile.block_m + tile.block_n)
            assert tile.stages * stage_bytes <= H200.smem_bytes
            steps = taps * -(-k // tile.block_k)
            assert tile.split_k == 1 or steps >= 4 * tile.split_k


@pytest.fixture(params=[80, 90], ids=lambda capability: f"sm_{capability}")
def compiled(request, monkeypatch, tmp_path):
    """Launches compile for the architecture and launch nothing; the list of what was compiled."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    fake = SimpleNamespace(
        get_current_device=lambda: request.param,  # compiled kernels are kept by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", request.param, 32),
    )
    monkeypatch.setattr(driver, "_active", fake)
    kernels, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return kernels


def images(*shapes):
    return [
        torch.zeros(s, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        for s in shapes
    ]


def tensors(*shapes):
    return [torch.zeros(s, dtype=torch.bfloat16) for s in shapes]


def attention_40():
    from mirage_hello.kernels.triton.attention import attention

    attention(*tensors((1, 512, 8, 40), (1, 77, 8, 40), (1, 77, 8, 40)))


def attention_160():
    from mirage_hello.kernels.triton.attention import attention

    attention(*tensors((1, 256, 8, 160), (1, 256, 8, 160), (1, 256, 8, 160)))


def conv2d_split():
    from mirage_hello.kernels.triton.conv2d import conv2d

    x, weight, residual = images((1, 640, 16, 16), (640, 640, 3, 3), (1, 640, 16, 16))
    bias, channel_bias = tensors((640,), (1, 640))
    conv2d(x, weight, bias, 1, 1, channel_bias, residual)


def conv2d_nchw():
    from mirage_hello.kernels.triton.conv2d import conv2d

    conv2d(*tensors((1, 4, 64, 64), (128, 4, 3, 3), (128,)), padding=1)


def linear_split():
    from mirage_hello.kernels.triton.linear import linear

    linear(*tensors((64, 2560), (640, 2560), (640,), (64, 640)))


def geglu():
    from mirage_hello.kernels.triton.linear import geglu as run

    run(*tensors((256, 640), (1280, 640), (1280,)))


def layer_norm():
    from mirage_hello.kernels.triton.layer_norm import layer_norm as run

    run(*tensors((77, 320), (320,), (320,)))


def group_norm():
    from mirage_hello.kernels.triton.group_norm import group_norm_silu as run

    weight = tensors((320,))[0]
    run(images((1, 320, 8, 8))[0], 32, weight, weight)
    run(images((1, 320, 64, 64))[0], 32, weight, weight)
    run(torch.zeros(1, 320, 64, 64), 32)


def elementwise():
    from mirage_hello.kernels.triton.elementwise import axpby, frame_to_model, model_to_frame, silu

    x = tensors((2, 3, 64, 64))[0]
    silu(x)
    axpby(torch.zeros(2), x, 0.5, x)
    frame_to_model(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.float16)
    model_to_frame(x)


@pytest.mark.parametrize(
    ("launch", "count"),
    [
        (attention_40, 1),
        (attention_160, 1),
        (conv2d_split, 2),
        (conv2d_nchw, 1),
        (linear_split, 2),
        (geglu, 1),
        (layer_norm, 1),
        (group_norm, 7),
        (elementwise, 4),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_compiles(launch, count, compiled):
    """With the tiles that shapes of the model choose on an H200, 227 KiB of shared memory."""
    launch()
    assert len(compiled) == count
    for kernel in compiled:
        assert kernel.metadata.shared <= 227 * 1024, kernel.metadata.name
        assert kernel.asm["cubin"]
