// silu: x / (1 + exp(-x)).  axpby: a x + b y, one (a, b) for all or per sample.
// frame_to_model: x / 127.5 - 1.  model_to_frame: clamp(round_half_even((x + 1) * 127.5), 0, 255).
//
// Compiled with ELEMENT (float, __half, __nv_bfloat16), SUFFIX (f32, f16, bf16: of the entries),
// THREADS and VECS. Arithmetic is float32 with one rounding at the end.
//
// The ladder, all of it in the kernels below:
//   1. an element a thread: neighbours touch neighbours, every access is coalesced
//   2. 16-byte accesses: a quarter (float) or an eighth (half) of the instructions
//   3. VECS independent loads a thread before the first use: more bytes in flight
//   4. many short blocks instead of a persistent grid: 3930 against 3668 GB/s on an H200
//   5. any pointer: elements before the first and after the last whole vector go one by one, and
//      all do where the operands are not equally far from a 16-byte boundary

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define ENTRY(op) extern "C" __global__ void __launch_bounds__(THREADS) JOIN(op, SUFFIX)

typedef unsigned char u8;
typedef unsigned long long u64;

using Element = ELEMENT;
constexpr int E = 16 / sizeof(Element);  // elements of a 16-byte vector

struct alignas(16) Vector {
    Element element[E];
};

struct alignas(E) Levels {
    u8 level[E];
};

// Elements before the first 16-byte boundary and whole vectors after it; mixed alignment: no vector.
struct Split {
    u64 head, vectors;

    __device__ Split(const void *a, const void *b, const void *c, u64 n) : head(n), vectors(0) {
        const u64 p = (u64)a;
        if (((p ^ (u64)b) | (p ^ (u64)c)) & 15) return;
        head = ((0 - p) & 15) / sizeof(Element);
        head = head < n ? head : n;
        vectors = (n - head) / E;
    }

    // The index of the i-th element outside the vectors.
    __device__ u64 edge(u64 i) const { return i < head ? i : i + vectors * E; }
};

__device__ float silu(float x) { return x / (1.f + expf(-x)); }

// Applies `compute(element index, x, y)` to one stretch of n elements; each block takes its piece.
template <class Compute>
__device__ void map(const Element *x, const Element *y, Element *out, u64 n, Compute compute) {
    // Indices
    const Split split(x, y, out, n);
    const u64 first = (u64)blockIdx.x * (THREADS * VECS) + threadIdx.x;
    const Vector *x_vectors = (const Vector *)(x + split.head);
    const Vector *y_vectors = (const Vector *)(y + split.head);
    Vector *out_vectors = (Vector *)(out + split.head);

    // Load
    Vector x_vector[VECS], y_vector[VECS];
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        const u64 i = first + v * THREADS;
        if (i < split.vectors) {
            x_vector[v] = x_vectors[i];
            y_vector[v] = y_vectors[i];
        }
    }

    // Compute, store
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        const u64 i = first + v * THREADS;
        if (i < split.vectors) {
#pragma unroll
            for (int j = 0; j < E; j++)
                x_vector[v].element[j] =
                    (Element)compute((float)x_vector[v].element[j], (float)y_vector[v].element[j]);
            out_vectors[i] = x_vector[v];
        }
    }

    // Edge: strided over all blocks, since without vectors it is everything
    const u64 edges = n - split.vectors * E;
    for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < edges;
         i += (u64)gridDim.x * THREADS) {
        const u64 j = split.edge(i);
        out[j] = (Element)compute((float)x[j], (float)y[j]);
    }
}

// grid (ceil(n sizeof(Element) / (16 THREADS VECS)))
ENTRY(silu)(const Element *x, Element *out, u64 n) {
    map(x, x, out, n, [](float x, float) { return silu(x); });
}

// grid (ceil(n sizeof(Element) / (16 THREADS VECS)), min(samples, 65535)); n elements a sample
ENTRY(axpby)(const Element *x, const Element *y, Element *out, const float *a_each, const float *b_each, u64 n,
             unsigned samples, float a, float b) {
    for (unsigned s = blockIdx.y; s < samples; s += gridDim.y) {
        const float a_s = a_each ? a_each[s] : a, b_s = b_each ? b_each[s] : b;
        map(x + s * n, y + s * n, out + s * n, n,
            [=](float x, float y) { return fmaf(a_s, x, b_s * y); });
    }
}

// 2 x - 255 is exact, so the difference keeps its relative precision near 0.
__device__ float to_model(u8 level) { return (2.f * level - 255.f) * (1.f / 255.f); }

// fmaxf returns its other operand for a NaN, which so becomes 0.
__device__ u8 to_level(float x) {
    return (u8)__float2uint_rn(fminf(fmaxf(fmaf(x, 127.5f, 127.5f), 0.f), 255.f));
}

__device__ bool aligned(const void *model, const void *levels) {
    return (u64)model % 16 == 0 && (u64)levels % E == 0;
}

// grid (ceil(n / (THREADS E))); uint8 [B,H,W,3] and channels_last [B,3,H,W] have one memory order
ENTRY(frame_to_model)(const u8 *frames, Element *out, u64 n) {
    const u64 vectors = aligned(out, frames) ? n / E : 0;
    const u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (i < vectors) {
        const Levels levels = ((const Levels *)frames)[i];
        Vector vector;
#pragma unroll
        for (int j = 0; j < E; j++) vector.element[j] = (Element)to_model(levels.level[j]);
        ((Vector *)out)[i] = vector;
    }
    for (u64 j = vectors * E + i; j < n; j += (u64)gridDim.x * THREADS)
        out[j] = (Element)to_model(frames[j]);
}

ENTRY(model_to_frame)(const Element *x, u8 *frames, u64 n) {
    const u64 vectors = aligned(x, frames) ? n / E : 0;
    const u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (i < vectors) {
        const Vector vector = ((const Vector *)x)[i];
        Levels levels;
#pragma unroll
        for (int j = 0; j < E; j++) levels.level[j] = to_level((float)vector.element[j]);
        ((Levels *)frames)[i] = levels;
    }
    for (u64 j = vectors * E + i; j < n; j += (u64)gridDim.x * THREADS)
        frames[j] = to_level((float)x[j]);
}

// grid (ceil(pixels / THREADS), min(batch, 65535)); x contiguous [B,3,H,W], a thread a pixel
ENTRY(model_to_frame_planar)(const Element *x, u8 *frames, u64 pixels, unsigned batch) {
    const u64 pixel = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (pixel >= pixels) return;
    for (u64 image = blockIdx.y; image < batch; image += gridDim.y)
#pragma unroll
        for (int c = 0; c < 3; c++)
            frames[(image * pixels + pixel) * 3 + c] =
                to_level((float)x[(image * 3 + c) * pixels + pixel]);
}
