"""group_norm_apply: GroupNorm (and SiLU) of cat([x, skip]) whose statistics are known, NHWC.

    y = act((x - mean_g) / sqrt(var_g + eps) * weight_c + bias_c)         or e4m3(y / out_scale)

The convolution that made x left its sums (conv2d_fused.Norm says what they are), so x is read once
and written once, and the concatenation is never made: it is what is written.

Not an op of the registry: its arguments exist only between two kernels of one chain.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_hello.kernels import tuning
from mirage_hello.kernels.conv2d_norm import Norm, merged_early
from mirage_hello.kernels.elementwise import SUFFIX, overlaps
from mirage_hello.kernels.group_norm_launch import nhwc_magic
from mirage_hello.ptx import loader
from mirage_hello.reference import normalization as reference

MULTIPROCESSORS = 132
SECTOR_BYTES = 32  # rows of a slab start and end with whole ones
ROW_BYTES = 128  # and are at least this long, where the groups allow
MAX_VECS = 8
SMEM_BYTES = 228 * 1024  # of a multiprocessor
MOST_TOGETHER = 4  # more come in several waves anyway, which even out


@dataclass(frozen=True)
class Cut:
    """How x is cut: `slab_groups` groups by `vecs` accesses of each of `threads` threads.

    together: blocks that a multiprocessor may hold at once; 0: as many as fit.
    """

    slab_groups: int
    threads: int
    vecs: int
    together: int = 0

    def __post_init__(self) -> None:
        threads = self.threads % 32 == 0 and 32 <= self.threads <= 1024
        if not (threads and self.slab_groups > 0 < self.vecs <= MAX_VECS and self.together >= 0):
            raise ValueError(
                f"group_norm_apply: a cut is 1 group or more, 32 to 1024 threads in whole warps, "
                f"1 to {MAX_VECS} accesses, and together 0 or more (got {self}); leave cut out"
            )

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory that nothing uses: it keeps more blocks away."""
        return SMEM_BYTES // (self.together + 1) if self.together else 0


