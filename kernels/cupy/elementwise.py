"""silu: x / (1 + exp(-x)).  axpby: a x + b y.  frame_to_model, model_to_frame: uint8 <-> [-1, 1].

Algorithm: dense tensors as flat arrays in the order of memory; uint8 [B, H, W, 3] and channels-last
    [B, 3, H, W] have the same order. A thread takes WIDTH neighbouring elements, 16 bytes of the
    wider type, in one access; an unaligned tensor and the tail go element by element.
Bound by: memory.

The source needs no CUDA headers, which CuPy's wheels do not all bring: float16 and bfloat16 are
unsigned short, converted by the instruction that the headers would give.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels.layout import in_order_of

THREADS = 256
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}

SOURCE = r"""
template <int FORMAT> struct Element;
template <> struct Element<0> {
    using Type = float;
    static __device__ float decode(float x) { return x; }
    static __device__ float encode(float x) { return x; }
};
template <> struct Element<1> {
    using Type = unsigned short;
    static __device__ float decode(Type bits) {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }
    static __device__ Type encode(float x) {
        Type bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
        return bits;
    }
};
template <> struct Element<2> {
    using Type = unsigned short;
    static __device__ float decode(Type bits) { return __uint_as_float((unsigned)bits << 16); }
    static __device__ Type encode(float x) {
        Type bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
        return bits;
    }
};
template <> struct Element<3> {
    using Type = unsigned char;
    static __device__ float decode(Type level) { return level; }
    static __device__ Type encode(float level) { return (Type)level; }
};

using In = Element<SOURCE>;
using Out = Element<TARGET>;
constexpr int WIDTH = 16 / (sizeof(In::Type) > sizeof(Out::Type) ? sizeof(In::Type)
                                                                : sizeof(Out::Type));
template <class T> struct alignas(sizeof(T) * WIDTH) Pack { T value[WIDTH]; };

template <class T> __device__ bool whole(const T* p, long long first, long long numel) {
    return first + WIDTH <= numel && (unsigned long long)p % sizeof(Pack<T>) == 0;
}
template <class T>
__device__ Pack<T> load(const T* p, long long first, long long numel) {
    if (whole(p, first, numel)) return *(const Pack<T>*)(p + first);
    Pack<T> pack = {};
    for (int j = 0; j < WIDTH && first + j < numel; ++j) pack.value[j] = p[first + j];
    return pack;
}
template <class T>
__device__ void store(T* p, long long first, long long numel, const Pack<T>& pack) {
    if (whole(p, first, numel)) {
        *(Pack<T>*)(p + first) = pack;
        return;
    }
    for (int j = 0; j < WIDTH && first + j < numel; ++j) p[first + j] = pack.value[j];
}
__device__ long long first_element() {
    return ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
}

template <class Op>
__device__ void map(const In::Type* x, Out::Type* out, long long numel, Op op) {
    const long long first = first_element();
    if (first >= numel) return;
    const Pack<In::Type> source = load(x, first, numel);
    Pack<Out::Type> target;
    for (int j = 0; j < WIDTH; ++j) target.value[j] = Out::encode(op(In::decode(source.value[j])));
    store(out, first, numel, target);
}

extern "C" __global__ void silu(const In::Type* x, Out::Type* out, long long numel) {
    map(x, out, numel, [](float v) { return v / (1.0f + expf(-v)); });
}

extern "C" __global__ void frame_to_model(const In::Type* x, Out::Type* out, long long numel) {
    // x / 127.5 - 1 = (x - 127.5) / 127.5, whose difference is exact and whose ends are -1 and 1.
    map(x, out, numel, [](float level) { return (level - 127.5f) / 127.5f; });
}

extern "C" __global__ void model_to_frame(const In::Type* x, Out::Type* out, long long numel) {
    // fmaxf(NaN, 0) is 0. rintf rounds halves to the even neighbour.
    map(x, out, numel, [](float v) {
        return rintf(fminf(fmaxf((v + 1.0f) * 127.5f, 0.0f), 255.0f));
    });
}

