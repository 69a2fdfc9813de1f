// MaxSim on NVIDIA GPUs: bf16 or fp16 in, products on tensor cores, float32 sums, nothing in between is ever stored.
//
// A query tile is 16 vectors in shared memory, in the order in which lanes read them: queries of 1, 2, 4, 8 or 16 rows (zeros
// fill them up), so that a pass over the candidates serves as many queries as fit. A warp takes 32 "slots" of candidate vectors
// at once, 4 tiles of 8, straight from global memory, 16 bytes a lane. An item has r_c vectors in 1, 2, 4 or a multiple of 8
// slots, so that a tile never holds parts of two items that it could not tell apart.
//
// mma.m16n8k16: lane = 4 g + t holds A (16 x 16) at rows g and g + 8, B (16 x 8) at column g, C at rows g and g + 8,
// columns 2 t and 2 t + 1. Which dimensions an instruction pairs is free, as long as A and B agree: lane t takes
// dimensions 8 t ... 8 t + 7 of each 32, four for each of two instructions (pack_queries in gpu_kernel.py does the same to A).
//
// Compiled to PTX for compute capability 8.0, which drivers from CUDA 12.1 on compile for any later GPU: see
// bench/compile_gpu_kernel.py.

typedef unsigned int u32;
typedef unsigned long long u64;
#define TILES 4
#define TILE_SLOTS (8 * TILES)
#define WARPS 8
#define LOWEST __int_as_float(0xff800000)

