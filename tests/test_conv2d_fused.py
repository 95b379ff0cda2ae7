"""conv2d_fused: a norm of the input and statistics of the output, in the emulator and on a GPU."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mirage_hello import reference
from mirage_hello.kernels import conv2d_fused as page
from mirage_hello.kernels import parity
from mirage_hello.kernels.conv2d_sm90a import candidates, conv2d_fused_sm90a, program
from mirage_hello.kernels.conv2d_tiles import NORM_WIDEST, Tile
from mirage_hello.ptx import assembler

PATCH = Tile(1, 32, patch=True)
# Tiles that between them render every branch of ptx/sums.j2, with a unit of channels: slices that
# cut no unit, that share units, that are empty; the last column tile past O.
SUMMED = [
    (PATCH, 10),
    (PATCH, 4),
    (Tile(2, 80, patch=True), 10),
    (Tile(2, 48, split=3, patch=True), 10),
    (Tile(2, 96, split=4, patch=True), 10),
    (Tile(2, 88, split=4, patch=True), 10),
    (Tile(1, 72, split=3, patch=True), 10),
    (Tile(2, 40, patch=True), 10),
    (Tile(3, 32, split=4, patch=True), 4),
    (Tile(1, 64, split=5, patch=True), 10),
    (Tile(2, 32, split=2), 10),
    (Tile(1, 32, blocks_per_sm=2, patch=True), 20),
    (replace(PATCH, persistent=True), 16),
]


def draw(*shape, dtype=torch.bfloat16, scale=1.0, device="cpu"):
    values = (scale * torch.randn(shape, device=device)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def inputs(b, c, h, w, o, dtype=torch.bfloat16, device="cpu", window=3, stride=1, offset=0.0):
    """Arguments of conv2d with everything in the epilogue; means of `offset` in the output."""
    size = {"dtype": dtype, "device": device}
    p, q = ((n + 2 * (window // 2) - window) // stride + 1 for n in (h, w))
    weight = draw(o, c, window, window, scale=(window**2 * c) ** -0.5, **size)
    args = draw(b, c, h, w, **size), weight, draw(o, **size) + offset
    return *args, stride, window // 2, draw(b, o, **size), draw(b, o, p, q, **size)


def check_sums(out, sums, unit):
    """The merged sums are those of the output as it was rounded."""
    found = page.merged(sums.double())
    count, mean, m2 = page.merged(page.sums_torch(out.double(), unit).double()).unbind(-1)
    deviation = (m2 / count).sqrt()
    assert torch.equal(found[..., 0], count)
    assert ((found[..., 1] - mean).abs() <= 1e-6 * mean.abs() + 1e-5 * deviation).all()
    assert ((found[..., 2] / m2.clamp_min(1e-30) - 1).abs() <= 1e-4)[m2 > 0].all()


def in_double(value):
    if isinstance(value, page.Norm):
        return replace(value, **{n: in_double(v) for n, v in vars(value).items()})
    return value.double() if isinstance(value, torch.Tensor) else value


def check_output(args, out, **options):
    plain = page.conv2d_fused_torch(*args, **options)[0]
    doubled = {name: in_double(value) for name, value in options.items()}
    truth = page.conv2d_fused_torch(*map(in_double, args), **doubled)[0]
    result = parity.judge(out, plain, truth)
    assert result.passed, result


def norm_of(x, groups, skip=None, unit=10, parts=3, silu=True):
    """A norm of cat([x, skip]), whose sums come in several parts of unequal height."""

    def sums(t, n):
        return torch.cat([page.sums_torch(rows, unit) for rows in t.chunk(n, 2)], 1)

    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    weight, bias = (draw(channels, dtype=x.dtype, device=x.device) for _ in range(2))
    skip_sums = None if skip is None else sums(skip, 2)
    return page.Norm(sums(x, parts), groups, weight, bias, skip_sums, silu=silu)


@pytest.mark.parametrize(("tile", "unit"), SUMMED, ids=str)
def test_emulated_sums(tile, unit):
    """Edges cut in both directions, O past the last tile."""
    args = inputs(2, 72, 11, 9, 80)
    out, sums = conv2d_fused_sm90a(*args, unit=unit, tile=tile)
    check_output(args, out)
    check_sums(out, sums, unit)


def test_emulated_sums_of_large_means():
    args = inputs(1, 16, 9, 9, 40, torch.float16, offset=1000.0)
    out, sums = conv2d_fused_sm90a(*args, unit=10, tile=PATCH)
    check_sums(out, sums, 10)


def test_emulated_sums_of_four_parities():
    x, weight = draw(2, 24, 5, 9), draw(40, 24, 3, 3, scale=0.07)
    out, sums = conv2d_fused_sm90a(x, weight, None, 1, 1, upsample=True, unit=10, tile=PATCH)
    check_output((x, weight, None, 1, 1), out, upsample=True)
    check_sums(out, sums, 10)


def test_emulated_silu_precedes_the_sums():
    args = inputs(1, 24, 9, 7, 32, torch.float16, stride=2)
    out, sums = conv2d_fused_sm90a(*args, unit=4, activation="silu", tile=Tile(1, 32))
    check_output(args, out, activation="silu")
    check_sums(out, sums, 4)


# Tiles of every branch of ptx/normalise.j2, with groups of 80 channels.
NORMALISED = [
    (PATCH, 8),
    (Tile(2, 80, patch=True), 4),
    (Tile(2, 48, split=3, patch=True), 2),
    (Tile(3, 64, split=4, patch=True), 1),
    (replace(PATCH, persistent=True), 8),
]

WIDEST = [Tile(groups, block_n, patch=True) for groups, block_n in NORM_WIDEST.items()]


@pytest.mark.parametrize(("tile", "groups"), NORMALISED, ids=str)
def test_emulated_norm(tile, groups):
    """Padding is 0 after the activation; channels that end inside a block of 64."""
    args = inputs(2, 80, 11, 9, 40)
    norm = norm_of(args[0], groups)
    out, sums = conv2d_fused_sm90a(*args, norm=norm, unit=10, tile=tile)
    check_output(args, out, norm=norm)
    check_sums(out, sums, 10)


@pytest.mark.parametrize("tile", [PATCH, Tile(2, 48, 3, patch=True), NORMALISED[-1][0]], ids=str)
@pytest.mark.parametrize("upsample", [False, True])
def test_emulated_norm_of_two_inputs(tile, upsample):
    """The third of four groups has channels of both."""
    x, skip, weight = draw(2, 80, 5, 9), draw(2, 40, 5, 9), draw(24, 120, 3, 3, scale=0.03)
    args = (x, weight, None, 1, 1, None, None, skip, upsample)
    norm = norm_of(x, 4, skip)
    check_output(args, conv2d_fused_sm90a(*args, norm=norm, tile=tile)[0], norm=norm)


@pytest.mark.parametrize(
    ("dtype", "window", "groups", "options"),
    [
        (torch.float16, 3, 4, {}),
        (torch.bfloat16, 3, 4, {"silu": False}),
        (torch.bfloat16, 1, 4, {"silu": False}),
        (torch.float16, 2, 40, {"unit": 2, "parts": 1}),
    ],
)
def test_emulated_norm_kinds(dtype, window, groups, options):
    args = list(inputs(1, 80, 9, 10, 32, dtype, window=window)[:5])
    args[0] = args[0] + 20
    norm = norm_of(args[0], groups, **options)
    check_output(args, conv2d_fused_sm90a(*args, norm=norm, tile=PATCH)[0], norm=norm)


def test_emulated_norm_of_many_parts():
    """More parts than a block merges itself, some of them empty."""
    args = inputs(2, 40, 9, 9, 32)[:5]
    norm = norm_of(args[0], 4)
    parts = norm.sums / torch.tensor([70.0, 1.0, 70.0, 1.0])
    parts = parts.repeat(1, 70, 1, 1).clone()
    parts = torch.cat([parts, parts * torch.tensor([0.0, 1.0, 0.0, 0.0])], 1)
    many = replace(norm, sums=parts)
    out, _ = conv2d_fused_sm90a(*args, norm=many, tile=PATCH)
    check_output(args, out, norm=norm)


def test_emulated_chain():
    """What one convolution leaves, the next one reads: a residual block."""
    first = inputs(1, 40, 9, 9, 40)
    x, norm = first[0], norm_of(first[0], 4)
    h, sums = conv2d_fused_sm90a(*first[:6], norm=norm, unit=10, tile=Tile(1, 32, 1, patch=True))
    second = (h, *inputs(1, 40, 9, 9, 40)[1:5], None, x)
    again = replace(norm, sums=sums)
    out, _ = conv2d_fused_sm90a(*second, norm=again, tile=PATCH)
    check_output(second, out, norm=replace(norm, sums=page.sums_torch(h, 10)))


def test_emulated_sums_every_time_the_same():
    args = inputs(1, 128, 8, 8, 40)
    tile = Tile(1, 48, split=2, patch=True)
    (out, sums), again = (conv2d_fused_sm90a(*args, unit=10, tile=tile) for _ in range(2))
    assert torch.equal(out, again[0]) and torch.equal(sums, again[1])


@pytest.mark.parametrize(("tile", "unit"), SUMMED, ids=str)
def test_assembles_without_spills(tile, unit):
    fitted = tile.fitted(4, 3, 3)
    text = program(fitted, 3, 3, 1, "bf16", unit=unit, silu=True).text
    report = assembler.ptxas(text, "sm_90a", ("-v",))[1]
    assert " 0 bytes spill stores, 0 bytes spill loads" in report and "C75" not in report


@pytest.mark.parametrize("tile", [tile for tile, _ in NORMALISED] + WIDEST, ids=str)
def test_norm_assembles_without_spills(tile):
    fitted = tile.fitted(4, 3, 3, 4096)
    text = program(fitted, 3, 3, 1, "bf16", norm_silu=True).text
    report = assembler.ptxas(text, "sm_90a", ("-v",))[1]
    assert " 0 bytes spill stores, 0 bytes spill loads" in report and "C75" not in report


def test_a_slice_narrower_than_a_unit_is_an_error():
    with pytest.raises(ValueError, match="cannot sum 40 channels"):
        tile = Tile(1, 64, split=5, patch=True)
        conv2d_fused_sm90a(*inputs(1, 64, 4, 4, 80), unit=40, tile=tile)


# torch's form


def test_sums_make_the_group_norm():
    """Over a skip whose channels share a group with x's."""
    x, skip = torch.randn(2, 40, 6, 5).double() + 50, torch.randn(2, 20, 6, 5).double()
    scale, shift = torch.randn(60).double(), torch.randn(60).double()
    sums = (page.sums_torch(t, 10) for t in (x, skip))
    norm = page.Norm(next(sums), 2, scale, shift, next(sums))
    weight = torch.randn(10, 60, 3, 3).double()
    args = (x, weight, None, 1, 1, None, None, skip)
    out, found = page.conv2d_fused(*args, norm=norm, unit=10, backend="torch")
    joined = F.silu(reference.group_norm(torch.cat([x, skip], 1), 2, scale, shift))
    expected = reference.conv2d(joined, weight, None, 1, 1)
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-3)
    check_sums(out, found, 10)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"unit": 3}, "unit must be even"),
        ({"unit": 24}, "unit must be even and divide O"),
        ({"activation": "relu"}, "activation must be 'silu'"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"weight": draw(40, 24, 3, 3)}, "weight C=24"),
        ({"stride": 0}, "stride"),
        ({"x": draw(1, 16, 4, 4, dtype=torch.float32)}, "convert x and weight|dtype"),
    ],
)
def test_refusals(change, reason):
    values = {"x": draw(1, 16, 4, 4), "weight": draw(40, 16, 3, 3), "padding": 1} | change
    with pytest.raises((TypeError, ValueError), match=reason):
        page.conv2d_fused(**values)


