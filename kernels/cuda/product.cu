// conv2d:  out[b,p,q,o] = sum_{r,s,c} x[b, p*stride+r-padding, q*stride+s-padding, c] weight[o,r,s,c]
//                         + bias[o] + channel_bias[b,o] + residual[b,p,q,o]
// linear:  the same with a 1x1 window on one image of 1 x M pixels
// geglu:   linear for h and gate at once, out = h * gelu(gate)
//
// Compiled with ELEMENT (__half, __nv_bfloat16), MMA (f16, bf16: the instruction's name for it),
// GATED (0, 1) and BLOCK_N (64, 128). For compute capability 8.0 and newer.
//
// The ladder; steps with a switch can be taken back, bench/sweeps/product_sm80.py times them:
//   1. implicit matrix product: K is walked tap by tap, 32 channels at a time, so a row of the left
//      operand is 64 contiguous bytes of one input pixel; nothing is unfolded in memory
//   2. SWIZZLE: 64-byte rows, 16-byte pieces permuted by row, so that ldmatrix reads 8 rows without
//      bank conflicts
//   3. ASYNC: cp.async, which zero-fills what lies outside: padding and ragged edges cost no branch
//   4. RING stages instead of 2: three loads are in flight while one is multiplied
//   5. BLOCK_N 128, a warp has 64 x 64 in place of 32 x 64: a product reads 2/3 of the bytes. Pays
//      for deep products of many tiles alone: two blocks a multiprocessor, where 64 has three
//   6. h and gate of one column in one thread: the gate never leaves its registers
// Bound by: shared memory at BLOCK_N 64. In clocks of a multiprocessor for 16 of K: 4 warps x 6
// ldmatrix of 512 B at 128 B a clock, 96, and 6 KB of cp.async, 48: 144, where the products take 103
// (62 % of 4096 FLOP a clock, what mma.sync reaches on Hopper). At 128: 128 + 64 = 192 of 206.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define STRING_(x) #x
#define STRING(x) STRING_(x)

typedef unsigned u32;
typedef long long i64;
using Element = ELEMENT;

#ifndef SWIZZLE
#define SWIZZLE 1
#endif
#ifndef ASYNC
#define ASYNC 1
#endif

constexpr int BLOCK_M = 128, BLOCK_K = 32, WARPS = 4;
constexpr int A_BYTES = BLOCK_M * BLOCK_K * 2, STAGE_BYTES = A_BYTES + BLOCK_N * BLOCK_K * 2;
// 48 KiB, what a block may have without asking: 4 stages of 128 + 64 rows of 64 B, 3 of 128 + 128
#ifdef RING
constexpr int STAGES = RING;
#else
constexpr int STAGES = 48 * 1024 / STAGE_BYTES;
#endif
// A warp has 64 columns of the tile; GATED: 32 of h, and the same 32 of the gate.
constexpr int WARP_N = 64, WARPS_N = BLOCK_N / WARP_N, WARPS_M = WARPS / WARPS_N;
constexpr int M_TILES = BLOCK_M / WARPS_M / 16;        // of 16 rows
constexpr int WARP_COLUMNS = GATED ? WARP_N / 2 : WARP_N;  // of the output
constexpr int COLUMNS = WARP_COLUMNS * WARPS_N;
constexpr int WEIGHTS = BLOCK_N / 32;  // rows of the weight that a thread loads

struct Shape {
    int channels, height, width, outputs, rows, columns;  // C, H, W, O, P, Q
    int taps_x, taps, stride, padding, pixels;            // S, R S, pixels of the whole batch
};

// Byte offset of 16-byte piece `piece` of row `row` in a tile of 64-byte rows. Two rows share 128
// bytes, so the permutation goes by pairs of rows.
__device__ int swizzled(int row, int piece) {
    return row * 64 + ((SWIZZLE ? piece ^ (row >> 1 & 3) : piece) << 4);
}

// 16 bytes to shared memory, or zeros.
__device__ void load(u32 to, const Element *from, bool inside) {
    if (ASYNC) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                     "r"(inside ? 16 : 0)
                     : "memory");
    } else {
        const uint4 x = inside ? *reinterpret_cast<const uint4 *>(from) : uint4{0, 0, 0, 0};
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y),
                     "r"(x.z), "r"(x.w)
                     : "memory");
    }
}

__device__ void read_matrices(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
}

__device__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." STRING(MMA) "." STRING(MMA) ".f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What one thread loads of each K step: piece threadIdx % 4 of four rows of x, two or four of the weight.
struct Loader {
    const Element *x[4], *weight[WEIGHTS];
    int h[4], w[4];  // top left tap of the row's window; h < 0 by far where there is no pixel
    bool is_output[WEIGHTS];
    int channel;  // first of the piece, in the K step's block

    __device__ Loader(const Element *images, const Element *weights, const Shape &s) {
        const int first = threadIdx.x / 4;
        channel = threadIdx.x % 4 * 8;
        for (int i = 0; i < 4; ++i) {
            const int pixel = blockIdx.x * BLOCK_M + first + 32 * i;
            const int image = pixel / (s.rows * s.columns), rest = pixel % (s.rows * s.columns);
            h[i] = pixel < s.pixels ? rest / s.columns * s.stride - s.padding : -(1 << 30);
            w[i] = rest % s.columns * s.stride - s.padding;
            x[i] = images + (i64)image * s.height * s.width * s.channels + channel;
        }
        for (int i = 0; i < WEIGHTS; ++i) {  // GATED: rows of h and of the gate by 32s
            int output = blockIdx.y * COLUMNS + first + (GATED ? i / 2 : i) * 32;
            is_output[i] = output < s.outputs;
            if (GATED && i % 2) output += s.outputs;
            weight[i] = weights + (i64)output * s.taps * s.channels + channel;
        }
    }

