"""What the registry knows of one call: tensors reduced to their specifications."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its data: what a kernel may ask about an argument."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned16: bool
    requires_grad: bool

    @classmethod
    def of(cls, t: Tensor) -> "TensorSpec":
        aligned = t.data_ptr() % 16 == 0
        return cls(t.shape, t.stride(), t.dtype, t.device, aligned, t.requires_grad)

    @property
    def dim(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def is_channels_last(self) -> bool:
        """[B, C, H, W] stored as B, H, W, C without gaps (also true where C or H W is 1)."""
        if self.dim != 4:
            return False
        _, c, h, w = self.shape
        return self._strides_match((h * w * c, 1, w * c, c))

    @property
    def is_contiguous(self) -> bool:
        expected, strides = 1, []
        for size in reversed(self.shape):
            strides.append(expected)
            expected *= size
        return self._strides_match(tuple(reversed(strides)))

    @property
    def is_dense(self) -> bool:
        """No gaps and no overlap: some permutation of the dimensions is contiguous."""
        expected = 1
        pairs = [p for p in zip(self.stride, self.shape, strict=True) if p[1] != 1]
        for stride, size in sorted(pairs):
            if stride != expected:
                return False
            expected *= size
        return True

    def _strides_match(self, strides: tuple[int, ...]) -> bool:
        if self.numel == 0:
            return True
        pairs = zip(self.shape, self.stride, strides, strict=True)
        return all(size == 1 or got == want for size, got, want in pairs)

    def __str__(self) -> str:
        layout = ":nhwc" if self.is_channels_last and not self.is_contiguous else ""
        return "x".join(map(str, self.shape)) + layout


@dataclass(frozen=True)
class Call:
    """One call of an op: parameter name -> value, tensors as TensorSpec, defaults filled in."""

    op: str
    args: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype  # of the first floating tensor, else of the first tensor
    arch: str  # "sm_90a", "sm_89", "cpu"
    needs_grad: bool
    autocast: bool
    optional: frozenset[str] = frozenset()  # parameters that have a default

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {name: v for name, v in self.args.items() if isinstance(v, TensorSpec)}

    @property
    def label(self) -> str:
        """Key of the measured choices: `bfloat16 1x4096x8x40 1x77x8x40 1x77x8x40`.

        Optional tensors (a bias, a residual) are left out: they do not change which kernel is best.
        """
        main = (t for name, t in self.tensors.items() if name not in self.optional)
        shapes = " ".join(str(t) for t in main)
        options = [
            f"{name}={value}"
            for name, value in self.args.items()
            if isinstance(value, int) and not isinstance(value, bool)
        ]
        return " ".join([str(self.dtype).removeprefix("torch."), shapes, *options])


def device_arch(device: torch.device) -> str:
    """`sm_90a` for compute capability 9.0, `sm_100a` for 10.0, `sm_XY` otherwise, `cpu` on a CPU.

    The `a` architectures have instructions (wgmma, setmaxnreg, tcgen05) that no other has.
    """
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")
