// Enough of CUDA to run runtime/_maxsim.cu on a CPU: a block is 128 threads of the system's, a warp's lanes meet at barriers.
// The tensor cores' instruction follows the fragment tables of NVIDIA's PTX ISA ("Matrix Fragments for mma.m16n8k16").
#define EMULATED
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

struct uint4 { unsigned x, y, z, w; };
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct Dim { int x, y; };
static thread_local Dim threadIdx;
static Dim blockIdx;
uint4 shared[1 << 16];
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__
#define __launch_bounds__(threads)

struct Lanes {  // one warp
    std::barrier<> meet{32};
    unsigned words[32][6];
    float values[32];
};
static std::deque<Lanes> warps(4);
static std::barrier<> everybody(128);
static inline Lanes &warp() { return warps[threadIdx.x / 32]; }
static inline int lane_of() { return threadIdx.x % 32; }
static inline void __syncthreads() { everybody.arrive_and_wait(); }
static inline void __syncwarp() { warp().meet.arrive_and_wait(); }

static inline float __int_as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
static inline float __shfl_xor_sync(unsigned, float value, int mask) {
    Lanes &w = warp();
    w.values[lane_of()] = value;
    w.meet.arrive_and_wait();
    const float other = w.values[lane_of() ^ mask];
    w.meet.arrive_and_wait();
    return other;
}
static inline float larger(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : a > b ? a : b; }
static const uint4 *first_candidate, *past_candidates, *first_packed, *past_packed;  // what a launch may read
extern "C" { std::atomic<int> stray_reads; }

// Asynchronous copies arrive as late as they may: when a thread waits for their stage. Until then what was there is noise.
struct Copy { uint4 *to, value; };
static thread_local std::deque<std::vector<Copy>> under_way;
static thread_local std::vector<Copy> started;
static inline void start_copy(uint4 *to, const uint4 *from, bool real) {
    const bool known = (from >= first_candidate && from < past_candidates) || (from >= first_packed && from < past_packed);
    if (real && !known) stray_reads++;
    std::memset(to, 0xff, sizeof *to);
    started.push_back({to, real && known ? *from : uint4{0, 0, 0, 0}});
}
static inline void end_stage() {
    under_way.push_back(started);
    started.clear();
}
template <int LATER>
static inline void wait_for_stage() {
    for (; under_way.size() > LATER; under_way.pop_front())
        for (const Copy &copy : under_way.front()) *copy.to = copy.value;
}

static inline float widen_bf16(uint16_t bits) { return __int_as_float((unsigned)bits << 16); }
static inline float widen_fp16(uint16_t bits) { _Float16 half; std::memcpy(&half, &bits, 2); return (float)half; }

// A, row-major 16 x 16: lane 4 g + t holds (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..), two of 16 bits a register.
// B, 16 x 8: (2t.., g), (2t + 8.., g). C, 16 x 8: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class Widen>
static void multiply_emulated(float *c, uint4 a, unsigned b0, unsigned b1, Widen widen) {
    Lanes &w = warp();
    const unsigned mine[6] = {a.x, a.y, a.z, a.w, b0, b1};
    std::memcpy(w.words[lane_of()], mine, sizeof mine);
    w.meet.arrive_and_wait();
    auto half_of = [&](int lane, int reg, int which) { return widen((uint16_t)(w.words[lane][reg] >> (16 * which))); };
    for (int i = 0; i < 4; i++) {
        const int row = lane_of() / 4 + 8 * (i / 2), column = 2 * (lane_of() % 4) + i % 2;
        for (int k = 0; k < 16; k++) {
            const int t = k % 8 / 2;
            const float left = half_of(4 * (row % 8) + t, 2 * (k / 8) + row / 8, k % 2);
            c[i] += left * half_of(4 * column + t, 4 + k / 8, k % 2);
        }
    }
    w.meet.arrive_and_wait();
}
#define MULTIPLY(TYPE) multiply_emulated(c, a, b0, b1, TYPE[0] == 'b' ? widen_bf16 : widen_fp16)

// Runs a grid. Lanes of a warp leave a kernel together, so their barrier stays whole; those that left a block do not meet again.
#define EMULATE(NAME, KERNEL)                                                                                                  \
    extern "C" void NAME(int tile_blocks, int blocks_y, const void *packed, const void *candidates, float *scores,             \
                         int queries, int rows, int items, int r_c, int blocks, unsigned long long stride) {                   \
        first_candidate = (const uint4 *)candidates;                                                                           \
        past_candidates = first_candidate + (size_t)items * r_c * blocks * 4;                                                  \
        first_packed = (const uint4 *)packed;                                                                                  \
        past_packed = first_packed + (size_t)((queries * rows + 15) / 16) * blocks * 64;                                       \
        std::vector<std::thread> threads;                                                                                      \
        std::barrier<> turn(128);                                                                                              \
        for (int id = 0; id < 128; id++)                                                                                       \
            threads.emplace_back([&, id] {                                                                                     \
                threadIdx = {id, 0};                                                                                           \
                for (int y = 0; y < blocks_y; y++)                                                                             \
                    for (int x = 0; x < tile_blocks; x++) {                                                                    \
                        if (id == 0) blockIdx = {x, y};                                                                        \
                        turn.arrive_and_wait();                                                                                \
                        under_way.clear();                                                                                     \
                        KERNEL((const uint4 *)packed, (const uint4 *)candidates, scores, queries, rows, items, r_c, blocks,    \
                               stride);                                                                                        \
                        turn.arrive_and_wait();                                                                                \
                    }                                                                                                          \
            });                                                                                                                \
        for (auto &thread : threads) thread.join();                                                                            \
    }
