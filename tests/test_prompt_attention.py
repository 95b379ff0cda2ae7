"""Cross-attention of a folded prompt against attention itself, and the softmax of its product."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stream_calls import clip, planned, run
from test_live_changes import CHANGES

from mirage_hello.kernels import linear_sm90a, prompt_attention, row_sums
from mirage_hello.kernels.linear_tile import Tile
from mirage_hello.ptx import assembler


def problem(tokens: int, channels: int, heads: int, rows: int, dtype=torch.float64) -> dict:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    return {
        "x": 2 * draw(1, rows, channels) + 0.5,
        "gamma": 1 + 0.2 * draw(channels),
        "beta": 0.2 * draw(channels),
        "to_q": draw(channels, channels) * channels**-0.5,
        "keys_values": draw(1, tokens, 2 * channels),
        "to_out": draw(channels, channels) * channels**-0.5,
    }


def attended(x, gamma, beta, to_q, keys_values, to_out, heads: int) -> torch.Tensor:
    """The layers one after another: layer_norm, q, attention, projection out."""
    q = F.layer_norm(x, x.shape[-1:], gamma, beta) @ to_q.T
    k, v = keys_values.unflatten(-1, (2, heads, -1)).unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (q.unflatten(-1, (heads, -1)), k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2) @ to_out.T


def folded(p: dict, heads: int) -> prompt_attention.Prompt:
    return prompt_attention.fold(
        p["gamma"], p["beta"], p["to_q"], p["keys_values"][0], p["to_out"], heads
    )


def error(out: torch.Tensor, truth: torch.Tensor) -> float:
    return ((out.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(("tokens", "channels", "heads"), [(77, 320, 8), (1, 64, 2), (13, 96, 3)])
def test_folding_changes_nothing(tokens: int, channels: int, heads: int) -> None:
    p = problem(tokens, channels, heads, rows=9)
    prompt = folded(p, heads)
    assert prompt.width >= tokens and len(prompt.scores) == heads * prompt.width
    probabilities = prompt_attention.probabilities_torch(p["x"], prompt, 1e-5)
    assert torch.allclose(probabilities.unflatten(-1, (heads, -1)).sum(-1), torch.ones(1).double())
    assert not probabilities.unflatten(-1, (heads, -1))[..., tokens:].any()
    assert error(probabilities @ prompt.values.T, attended(**p, heads=heads)) < 1e-5


@pytest.mark.parametrize("tile", [None, Tile(2, 80), Tile(2, 160, pingpong=True)])
@pytest.mark.parametrize("summed", [False, True])
def test_the_emulated_product_and_its_softmax(tile: Tile | None, summed: bool) -> None:
    heads, tokens = 2, 77
    p = problem(tokens, 64, heads, rows=70)
    truth = attended(**p, heads=heads)
    half = {name: t.bfloat16() for name, t in p.items()}
    prompt, x = folded(half, heads), half["x"]
    sums = None
    if summed:  # x as a linear layer leaves it: the identity of x, and its sums
        made, sums = linear_sm90a.linear_summed(x, torch.eye(64).bfloat16())
        assert torch.equal(made, x)
    columns = prompt.columns
    out = linear_sm90a.softmaxed(x, prompt.scores, columns, prompt.width, 1e-5, sums, tile)
    assert not out.unflatten(-1, (heads, -1))[..., tokens:].any()
    plain = attended(**half, heads=heads)
    product = out @ prompt.values.T
    assert error(product, truth) <= 2 * error(plain, truth), error(plain, truth)


def test_large_scores_and_padding_do_not_overflow() -> None:
    p = problem(5, 64, 2, rows=64)
    p["to_q"] *= 300.0  # scores of thousands: one token takes all
    half = {name: t.bfloat16() for name, t in p.items()}
    prompt = folded(half, 2)
    out = prompt_attention.probabilities(half["x"], prompt, 1e-5)
    largest = out.unflatten(-1, (2, -1)).amax(-1)
    assert torch.isfinite(out).all() and (largest > 0.9).float().mean() > 0.9


def test_the_self_test_tells_right_from_wrong(monkeypatch) -> None:
    cpu = torch.device("cpu")
    assert prompt_attention.self_test(cpu, torch.bfloat16) < prompt_attention.LARGEST_ERROR / 3
    right = linear_sm90a.softmaxed
    for wrong in (lambda *a: 0 * right(*a), lambda *a: right(*a).roll(1, -1)):
        monkeypatch.setattr(linear_sm90a, "softmaxed", wrong)
        assert prompt_attention.self_test(cpu, torch.bfloat16) > prompt_attention.LARGEST_ERROR


@pytest.mark.parametrize("error", [2 * prompt_attention.LARGEST_ERROR, float("nan")])
def test_a_kernel_that_fails_is_not_used_and_that_is_said(error, monkeypatch, caplog) -> None:
    monkeypatch.setattr(prompt_attention, "self_test", lambda device, dtype: error)
    monkeypatch.setattr(logging.getLogger("mirage_hello"), "propagate", True)
    assert not prompt_attention.proven.__wrapped__(torch.device("cuda"), torch.bfloat16)
    assert f"an error of {error:g}" in caplog.text


def test_widths_are_those_of_tiles() -> None:
    assert prompt_attention.width_of(77) == 80 and prompt_attention.width_of(3) == 8
    for tokens in range(1, 257):
        width = prompt_attention.width_of(tokens)
        assert width and width % 8 == 0 and width >= tokens
        tile = linear_sm90a.choose_softmax_tile(4096, 8 * width, 5, width)
        assert tile.block_n % width == 0 and tile.split == 1
    assert prompt_attention.width_of(257) is None
    with pytest.raises(ValueError, match="at most 256 tokens"):
        folded(problem(257, 64, 2, rows=1), 2)
    with pytest.raises(ValueError, match=r"heads divide C \(got \[5, 128\], C=64, heads=3\)"):
        folded(problem(5, 64, 2, rows=1), 3)
    weight, columns = torch.zeros(24, 64).bfloat16(), torch.zeros(24, 2)
    with pytest.raises(ValueError, match="divides N"):
        linear_sm90a.softmaxed(torch.zeros(8, 64).bfloat16(), weight, columns, 16, 1e-5)


@pytest.mark.parametrize("change", ["prompt", "folded weights", "strength"])
def test_a_change_between_two_frames_of_emulated_kernels(change: str) -> None:
    """Everything that is made of other weights follows them in place: equal to a fresh plan's."""
    policy = ("ptx-emulated", "torch")
    frames = clip(2, 16, 16)

    def make():
        return planned(dtype=torch.bfloat16, policy=policy)

    live, fresh = make(), make()
    CHANGES[change](fresh)
    expected = run(fresh, frames)
    first = run(live, frames)
    plan = live.plan
    assert any("softmax" in launch.name for launch in plan.launches)
    CHANGES[change](live)
    live.reset()
    assert np.array_equal(run(live, frames), expected) and live.plan is plan
    assert not np.array_equal(first, expected)


