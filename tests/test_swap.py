"""swap: the registry's kernels in somebody else's model, and out again."""

import diffusers
import pytest
import torch
from torch import nn

from mirage_hello.kernels import BackendError, ops, swap, unswap


class Counter:
    """Counts the calls of every op while a test runs."""

    def __init__(self, monkeypatch):
        self.calls = {}
        original = type(ops.silu).__call__

        def counted(op, *args, **kwargs):
            self.calls[op.name] = self.calls.get(op.name, 0) + 1
            return original(op, *args, **kwargs)

        monkeypatch.setattr(type(ops.silu), "__call__", counted)


@pytest.fixture
def counter(monkeypatch):
    return Counter(monkeypatch)


def small_model():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),  # grouped: stays torch's
        nn.SiLU(),
        nn.Flatten(2),
        nn.LayerNorm(64),
        nn.Linear(64, 8),
    )


def test_user_model_keeps_its_answer_and_its_keys(counter):
    model, x = small_model(), torch.randn(2, 3, 8, 8)
    expected, keys = model(x), list(model.state_dict())
    assert swap(model, "torch") is model
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == keys
    used = {"conv2d": 1, "group_norm_silu": 1, "silu": 1, "layer_norm": 1, "linear": 1}
    assert counter.calls == used
    unswap(model)
    torch.testing.assert_close(model(x), expected)
    assert counter.calls == used


def test_policy_holds_inside_forward_and_nowhere_else():
    model, x = small_model(), torch.randn(2, 3, 8, 8)
    swap(model, {"linear": "cupy"})
    with pytest.raises(BackendError, match="linear: backend cupy"), torch.no_grad():
        model(x)
    ops.linear(torch.randn(2, 4), torch.randn(3, 4))
    swap(model, "torch")  # a second swap replaces the first
    model(x)


def test_swapped_model_trains():
    model, x = swap(small_model()), torch.randn(2, 3, 8, 8)
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_diffusers_unet(counter):
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8,
    ).eval()  # fmt: skip
    inputs = torch.randn(1, 4, 8, 8), 7, torch.randn(1, 5, 16)
    with torch.no_grad():
        expected = model(*inputs).sample
        torch.testing.assert_close(swap(model)(*inputs).sample, expected, atol=2e-5, rtol=1e-4)
    assert {"attention", "conv2d", "group_norm", "linear", "layer_norm"} <= set(counter.calls)
    calls = dict(counter.calls)
    with torch.no_grad():
        torch.testing.assert_close(unswap(model)(*inputs).sample, expected)
    assert counter.calls == calls
