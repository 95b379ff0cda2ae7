// y = (x - mean_g) / sqrt(var_g + eps) * weight_c + bias_c, and silu(y) where SILU is 1.
//
// Compiled with ELEMENT (float, __half, __nv_bfloat16), OP and SUFFIX (parts of the entries' names),
// SILU, E (elements of an access), S (of them in one group: a segment), VECS (accesses of a thread),
// CLUSTER (blocks that share a group; 1: none), THREADS (the most a block has). channels_last has the
// sizes of the shape and of the cut as constants too: CHANNELS, PIXELS, SLAB_GROUPS, GROUP_CHANNELS,
// MAGIC, COLUMNS, LANES.
// Grids, blocks and shared memory are those of ptx/group_norm_*.ptx.j2; group_norm_launch.py
// launches both.
//
// The ladder:
//   1. one block a group, two reads: sum, then squares; few blocks, idle multiprocessors
//   2. channels_last: a thread keeps E neighbouring channels of every lanes-th pixel, so that rows
//      are read whole and a group's odd width (10 channels are 20 bytes) costs nothing
//   3. sums relative to the thread's own first sample: robust to |mean| >> std, one read
//   4. one pass: what was read stays in registers until the statistics are known
//   5. a cluster shares a group: more blocks at work, pairs (mean, M2) pushed to the peers
//   6. two passes where an image does not fit on chip; the second runs backwards, into the L2

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define JOIN_(a, b, c) a##_##b##_##c
#define JOIN(a, b, c) JOIN_(a, b, c)
#define ENTRY(variant) extern "C" __global__ void __launch_bounds__(THREADS, 1) JOIN(OP, variant, SUFFIX)
#if CLUSTER > 1
#define ONE_PASS_ENTRY(variant)                                                        \
    extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) \
        JOIN(OP, variant, SUFFIX)
#else
#define ONE_PASS_ENTRY(variant) ENTRY(variant)
#endif

typedef unsigned u32;
typedef unsigned long long u64;
using Element = ELEMENT;
constexpr int K = E / S;  // segments of a vector
// float merges twice, the second time measured from the mean that the first time found: squares
// measured from a sample 3 standard deviations away cost 3 bits.
constexpr int ROUNDS = sizeof(Element) == 4 ? 2 : 1;

struct alignas(E * sizeof(Element)) Vector {
    Element element[E];
};

// 1 / count; 1 for an empty part, whose sums are 0 too.
__device__ float reciprocal(float count) { return __frcp_rn(fmaxf(count, 1.f)); }

// Mean, measured from the group's first sample, and sum of squared differences from the mean.
struct Moments {
    float mean, m2;
};

// x - pivot and its square, summed. M2 >= (pivot - mean)^2 because the pivot is one of the samples:
// at most log2(samples) bits cancel in `moments`.
struct Sums {
    float pivot, sum, square;

    __device__ void add(float x) {
        const float d = x - pivot;
        sum += d;
        square = fmaf(d, d, square);
    }
    // The mean is measured from `origin`, the group's first sample: a mean of 1000 held in 24 bits
    // would be wrong by 3e-5 of a standard deviation of 1.
    __device__ Moments moments(float samples, float origin) const {
        const float delta = sum * reciprocal(samples);
        return {pivot - origin + delta, fmaf(-delta, sum, square)};
    }
};

// Chan's merge of many Moments, all measured from the mean of one of them.
struct Merge {
    float from, delta = 0, m2 = 0;

    __device__ void add(Moments part, float samples) {
        const float d = part.mean - from;
        delta = fmaf(samples, d, delta);
        m2 += fmaf(samples * d, d, part.m2);
    }
    __device__ void across_warp() {
        for (int distance = 16; distance; distance /= 2) {
            delta += __shfl_xor_sync(~0u, delta, distance);
            m2 += __shfl_xor_sync(~0u, m2, distance);
        }
    }
    __device__ Moments result(float samples) const {
        const float d = delta * reciprocal(samples);
        return {from + d, fmaxf(fmaf(-d, delta, m2), 0.f)};
    }
};

