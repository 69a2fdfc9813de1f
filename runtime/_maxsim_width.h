/* The kernels of one vector width (WIDTH floats) for every storage type, or with DOTS for that one. */
#ifdef TARGET
#ifdef __clang__
PRAGMA(clang attribute push(__attribute__((target(TARGET))), apply_to = function))
#else
PRAGMA(GCC push_options)
PRAGMA(GCC target(TARGET))
#endif
#endif

/* Two vectors into one, in every four lanes: x0 y0 x1 y1, x2 y2 x3 y3, x0 x1 y0 y1, x2 x3 y2 y3. */
#undef INTERLEAVE_LOW
#undef INTERLEAVE_HIGH
#undef PAIR_LOW
#undef PAIR_HIGH
#if WIDTH == 4
#define INTERLEAVE_LOW(x, y) SHUFFLE(x, y, 0, 4, 1, 5)
#define INTERLEAVE_HIGH(x, y) SHUFFLE(x, y, 2, 6, 3, 7)
#define PAIR_LOW(x, y) SHUFFLE(x, y, 0, 1, 4, 5)
#define PAIR_HIGH(x, y) SHUFFLE(x, y, 2, 3, 6, 7)
#elif WIDTH == 8
#define INTERLEAVE_LOW(x, y) SHUFFLE(x, y, 0, 8, 1, 9, 4, 12, 5, 13)
#define INTERLEAVE_HIGH(x, y) SHUFFLE(x, y, 2, 10, 3, 11, 6, 14, 7, 15)
#define PAIR_LOW(x, y) SHUFFLE(x, y, 0, 1, 8, 9, 4, 5, 12, 13)
#define PAIR_HIGH(x, y) SHUFFLE(x, y, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define INTERLEAVE_LOW(x, y) SHUFFLE(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define INTERLEAVE_HIGH(x, y) SHUFFLE(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define PAIR_LOW(x, y) SHUFFLE(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define PAIR_HIGH(x, y) SHUFFLE(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#endif

#if !defined(DOTS) || DOTS == BF16
#define STORAGE BF16
#define STORAGE_NAME bf16
#include "_maxsim_kernel.h"
#undef STORAGE
#undef STORAGE_NAME
#endif
#if !defined(DOTS)
#define STORAGE F32
#define STORAGE_NAME f32
#include "_maxsim_kernel.h"
#undef STORAGE
#undef STORAGE_NAME
#endif
#if !defined(DOTS) || DOTS == INT8
#define STORAGE INT8
#define STORAGE_NAME int8
#include "_maxsim_kernel.h"
#undef STORAGE
#undef STORAGE_NAME
#endif

#ifdef TARGET
#ifdef __clang__
PRAGMA(clang attribute pop)
#else
PRAGMA(GCC pop_options)
#endif
#endif
