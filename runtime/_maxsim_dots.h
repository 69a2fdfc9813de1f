/* Products by the processor's own dot instructions, straight from storage: nothing is widened. Included by _maxsim_kernel.h.
 *
 * VDPBF16PS adds two products of bf16 to each of 16 float lanes, VPDPBUSD four products of bytes to each of 16 int32 lanes.
 * To keep the query's bits it comes as two numbers of the storage's type, high and low, one in each half of the lanes.
 * A half has HALF / tile lanes for each of `tile` query vectors (1, 2, 4 or 8), which take turns at a candidate's words: one
 * step multiplies the tile, both parts, with HALF / tile words of each candidate. Packed: [rows / tile][steps][part][row][word].
 */
#undef STEP_CHUNKS
#define STEP_CHUNKS (512 / BYTES / CHUNK) /* half a kilobyte of a candidate at a time; the query's part stays in L1 or L2 */
#define WORD 4
#define HALF (WIDTH / 2)
#define HALVES(v) SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define EVENS(v) SHUFFLE(v, v, 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODDS(v) SHUFFLE(v, v, 1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15)

INLINE int64_t NAME(sums)(const Task *task) { return task->rows / task->tile; }

#ifdef TARGET
#define Words __m512i
/* A candidate's next words, again and again over all lanes; bytes become unsigned (codes + 128), as VPDPBUSD wants them. */
INLINE Words NAME(broadcast)(const char *from, const int words) {
    __m512i all;
    if (words == 1)
        all = _mm512_set1_epi32(*(const int_any *)from);
    else if (words == 2)
        all = _mm512_set1_epi64(*(const long_any *)from);
    else if (words == 4)
        all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)from));
    else
        all = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)from));
    return STORAGE == INT8 ? _mm512_xor_si512(all, _mm512_set1_epi8((char)0x80)) : all;
}

INLINE vf NAME(dot)(vf sum, Words query, Words words) {
#if STORAGE == BF16
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)query, (__m512bh)words);
#else
    return (vf)_mm512_dpbusd_epi32((__m512i)sum, words, query);
#endif
}
#else /* for the tests: the same in plain C, so that every machine runs what surrounds it */
#define Words vu
INLINE Words NAME(broadcast)(const char *from, const int words) {
    vu all;
    for (int i = 0; i < WIDTH; i++) {
        uint32_t word;
        memcpy(&word, from + i % words * WORD, WORD);
        all[i] = STORAGE == INT8 ? word ^ 0x80808080u : word;
    }
    return all;
}

INLINE vf NAME(dot)(vf sum, Words query, Words words) {
#if STORAGE == BF16
    return sum + (vf)(query << 16) * (vf)(words << 16) + (vf)(query & 0xffff0000u) * (vf)(words & 0xffff0000u);
#else
    vi total = (vi)sum;
    for (int i = 0; i < WIDTH; i++)
        for (int byte = 0; byte < 32; byte += 8) total[i] += (int8_t)(query[i] >> byte) * (uint8_t)(words[i] >> byte);
    return (vf)total;
#endif
}
#endif

/* sums[c][t] += products of `tall` tiles of query vectors with `wide` candidates, over some steps. */
INLINE void NAME(dots_tile)(const vf *starts, const char *query, int64_t query_stride, const char *const *candidates,
                            int64_t steps, vf *sums, int64_t stride, int64_t ahead, const int words, const int tall,
                            const int wide) {
    const char *candidate[FLAT];
    vf sum[2 * FLAT];
    UNROLL for (int c = 0; c < wide; c++) {
        candidate[c] = candidates[c];
        UNROLL for (int t = 0; t < tall; t++) sum[c * tall + t] = starts ? starts[t] : sums[c * stride + t];
    }
    for (int64_t k = 0; k < steps;) {
        for (int c = 0; c < wide; c++) __builtin_prefetch(candidate[c] + k * words * WORD + ahead, 0, 2);
        for (const int64_t line = MIN(k + LINE / WORD / words, steps); k < line; k++, query += WIDTH * WORD) {
            UNROLL for (int c = 0; c < wide; c++) {
                const Words part = NAME(broadcast)(candidate[c] + k * words * WORD, words);
                UNROLL for (int t = 0; t < tall; t++)
                    sum[c * tall + t] = NAME(dot)(sum[c * tall + t], *(const Words *)(query + t * query_stride), part);
            }
            RELOAD;
        }
    }
    UNROLL for (int c = 0; c < wide; c++)
        UNROLL for (int t = 0; t < tall; t++) sums[c * stride + t] = sum[c * tall + t];
}

