"""VideoUNet: sizes, layout, dtypes, gradients, export, and Stable Diffusion 1.5's shape."""

import pytest
import torch
from torch import Tensor

from mirage_hello.model import PRESETS, UNetConfig, VideoUNet, build, checkpoint, preset
from mirage_hello.model.blocks import Transformer

SMALL = UNetConfig(
    channels=(32, 64), heads=(2, 4), transformers=(True, False), context_dim=24, groups=8
)


def small(seed: int = 0, config: UNetConfig = SMALL) -> VideoUNet:
    torch.manual_seed(seed)
    return VideoUNet(config).eval()


def inputs(h: int = 8, w: int = 8, batch: int = 2, width: int = 24) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 28, h, w, generator=generator)
    timesteps = torch.tensor([3.0, 700.0][:batch])
    context = torch.randn(batch, 5, width, generator=generator)
    return x.contiguous(memory_format=torch.channels_last), timesteps, context


@pytest.mark.parametrize(
    ("name", "expected"),
    # 880m: 859,520,964 (Stable Diffusion 1.5) + 24 x 320 x 9 + (320 + 1 + 1280 + 1) x 1280
    [("tiny", 10_692_552), ("391m", 389_763_140), ("880m", 859_520_964 + 69_120 + 2_050_560)],
)
def test_parameter_counts(name: str, expected: int) -> None:
    with torch.device("meta"):
        unet = VideoUNet(PRESETS[name].unet)
    assert sum(p.numel() for p in unet.parameters()) == expected


def test_391m_is_within_one_percent_of_its_name() -> None:
    with torch.device("meta"):
        unet = VideoUNet(PRESETS["391m"].unet)
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(391e6, rel=0.01)


def test_880m_has_the_names_of_stable_diffusion() -> None:
    with torch.device("meta"):
        state = checkpoint.unpack_attention(VideoUNet(PRESETS["880m"].unet).state_dict())
    own = {name for name in state if not name.startswith("history_embedding.")}
    assert len(own) == 686  # tensors in Stable Diffusion 1.5's U-Net
    shapes = {
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "down_blocks.1.resnets.0.conv_shortcut.weight": (640, 320, 1, 1),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.bias": (1280,),
        "up_blocks.0.resnets.2.conv1.weight": (1280, 2560, 3, 3),
        "up_blocks.3.resnets.0.conv1.weight": (320, 960, 3, 3),
        "up_blocks.2.upsamplers.0.conv.weight": (640, 640, 3, 3),
        "time_embedding.linear_1.weight": (1280, 320),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize("size", [(8, 8), (9, 5), (1, 1)])
def test_output_has_the_input_size_and_is_channels_last(size: tuple[int, int]) -> None:
    with torch.no_grad():
        y = small()(*inputs(*size))
    assert y.shape == (2, 4, *size)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_prepared_conditions_give_the_same_output() -> None:
    unet, (x, timesteps, context) = small(), inputs()
    noise = torch.tensor([0.0, 0.5])
    with torch.no_grad():
        biases, keys = unet.noise_biases(timesteps, noise), unet.context_keys(context)
        assert torch.equal(unet(x, biases, keys), unet(x, timesteps, context, noise))


def test_every_input_matters() -> None:
    unet, (x, timesteps, context) = small(), inputs()
    noise = torch.zeros(2)
    with torch.no_grad():
        y = unet(x, timesteps, context, noise)
        assert torch.equal(y, unet(x, timesteps, context))  # None is no noise
        for changed in (
            (x.flip(1), timesteps, context, noise),
            (x, timesteps + 50, context, noise),
            (x, timesteps, context + 1, noise),
            (x, timesteps, context, noise + 0.3),
        ):
            assert not torch.allclose(y, unet(*changed), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(dtype: torch.dtype) -> None:
    x, timesteps, context = inputs()
    with torch.no_grad():
        expected = small()(x, timesteps, context)
        got = small().to(dtype)(x.to(dtype), timesteps, context.to(dtype))
    assert got.dtype == dtype and got.isfinite().all()
    assert (got.float() - expected).abs().max() < 0.1 * expected.std()


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for flag in (False, True):
        unet = small()
        unet.gradient_checkpointing = flag
        unet(*inputs()).square().mean().backward()
        gradients.append([p.grad for p in unet.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None and torch.equal(plain, checkpointed)


def test_seeds_decide_the_weights_and_nothing_else_does() -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    first, second, other = (build("tiny", seed=s)[0].unet.conv_in.weight for s in (5, 5, 6))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_tiny_exports() -> None:
    unet = build("tiny")[0].unet
    config = unet.config
    _, timesteps, context = inputs(8, 8, 1, config.context_dim)
    example = (torch.randn(1, config.in_channels, 8, 8), timesteps, context)
    program = torch.export.export(unet, example)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*example), unet(*example))


def test_attention_reads_views_of_one_product() -> None:
    torch.manual_seed(0)
    block = Transformer(64, 4, 24, 8)
    assert {n for n, _ in block.named_parameters() if "attn1" in n} == {
        f"transformer_blocks.0.attn1.{n}"
        for n in ("to_qkv.weight", "to_out.0.weight", "to_out.0.bias")
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small()(torch.zeros(1, 4, 8, 8), *inputs(batch=1)[1:]), r"\[B, 28, h, w\]"),
        (lambda: small()(*inputs()[:2], torch.zeros(2, 5, 7)), r"\[B, L, 24\] \(got \[2, 5, 7\]"),
        (lambda: UNetConfig(channels=(320, 640)), "one entry a level"),
        (lambda: UNetConfig(channels=(100, 640, 1280, 1280)), "multiple of groups"),
        (lambda: preset("891m"), "did you mean '391m'|did you mean '880m'"),
        (lambda: small().style(0), "0 learned styles"),
    ],
)
def test_errors_say_got_and_expected(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
