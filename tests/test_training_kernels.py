"""Triton kernels of training: in the interpreter against torch, compiled for a GPU, and on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = """
import torch
from mirage_hello.model.data import noise, noise_triton
from mirage_hello.model.training import norms

reason = norms.refusal(torch.device("cpu"))
assert reason is None, reason

# A whole step of the video model, skips included, calls them as it calls torch's.
from mirage_hello.kernels import use
from mirage_hello.model.presets import PRESETS, build
from training_driver import add_minute_model

add_minute_model()
gradients = []
for dtype, own in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)):
    denoiser, _ = build("minute", seed=0)
    denoiser.to(dtype)
    x = torch.randn(4, 28, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    with use("torch"), norms.installed(torch.device("cpu" if own else "meta")):
        out = denoiser.unet(x, torch.zeros(4), denoiser.unet.style(0).expand(4, -1, -1))
        out.float().square().mean().backward()
    gradients.append(torch.cat([p.grad.float().flatten() for p in denoiser.parameters()]))
mine, theirs, exact = gradients
errors = (mine - exact).norm() / exact.norm(), (theirs - exact).norm() / exact.norm()
assert errors[0] < 1.2 * errors[1] < 0.2, errors

generator = torch.Generator().manual_seed(0)
def draw(*shape):
    return torch.randint(-2**31, 2**31, shape, generator=generator).to(torch.int32)

a, b, c = draw(3, 1), draw(3, 2000), draw(1, 2000)
for keys in ((a, b, 17), (b, 1), (a, b, c, 500), (a, b, draw(2000), -7), (b[:, ::2], a)):
    assert torch.equal(noise.hashed(*keys), noise_triton.hashed(keys, False))
    assert torch.equal(noise.uniform(*keys), noise_triton.hashed(keys, True))
"""

COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mirage_hello.model.data import noise_triton
from mirage_hello.model.training import norms

def cubin(kernel, fixed, pointers):
    names = kernel.arg_names
    types = {n: "constexpr" if n in fixed else pointers.get(n, "i32") for n in names}
    values = {(names.index(n),): v for n, v in fixed.items()}
    source = ASTSource(kernel, types, values)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16}).asm["cubin"]

pointers = dict.fromkeys(("x", "grad", "weight", "bias", "out", "grad_x"), "*bf16")
pointers |= {"stats": "*fp32", "parts": "*fp32", "eps": "fp32"}
form = {"channels": 224, "padded": 256, "groups": 32, "silu": True, "block": 32}
assert cubin(norms.forward_kernel, form, pointers)
assert cubin(norms.backward_kernel, form, pointers)
keys = {"k0": 2, "k1": 2, "k2": 1, "k3": 0, "as_uniform": True, "block": 1024}
pointers = {"out": "*fp32"} | dict.fromkeys(("p0", "p1", "p2", "p3"), "*i32")
assert cubin(noise_triton.hash_kernel, keys, pointers)
"""


def in_a_process(text: str, interpret: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)  # of training_driver
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    result = subprocess.run(
        [sys.executable, "-c", text], env=environment, cwd="/", capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]


def test_kernels_agree_with_torch_in_the_interpreter():
    in_a_process(INTERPRETED, interpret=True)


def test_kernels_compile_for_a_gpu_that_is_not_here():
    in_a_process(COMPILED, interpret=False)


@pytest.mark.gpu
def test_kernels_agree_with_torch_on_the_gpu():
    from mirage_hello.model.data import noise, noise_triton
    from mirage_hello.model.training import norms

    device = torch.device("cuda:0")
    assert norms.refusal(device) is None
    keys = (torch.arange(3, device=device)[:, None], torch.arange(5000, device=device), 7)
    assert torch.equal(noise.uniform(*keys), noise_triton.hashed(keys, True))


@pytest.mark.gpu
def test_a_captured_run_has_the_curve_of_an_ordinary_one(tmp_path):
    from training_driver import add_minute_model

    from mirage_hello.model.presets import PRESETS
    from mirage_hello.model.training import Options, preset, train
    from mirage_hello.model.training.config import changed
    from mirage_hello.model.training.journal import read

    add_minute_model()
    curves = []
    for graphs in (True, False):
        values = {"model": "minute", "size": 16, "clip_frames": 6, "video_steps": 24,
                  "autoencoder_steps": 14, "graphs": graphs, "fused": False}  # fmt: skip
        out = tmp_path / str(graphs)
        train(changed(preset("smoke"), values), out, Options(device="cuda", quiet=True))
        curves.append([r["loss"] for r in read(out)])
    PRESETS.pop("minute")
    assert curves[0] == pytest.approx(curves[1], rel=0.05)