#ifndef EMULATED  // tests/runtime/emulate_cuda.h has them for a CPU
__device__ __forceinline__ float larger(float a, float b) {  // NaN wins, so that it is seen
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

__device__ __forceinline__ uint4 load_once(const uint4 *from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

#define MULTIPLY(TYPE) \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1))
#endif

struct Bf16 {
    static __device__ __forceinline__ void multiply(float *c, uint4 a, u32 b0, u32 b1) { MULTIPLY("bf16"); }
};
struct Fp16 {
    static __device__ __forceinline__ void multiply(float *c, uint4 a, u32 b0, u32 b1) { MULTIPLY("f16"); }
};

__device__ __forceinline__ float largest(float x, int lanes) {  // over neighbouring t
    for (int step = 1; step < lanes; step *= 2) x = larger(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

struct Scores {
    float *at;  // of the tile's first query and the launch's first item
    u64 stride;
    int queries, rows;  // from that query on; of each

    // top and low: one item's largest products at rows g and g + 8. All lanes of a warp come here; some have the item.
    __device__ __forceinline__ void store(float top, float low, int g, bool mine, int item) const {
        const int above = rows < 8 ? rows : 8;
        if (rows == 16) top += low;
        for (int step = 1; step < above; step *= 2) {
            top += __shfl_xor_sync(~0u, top, 4 * step);
            low += __shfl_xor_sync(~0u, low, 4 * step);
        }
        if (!mine || g % above) return;
        if (g / rows < queries) at[g / rows * stride + item] = top;
        if (rows < 16 && (g + 8) / rows < queries) at[(g + 8) / rows * stride + item] = low;
    }
};

// packed: tiles of `blocks` * 64 uint4. candidates: (items, r_c, 32 * blocks). scores: (queries, stride), this launch's first
// item at 0. Grid: x counts query tiles, so that blocks that run together read the same candidates; y counts candidates.
template <class Type>
__device__ __forceinline__ void maxsim(const uint4 *packed, const uint4 *candidates, float *scores, int queries, int rows,
                                       int items, int r_c, int slots, int blocks, u64 stride, int shared) {
    extern __shared__ uint4 held[];
    const uint4 *query = packed + (u64)blockIdx.x * blocks * 64;
    if (shared) {
        for (int i = threadIdx.x; i < blocks * 64; i += 32 * WARPS) held[i] = query[i];
        __syncthreads();
        query = held;
    }
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int together = slots <= TILE_SLOTS && TILE_SLOTS % slots == 0 ? TILE_SLOTS / slots : 1;  // items of a warp
    const u64 start = ((u64)blockIdx.y * WARPS + threadIdx.x / 32) * together;
    if (start >= items) return;
    const int first = (int)start, used = together * slots;
    float top = LOWEST, low = LOWEST, acc[TILES][4];
    const int query_of_tile = blockIdx.x * (16 / rows);
    const Scores out = {scores + query_of_tile * stride, stride, queries - query_of_tile, rows};

    for (int pass = 0; pass < used; pass += TILE_SLOTS) {
        const uint4 *from[TILES];
        bool real[TILES];
        for (int n = 0; n < TILES; n++) {
            const int slot = pass + 8 * n + g, item = first + slot / slots, vector = slot % slots;
            real[n] = slot < used && vector < r_c && item < items;
            from[n] = candidates + ((u64)item * r_c + vector) * (blocks * 4) + t;
            for (int k = 0; k < 4; k++) acc[n][k] = 0;
        }
#pragma unroll 4
        for (int block = 0; block < blocks; block++) {
            uint4 b[TILES];
            for (int n = 0; n < TILES; n++) b[n] = real[n] ? load_once(from[n] + block * 4) : make_uint4(0, 0, 0, 0);
            const uint4 first_half = query[block * 64 + lane], second_half = query[block * 64 + 32 + lane];
            for (int n = 0; n < TILES; n++) {
                Type::multiply(acc[n], first_half, b[n].x, b[n].y);
                Type::multiply(acc[n], second_half, b[n].z, b[n].w);
            }
        }
        for (int n = 0; n < TILES; n++)
            for (int e = 0; e < 2; e++) {
                const int slot = pass + 8 * n + 2 * t + e;
                if (slot >= used || slot % slots >= r_c) acc[n][e] = acc[n][2 + e] = LOWEST;
            }
        if (together == 1) {
            for (int n = 0; n < TILES; n++) {
                top = larger(top, larger(acc[n][0], acc[n][1]));
                low = larger(low, larger(acc[n][2], acc[n][3]));
            }
            continue;
        }
        if (slots == 1) {
            for (int n = 0; n < TILES; n++)
                for (int e = 0; e < 2; e++) {
                    const int item = first + 8 * n + 2 * t + e;
                    out.store(acc[n][e], acc[n][2 + e], g, item < items, item);
                }
            return;
        }
        const int lanes = slots >= 8 ? 4 : slots / 2, span = slots >= 8 ? slots / 8 : 1;  // tiles of an item
        float tops[TILES], lows[TILES];
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            tops[n] = larger(acc[n][0], acc[n][1]);
            lows[n] = larger(acc[n][2], acc[n][3]);
        }
#pragma unroll
        for (int reach = 1; reach < TILES; reach *= 2)
#pragma unroll
            for (int n = 0; n + reach < TILES; n += 2 * reach)
                if (reach < span) {
                    tops[n] = larger(tops[n], tops[n + reach]);
                    lows[n] = larger(lows[n], lows[n + reach]);
                }
#pragma unroll
        for (int n = 0; n < TILES; n++)
            if (n % span == 0) {
                const int item = first + (8 * n + 2 * t) / slots;
                out.store(largest(tops[n], lanes), largest(lows[n], lanes), g, t % lanes == 0 && item < items, item);
            }
        return;
    }
    out.store(largest(top, 4), largest(low, 4), g, t == 0, first);
}

#define KERNEL(NAME, TYPE) \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) NAME(const uint4 *packed, const uint4 *candidates, float *scores, \
        int queries, int rows, int items, int r_c, int slots, int blocks, u64 stride, int shared) { \
        maxsim<TYPE>(packed, candidates, scores, queries, rows, items, r_c, slots, blocks, stride, shared); \
    }
KERNEL(maxsim_bf16, Bf16)
KERNEL(maxsim_fp16, Fp16)