// Merges what `add_parts(merge)` adds, `from` being the mean of one of the parts.
template <class AddParts>
__device__ Moments merge_rounds(float from, float samples, AddParts add_parts) {
    Moments found{from, 0};
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        Merge merge{found.mean};
        add_parts(merge);
        found = merge.result(samples);
    }
    return found;
}

// What is stored for a group: its mean, and 1 / sqrt(var + eps).
__device__ float2 normalizer(Moments m, float samples, float eps) {
    return make_float2(m.mean, 1.f / __fsqrt_rn(fmaf(m.m2, reciprocal(samples), eps)));
}

__device__ float activate(float y) {
    return SILU ? y / (1.f + __expf(-y)) : y;
}

// The thread's first channel in its slab. Columns past the slab repeat its last one: whole warps.
__device__ u32 first_channel(u32 slab_channels) { return min(threadIdx.x * E, slab_channels - E); }

__device__ u32 linear_thread() { return threadIdx.y * blockDim.x + threadIdx.x; }

// Clusters: the barrier, and a store into a peer's shared memory.

__device__ void cluster_arrive() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ void cluster_wait() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

__device__ void store_to_peer(Moments *here, u32 peer, Moments value) {
#if CLUSTER > 1
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(there) : "r"((u32)__cvta_generic_to_shared(here)), "r"(peer));
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(there), "f"(value.mean),
                 "f"(value.m2) : "memory");
#else
    *here = value;
#endif
}

// The blocks of a cluster: `units` in all, `block_units` in each but the last ones.
__device__ Moments merge_blocks(const Moments *blocks, u32 stride, u32 units, u32 block_units,
                                u32 samples_of_unit) {
    return merge_rounds(blocks[0].mean, (float)units * samples_of_unit, [&](Merge &merge) {
        u32 left = units;
        for (int r = 0; r < CLUSTER; r++) {
            const u32 here = min(left, block_units);
            merge.add(blocks[r * stride], (float)(here * samples_of_unit));
            left -= here;
        }
    });
}

// The slices of one group, by a warp.
__device__ Moments merge_slices(const Moments *partial, const float *slice_units, u32 slices,
                                float units, float samples_of_unit) {
    return merge_rounds(partial[0].mean, units * samples_of_unit, [&](Merge &merge) {
        for (u32 s = linear_thread() % 32; s < slices; s += 32)
            merge.add(partial[s], slice_units[s] * samples_of_unit);
        merge.across_warp();
    });
}

// channels_last -----------------------------------------------------------------------------------

extern __shared__ char smem[];

// The block's lanes and segments of each group: shared memory as in the header of the PTX file.
struct Lanes {
    Moments *entries;
    float *samples;
    u32 pitch, segments;

    __device__ Lanes(Moments *at, u32 group_channels)
        : entries(at), pitch(blockDim.x * K | 1), segments(group_channels / S) {
        samples = (float *)(entries + blockDim.y * pitch);
    }
    __device__ void publish(const Sums (&sums)[K], const float (&origin)[K], float count) {
#pragma unroll
        for (int k = 0; k < K; k++)
            entries[threadIdx.y * pitch + threadIdx.x * K + k] = sums[k].moments(count, origin[k]);
        if (threadIdx.x == 0) samples[threadIdx.y] = count;
    }
    // By a whole warp.
    __device__ Moments merge(u32 group, float group_samples) const {
        return merge_rounds(entries[group * segments].mean, group_samples, [&](Merge &merge) {
            for (u32 lane = linear_thread() % 32; lane < blockDim.y; lane += 32)
                for (u32 s = 0; s < segments; s++)
                    merge.add(entries[lane * pitch + group * segments + s], samples[lane]);
            merge.across_warp();
        });
    }
};