    __device__ void stage(u32 to, const Shape &s, int tap, int block) const {
        const int first = threadIdx.x / 4, piece = threadIdx.x % 4;
        const int r = tap / s.taps_x, column = tap % s.taps_x, c = block * BLOCK_K;
        const bool is_channel = c + channel < s.channels;
        for (int i = 0; i < 4; ++i) {
            const int y = h[i] + r, across = w[i] + column;
            const bool inside = is_channel && y >= 0 && y < s.height && across >= 0 && across < s.width;
            const Element *from = x[i] + ((i64)y * s.width + across) * s.channels + c;
            load(to + swizzled(first + 32 * i, piece), inside ? from : x[0], inside);
        }
        for (int i = 0; i < WEIGHTS; ++i) {
            const bool inside = is_channel && is_output[i];
            const Element *from = weight[i] + (i64)tap * s.channels + c;
            load(to + A_BYTES + swizzled(first + 32 * i, piece), inside ? from : weight[0], inside);
        }
    }
};

// A warp's rows and columns of the tile, one K step.
__device__ void multiply_stage(float (&acc)[M_TILES][WARP_N / 8][4], u32 stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int top = warp % WARPS_M * 16 * M_TILES, left = warp / WARPS_M * WARP_N;
    for (int k = 0; k < BLOCK_K / 16; ++k) {
        u32 a[M_TILES][4];
        for (int m = 0; m < M_TILES; ++m)
            read_matrices(a[m], stage + swizzled(top + 16 * m + lane % 16, 2 * k + lane / 16));
        for (int n = 0; n < WARP_N / 16; ++n) {
            u32 b[4];  // two blocks of 8 columns, both halves of 16 channels
            const int row = left + 16 * n + lane % 8 + lane / 16 * 8;
            read_matrices(b, stage + A_BYTES + swizzled(row, 2 * k + lane / 8 % 2));
            for (int m = 0; m < M_TILES; ++m) {
                multiply(acc[m][2 * n], a[m], b[0], b[1]);
                multiply(acc[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

__device__ float at(const Element *values, i64 i) { return values ? float(values[i]) : 0.f; }

__device__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678f)); }

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    product(const Element *x, const Element *weight, const Element *bias, const Element *channel_bias,
            const Element *residual, Element *out, int channels, int height, int width, int outputs,
            int rows, int columns, int taps_x, int taps, int stride, int padding, int pixels) {
    __shared__ __align__(128) char smem[STAGES * STAGE_BYTES];
    const Shape s{channels, height, width,  outputs, rows,   columns,
                  taps_x,   taps,   stride, padding, pixels};
    const u32 ring = (u32)__cvta_generic_to_shared(smem);
    const Loader loader(x, weight, s);
    const int blocks = (channels + BLOCK_K - 1) / BLOCK_K, steps = taps * blocks;
    float acc[M_TILES][WARP_N / 8][4] = {};

    // Load: a group is committed every step, empty or not, so that waiting for all but the newest
    // STAGES - 2 always means the step that comes next.
    int tap = 0, block = 0;
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) loader.stage(ring + step * STAGE_BYTES, s, tap, block);
        if (++block == blocks) block = 0, ++tap;
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    // Compute
    for (int step = 0; step < steps; ++step) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads();  // everyone's loads of this step; everyone is past the previous one
        const int ahead = step + STAGES - 1;
        if (ahead < steps) loader.stage(ring + ahead % STAGES * STAGE_BYTES, s, tap, block);
        if (++block == blocks) block = 0, ++tap;
        asm volatile("cp.async.commit_group;" ::: "memory");
        multiply_stage(acc, ring + step % STAGES * STAGE_BYTES);
    }

    // Store: a thread has columns 2 (lane % 4) and the next of every 8, in rows lane / 4 and + 8
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int top = warp % WARPS_M * 16 * M_TILES, left = warp / WARPS_M * WARP_COLUMNS;
#pragma unroll  // acc lives in registers, which have no run-time index
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int pixel = blockIdx.x * BLOCK_M + top + 16 * m + 8 * half + lane / 4;
            if (pixel >= pixels) continue;
            const int image = pixel / (rows * columns);
#pragma unroll
            for (int n = 0; n < WARP_COLUMNS / 8; ++n) {
                const int column = blockIdx.y * COLUMNS + left + 8 * n + lane % 4 * 2;
                if (column >= outputs) break;
                const i64 to = (i64)pixel * outputs + column;
                float value[2];
                for (int e = 0; e < 2; ++e) {
                    value[e] = acc[m][n][2 * half + e] + at(bias, column + e);
#if GATED
                    const float gate = acc[m][n + WARP_COLUMNS / 8][2 * half + e];
                    value[e] *= gelu(gate + at(bias, outputs + column + e));
#else
                    value[e] += at(channel_bias, (i64)image * outputs + column + e);
                    value[e] += at(residual, to + e);
#endif
                }
                const Element pair[2] = {Element(value[0]), Element(value[1])};
                *(u32 *)(out + to) = *(const u32 *)pair;
            }
        }
}
