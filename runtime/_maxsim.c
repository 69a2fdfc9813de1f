/* MaxSim kernels: one body (_maxsim_kernel.h) compiled for every vector width and storage type, chosen at run time.
 *
 * A plain shared library for ctypes: no Python header is needed to build it, and it serves every Python.
 * Written with the vector extensions of GCC and Clang rather than intrinsics, so that the bodies for AVX-512 and NEON are
 * the text that every machine tests. Where the processor has dot instructions for the storage type, those multiply straight
 * from memory (_maxsim_dots.h): twice the products per instruction pay for a query in two parts, and nothing is widened.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
/* Keeps the compiler from holding loaded values over this point: the registers are for the sums. */
#define RELOAD __asm__("" ::: "memory")
#define UNROLL PRAGMA(GCC unroll 16)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Macros, not an enum: the preprocessor chooses by them too. */
#define BF16 0
#define F32 1
#define INT8 2
#define STORAGES 3

enum { DONE, NO_MEMORY, NO_KERNEL };
/* Layouts of the query: lanes are query vectors; dims; both, for the dot instructions; pairs of dims, in 16-bit integers. */
enum { MANY, FEW, DOT, PAIRS };
enum {
    LINE = 64,        /* bytes of a cache line */
    CHUNK = 32,       /* dims in one step: a line of bf16 */
    FEW_TALL = 4,     /* query vectors in a tile of few rows, at most */
    FEW_WIDE = 6,     /* candidate vectors in a tile of few rows, at most */
    MANY_SUMS = 12,   /* sums in a tile of many rows: with 2 query registers and 2 spare, the 16 of AVX2 */
    FLAT = 12,        /* candidate vectors handled together: a multiple of every tile's width */
    BLOCK_ITEMS = 96, /* items whose running maxima are kept at once */
    NEAR = 8192,      /* bytes that memory delivers while it fetches a line */
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
    /* few and pairs: [rows / tall][chunks][tall][CHUNK]; many: [rows / width][chunks * CHUNK][width]; dot: _maxsim_dots.h */
    const void *packed;
    const void *starts;   /* dot: what the sums start from, [rows / tile][16] float, or int32 for int8 */
    const float *units;   /* int8: what a lane's sum counts, dot: [rows / tile][16]; pairs: [rows, at least 4] */
    int64_t layout, tile; /* dot: 1, 2, 4 or 8 query vectors side by side */
    int64_t rows;         /* queries * vectors rounded up to 1, 2, a multiple of FEW_TALL, of the width, or of the tile */
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
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef int32_t int_any __attribute__((aligned(1), may_alias));
typedef int64_t long_any __attribute__((aligned(1), may_alias));

#define LARGER(a, b, v, mask) ((v)(((mask)(a) & ((a) > (b))) | ((mask)(b) & ~((a) > (b)))))

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

#define JOIN3_(a, b, c) a##_##b##_##c
#define JOIN3(a, b, c) JOIN3_(a, b, c)
#define NAME(name) JOIN3(name, STORAGE_NAME, VARIANT)
#define NAMED(storage, variant) JOIN3(maxsim, storage, variant)
#define PRAGMA_(text) _Pragma(#text)
#define PRAGMA(text) PRAGMA_(text)

/* metaembed_dots: storage types that have dot kernels here, as bits 1 << storage. metaembed_pairs: whether int8 is multiplied
 * fast as pairs of 16-bit integers. */
#if defined(TEST_WIDTH) /* the tests build every width for the machine they run on, and dots in plain C */
#define WIDTH TEST_WIDTH
#define VARIANT TEST_WIDTH
#include "_maxsim_width.h"
static const Kernel NARROW[STORAGES] = {NAMED(bf16, VARIANT), NAMED(f32, VARIANT), NAMED(int8, VARIANT)};
static const Kernel BROAD[STORAGES] = {NAMED(bf16, VARIANT), NAMED(f32, VARIANT), NAMED(int8, VARIANT)};
#ifdef TEST_DOTS
#undef VARIANT
#define VARIANT dots
#define DOTS BF16
#include "_maxsim_width.h"
#undef DOTS
#define DOTS INT8
#include "_maxsim_width.h"
static const Kernel DOTTED[STORAGES] = {maxsim_bf16_dots, 0, maxsim_int8_dots};
EXPORT int metaembed_dots(void) { return 1 << BF16 | 1 << INT8; }
#else
static const Kernel DOTTED[STORAGES] = {0};
EXPORT int metaembed_dots(void) { return 0; }
#endif

EXPORT int metaembed_vector_width(void) { return WIDTH; }
EXPORT int metaembed_pairs(void) { return 1; }
#elif defined(__x86_64__)
#include <immintrin.h>
#define WIDTH 8
#define VARIANT 8
#define TARGET "avx2,fma"
#include "_maxsim_width.h"
#undef WIDTH
#undef VARIANT
#undef TARGET
#define WIDTH 16
#define VARIANT 16
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma"
#include "_maxsim_width.h"
#undef VARIANT
#undef TARGET
#define VARIANT dots
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"
#define DOTS BF16
#include "_maxsim_width.h"
#undef DOTS
#undef TARGET
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"
#define DOTS INT8
#include "_maxsim_width.h"
static const Kernel DOTTED[STORAGES] = {maxsim_bf16_dots, 0, maxsim_int8_dots};
static const Kernel BROAD[STORAGES] = {maxsim_bf16_16, maxsim_f32_16, maxsim_int8_16};
static const Kernel NARROW[STORAGES] = {maxsim_bf16_8, maxsim_f32_8, maxsim_int8_8};

EXPORT int metaembed_vector_width(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 16;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 8 : 0;
}

EXPORT int metaembed_pairs(void) { return 1; }

EXPORT int metaembed_dots(void) {
    if (metaembed_vector_width() < 16)
        return 0;
    return (__builtin_cpu_supports("avx512bf16") ? 1 << BF16 : 0) | (__builtin_cpu_supports("avx512vnni") ? 1 << INT8 : 0);
}
#elif defined(__aarch64__)
#define WIDTH 4
#define VARIANT 4
#include "_maxsim_width.h"
static const Kernel NARROW[STORAGES] = {maxsim_bf16_4, maxsim_f32_4, maxsim_int8_4};
static const Kernel BROAD[STORAGES] = {0}, DOTTED[STORAGES] = {0};

EXPORT int metaembed_vector_width(void) { return 4; }
EXPORT int metaembed_dots(void) { return 0; }
EXPORT int metaembed_pairs(void) { return 0; }
#else
#error "no kernel for this processor: the numpy path serves it"
#endif

/* Raised with every change of the structures above: maxsim_native.py leaves a library of another version alone. */
EXPORT int metaembed_interface(void) { return 5; }

/* Scores items first..last-1; safe to call from many threads on disjoint ranges. */
EXPORT int metaembed_maxsim(int storage, const Task *task, int64_t first, int64_t last) {
    int width = metaembed_vector_width();
    if (width == 0 || storage < 0 || storage >= STORAGES)
        return NO_KERNEL;
    if (task->layout == DOT)
        return metaembed_dots() >> storage & 1 ? DOTTED[storage](task, first, last) : NO_KERNEL;
    return (width == 16 ? BROAD : NARROW)[storage](task, first, last);
}