__device__ void start(Sums (&sums)[K], const Vector &first) {
#pragma unroll
    for (int k = 0; k < K; k++) sums[k] = {(float)first.element[k * S], 0.f, 0.f};
}

__device__ void add(Sums (&sums)[K], const Vector &vector) {
#pragma unroll
    for (int j = 0; j < E; j++) sums[j / S].add((float)vector.element[j]);
}

// The first sample of the group of each segment; `first` is the slab's first channel of pixel 0.
__device__ void load_origins(float (&origin)[K], const Element *first, u32 slab_channel,
                             u32 group_channels, u32 magic) {
#pragma unroll
    for (int k = 0; k < K; k++)  // channel / group_channels, by a multiplication
        origin[k] = (float)first[((slab_channel + k * S) * (u64)magic >> 31) * group_channels];
}

// (x - origin) * scale + shift of the thread's E channels.
struct Affine {
    float origin[K], scale[E], shift[E];

    __device__ Affine(const float (&origin_)[K], const float2 *groups, const Element *weight,
                      const Element *bias, u32 channel, u32 slab_channel, u32 magic) {
#pragma unroll
        for (int k = 0; k < K; k++) origin[k] = origin_[k];
#pragma unroll
        for (int j = 0; j < E; j++) {
            const float2 group = groups[(slab_channel + j / S * S) * (u64)magic >> 31];
            scale[j] = group.y * (weight ? (float)weight[channel + j] : 1.f);
            shift[j] = fmaf(-group.x, scale[j], bias ? (float)bias[channel + j] : 0.f);
        }
    }
    __device__ Vector operator()(const Vector &x) const {
        Vector y;
#pragma unroll
        for (int j = 0; j < E; j++)
            y.element[j] = (Element)activate(fmaf((float)x.element[j] - origin[j / S], scale[j], shift[j]));
        return y;
    }
};

