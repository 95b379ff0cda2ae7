"""The emulator is quick enough to debug with: kernels of the model within 20 s on one core."""

import time

import pytest
import torch

from mirage_hello.kernels import ops, use
from mirage_hello.ptx.emulator import launch, parse


def group_norm_silu():
    x = torch.randn(1, 64, 16, 16).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.ones(64).bfloat16()
    return ops.group_norm_silu(x, 32, weight, weight)


def attention():
    q, k, v = torch.randn(3, 1, 128, 2, 40).bfloat16()
    return ops.attention(q, k, v)


def conv2d():
    x = torch.randn(1, 32, 16, 16).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, 32, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    return ops.conv2d(x, weight, padding=1)


@pytest.mark.parametrize("case", [group_norm_silu, attention, conv2d], ids=lambda f: f.__name__)
def test_within_20_seconds(case):
    begin = time.process_time()
    with use("ptx-emulated"):
        case()
    assert time.process_time() - begin < 20


def test_time_hardly_grows_with_the_threads_of_an_instruction():
    text = """.version 7.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 p_x) {
    .reg .b32 %i, %n, %v; .reg .pred %p;
    mov.u32 %i, 0; mov.u32 %v, %tid.x;
LOOP: mad.lo.u32 %v, %v, %v, %i; add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 300; @%p bra LOOP;
    ret; }"""
    seconds = {}
    for blocks in (1, 16):
        begin = time.process_time()
        report = launch(parse(text), "k", blocks, 256, [None])
        seconds[blocks] = time.process_time() - begin
        assert report.counts.totals()["thread_instructions"] == blocks * 256 * (4 * 300 + 2)
    assert seconds[16] < 8 * seconds[1] + 0.1
