"""What the tests of the attention kernels share: inputs, and the parity rule."""

import torch

from mirage_hello.kernels import parity
from mirage_hello.kernels.attention import attention_torch
from mirage_hello.reference import attention

BF16, F16 = torch.bfloat16, torch.float16


def draw(queries, keys, head_dim, dtype=BF16, device="cpu", batch=1, heads=1):
    q = torch.randn(batch, queries, heads, head_dim, device=device).to(dtype)
    k, v = (torch.randn(batch, keys, heads, head_dim, device=device).to(dtype) for _ in range(2))
    return q, k, v


def assert_right(out, q, k, v, scale=None):
    truth = attention(q.double(), k.double(), v.double(), scale)
    result = parity.judge(out, attention_torch(q, k, v, scale), truth)
    assert result.passed, result


def steep(k, largest):
    """Keys whose scores fall from the first to the last: a lazy maximum is far too low."""
    slope = torch.linspace(largest, largest / 10, k.shape[1], device=k.device)
    return (k.float() * slope[None, :, None, None]).to(k.dtype)