#ifdef CHANNELS
#if PASSES == 1
ONE_PASS_ENTRY(nhwc)(const Element *x, const Element *weight, const Element *bias, Element *out,
                     float eps) {
    constexpr u32 channels = CHANNELS, pixels = PIXELS;
    constexpr u32 block_pixels = (PIXELS + CLUSTER - 1) / CLUSTER;
    constexpr u32 slab_groups = SLAB_GROUPS, group_channels = GROUP_CHANNELS, magic = MAGIC;
    constexpr u32 threads = COLUMNS * LANES;
    cluster_arrive();  // "I run": waited for before the first store to a peer
    // Indices
    const u32 first = blockIdx.x * block_pixels;
    const u32 count = min(block_pixels, pixels - min(first, pixels));
    const u32 slab_channel = first_channel(slab_groups * group_channels);
    const u32 channel = blockIdx.y * slab_groups * group_channels + slab_channel;
    const u64 from = ((u64)blockIdx.z * pixels + first + threadIdx.y) * channels + channel;
    constexpr u64 step = (u64)LANES * channels;
    float2 *groups = (float2 *)smem;
    Moments *blocks = (Moments *)(groups + slab_groups);
    Lanes lanes(blocks + CLUSTER * slab_groups, group_channels);

    // Load
    float origin[K];
    load_origins(origin, x + (u64)blockIdx.z * pixels * channels + channel - slab_channel,
                 slab_channel, group_channels, magic);
    Vector kept[VECS] = {};
#pragma unroll
    for (int v = 0; v < VECS; v++)
        if (threadIdx.y + v * LANES < count)
            kept[v] = *(const Vector *)(x + from + v * step);

    // Reduce
    Sums sums[K];
    float samples = 0;
    start(sums, kept[0]);
#pragma unroll
    for (int v = 0; v < VECS; v++)
        if (threadIdx.y + v * LANES < count) {
            samples += S;
            add(sums, kept[v]);
        }
    lanes.publish(sums, origin, samples);
    __syncthreads();
    cluster_wait();
    for (u32 group = linear_thread() / 32; group < slab_groups; group += threads / 32) {
        const Moments m = lanes.merge(group, (float)count * group_channels);
        const u32 peer = linear_thread() % 32;
        if (peer < CLUSTER) store_to_peer(blocks + blockIdx.x * slab_groups + group, peer, m);
    }
    cluster_arrive();
    cluster_wait();
    if (CLUSTER == 1) __syncthreads();
    for (u32 group = linear_thread(); group < slab_groups; group += threads)
        groups[group] = normalizer(
            merge_blocks(blocks + group, slab_groups, pixels, block_pixels, group_channels),
            (float)pixels * group_channels, eps);
    __syncthreads();

    // Compute, store
    const Affine affine(origin, groups, weight, bias, channel, slab_channel, magic);
#pragma unroll
    for (int v = 0; v < VECS; v++)
        if (threadIdx.y + v * LANES < count)
            *(Vector *)(out + from + v * step) = affine(kept[v]);
}
#else
ENTRY(nhwc_statistics)(const Element *x, Moments *partial, float *slice_pixels) {
    constexpr u32 channels = CHANNELS, pixels = PIXELS, groups = CHANNELS / GROUP_CHANNELS;
    constexpr u32 tile_groups = SLAB_GROUPS, group_channels = GROUP_CHANNELS, magic = MAGIC;
    // Indices
    const u32 tile_channel = first_channel(tile_groups * group_channels);
    const u32 channel = blockIdx.y * tile_groups * group_channels + tile_channel;
    const u32 chunk = LANES * VECS, slice = blockIdx.x, slices = gridDim.x;
    const Element *image = x + (u64)blockIdx.z * pixels * channels + channel;
    Lanes lanes((Moments *)smem + tile_groups, group_channels);
    float origin[K];
    load_origins(origin, image - tile_channel, tile_channel, group_channels, magic);

    // Load, sum: chunks upwards, interleaved with the other slices'
    Sums sums[K] = {};
    float samples = 0;
    u32 count = 0;
    for (u32 first = slice * chunk; first < pixels; first += slices * chunk) {
        Vector vector[VECS] = {};
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            const u32 pixel = first + threadIdx.y + v * LANES;
            if (pixel < pixels) vector[v] = *(const Vector *)(image + (u64)pixel * channels);
        }
        if (count == 0) start(sums, vector[0]);
        count += min(chunk, pixels - first);
#pragma unroll
        for (int v = 0; v < VECS; v++)
            if (first + threadIdx.y + v * LANES < pixels) {
                samples += S;
                add(sums, vector[v]);
            }
    }

    // Reduce, store
    lanes.publish(sums, origin, samples);
    __syncthreads();
    const u32 thread = linear_thread();
    if (thread == 0) slice_pixels[blockIdx.z * slices + slice] = count;
    for (u32 group = thread / 32; group < tile_groups; group += COLUMNS * LANES / 32) {
        const Moments m = lanes.merge(group, (float)count * group_channels);
        const u32 g = blockIdx.z * groups + blockIdx.y * tile_groups + group;
        if (thread % 32 == 0) partial[g * slices + slice] = m;
    }
}