@pytest.mark.parametrize(("m", "k"), [(4096, 320), (1024, 640), (256, 1280), (64, 1280)])
def test_chosen_tiles_assemble_without_spills(m: int, k: int) -> None:
    """77 tokens and 8 heads, behind a linear layer that leaves sums of 80 columns."""
    tile = linear_sm90a.choose_softmax_tile(m, 640, k // 64, 80)
    fitted = tile.fitted(tile.loads(tile.tiles(m, 640, False)[0], k // 64), factors=True)
    merging = row_sums.RowSums(torch.empty(1, k // 80, 2), 80).variables(k)
    program = linear_sm90a.program("linear", fitted, "bf16", norm=True, softmax=80, **merging)
    assert program.text.isascii()
    report = assembler.ptxas(program.text, "sm_90a", ("-v",))[1]
    assert " 0 bytes spill stores, 0 bytes spill loads" in report and "C75" not in report


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "channels"), [(4096, 320), (1024, 640), (256, 1280), (64, 1280)])
def test_on_the_gpu(m: int, channels: int) -> None:
    p = {name: t.cuda() for name, t in problem(77, channels, 8, m).items()}
    truth = attended(**p, heads=8)
    half = {name: t.bfloat16() for name, t in p.items()}
    plain = attended(**half, heads=8)
    prompt = folded(half, 8)
    outs = [prompt_attention.probabilities(half["x"], prompt, 1e-5) for _ in range(2)]
    assert torch.equal(*outs)
    assert error(outs[0] @ prompt.values.T, truth) <= 2 * error(plain, truth)
