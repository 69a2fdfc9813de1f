// MaxSim on NVIDIA GPUs: bf16 or fp16 in, products on tensor cores, float32 sums; of all products only scores are stored.
//
// Query vectors come in tiles of 16 rows, in the order in which lanes read them: queries of 1, 2, 4, 8 or 16 rows (zeros fill
// them up), so that one reading of the candidates serves as many queries as fit in the TILES tiles of a block. A warp has as many
// whole items as fit in 32 candidate vectors, or one item, 32 vectors a pass.
//
// Both stream through shared memory, 64 dimensions (a line of 128 bytes) of each vector at a time, STAGES - 1 lines under way
// while one is multiplied. The copy fills what is beyond an end with zeros.
//
// mma.m16n8k16: lane = 4 g + t holds A (16 x 16) at rows g and g + 8, B (16 x 8) at column g, C at rows g and g + 8,
// columns 2 t and 2 t + 1. Which dimensions an instruction pairs is free, as long as A and B agree: lane t takes
// dimensions 8 t ... 8 t + 7 of each 32, four for each of two instructions (pack_queries in gpu_kernel.py does the same to A).
//
// Compiled to PTX for compute capability 8.0, which drivers from CUDA 12.1 on compile for any later GPU: see
// bench/compile_gpu_kernel.py.

typedef unsigned int u32;
typedef unsigned long long u64;
#define WARPS 4
#define THREADS (32 * WARPS)
#define COLUMNS 4
#define SLOTS (8 * COLUMNS)
#define LINE 8  // uint4 of a vector's 64 dimensions
#define PITCH 33  // floats of a row of products, where a warp's lanes exchange them
#define LOWEST __int_as_float(0xff800000)