ENTRY(nhwc_apply)(const Element *x, const Moments *partial, const float *slice_pixels,
                  const Element *weight, const Element *bias, Element *out, float eps) {
    constexpr u32 channels = CHANNELS, pixels = PIXELS, all_groups = CHANNELS / GROUP_CHANNELS;
    constexpr u32 tile_groups = SLAB_GROUPS, group_channels = GROUP_CHANNELS, magic = MAGIC;
    constexpr u32 slices = SLICES;
    // Reduce: a warp a group
    float2 *groups = (float2 *)smem;
    const u32 thread = linear_thread();
    for (u32 group = thread / 32; group < tile_groups; group += COLUMNS * LANES / 32) {
        const u32 g = blockIdx.z * all_groups + blockIdx.y * tile_groups + group;
        const Moments m = merge_slices(partial + g * slices, slice_pixels + blockIdx.z * slices,
                                       slices, pixels, group_channels);
        if (thread % 32 == 0) groups[group] = normalizer(m, (float)pixels * group_channels, eps);
    }
    __syncthreads();

    // Load, compute, store: chunks downwards, into what the L2 still holds
    const u32 tile_channel = first_channel(tile_groups * group_channels);
    const u32 channel = blockIdx.y * tile_groups * group_channels + tile_channel;
    const u64 image = (u64)blockIdx.z * pixels * channels + channel;
    float origin[K];
    load_origins(origin, x + image - tile_channel, tile_channel, group_channels, magic);
    const Affine affine(origin, groups, weight, bias, channel, tile_channel, magic);
    const u32 chunk = LANES * VECS;
    const int chunks = (pixels + chunk - 1) / chunk;
    for (int c = chunks - 1 - (int)blockIdx.x; c >= 0; c -= gridDim.x) {
        Vector vector[VECS];
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            const u32 pixel = c * chunk + threadIdx.y + v * LANES;
            if (pixel < pixels) vector[v] = *(const Vector *)(x + image + (u64)pixel * channels);
        }
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            const u32 pixel = c * chunk + threadIdx.y + v * LANES;
            if (pixel < pixels) *(Vector *)(out + image + (u64)pixel * channels) = affine(vector[v]);
        }
    }
}
#endif
#endif

// contiguous: a group is one stretch of memory, E == S ---------------------------------------------

// Every thread's moments into those of the block.
__device__ Moments merge_threads(Moments own, float samples, float block_samples) {
    __shared__ float mean_of_thread_0;
    __shared__ float2 warps[ROUNDS][32];
    const u32 thread = threadIdx.x;
    if (thread == 0) mean_of_thread_0 = own.mean;
    __syncthreads();
    int round = 0;
    return merge_rounds(mean_of_thread_0, block_samples, [&](Merge &merge) {
        merge.add(own, samples);
        merge.across_warp();
        if (thread % 32 == 0) warps[round][thread / 32] = make_float2(merge.delta, merge.m2);
        __syncthreads();
        // Every warp adds the warps' sums.
        const bool is_warp = thread % 32 < blockDim.x / 32;
        merge.delta = is_warp ? warps[round][thread % 32].x : 0.f;
        merge.m2 = is_warp ? warps[round][thread % 32].y : 0.f;
        merge.across_warp();
        round++;
    });
}

__device__ Vector normalize(const Vector &x, float origin, float2 group, const Element *weight,
                            const Element *bias, u32 channel) {
    const float scale = group.y * (weight ? (float)weight[channel] : 1.f);
    const float shift = fmaf(-group.x, scale, bias ? (float)bias[channel] : 0.f);
    Vector y;
#pragma unroll
    for (int j = 0; j < E; j++)
        y.element[j] = (Element)activate(fmaf((float)x.element[j] - origin, scale, shift));
    return y;
}