def group_norm_apply(
    x: Tensor,
    norm: Norm,
    skip: Tensor | None = None,
    cut: Cut | None = None,
    out_scale: float | None = None,
) -> Tensor:
    """act((x - mean_g) / sqrt(var_g + eps) * weight_c + bias_c) of cat([x, skip]).

    Args:
        x: [B, C, H, W] channels_last, 16-byte aligned; C a multiple of 16 bytes.
        norm: sums [B, S, C / unit, 4] of x, skip_sums of the skip, groups of both together.
        skip: [B, C', H, W] like x, or None.
        cut: overrides the choice.
        out_scale: None, or the unit of an e4m3 output for conv2d_fp8 (its `x_scale`): values are
            divided by it and rounded once, saturated at 448 units.

    Returns:
        [B, C + C', H, W] channels_last, x's dtype, or float8_e4m3fn with out_scale.

    Raises:
        ValueError: a layout, sums that do not fit the groups, an out_scale that is not above 0.

    Numerics: sums merged in float32, the squares measured from the merged mean; one rounding.
    """
    shape = _check(x, norm, skip)
    if out_scale is not None and not 0 < out_scale < math.inf:
        raise ValueError(
            f"group_norm_apply: out_scale must be above 0 (got {out_scale}); calibrate it"
        )
    dtype = x.dtype if out_scale is None else torch.float8_e4m3fn
    out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    norm = merged_early(norm, x)  # else every block would read thousands of entries
    images, channels, *spatial = shape
    pixels, width = math.prod(spatial), channels // norm.groups
    op = "group_norm_apply" + ("_to_e4m3" if out_scale is not None else "")
    cut = cut or choose_cut(images, pixels, norm.groups, width * x.element_size(), op)
    columns = cut.slab_groups * width * x.element_size() // 16
    if norm.groups % cut.slab_groups or columns > cut.threads:
        raise ValueError(
            f"group_norm_apply: slab_groups must divide the groups, a slab's 16-byte columns must "
            f"not exceed the threads (got {cut}, {norm.groups} groups, {columns} columns)"
        )
    chunk = cut.threads // columns * cut.vecs
    program = _program(x, norm, skip, cut, columns, out_scale is not None)
    grid = (-(-pixels // chunk), norm.groups // cut.slab_groups, images)
    args = (x, skip, norm.sums, norm.skip_sums, norm.weight, norm.bias, out, pixels, norm.eps)
    name = "group_norm_apply" if out_scale is None else "group_norm_apply_to_e4m3"
    scale = () if out_scale is None else (1.0 / out_scale,)
    entry = f"{name}_{SUFFIX[x.dtype]}"
    program.launch(entry, grid, (cut.threads,), (*args, *scale), cut.smem_bytes)
    return out


def choose_cut(
    images: int, pixels: int, groups: int, group_bytes: int, op: str = "group_norm_apply"
) -> Cut:
    """The measured cut of this shape, else the rule's; op: the name that it was measured under.

    Raises:
        ValueError: a pixel's channels are no multiple of 16 bytes.
    """
    rule = rule_cut(images, pixels, groups, group_bytes)
    names = {"images": images, "pixels": pixels, "groups": groups, "group_bytes": group_bytes}
    return tuning.tile_for(
        op,
        names,
        lambda: candidates(rule, groups, group_bytes),
        lambda cut: distance(cut, rule),
    )


def distance(cut: Cut, rule: Cut) -> float:
    """How far a cut is from the rule's: doublings of each number, and of a block's work."""
    pairs = ((c.slab_groups, c.threads, c.vecs, c.threads * c.vecs) for c in (cut, rule))
    doublings = sum(abs(math.log2(a / b)) for a, b in zip(*pairs, strict=True))
    return doublings + abs(cut.together - rule.together)


def candidates(rule: Cut, groups: int, group_bytes: int) -> list[Cut]:
    """The rule's cut, and those with other slabs, threads, accesses and shares."""
    slabs = [g for g in range(1, groups + 1) if groups % g == 0 and g * group_bytes % 16 == 0]
    near = [g for g in slabs if rule.slab_groups <= 4 * g <= 16 * rule.slab_groups]

    def divides(columns: int, threads: int) -> bool:  # exactly, by COLUMN_MAGIC
        return columns <= threads and (threads - 1) * (-65536 % columns) < 65536

    found = [
        Cut(slab_groups, threads, vecs, together)
        for slab_groups in near
        for threads in sorted({128, 256, 512, rule.threads})
        for vecs in range(1, MAX_VECS + 1)
        for together in range(MOST_TOGETHER + 1)
        if divides(slab_groups * group_bytes // 16, threads)
    ]
    return [rule, *(cut for cut in found if cut != rule)]


def rule_cut(images: int, pixels: int, groups: int, group_bytes: int) -> Cut:
    """Slabs of whole sectors, three blocks a multiprocessor where there is enough to do.

    A block merges the sums of its groups only, while its pixels arrive: narrow slabs are cheap. A
    multiprocessor holds no more blocks than its share: those that start under the kernel before
    crowd where it leaves room, eight on one while others wait (640 @32: 2.58 us, 2.04 with 3). Few
    small ones leave the shared memory to the convolution behind them, which loads weights early.
    """
    fit = [g for g in range(1, groups + 1) if groups % g == 0 and g * group_bytes % 16 == 0]
    if not fit:
        raise ValueError(
            f"group_norm_apply: all channels of a pixel must be a multiple of 16 bytes "
            f"(got {groups * group_bytes})"
        )
    whole = [g for g in fit if g * group_bytes % SECTOR_BYTES == 0] or fit
    slab_groups = next((g for g in whole if g * group_bytes >= ROW_BYTES), whole[-1])
    columns = slab_groups * group_bytes // 16
    vectors = images * pixels * columns * (groups // slab_groups)
    threads = 256 if vectors >= 256 * MULTIPROCESSORS else 128
    threads = max(threads, -(-columns // 32) * 32)
    vecs = min(MAX_VECS, -(-vectors // (threads * 3 * MULTIPROCESSORS)))
    chunk = threads // columns * vecs
    blocks = images * -(-pixels // chunk) * (groups // slab_groups)
    share = max(2, -(-blocks // MULTIPROCESSORS))
    capped = threads >= 256 and share <= MOST_TOGETHER
    return Cut(slab_groups, threads, vecs, share if capped else 0)


def _program(
    x: Tensor, norm: Norm, skip: Tensor | None, cut: Cut, columns: int, quantise: bool = False
) -> loader.Program:
    channels = norm.weight.numel()
    width, elements = channels // norm.groups, 16 // x.element_size()
    activation = "silu" if norm.silu else "none"
    if norm.silu and x.dtype == torch.bfloat16:
        activation = "silu_tanh"
    return loader.program(
        "group_norm_apply",
        dtype=SUFFIX[x.dtype],
        ACTIVATION=activation,
        QUANTISE=quantise,
        OVERLAP=overlaps(x.get_device()),
        CHANNELS=channels,
        X_CHANNELS=x.shape[1],
        GROUP_CHANNELS=width,
        MAGIC=nhwc_magic(width),
        S=math.gcd(width, elements),
        UNIT=x.shape[1] // norm.sums.shape[2],
        PARTS=norm.sums.shape[1],
        SKIP_PARTS=0 if skip is None else norm.skip_sums.shape[1],  # type: ignore[union-attr]
        SLAB_GROUPS=cut.slab_groups,
        THREADS=cut.threads,
        VECS=cut.vecs,
        COLUMN_MAGIC=-(-65536 // columns),  # thread / columns, exact for 1024 threads
        REGISTERS=min(255, 65536 // cut.threads // 8 * 8),
    )


def torch_form(x: Tensor, norm: Norm, skip: Tensor | None = None) -> Tensor:
    """The same by the reference from x itself, whose statistics the sums are."""
    x = x if skip is None else torch.cat([x, skip], 1)
    run = reference.group_norm_silu if norm.silu else reference.group_norm
    return run(x, norm.groups, norm.weight, norm.bias, norm.eps)


def _check(x: Tensor, norm: Norm, skip: Tensor | None) -> tuple[int, ...]:
    """The shape of the result."""
    if (skip is None) != (norm.skip_sums is None):
        raise ValueError("group_norm_apply: skip and norm.skip_sums go together; give both")
    given = [("x", x, norm.sums)]
    if skip is not None and norm.skip_sums is not None:
        given.append(("skip", skip, norm.skip_sums))
    for name, t, sums in given:
        last = t.permute(0, *range(2, t.dim()), 1)
        if not last.is_contiguous() or t.data_ptr() % 16 or t.shape[1] * t.element_size() % 16:
            raise ValueError(
                f"group_norm_apply: {name} must be channels_last, 16-byte aligned, C a multiple of "
                f"16 bytes (got {tuple(t.shape)}, strides {t.stride()})"
            )
        if t.dtype != x.dtype or (t.shape[0], *t.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ValueError(
                f"group_norm_apply: {name} must be like x but for its channels (got {t.dtype} "
                f"{tuple(t.shape)}, x {x.dtype} {tuple(x.shape)})"
            )
        if sums.dim() != 4 or sums.shape[0] != t.shape[0] or t.shape[1] % sums.shape[2]:
            raise ValueError(
                f"group_norm_apply: sums of {name} must be [B, S, C / unit, 4] "
                f"(got {tuple(sums.shape)} for {tuple(t.shape)})"
            )
        if sums.dtype != torch.float32 or not sums.is_contiguous():
            raise ValueError(f"group_norm_apply: sums of {name} must be contiguous float32")
    channels = sum(t.shape[1] for _, t, _ in given)
    units = {t.shape[1] // sums.shape[2] for _, t, sums in given}
    if channels % norm.groups or len(units) > 1 or channels // norm.groups % units.pop():
        raise ValueError(
            f"group_norm_apply: {channels} channels in {norm.groups} groups must be whole units "
            f"of all sums (got {[tuple(s.shape) for _, _, s in given]}); choose another unit"
        )
    for name, parameter in (("weight", norm.weight), ("bias", norm.bias)):
        if parameter.shape != (channels,) or parameter.dtype != x.dtype:
            raise ValueError(
                f"group_norm_apply: {name} must be {x.dtype} [{channels}] "
                f"(got {parameter.dtype} {tuple(parameter.shape)})"
            )
    return (x.shape[0], channels, *x.shape[2:])
