// out = softmax(scale q k^T) v for one head: online softmax on the tensor cores, sm_80 and later.
//
// Compiled with ELEMENT (__half, __nv_bfloat16), KIND (f16, bf16: the same in an instruction's name)
// and HEAD_DIM, a multiple of 8 up to 256. kernels/attention_mma.py launches it.
//
// The ladder; the steps with a switch can be taken back, bench/sweeps/attention_mma.py times them:
//   1. scores in registers: S = Q K^T by mma.sync, softmax, O += P V; nothing but O is written
//   2. online softmax: a block of keys at a time; a new row maximum rescales O and the row sums
//   3. the scale folded into 2^x: one fused multiply-add and one exponential a score
//   4. no padded head dimensions: HEAD_DIM 40 takes 3 steps of 16 in Q K^T and 5 tiles of 8 in P V
//   5. SWIZZLE: ldmatrix reads 8 rows of 16 bytes from 8 different bank groups
//   6. ASYNC: the next block of K and V travels by cp.async while this one is computed
//   7. M_TILES: a warp has 32 query rows, so each fragment of K and V feeds twice the products
//   8. RESCALE_ABOVE: 2^(s - m) is as exact with an older m, so O and l are rescaled only when a
//      maximum has grown by more than 8 (probabilities up to 256, then; they are floating point)
//
// Registers of mma.m16n8k16, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix fragments"):
//   A (16 x 16): rows g and g + 8, columns 2t, 2t+1 and 8 more;   C (16 x 8): rows g, g + 8, columns 2t,
//   2t+1. C of S, packed to 16 bits, is A of P V: probabilities never leave their thread.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned u32;
typedef long long i64;
using Element = ELEMENT;

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

#ifndef SWIZZLE
#define SWIZZLE 1
#endif
#ifndef ASYNC
#define ASYNC 1
#endif
#ifndef M_TILES  // of 16 rows a warp
#define M_TILES (HEAD_DIM <= 64 ? 2 : 1)
#endif
#ifndef RESCALE_ABOVE  // in units of the exponent; 0: at every new maximum
#define RESCALE_ABOVE 8
#endif

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int BLOCK_M = 16 * M_TILES * WARPS;
constexpr int BLOCK_N = HEAD_DIM <= 128 ? 64 : HEAD_DIM <= 192 ? 32 : 16;
constexpr int K_STEPS = (HEAD_DIM + 15) / 16;  // of Q K^T, 16 columns each, zeros past HEAD_DIM
constexpr int PIECES = 2 * K_STEPS;            // 16-byte pieces of a row
constexpr int CHUNKS = (PIECES + 7) / 8;       // 128-byte pieces of a row
constexpr int Q_BYTES = CHUNKS * BLOCK_M * 128, KV_BYTES = CHUNKS * BLOCK_N * 128;
constexpr int S_TILES = BLOCK_N / 8, O_TILES = HEAD_DIM / 8;

__device__ float infinity() { return __int_as_float(0x7f800000); }

// Byte offset of a 16-byte piece among `rows` rows: columns of 64 elements one after the other, rows
// of 128 bytes, pieces of a row permuted by its number.
template <int rows>
__device__ u32 at(int row, int piece) {
    return (piece / 8 * rows + row) * 128 + (SWIZZLE ? (piece ^ row) & 7 : piece & 7) * 16;
}

// 16 bytes to shared memory, zeros if not `inside`.
__device__ void copy_piece(u32 to, const Element* source, bool inside) {
    if (ASYNC) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(source),
                     "r"(inside ? 16 : 0));
    } else {
        const uint4 x = inside ? *reinterpret_cast<const uint4*>(source) : uint4{0, 0, 0, 0};
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y),
                     "r"(x.z), "r"(x.w)
                     : "memory");
    }
}

// `rows` rows of one head to shared memory; rows from `count` on and columns past HEAD_DIM are zeros.
// Eight threads copy 128 bytes of a row; a thread's rows are THREADS / 8 apart.
template <int rows>
__device__ void load_rows(u32 to, const Element* from, i64 stride, int count) {
    const int first = threadIdx.x / 8, piece = threadIdx.x % 8;
    from += first * stride + piece * 8;
#pragma unroll
    for (int row = first; row < first + rows; row += THREADS / 8, from += THREADS / 8 * stride) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int column = 8 * chunk + piece;
            if (column < PIECES) {
                copy_piece(to + at<rows>(row, column), from + chunk * 64,
                           row < count && column < HEAD_DIM / 8);
            }
        }
    }
}