#if PASSES == 1
ONE_PASS_ENTRY(nchw)(const Element *x, const Element *weight, const Element *bias, Element *out,
                     u64 magic, u32 vectors, u32 block_vectors, u32 groups, u32 group_channels,
                     float eps) {
    cluster_arrive();  // "I run": waited for before the first store to a peer
    // Indices
    __shared__ Moments blocks[CLUSTER];
    __shared__ float2 group_normalizer;
    const u32 group = blockIdx.y, thread = threadIdx.x;
    const u32 first = blockIdx.x * block_vectors;
    const u32 count = min(block_vectors, vectors - min(first, vectors));
    const u64 from = ((u64)blockIdx.z * groups + group) * vectors + first;
    const float origin = (float)((const Vector *)x)[from - first].element[0];

    // Load
    Vector kept[VECS] = {};
#pragma unroll
    for (int v = 0; v < VECS; v++)
        if (thread + v * blockDim.x < count)
            kept[v] = ((const Vector *)x)[from + thread + v * blockDim.x];

    // Reduce
    Sums sums[K];
    float samples = 0;
    start(sums, kept[0]);
#pragma unroll
    for (int v = 0; v < VECS; v++)
        if (thread + v * blockDim.x < count) {
            samples += E;
            add(sums, kept[v]);
        }
    const Moments m = merge_threads(sums[0].moments(samples, origin), samples, (float)count * E);
    cluster_wait();
    if (thread < CLUSTER) store_to_peer(blocks + blockIdx.x, thread, m);
    cluster_arrive();
    cluster_wait();
    if (thread == 0)
        group_normalizer =
            normalizer(merge_blocks(blocks, 1, vectors, block_vectors, E), (float)vectors * E, eps);
    __syncthreads();

    // Compute, store
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        const u32 i = thread + v * blockDim.x;
        if (i < count) {
            const u32 channel = group * group_channels + (u32)((first + i) * magic >> 48);
            ((Vector *)out)[from + i] =
                normalize(kept[v], origin, group_normalizer, weight, bias, channel);
        }
    }
}
#else
ENTRY(nchw_statistics)(const Element *x, Moments *partial, float *slice_vectors, u32 vectors) {
    // Load, sum: chunks upwards, interleaved with the other slices'
    const u32 slab = blockIdx.z * gridDim.y + blockIdx.y, slice = blockIdx.x;
    const Vector *group = (const Vector *)x + (u64)slab * vectors;
    const u32 chunk = blockDim.x * VECS;
    Sums sums[K] = {};
    float samples = 0;
    u32 count = 0;
    for (u32 first = slice * chunk; first < vectors; first += gridDim.x * chunk) {
        Vector vector[VECS] = {};
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            const u32 i = first + threadIdx.x + v * blockDim.x;
            if (i < vectors) vector[v] = group[i];
        }
        if (count == 0) start(sums, vector[0]);
        count += min(chunk, vectors - first);
#pragma unroll
        for (int v = 0; v < VECS; v++)
            if (first + threadIdx.x + v * blockDim.x < vectors) {
                samples += E;
                add(sums, vector[v]);
            }
    }

    // Reduce, store
    const float origin = (float)group[0].element[0];
    const Moments m = merge_threads(sums[0].moments(samples, origin), samples, (float)count * E);
    if (threadIdx.x) return;
    partial[slab * gridDim.x + slice] = m;
    if (slab == 0) slice_vectors[slice] = count;  // the same in every group
}

ENTRY(nchw_apply)(const Element *x, const Moments *partial, const float *slice_vectors,
                  const Element *weight, const Element *bias, Element *out, u64 magic, u32 slices,
                  u32 group_channels, float eps, u32 vectors) {
    // Reduce: the slices, by warp 0
    __shared__ float2 group_normalizer;
    const u32 slab = blockIdx.z * gridDim.y + blockIdx.y;
    if (threadIdx.x < 32) {
        const Moments m = merge_slices(partial + slab * slices, slice_vectors, slices, vectors, E);
        if (threadIdx.x == 0) group_normalizer = normalizer(m, (float)vectors * E, eps);
    }
    __syncthreads();

    // Load, compute, store: chunks downwards, into what the L2 still holds
    const Vector *group = (const Vector *)x + (u64)slab * vectors;
    Vector *out_group = (Vector *)out + (u64)slab * vectors;
    const float origin = (float)group[0].element[0];
    const u32 chunk = blockDim.x * VECS;
    const int chunks = (vectors + chunk - 1) / chunk;
    for (int c = chunks - 1 - (int)blockIdx.x; c >= 0; c -= gridDim.x)
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            const u32 i = c * chunk + threadIdx.x + v * blockDim.x;
            if (i >= vectors) break;
            const u32 channel = blockIdx.y * group_channels + (u32)(i * magic >> 48);
            out_group[i] = normalize(group[i], origin, group_normalizer, weight, bias, channel);
        }
}
#endif
