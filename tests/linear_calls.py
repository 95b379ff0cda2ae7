"""What the tests of the linear kernels share: inputs, a run with a tile, and the parity rule."""

import torch

from mirage_hello import reference
from mirage_hello.kernels import linear_sm90a, parity


def draw(*shape, dtype=torch.bfloat16, scale=1.0, device="cpu"):
    return (scale * torch.randn(shape)).to(device=device, dtype=dtype)


def inputs(op, m, k, n, dtype=torch.bfloat16, device="cpu"):
    """x, weight, bias, and linear's residual."""
    size = {"dtype": dtype, "device": device}
    weight = draw(2 * n if op == "geglu" else n, k, scale=k**-0.5, **size)
    residual = (draw(m, n, **size),) if op == "linear" else ()
    return draw(m, k, **size), weight, draw(weight.shape[0], **size), *residual


def run(op, *args, tile=None):
    return getattr(linear_sm90a, f"{op}_sm90a")(*args, tile=tile)


def in_parity(op, args, tile=None):
    """Hold the kernel with a tile against the float64 reference."""
    truth = getattr(reference, op)(*(t.double() for t in args))
    return parity.judge(run(op, *args, tile=tile), getattr(reference, op)(*args), truth)