__device__ void load_matrices(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address));
}

__device__ void load_transposed(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address));
}

// c += a b
__device__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TEXT(KIND) "." TEXT(KIND) ".f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn." TEXT(KIND) "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Over the four lanes that hold a row.
__device__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// One warp's 16 x M_TILES query rows.
struct Rows {
    u32 q[M_TILES][K_STEPS][4];
    float s[M_TILES][S_TILES][4];
    float o[M_TILES][O_TILES][4];
    float m[M_TILES][2], l[M_TILES][2];  // row maxima and this thread's part of the row sums

    __device__ void clear() {
#pragma unroll
        for (int t = 0; t < M_TILES; t++) {
#pragma unroll
            for (int j = 0; j < O_TILES; j++) {
                o[t][j][0] = o[t][j][1] = o[t][j][2] = o[t][j][3] = 0.f;
            }
            m[t][0] = m[t][1] = -1e30f;  // finite: scores of -inf then give 0, not NaN
            l[t][0] = l[t][1] = 0.f;
        }
    }

    __device__ void load_queries(u32 smem, int first_row, int lane) {
#pragma unroll
        for (int t = 0; t < M_TILES; t++) {
#pragma unroll
            for (int k = 0; k < K_STEPS; k++) {
                const int row = first_row + 16 * t + lane % 16;
                load_matrices(q[t][k], smem + at<BLOCK_M>(row, 2 * k + lane / 16));
            }
        }
    }

    // S = Q K^T. Lanes 0-7 address keys 0-7, columns 0-7; 8-15 columns 8-15; 16-31 keys 8-15.
    __device__ void score(u32 smem, int lane) {
#pragma unroll
        for (int t = 0; t < M_TILES; t++) {
#pragma unroll
            for (int j = 0; j < S_TILES; j++) s[t][j][0] = s[t][j][1] = s[t][j][2] = s[t][j][3] = 0.f;
        }
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
#pragma unroll
            for (int j = 0; j < S_TILES; j += 2) {
                u32 b[4];
                const int row = 8 * j + lane % 8 + lane / 16 * 8;
                load_matrices(b, smem + at<BLOCK_N>(row, 2 * k + lane / 8 % 2));
#pragma unroll
                for (int t = 0; t < M_TILES; t++) {
                    multiply(s[t][j], q[t][k], b[0], b[1]);
                    multiply(s[t][j + 1], q[t][k], b[2], b[3]);
                }
            }
        }
    }

    // Keys from `count` on do not exist.
    __device__ void mask(int count, int lane) {
#pragma unroll
        for (int t = 0; t < M_TILES; t++) {
#pragma unroll
            for (int j = 0; j < S_TILES; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    if (8 * j + lane % 4 * 2 + e % 2 >= count) s[t][j][e] = -infinity();
                }
            }
        }
    }

    // Row maxima. Where one has outgrown m by too much, m, O and l of these rows follow.
    __device__ void follow_maxima(float c) {
        float largest[M_TILES][2];
        bool outgrown = false;
#pragma unroll
        for (int t = 0; t < M_TILES; t++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float x = m[t][r];
#pragma unroll
                for (int j = 0; j < S_TILES; j++) {
                    x = fmaxf(x, fmaxf(s[t][j][2 * r], s[t][j][2 * r + 1]));
                }
                largest[t][r] = quad_max(x);
                outgrown |= (largest[t][r] - m[t][r]) * c > RESCALE_ABOVE;
            }
        }
        if (!__any_sync(~0u, outgrown)) return;
