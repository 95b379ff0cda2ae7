"""The truth: every op in plain PyTorch, usable in float64. Imports torch and nothing else."""

from mirage_hello.reference.attention import attention
from mirage_hello.reference.conv2d import Padding, conv2d, sides
from mirage_hello.reference.elementwise import (
    add_noise,
    axpby,
    ddim_step,
    euler_step,
    guidance,
    residual_add,
    silu,
)
from mirage_hello.reference.frames import frame_to_model, model_to_frame
from mirage_hello.reference.linear import geglu, linear
from mirage_hello.reference.normalization import group_norm, group_norm_silu, layer_norm

__all__ = [
    "Padding",
    "add_noise",
    "attention",
    "axpby",
    "conv2d",
    "ddim_step",
    "euler_step",
    "frame_to_model",
    "geglu",
    "group_norm",
    "group_norm_silu",
    "guidance",
    "layer_norm",
    "linear",
    "model_to_frame",
    "residual_add",
    "sides",
    "silu",
]
