/* MaxSim kernels: one body (_maxsim_kernel.h) compiled for every vector width and storage type, chosen at run time.
 *
 * A plain shared library for ctypes: no Python header is needed to build it, and it serves every Python.
 * Written with the vector extensions of GCC and Clang rather than intrinsics, so that the bodies for AVX-512 and NEON are
 * the text that every machine tests. AVX512-BF16 is not used: VDPBF16PS would round the float32 query to bf16 (errors of
 * 1e-3), and splitting the query in two to keep its bits costs the factor of two that the instruction gains.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
/* Keeps the compiler from holding loaded values over this point: the registers are for the sums. */
#define RELOAD __asm__("" ::: "memory")
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Macros, not an enum: the preprocessor chooses by them too. */
#define BF16 0
#define F32 1
#define INT8 2
#define STORAGES 3

enum { DONE, NO_MEMORY, NO_KERNEL };
enum {
    LINE = 64,        /* bytes of a cache line */
    CHUNK = 32,       /* dims in one step: a line of bf16 */
    FEW_TALL = 4,     /* query vectors in a tile of few rows, at most */
    FEW_WIDE = 6,     /* candidate vectors in a tile of few rows, at most */
    MANY_SUMS = 12,   /* sums in a tile of many rows: with 2 query registers and 2 spare, the 16 of AVX2 */
    FLAT = 12,        /* candidate vectors handled together: a multiple of every tile's width */
    BLOCK_ITEMS = 96, /* items whose running maxima are kept at once */
    BLOCK_CHUNKS = 8, /* 16 query vectors and 12 candidates x 256 dims in float32 are 28 KiB: they stay in L1 */
};

/* Vectors of every item that are stored together: vector j of item i starts at data + i * item_stride + j * dims. */
typedef struct {
    const void *data;
    const float *scales;  /* int8 only: of vector j of item i at scales[i * scale_stride + j] */
    int64_t item_stride;  /* in elements */
    int64_t scale_stride;
    int64_t vectors;      /* per item */
} Group;

typedef struct {
    const float *packed;  /* few: [rows / tall][chunks][tall][CHUNK]; else [rows / width][chunks * CHUNK][width] */
    int64_t few;          /* lanes are dims: for few rows. Else lanes are query vectors */
    int64_t rows;         /* queries * vectors rounded up to 1, 2, a multiple of FEW_TALL, or one of the width */
    int64_t queries, vectors, dims;
    const Group *groups;
    int64_t group_count;
    const int64_t *chosen; /* which row of the groups item i is, or NULL for row i */
    float *scores;        /* scores[query * score_stride + item]; NaN where a similarity is not finite */
    int64_t score_stride;
} Task;

typedef int (*Kernel)(const Task *, int64_t first, int64_t last);

typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t v4i __attribute__((vector_size(16)));

#define LARGER(a, b, v, mask) ((v)(((mask)(a) & ((a) > (b))) | ((mask)(b) & ~((a) > (b)))))

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

#define JOIN3_(a, b, c) a##_##b##_##c
#define JOIN3(a, b, c) JOIN3_(a, b, c)
#define NAME(name) JOIN3(name, STORAGE_NAME, WIDTH)
#define NAMED(storage, width) JOIN3(maxsim, storage, width)
#define PRAGMA_(text) _Pragma(#text)
#define PRAGMA(text) PRAGMA_(text)

#if defined(TEST_WIDTH) /* the tests build every width for the machine they run on */
#define WIDTH TEST_WIDTH
#include "_maxsim_width.h"
static const Kernel NARROW[STORAGES] = {NAMED(bf16, WIDTH), NAMED(f32, WIDTH), NAMED(int8, WIDTH)};
static const Kernel BROAD[STORAGES] = {NAMED(bf16, WIDTH), NAMED(f32, WIDTH), NAMED(int8, WIDTH)};

EXPORT int metaembed_vector_width(void) { return WIDTH; }
#elif defined(__x86_64__)
#include <immintrin.h>
#define WIDTH 8
#define TARGET "avx2,fma"
#include "_maxsim_width.h"
#undef WIDTH
#undef TARGET
#define WIDTH 16
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma"
#include "_maxsim_width.h"
static const Kernel BROAD[STORAGES] = {maxsim_bf16_16, maxsim_f32_16, maxsim_int8_16};
static const Kernel NARROW[STORAGES] = {maxsim_bf16_8, maxsim_f32_8, maxsim_int8_8};

EXPORT int metaembed_vector_width(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 16;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 8 : 0;
}
#elif defined(__aarch64__)
#define WIDTH 4
#include "_maxsim_width.h"
static const Kernel NARROW[STORAGES] = {maxsim_bf16_4, maxsim_f32_4, maxsim_int8_4};
static const Kernel BROAD[STORAGES] = {0, 0, 0};

EXPORT int metaembed_vector_width(void) { return 4; }
#else
#error "no kernel for this processor: the numpy path serves it"
#endif

/* Raised with every change of the structures above: maxsim_native.py leaves a library of another version alone. */
EXPORT int metaembed_interface(void) { return 3; }

/* Scores items first..last-1; safe to call from many threads on disjoint ranges. */
EXPORT int metaembed_maxsim(int storage, const Task *task, int64_t first, int64_t last) {
    int width = metaembed_vector_width();
    if (width == 0 || storage < 0 || storage >= STORAGES)
        return NO_KERNEL;
    return (width == 16 ? BROAD : NARROW)[storage](task, first, last);
}