extern "C" __global__ void axpby(const In::Type* x, const In::Type* y, Out::Type* out,
                                 const float* as, const float* bs, float a, float b,
                                 long long numel, long long sample_numel) {
    const long long first = first_element();
    if (first >= numel) return;
    const Pack<In::Type> xs = load(x, first, numel), ys = load(y, first, numel);
    Pack<Out::Type> target;
    // as and bs, where not null, hold one coefficient a sample; a pack may span several samples.
    long long sample = first / sample_numel, last_of_sample = (sample + 1) * sample_numel;
    for (int j = 0; j < WIDTH && first + j < numel; ++j) {
        if (first + j == last_of_sample) ++sample, last_of_sample += sample_numel;
        const float ca = as ? as[sample] : a, cb = bs ? bs[sample] : b;
        target.value[j] = Out::encode(ca * In::decode(xs.value[j]) + cb * In::decode(ys.value[j]));
    }
    store(out, first, numel, target);
}
"""


def options(source: torch.dtype, target: torch.dtype) -> tuple[str, ...]:
    """NVRTC options that select the storage formats of input and output."""
    return ("--std=c++17", f"-DSOURCE={FORMATS[source]}", f"-DTARGET={FORMATS[target]}")


@functools.cache
def _kernel(op: str, source: torch.dtype, target: torch.dtype) -> Any:
    import cupy

    return cupy.RawKernel(SOURCE, op, options=options(source, target))


def _launch(op: str, x: Tensor, out: Tensor, args: tuple) -> None:
    """One thread for each 16 bytes of the wider type, on torch's current stream."""
    import cupy

    width = 16 // max(x.element_size(), out.element_size())
    blocks = -(-x.numel() // (width * THREADS))
    handle = torch.cuda.current_stream(x.device).cuda_stream
    with cupy.cuda.Device(x.device.index), cupy.cuda.ExternalStream(handle):
        _kernel(op, x.dtype, out.dtype)((blocks,), (THREADS,), args)


def _unary(op: str, x: Tensor, out: Tensor) -> None:
    import numpy as np

    if x.numel():
        pointers = (np.uint64(t.data_ptr()) for t in (x, out))
        _launch(op, x, out, (*pointers, np.int64(x.numel())))


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)).

    Args:
        x: any shape, dense; float32, float16 or bfloat16.

    Returns:
        x's shape, dtype and layout.
    """
    out = torch.empty_like(x)
    _unary("silu", in_order_of(x, out), out)
    return out


def axpby(a: float | Tensor, x: Tensor, b: float | Tensor, y: Tensor) -> Tensor:
    """a x + b y.

    Args:
        a, b: a float, or float32 [B], one value for each sample of x.
        x, y: [B, ...], one shape and dtype, dense with the batch outermost; float32, float16 or
            bfloat16.

    Returns:
        x's shape, dtype and layout.

    Numerics: one product and one FMA in float32, one rounding to x's dtype.
    """
    import numpy as np

    out = torch.empty_like(x)
    x, y = in_order_of(x, out), in_order_of(y, out)
    if x.numel() == 0:
        return out
    tensors = [c.contiguous() if isinstance(c, Tensor) else None for c in (a, b)]
    floats = [np.float32(0 if isinstance(c, Tensor) else c) for c in (a, b)]
    pointers = [np.uint64(0 if t is None else t.data_ptr()) for t in (x, y, out, *tensors)]
    samples = 1 if tensors == [None, None] else x.shape[0]
    sizes = np.int64(x.numel()), np.int64(x.numel() // samples)
    _launch("axpby", x, out, (*pointers, *floats, *sizes))
    return out


def frame_to_model(frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x / 127.5 - 1.

    Args:
        frames: uint8 [B, H, W, 3].
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        [B, 3, H, W], channels-last, in [-1, 1].
    """
    frames = frames.contiguous()
    out = torch.empty(frames.shape, dtype=dtype, device=frames.device)
    _unary("frame_to_model", frames, out)
    return out.permute(0, 3, 1, 2)


def model_to_frame(x: Tensor) -> Tensor:
    """clamp(round((x + 1) * 127.5), 0, 255), halves to the even neighbour; NaN gives 0.

    Args:
        x: [B, 3, H, W], read fastest when channels-last; float32, float16 or bfloat16.

    Returns:
        uint8 [B, H, W, 3], contiguous.
    """
    x = x.permute(0, 2, 3, 1).contiguous()
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    _unary("model_to_frame", x, out)
    return out