#ifndef EMULATED  // tests/runtime/emulate_cuda.h has them for a CPU
__device__ __forceinline__ float larger(float a, float b) {  // NaN wins, so that it is seen
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

__device__ __forceinline__ void start_copy(uint4 *to, const uint4 *from, bool real) {  // zeros, and no reading, if not real
    const u32 at = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ __forceinline__ void end_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LATER>
__device__ __forceinline__ void wait_for_stage() { asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory"); }

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

// Scores of one tile: `products` are a warp's, 16 rows of PITCH floats, `vectors` of them real, those of whole items. Each lane has
// a row, and every other vector of it; `best` is what it found in earlier passes over the same item.
__device__ __forceinline__ float reduce(const float *products, int vectors, float best) {
#pragma unroll 1
    for (int i = threadIdx.x % 32 / 16; i < vectors; i += 2) best = larger(best, products[threadIdx.x % 16 * PITCH + i]);
    return best;
}

// The sum over each query's rows goes to `at`, of the tile's first query; the next query's is `stride` further on.
__device__ __forceinline__ void store(float *at, u64 stride, int queries, int rows, float best) {
    const int row = threadIdx.x % 16;
    best = larger(best, __shfl_xor_sync(~0u, best, 16));
#pragma unroll 1
    for (int step = 1; step < rows; step *= 2) best += __shfl_xor_sync(~0u, best, step);
    if (threadIdx.x % 32 < 16 && row % rows == 0 && row / rows < queries) at[row / rows * stride] = best;
}

// packed: tiles of `blocks` * 64 uint4. candidates: (items, r_c, 32 * blocks). scores: (queries, stride), this launch's first
// item at 0. Grid: x counts TILES of query tiles, so that blocks that run together read the same candidates; y counts candidates.
template <class Type, int TILES, int STAGES>
__device__ __forceinline__ void maxsim(const uint4 *packed, const uint4 *candidates, float *scores, int queries, int rows,
                                       int items, int r_c, int blocks, u64 stride) {
    extern __shared__ uint4 shared[];  // STAGES of TILES * 128 for queries, then 256 a warp
    const int stage_size = TILES * 128 + WARPS * 256;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_tile = blockIdx.x * TILES, tiles = (queries * rows + 15) / 16;
    const int together = r_c < SLOTS ? SLOTS / r_c : 1, first = (blockIdx.y * WARPS + warp) * together;
    const int here = first < items ? (items - first < together ? items - first : together) : 0;  // items of this warp
    const int lines = (blocks + 1) / 2, passes = (together * r_c + SLOTS - 1) / SLOTS;
    candidates += (u64)first * r_c * (4 * blocks);

    int next_pass = 0, next_line = 0;
    auto start_stage = [&](int stage) {
        if (next_pass == passes) return;
        uint4 *to = shared + stage * stage_size;
#pragma unroll
        for (int i = threadIdx.x; i < TILES * 128; i += THREADS) {
            const int tile = first_tile + i / 128, block = 2 * next_line + i / 64 % 2;
            const bool real = tile < tiles && block < blocks;
            start_copy(to + i, packed + (real ? ((u64)tile * blocks + block) * 64 + i % 64 : 0), real);
        }
        to += TILES * 128 + warp * 256;
        const int part = lane % LINE, at = next_line * LINE + part;
#pragma unroll
        for (int slot = lane / LINE; slot < SLOTS; slot += 4) {
            const int vector = next_pass * SLOTS + slot;
            const bool real = vector < here * r_c && at < 4 * blocks;
            // Odd slots have their halves exchanged, so that the lanes that read together find different banks.
            start_copy(to + slot * LINE + (part ^ (slot % 2 * 4)), candidates + (real ? (u64)vector * (4 * blocks) + at : 0), real);
        }
        if (++next_line == lines) next_line = 0, next_pass++;
    };
#pragma unroll 1
    for (int stage = 0; stage < STAGES - 1; stage++) {
        start_stage(stage);
        end_stage();
    }

    float best[TILES], acc[TILES][COLUMNS][4];
    for (int q = 0; q < TILES; q++) best[q] = LOWEST;
    int stage = 0;
    for (int pass = 0; pass < passes; pass++) {
        for (int q = 0; q < TILES; q++)
            for (int n = 0; n < COLUMNS; n++)
                for (int k = 0; k < 4; k++) acc[q][n][k] = 0;
        uint4 *mine = shared;
        for (int line = 0; line < lines; line++) {
            wait_for_stage<STAGES - 2>();
            __syncthreads();  // all copies are in, and nobody reads the stage before this one any more
            start_stage(stage == 0 ? STAGES - 1 : stage - 1);
            end_stage();
            const uint4 *query = shared + stage * stage_size;
            mine = shared + stage * stage_size + TILES * 128 + warp * 256;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint4 b[COLUMNS];
#pragma unroll
                for (int n = 0; n < COLUMNS; n++) b[n] = mine[(8 * n + g) * LINE + ((4 * half + t) ^ (g % 2 * 4))];
#pragma unroll
                for (int q = 0; q < TILES; q++) {
                    const uint4 *a = query + q * 128 + half * 64 + lane;
                    const uint4 first_half = a[0], second_half = a[32];
#pragma unroll
                    for (int n = 0; n < COLUMNS; n++) {
                        Type::multiply(acc[q][n], first_half, b[n].x, b[n].y);
                        Type::multiply(acc[q][n], second_half, b[n].z, b[n].w);
                    }
                }
            }
            stage = stage == STAGES - 1 ? 0 : stage + 1;
        }
        float *products = (float *)mine;  // this warp's alone, and read: the next copy to it starts after the next barrier
#pragma unroll
        for (int q = 0; q < TILES; q++) {
            __syncwarp();
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
                for (int k = 0; k < 4; k++) products[(g + k / 2 * 8) * PITCH + 8 * n + 2 * t + k % 2] = acc[q][n][k];
            __syncwarp();
            float *at = scores + (u64)(first_tile + q) * (16 / rows) * stride + first;
            const int left = queries - (first_tile + q) * (16 / rows);
            if (together > 1) {
                for (int item = 0; item < here; item++)
                    store(at + item, stride, left, rows, reduce(products + item * r_c, r_c, LOWEST));
                continue;
            }
            best[q] = reduce(products, r_c - pass * SLOTS < SLOTS ? r_c - pass * SLOTS : SLOTS, best[q]);
            if (pass == passes - 1 && here) store(at, stride, left, rows, best[q]);
        }
    }
}

#define KERNEL(NAME, ...) \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const uint4 *packed, const uint4 *candidates, float *scores, \
        int queries, int rows, int items, int r_c, int blocks, u64 stride) { \
        maxsim<__VA_ARGS__>(packed, candidates, scores, queries, rows, items, r_c, blocks, stride); \
    }
// Names end in TILES and STAGES; which is used when: VARIANTS in gpu_kernel.py.
KERNEL(maxsim_bf16_1_3, Bf16, 1, 3)
KERNEL(maxsim_bf16_1_4, Bf16, 1, 4)
KERNEL(maxsim_bf16_2_3, Bf16, 2, 3)
KERNEL(maxsim_bf16_4_3, Bf16, 4, 3)
KERNEL(maxsim_fp16_1_3, Fp16, 1, 3)
KERNEL(maxsim_fp16_1_4, Fp16, 1, 4)
KERNEL(maxsim_fp16_2_3, Fp16, 2, 3)
KERNEL(maxsim_fp16_4_3, Fp16, 4, 3)
