"""Live changes: the next frame sees them, a fresh plan equals it, nothing is captured again.

The tests with a `device` run on a GPU too, there with the captured graph; on a CPU the function
runs in the arena.
"""

import numpy as np
import pytest
import torch
from stream_calls import clip, planned, run

from mirage_hello.model import FrameStream

CHANGES = {
    "prompt": lambda of: of.set_context(torch.linspace(-1, 1, 3 * 24).view(3, 24)),
    "longer prompt": lambda of: of.set_context(torch.linspace(-1, 1, 7 * 24).view(7, 24)),
    "style": lambda of: of.set_style(2),
    "strength": lambda of: setattr(of, "strength", 0.4),
    "history noise": lambda of: setattr(of, "history_noise", 0.4),
    "noise correlation": lambda of: setattr(of, "noise_correlation", 0.9),
    "guidance": lambda of: setattr(of, "guidance", 5.0),
    "guidance on": lambda of: setattr(of, "guidance", 5.0),
    "guidance off": lambda of: setattr(of, "guidance", None),
    "schedule": lambda of: setattr(of, "schedule", [2.0, 0.7, 0.0]),
    "weights": lambda of: of.set_deltas({WEIGHT: DELTA}, 0.5),
    "low-rank weights": lambda of: of.set_deltas({WEIGHT: (torch.ones(64, 2), torch.ones(2, 64))}),
    "folded weights": lambda of: of.set_deltas(FOLDED, 0.3),
}
REMADE = {"longer prompt", "guidance on", "guidance off"}  # the only ones with a new plan
MIDDLE = "unet.mid_block.attentions.0"
BLOCK = f"{MIDDLE}.transformer_blocks.0"
WEIGHT = f"{BLOCK}.attn1.to_out.0.weight"
DELTA = torch.linspace(-1, 1, 64 * 64).view(64, 64)
FOLDED = {  # into others: the prompt's matrices, LayerNorm's weights, the merged last products
    f"{BLOCK}.attn2.to_q.weight": DELTA,
    f"{BLOCK}.attn2.to_out.0.weight": DELTA.T,
    f"{BLOCK}.norm3.weight": DELTA[-1],
    f"{BLOCK}.ff.net.2.weight": DELTA.repeat(1, 4),
    f"{MIDDLE}.proj_out.weight": DELTA[:, :, None, None],
    "unet.conv_out.weight": torch.ones(4, 32, 3, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_frames_equals_a_fresh_plan(device, change: str, dtype) -> None:
    def make() -> FrameStream:
        guidance = 2.0 if change in ("guidance", "guidance off") else None
        return planned(device, steps=2, guidance=guidance, dtype=dtype)

    frames = clip(3)
    plain, live, fresh = make(), make(), make()
    CHANGES[change](fresh)
    expected = run(fresh, frames)
    assert np.array_equal(plain.push(frames[0]), live.push(frames[0]))
    plan = live.plan
    CHANGES[change](live)
    assert not np.array_equal(plain.push(frames[1]), live.push(frames[1]))
    assert (live.plan is plan) == (change not in REMADE)  # nothing is captured again
    live.reset()
    assert np.array_equal(run(live, frames), expected)


def test_deltas_leave_without_a_trace(device: torch.device) -> None:
    of, frames = planned(device, dtype=torch.bfloat16), clip(2)
    expected = run(of, frames)
    of.set_deltas({WEIGHT: DELTA}, 0.3)
    of.set_deltas({"unet.conv_in.weight": torch.ones(32, 28, 3, 3)})
    of.reset()
    assert not np.array_equal(run(of, frames), expected)
    of.set_deltas({})
    of.reset()
    assert np.array_equal(run(of, frames), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda of: of.set_deltas({"unet.conv_im.weight": DELTA}), "did you mean unet.conv_in"),
        (lambda of: of.set_deltas({WEIGHT: DELTA[:2]}), r"must be \[64, 64\] \(got \[2, 64\]"),
        (lambda of: setattr(of, "schedule", [1.0, 0.0]), "2 steps is 3 falling noise levels"),
        (lambda of: setattr(of, "schedule", [1.0, 2.0, 0.0]), "falling"),
        (lambda of: of.set_context(torch.zeros(3, 5)), r"\[L, 24\]"),
        (lambda of: setattr(of, "history_noise", 11), "from 0 to 10"),
        (lambda of: setattr(of, "noise_correlation", 1.1), "from 0 to 1"),
    ],
)
def test_a_refused_change_changes_nothing(call, message: str) -> None:
    of, frames = planned(steps=2), clip(2)
    expected = run(planned(steps=2), frames)
    first = of.push(frames[0])
    with pytest.raises(ValueError, match=message):
        call(of)
    assert np.array_equal([first, of.push(frames[1])], expected)


def test_guidance_is_the_equation(device: torch.device) -> None:
    """uncond + scale (cond - uncond): scale 1 is the conditional prediction alone."""
    frames = clip(2)
    plain = run(planned(device, dtype=torch.float32, policy="torch"), frames)
    guided = run(planned(device, dtype=torch.float32, policy="torch", guidance=1.0), frames)
    assert np.abs(np.array(plain, int) - np.array(guided, int)).mean() < 0.1
