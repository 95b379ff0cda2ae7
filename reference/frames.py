"""Video frames (uint8, RGB, NHWC) to and from the model's range (floating, [-1, 1], NCHW)."""

import torch
from torch import Tensor


def frame_to_model(frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x / 127.5 - 1.

    Args:
        frames: uint8 [B, H, W, 3].
        dtype: floating dtype of the result.

    Returns:
        [B, 3, H, W] in [-1, 1], channels_last (so the memory order is that of the frames).

    Numerics: in float32 (float64 for a float64 result), rounded once to dtype.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return (frames.to(work) / 127.5 - 1).to(dtype).permute(0, 3, 1, 2)


def model_to_frame(x: Tensor) -> Tensor:
    """clamp(round((x + 1) 127.5), 0, 255), round half to even; NaN gives 0.

    Args:
        x: [B, 3, H, W], floating.

    Returns:
        uint8 [B, H, W, 3], contiguous.

    Numerics: in float32 (float64 for float64 inputs).
    """
    work = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    levels = ((work + 1) * 127.5).round().clamp(0, 255).nan_to_num(0)
    return levels.permute(0, 2, 3, 1).contiguous().to(torch.uint8)