#pragma unroll
        for (int t = 0; t < M_TILES; t++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float rescale = exp2_fast((m[t][r] - largest[t][r]) * c);
                m[t][r] = largest[t][r];
                l[t][r] *= rescale;
#pragma unroll
                for (int j = 0; j < O_TILES; j++) {
                    o[t][j][2 * r] *= rescale;
                    o[t][j][2 * r + 1] *= rescale;
                }
            }
        }
    }

    // s = 2^(c s - c m), and the sums of the rows.
    __device__ void exponentials(float c) {
#pragma unroll
        for (int t = 0; t < M_TILES; t++) {
#pragma unroll
            for (int j = 0; j < S_TILES; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[t][j][e] = exp2_fast(fmaf(s[t][j][e], c, -m[t][e / 2] * c));
                    l[t][e / 2] += s[t][j][e];
                }
            }
        }
    }

    // O += P V. V lies [key][column]; .trans hands out its columns. Lanes 0-15: keys 0-15, columns 0-7;
    // 16-31: columns 8-15, zeros where HEAD_DIM ends before them.
    __device__ void accumulate(u32 smem, int lane) {
#pragma unroll
        for (int k = 0; k < BLOCK_N / 16; k++) {
            u32 p[M_TILES][4];
#pragma unroll
            for (int t = 0; t < M_TILES; t++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float* pair = &s[t][2 * k + e / 2][e % 2 * 2];
                    p[t][e] = pack(pair[0], pair[1]);
                }
            }
#pragma unroll
            for (int j = 0; j < O_TILES; j += 2) {
                u32 b[4];
                load_transposed(b, smem + at<BLOCK_N>(16 * k + lane % 16, j + lane / 16));
#pragma unroll
                for (int t = 0; t < M_TILES; t++) {
                    multiply(o[t][j], p[t], b[0], b[1]);
                    if (j + 1 < O_TILES) multiply(o[t][j + 1], p[t], b[2], b[3]);
                }
            }
        }
    }

    __device__ void store(Element* out, i64 stride, int first_row, int end, int lane) {
#pragma unroll
        for (int t = 0; t < M_TILES; t++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float inverse = 1.f / quad_sum(l[t][r]);
                const int row = first_row + 16 * t + lane / 4 + 8 * r;
                if (row >= end) continue;
                u32* to = reinterpret_cast<u32*>(out + row * stride + lane % 4 * 2);
#pragma unroll
                for (int j = 0; j < O_TILES; j++) {
                    to[4 * j] = pack(o[t][j][2 * r] * inverse, o[t][j][2 * r + 1] * inverse);
                }
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention(const Element* q, const Element* k, const Element* v, Element* out, i64 q_b, i64 q_n,
              i64 q_h, i64 k_b, i64 k_n, i64 k_h, i64 v_b, i64 v_n, i64 v_h, int queries, int keys,
              float scale_log2) {
    // Indices
    extern __shared__ char shared[];  // Q, then two buffers of K and V
    const u32 smem_q = static_cast<u32>(__cvta_generic_to_shared(shared)), smem_kv = smem_q + Q_BYTES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 batch = blockIdx.z, head = blockIdx.y, heads = gridDim.y;
    const int first_query = blockIdx.x * BLOCK_M, warp_row = warp * 16 * M_TILES;
    q += batch * q_b + head * q_h;
    k += batch * k_b + head * k_h;
    v += batch * v_b + head * v_h;
    out += (batch * queries * heads + head) * HEAD_DIM;

    // Load
    const auto load_keys = [&](int block) {
        const u32 to = smem_kv + block % 2 * 2 * KV_BYTES;
        const int first = block * BLOCK_N;
        load_rows<BLOCK_N>(to, k + first * k_n, k_n, keys - first);
        load_rows<BLOCK_N>(to + KV_BYTES, v + first * v_n, v_n, keys - first);
        asm volatile("cp.async.commit_group;");
    };
    load_rows<BLOCK_M>(smem_q, q + first_query * q_n, q_n, queries - first_query);
    load_keys(0);

    // Compute
    Rows rows;
    rows.clear();
    const int last = (keys - 1) / BLOCK_N;
    for (int block = 0; block <= last; block++) {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();  // the block has arrived for all, and nobody reads the other buffer any more
        if (block == 0) rows.load_queries(smem_q, warp_row, lane);
        if (block < last) load_keys(block + 1);
        const u32 smem_k = smem_kv + block % 2 * 2 * KV_BYTES;
        rows.score(smem_k, lane);
        if (block == last) rows.mask(keys - block * BLOCK_N, lane);
        rows.follow_maxima(scale_log2);
        rows.exponentials(scale_log2);
        rows.accumulate(smem_k + KV_BYTES, lane);
    }

    // Store
    rows.store(out, heads * HEAD_DIM, first_query + warp_row, queries, lane);
}