/* Functions of their own: inlined into one, the tiles would run the compiler out of registers. */
#define DOTS_TILES(name, words, tall, wide)                                                                                 \
    static __attribute__((noinline)) void NAME(name)(const vf *starts, const char *query, int64_t query_stride,            \
                                                     const char *const *candidates, int count, int64_t steps, vf *sums,    \
                                                     int64_t stride, int64_t ahead) {                                      \
        int c = 0;                                                                                                         \
        for (; c + wide <= count; c += wide)                                                                               \
            NAME(dots_tile)(starts, query, query_stride, candidates + c, steps, sums + c * stride, stride, ahead, words,   \
                            tall, wide);                                                                                   \
        for (; c < count; c++)                                                                                             \
            NAME(dots_tile)(starts, query, query_stride, candidates + c, steps, sums + c * stride, stride, ahead, words,   \
                            tall, 1);                                                                                      \
    }
DOTS_TILES(dots_of_1, 8, 1, 6)
DOTS_TILES(dots_of_2, 4, 1, 6)
DOTS_TILES(dots_of_4, 2, 1, 6)
DOTS_TILES(dots_of_8, 1, 1, 12)
DOTS_TILES(dots_of_16, 1, 2, 6)

/* Adds the products of all rows with up to FLAT candidates over some chunks; `ahead`: bytes to where to prefetch, line by line:
 * all at once they would wait for each other. */
static void NAME(products)(const Task *task, const Space *space, int64_t chunk, int64_t chunks, const char *const *candidates,
                           int count, int64_t ahead) {
    const int64_t words = HALF / task->tile, stride = NAME(sums)(task), step = words * WORD, bytes = CHUNK * BYTES;
    const int64_t all = (task->dims + CHUNK - 1) / CHUNK * bytes / step * WIDTH * WORD, steps = chunks * bytes / step;
    const char *query = (const char *)task->packed + chunk * bytes / step * WIDTH * WORD;
    for (int64_t m = 0; m < stride; m += 2, query += 2 * all, ahead = 0) {
        const vf *starts = chunk ? NULL : (const vf *)task->starts + m;
        vf *sums = space->sums + m;
        if (m + 1 < stride)
            NAME(dots_of_16)(starts, query, all, candidates, count, steps, sums, stride, ahead);
        else if (words == 1)
            NAME(dots_of_8)(starts, query, all, candidates, count, steps, sums, stride, ahead);
        else if (words == 2)
            NAME(dots_of_4)(starts, query, all, candidates, count, steps, sums, stride, ahead);
        else if (words == 4)
            NAME(dots_of_2)(starts, query, all, candidates, count, steps, sums, stride, ahead);
        else
            NAME(dots_of_1)(starts, query, all, candidates, count, steps, sums, stride, ahead);
    }
}

/* Folds the finished sums of candidates into their items' running maxima. */
INLINE void NAME(fold)(const Task *task, const Space *space, const float *scales, const int64_t *items, int count) {
    const int64_t sums = NAME(sums)(task);
    vf poison = {0};
    for (int c = 0; c < count; c++) {
        float *best = space->best + items[c] * space->stride;
        for (int64_t m = 0; m < sums; m++, best += task->tile) {
#if STORAGE == INT8
            vf dots = __builtin_convertvector((vi)space->sums[c * sums + m], vf) * ((const vf *)task->units)[m] * scales[c];
#else
            vf dots = space->sums[c * sums + m];
#endif
            dots += HALVES(dots); /* both parts of the query */
            for (int64_t lanes = HALF; lanes > task->tile; lanes /= 2) dots = EVENS(dots) + ODDS(dots);
            poison += dots - dots;
            *(v8 *)best = LARGER(*(v8 *)&dots, *(v8 *)best, v8, v8i);
        }
    }
    *space->poison += poison;
}
#undef Words
#undef WORD
#undef HALF
#undef HALVES
#undef EVENS
#undef ODDS
#undef DOTS_TILES
