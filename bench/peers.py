"""What people use today: each op as they would write it in PyTorch, and the libraries under it.

    torch-eager     the op in plain PyTorch calls
    torch-compile   the same under torch.compile (its own CUDA graph off: the harness captures it)
    cudnn           conv2d by cuDNN in channels_last; attention by SDPA's cuDNN backend
    flash           attention by SDPA's flash backend
    cublas          linear by cuBLAS (addmm with a bias)
    bf16            of an op in e4m3: ours in bfloat16
    copy            a plain copy of as many bytes as the op must move
Every function takes the op's arguments in the op's order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import composed, eight_bit, folded
from .case import Case


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """SDPA wants [B, H, N, D]: transposed views, no copies."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def conv2d(x, weight, bias=None, stride=1, padding=0, channel_bias=None, residual=None) -> Tensor:
    y = F.conv2d(x, weight, bias, stride, padding)
    if channel_bias is not None:
        y = y + channel_bias[:, :, None, None]
    return y if residual is None else y + residual


def linear(x, weight, bias=None, residual=None) -> Tensor:
    y = F.linear(x, weight, bias)
    return y if residual is None else y + residual


def geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    h, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return h * F.gelu(gate)


def frame_to_model(frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return frames.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1.0


def model_to_frame(x: Tensor) -> Tensor:
    scaled = ((x.float() + 1.0) * 127.5).round().nan_to_num(0.0).clamp(0.0, 255.0)
    return scaled.permute(0, 2, 3, 1).to(torch.uint8, memory_format=torch.contiguous_format)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def group_norm_silu(x, groups, weight=None, bias=None, eps=1e-5) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


EAGER: dict[str, Callable[..., Tensor]] = {
    "norm_conv2d": composed.norm_conv2d_by(group_norm_silu, conv2d),
    "residual_block": composed.residual_block_by(group_norm_silu, conv2d),
    "attention": attention,
    "conv2d": conv2d,
    "linear": linear,
    "geglu": geglu,
    "group_norm": lambda x, groups, w, b, eps: F.group_norm(x, groups, w, b, eps),
    "group_norm_silu": group_norm_silu,
    "layer_norm_linear": folded.normed_by("layer_norm_linear", layer_norm, linear),
    "layer_norm_geglu": folded.normed_by("layer_norm_geglu", layer_norm, geglu),
    "residual_norm_linear": folded.behind_by("residual_norm_linear", linear, layer_norm, linear),
    "residual_norm_geglu": folded.behind_by("residual_norm_geglu", linear, layer_norm, geglu),
    "layer_norm": layer_norm,
    "silu": F.silu,
    "axpby": lambda a, x, b, y: torch.add(a * x, y, alpha=b),
    "residual_add": torch.add,
    "add_noise": lambda x, noise, alpha, sigma: alpha * x + sigma * noise,
    "euler_step": lambda x, denoised, sigma, sigma_next: (
        x + (x - denoised) * ((sigma_next - sigma) / sigma)
    ),
    "ddim_step": lambda x, eps, ab, ab_next: (
        (x - (1 - ab) ** 0.5 * eps) * (ab_next / ab) ** 0.5 + (1 - ab_next) ** 0.5 * eps
    ),
    "guidance": lambda uncond, cond, scale: torch.lerp(uncond, cond, scale),
    "frame_to_model": frame_to_model,
    "model_to_frame": model_to_frame,
}


def peers(case: Case, args: tuple, names: tuple[str, ...]) -> dict[str, Callable[..., Tensor]]:
    """The peers of this case among `names`, each a function of the op's arguments.

    Args:
        case: says which peers mean something for it.
        args: the op's arguments; `copy` takes its size from them.
        names: the peers asked for.

    Returns:
        name -> function. Nothing has run yet: a peer that cannot (a head dimension that cuDNN
        refuses) raises when it is called.
    """
    return {name: _peer(case, args, name) for name in case.peers if name in names}


def _peer(case: Case, args: tuple, name: str) -> Callable[..., Tensor]:
    if name == "bf16":
        return eight_bit.BF16[case.op]
    eager = EAGER[case.op]
    if name == "torch-compile":
        # One graph per case: a shared cache would recompile with dynamic shapes, a slower kernel.
        torch._dynamo.reset()
        return torch.compile(eager, fullgraph=True, dynamic=False)
    if name == "copy":
        return _copy(case, args)
    if case.op == "attention" and name in ("cudnn", "flash"):
        backend = SDPBackend.CUDNN_ATTENTION if name == "cudnn" else SDPBackend.FLASH_ATTENTION

        def only(*inputs: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return eager(*inputs)

        return only
    return eager  # cublas and cudnn are what eager PyTorch calls on a GPU


def _copy(case: Case, args: tuple) -> Callable[..., Tensor]:
    """Half of the bytes read, half of them written."""
    tensor = next(a for a in args if isinstance(a, Tensor))
    dtype = next((a for a in args if isinstance(a, torch.dtype)), tensor.dtype)
    words = -(-case.bytes_moved(dtype) // 8)  # half of the bytes, in words of 4
    source = torch.randint(0, 256, (words,), dtype=torch.int32, device=tensor.device)
    target = torch.empty_like(source)
    return lambda *inputs: torch.neg(source, out=target)  # a kernel; see ceilings.copy_pass