def test_the_ptx_backend_says_what_it_does_not_take():
    x, weight = (draw(*shape, dtype=torch.float32) for shape in ((1, 16, 4, 4), (40, 16, 3, 3)))
    with pytest.raises(TypeError, match="ptx takes bfloat16 or float16"):
        page.conv2d_fused(x, weight, padding=1, backend="ptx")
    with pytest.raises(ValueError, match=r"conv2d_fused: .*; choose backend 'torch'"):
        page.conv2d_fused(draw(1, 3, 4, 4), draw(40, 3, 3, 3), padding=1, backend="ptx")


def test_a_norm_needs_stride_1():
    x = draw(1, 40, 4, 4)
    with pytest.raises(ValueError, match="need stride 1"):
        page.conv2d_fused(x, draw(8, 40, 3, 3), None, 2, 1, norm=norm_of(x, 4))


def test_sums_that_do_not_fit_the_groups_are_an_error():
    x, norm = draw(1, 40, 4, 4), draw(40)
    sums = page.sums_torch(x, 20)
    with pytest.raises(ValueError, match="groups of 10 channels need sums of one divisor"):
        page.conv2d_fused(x, draw(8, 40, 3, 3), padding=1, norm=page.Norm(sums, 4, norm, norm))


@pytest.mark.gpu
def test_random_sums_on_the_gpu(seed):
    dice = random.Random(seed)
    for _ in range(40):
        b, h, w, o = dice.randint(1, 3), dice.randint(1, 70), dice.randint(1, 70), 80
        c, window, stride = 8 * dice.randint(1, 40), dice.choice([1, 3]), dice.choice([1, 1, 2])
        args = inputs(b, c, h, w, o, torch.bfloat16, "cuda", window, stride)
        fits = candidates(window**2 * -(-c // 64), window, window, stride)
        tile = dice.choice([t for t in fits if t.sum_slots(10)])
        out, sums = conv2d_fused_sm90a(*args, unit=10, tile=tile)
        check_output(args, out)
        check_sums(out, sums, 10)


@pytest.mark.gpu
@pytest.mark.parametrize("skip_channels", [0, 160])
def test_random_norms_on_the_gpu(skip_channels, seed):
    dice = random.Random(seed)
    for _ in range(20):
        b, h, w = dice.randint(1, 3), dice.randint(1, 70), dice.randint(1, 70)
        c, o = 160 * dice.randint(1, 4), 40 * dice.randint(1, 5)
        x, skip = (draw(b, n, h, w, device="cuda") + 3 for n in (c, skip_channels))
        weight = draw(o, c + skip_channels, 3, 3, scale=(9 * c) ** -0.5, device="cuda")
        args = (x, weight, None, 1, 1, None, None, skip if skip_channels else None)
        norm = norm_of(x, 16, args[-1])
        out, sums = conv2d_fused_sm90a(*args, norm=norm, unit=10)
        check_output(args, out, norm=norm)
        check_sums(out, sums, 10)
        again, _ = conv2d_fused_sm90a(*args, norm=norm, unit=10)
        assert torch.equal(out, again)
