/* Products in float32: lanes are dims for few rows, query vectors for more. Included by _maxsim_kernel.h.
 *
 * For int8 lanes of dims may be pairs of 16-bit integers instead: one instruction multiplies 2 * WIDTH codes with 16-bit codes
 * of the query and adds them two by two, where float32 takes two conversions, two widenings and two multiply-adds.
 */
#undef STEP_CHUNKS
#define STEP_CHUNKS BLOCK_CHUNKS
/* Keeps a value in its register: GCC loads the query again for every product otherwise, and spills products before their sums. */
#undef HOLD
#ifdef TARGET
#define HOLD(value) __asm__ volatile("" : "+v"(value))
#else
#define HOLD(value) (void)(value)
#endif

INLINE int64_t NAME(sums)(const Task *task) { return task->layout == MANY ? task->rows / WIDTH : task->rows; }

/* By intrinsics where there are some: GCC 12 makes scalar code of the conversion below, nine times slower on AVX2. */
INLINE vf NAME(widen)(const char *codes) {
#if defined(TARGET) && WIDTH == 8
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
#elif defined(TARGET) && WIDTH == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const vs *)codes, vi), vf);
#endif
}

/* The h-th WIDTH dims of each half of a chunk. For bf16, two in a word, the halves are the even and the odd dims. */
INLINE vf NAME(low)(const char *chunk, int h) {
    if (STORAGE == F32) return *(const vf *)(chunk + 4 * h * WIDTH);
    if (STORAGE == BF16) return (vf)(*(const vu *)(chunk + 4 * h * WIDTH) << 16);
    return NAME(widen)(chunk + h * WIDTH);
}

INLINE vf NAME(high)(const char *chunk, int h, const int tight) {
#if defined(TARGET) && WIDTH == 8 && STORAGE == BF16
    if (tight) { /* two shifts where a mask would take the sixteenth register of a tile and spill a sum: 1.2 times as fast */
        vu words = *(const vu *)(chunk + 4 * h * WIDTH) >> 16;
        __asm__("" : "+x"(words)); /* or the compiler makes it a mask again */
        return (vf)(words << 16);
    }
#endif
    if (STORAGE == F32) return *(const vf *)(chunk + 4 * (h * WIDTH + CHUNK / 2));
    if (STORAGE == BF16) return (vf)(*(const vu *)(chunk + 4 * h * WIDTH) & 0xffff0000u);
    return NAME(widen)(chunk + h * WIDTH + CHUNK / 2);
}

/* sum + products of 16-bit query codes with the int8 codes of as many dims, two by two in each int32 lane. */
#if defined(TARGET) && WIDTH == 8
#define Codes __m256i
#define Query __m256i
INLINE Codes NAME(codes)(const char *from) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)); }
INLINE Query NAME(query)(const char *from) { return _mm256_load_si256((const __m256i *)from); }
INLINE vf NAME(pairs)(vf sum, Query query, Codes part) {
    return (vf)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(query, part));
}
#elif defined(TARGET) && WIDTH == 16
#define Codes __m512i
#define Query __m512i
INLINE Codes NAME(codes)(const char *from) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from)); }
INLINE Query NAME(query)(const char *from) { return _mm512_load_si512(from); }
INLINE vf NAME(pairs)(vf sum, Query query, Codes part) {
    return (vf)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16(query, part));
}
#else /* for the tests: the same in plain C */
#define Codes const int8_t *
#define Query const int16_t *
INLINE Codes NAME(codes)(const char *from) { return (const int8_t *)from; }
INLINE Query NAME(query)(const char *from) { return (const int16_t *)from; }
INLINE vf NAME(pairs)(vf sum, Query query, Codes part) {
    vi total = (vi)sum;
    for (int i = 0; i < 2 * WIDTH; i++) total[i / 2] += query[i] * part[i];
    return (vf)total;
}
#endif

/* Few rows: lanes are dims. sums[c][m] += products of query vector m and candidate c, lane by lane. Each of the tiles that
 * read the same candidates, `pass` of `passes`, asks for its share of the lines to come: memory is then never idle. */
INLINE void NAME(few_tile)(const char *query, const char *const *candidates, int64_t chunks, vf *sums, int64_t rows,
                           int fresh, int64_t ahead, int64_t pass, int64_t passes, const int paired, const int tall,
                           const int wide) {
    const int64_t size = paired ? 2 : 4; /* bytes of a query's value */
    const char *candidate[FEW_WIDE];
    vf sum[FEW_WIDE * FEW_TALL], part[FEW_WIDE];
    Codes codes[FEW_WIDE];
    const int64_t turns = passes * MAX(LINE / (CHUNK * BYTES), 1); /* a chunk of int8 is half a line */
    int64_t turn = pass; /* chunks until it is this pass's turn */
    for (int c = 0; c < wide; c++) {
        candidate[c] = candidates[c];
        for (int m = 0; m < tall; m++) sum[c * tall + m] = fresh ? (vf){0} : sums[c * rows + m];
    }
    for (int64_t k = 0; k < chunks; k++, query += tall * CHUNK * size) {
        if (ahead && turn-- == 0) { /* a line of each between steps: all at once would hold up the products */
            for (int c = 0; c < wide; c++)
                for (int line = 0; line < MAX(CHUNK * BYTES / LINE, 1); line++)
                    __builtin_prefetch(candidate[c] + k * CHUNK * BYTES + line * LINE + ahead, 0, 2);
            turn = turns - 1;
        }
        for (int h = 0; h < CHUNK / 2 / WIDTH; h++) {
            if (paired) {
                for (int c = 0; c < wide; c++) codes[c] = NAME(codes)(candidate[c] + k * CHUNK + 2 * h * WIDTH);
                for (int m = 0; m < tall; m++) {
                    Query q = NAME(query)(query + (m * CHUNK + 2 * h * WIDTH) * size);
                    HOLD(q);
                    for (int c = 0; c < wide; c++) {
                        sum[c * tall + m] = NAME(pairs)(sum[c * tall + m], q, codes[c]);
                        HOLD(sum[c * tall + m]);
                    }
                }
                RELOAD;
                continue;
            }
            for (int c = 0; c < wide; c++) part[c] = NAME(low)(candidate[c] + k * CHUNK * BYTES, h);
            for (int m = 0; m < tall; m++) {
                vf q = *(const vf *)(query + (m * CHUNK + h * WIDTH) * size);
                for (int c = 0; c < wide; c++) sum[c * tall + m] += q * part[c];
            }
            RELOAD;
            for (int c = 0; c < wide; c++) part[c] = NAME(high)(candidate[c] + k * CHUNK * BYTES, h, tall == FEW_TALL);
            for (int m = 0; m < tall; m++) {
                vf q = *(const vf *)(query + (m * CHUNK + h * WIDTH + CHUNK / 2) * size);
                for (int c = 0; c < wide; c++) sum[c * tall + m] += q * part[c];
            }
            RELOAD;
        }
    }
    for (int c = 0; c < wide; c++)
        for (int m = 0; m < tall; m++) sums[c * rows + m] = sum[c * tall + m];
}

/* All rows with a tile's candidates before the next tile: these then come from L1. With the rows outermost, of 2,048 dims in
 * bf16, whose lines lie 4 KiB apart, twelve would claim the eight places that L1 has for them (5 % slower at (8,16)). */
INLINE void NAME(few_tiles)(const char *query, int64_t query_stride, const char *const *candidates, int count, int64_t chunks,
                            vf *sums, int64_t rows, int fresh, int64_t ahead, const int paired, const int tall,
                            const int wide) {
    const int64_t passes = rows / tall;
    int c = 0;
    for (; c + wide <= count; c += wide)
        for (int64_t pass = 0; pass < passes; pass++)
            NAME(few_tile)(query + pass * query_stride, candidates + c, chunks, sums + c * rows + pass * tall, rows, fresh,
                           ahead, pass, passes, paired, tall, wide);
    for (; c < count; c++)
        for (int64_t pass = 0; pass < passes; pass++)
            NAME(few_tile)(query + pass * query_stride, candidates + c, chunks, sums + c * rows + pass * tall, rows, fresh,
                           ahead, pass, passes, paired, tall, 1);
}

INLINE void NAME(few)(const Space *space, const char *query, int64_t query_stride, const char *const *candidates, int count,
                      int64_t chunks, int fresh, int64_t ahead, const int paired) {
    const int64_t rows = space->rows;
    vf *sums = space->sums;
    if (!ahead) /* chosen items lie anywhere: what is read now has to come at once */
        for (int c = 0; c < count; c++)
            for (int64_t k = 0; k < chunks * CHUNK * BYTES; k += LINE) __builtin_prefetch(candidates[c] + k, 0, 2);
    if (rows == 1)
        NAME(few_tiles)(query, query_stride, candidates, count, chunks, sums, rows, fresh, ahead, paired, 1, 6);
    else if (rows == 2)
        NAME(few_tiles)(query, query_stride, candidates, count, chunks, sums, rows, fresh, ahead, paired, 2, 3);
    else
        NAME(few_tiles)(query, query_stride, candidates, count, chunks, sums, rows, fresh, ahead, paired, FEW_TALL,
                        paired ? (WIDTH == 16 ? 4 : 2) : 3);
}

/* Functions of their own, so that neither takes the other's registers. */
static __attribute__((noinline)) void NAME(few_floats)(const Space *space, const char *query, int64_t query_stride,
                                                       const char *const *candidates, int count, int64_t chunks, int fresh,
                                                       int64_t ahead) {
    NAME(few)(space, query, query_stride, candidates, count, chunks, fresh, ahead, 0);
}

#if STORAGE == INT8
static __attribute__((noinline)) void NAME(few_pairs)(const Space *space, const char *query, int64_t query_stride,
                                                      const char *const *candidates, int count, int64_t chunks, int fresh,
                                                      int64_t ahead) {
    NAME(few)(space, query, query_stride, candidates, count, chunks, fresh, ahead, 1);
}
#endif

/* Many rows: lanes are query vectors. sums[c][m] += query[m][k] * candidate[c][k] over some dims k. What will be read next is
 * asked for between the products: a burst of requests would fill the line buffers and hold up everything behind it. */
INLINE void NAME(many_tile)(const float *query, int64_t query_stride, float (*candidates)[BLOCK_CHUNKS * CHUNK],
                            const char *const *codes, int64_t chunks, vf *sums, int64_t sums_stride, int fresh,
                            int64_t ahead, const int tall, const int wide) {
    enum { SLOTS = 16 }; /* at least MANY_SUMS, the most candidates of a tile */
    vf sum[MANY_SUMS], q[2];
    for (int c = 0; c < wide; c++)
        for (int m = 0; m < tall; m++) sum[c * tall + m] = fresh ? (vf){0} : sums[c * sums_stride + m];
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        UNROLL for (int slot = 0; slot < SLOTS; slot++) {
            if (slot < wide && ahead)
                for (int line = 0; line < MAX(CHUNK * BYTES / LINE, 1); line++)
                    __builtin_prefetch(codes[slot] + chunk * CHUNK * BYTES + line * LINE + ahead, 0, 2);
            UNROLL for (int d = 0; d < CHUNK / SLOTS; d++) {
                const int64_t k = chunk * CHUNK + slot * (CHUNK / SLOTS) + d;
                for (int m = 0; m < tall; m++) q[m] = *(const vf *)(query + m * query_stride + k * WIDTH);
                for (int c = 0; c < wide; c++)
                    for (int m = 0; m < tall; m++) sum[c * tall + m] += q[m] * candidates[c][k];
            }
        }
    }
    for (int c = 0; c < wide; c++)
        for (int m = 0; m < tall; m++) sums[c * sums_stride + m] = sum[c * tall + m];
}

INLINE void NAME(many_tiles)(const float *query, int64_t query_stride, float (*candidates)[BLOCK_CHUNKS * CHUNK],
                             const char *const *codes, int count, int64_t chunks, vf *sums, int64_t stride, int fresh,
                             int64_t ahead, const int tall) {
    const int wide = MANY_SUMS / tall;
    int c = 0;
    for (; c + wide <= count; c += wide)
        NAME(many_tile)(query, query_stride, candidates + c, codes + c, chunks, sums + c * stride, stride, fresh, ahead, tall,
                        wide);
    for (; c < count; c++)
        NAME(many_tile)(query, query_stride, candidates + c, codes + c, chunks, sums + c * stride, stride, fresh, ahead, tall,
                        1);
}

static void NAME(many)(const Space *space, const float *query, int64_t query_stride, const char *const *candidates,
                       int count, int64_t chunks, int fresh, int64_t ahead) {
    float expanded[FLAT][BLOCK_CHUNKS * CHUNK] __attribute__((aligned(64)));
    const int64_t stride = space->rows / WIDTH;
    for (int c = 0; c < count; c++)
        for (int64_t k = 0; k < chunks; k++)
            for (int h = 0; h < CHUNK / 2 / WIDTH; h++) {
                *(vf *)&expanded[c][k * CHUNK + h * WIDTH] = NAME(low)(candidates[c] + k * CHUNK * BYTES, h);
                *(vf *)&expanded[c][k * CHUNK + h * WIDTH + CHUNK / 2] = NAME(high)(candidates[c] + k * CHUNK * BYTES, h, 0);
            }
    for (int64_t m = 0; m < stride; m += 2, query += 2 * query_stride, ahead = 0)
        if (m + 1 < stride)
            NAME(many_tiles)(query, query_stride, expanded, candidates, count, chunks, space->sums + m, stride, fresh, ahead, 2);
        else
            NAME(many_tiles)(query, query_stride, expanded, candidates, count, chunks, space->sums + m, stride, fresh, ahead, 1);
}

/* Adds the products of all rows with up to FLAT candidates over some chunks; `ahead`: bytes to where to prefetch. */
INLINE void NAME(products)(const Task *task, const Space *space, int64_t chunk, int64_t chunks,
                           const char *const *candidates, int count, int64_t ahead) {
    const int64_t tall = task->layout == MANY ? WIDTH : MIN(space->rows, FEW_TALL), size = task->layout == PAIRS ? 2 : 4;
    const char *query = (const char *)task->packed + chunk * CHUNK * tall * size;
    const int64_t stride = (task->dims + CHUNK - 1) / CHUNK * CHUNK * tall;
    if (task->layout == MANY)
        NAME(many)(space, (const float *)query, stride, candidates, count, chunks, chunk == 0, ahead);
#if STORAGE == INT8
    else if (task->layout == PAIRS)
        NAME(few_pairs)(space, query, stride * size, candidates, count, chunks, chunk == 0, ahead);
#endif
    else
        NAME(few_floats)(space, query, stride * size, candidates, count, chunks, chunk == 0, ahead);
}

/* The lanes of four sums added up. */
INLINE v4 NAME(totals)(vf a, vf b, vf c, vf d) {
    vf ab = INTERLEAVE_LOW(a, b) + INTERLEAVE_HIGH(a, b); /* a b a b in every four lanes */
    vf cd = INTERLEAVE_LOW(c, d) + INTERLEAVE_HIGH(c, d);
    vf quads = PAIR_LOW(ab, cd) + PAIR_HIGH(ab, cd); /* a b c d in every four lanes */
    v4 total = *(const v4 *)&quads;
    for (int i = 4; i < WIDTH; i += 4) total += *(const v4 *)((const float *)&quads + i);
    return total;
}

/* Folds four finished sums, of `each` rows from m on and of candidates c to `last`, into their items' running maxima.
 * Returns what poisons the block. */
INLINE v4 NAME(fold_four)(const Task *task, const Space *space, const float *scales, const int64_t *items, int c, int last,
                            int64_t m, const int each) {
    vf row[4];
    v4 scale;
    for (int i = 0; i < 4; i++) { /* where a candidate is missing, the last one again */
        const int which = MIN(c + i / each, last);
        row[i] = space->sums[which * space->rows + m + i % each];
        scale[i] = scales[which];
        if (STORAGE == INT8 && task->layout == PAIRS) {
            row[i] = __builtin_convertvector((vi)row[i], vf);
            scale[i] *= task->units[m + i % each];
        }
    }
    v4 dots = NAME(totals)(row[0], row[1], row[2], row[3]);
    if (STORAGE == INT8) dots *= scale;
    for (int i = 0; i < 4 / each; i++) {
        float *best = space->best + items[MIN(c + i, last)] * space->stride + m;
        if (each == 4)
            *(v4 *)best = LARGER(dots, *(v4 *)best, v4, v4i);
        else
            for (int r = 0; r < each; r++) best[r] = dots[i * each + r] > best[r] ? dots[i * each + r] : best[r];
    }
    return dots - dots;
}

/* Few rows: four sums at a time, of one candidate, or for one or two rows of several. Poison is gathered in a register: through
 * memory every candidate waited for the one before (4 to 7 % of the time at 128 dims). */
INLINE void NAME(fold_few)(const Task *task, const Space *space, const float *scales, const int64_t *items, int count,
                           const int each) {
    const int together = 4 / each;
    v4 poison = {0};
    int c = 0;
    for (; c + together <= count; c += together)
        for (int64_t m = 0; m < space->rows; m += 4)
            poison += NAME(fold_four)(task, space, scales, items, c, c + together - 1, m, each);
    if (c < count) poison += NAME(fold_four)(task, space, scales, items, c, count - 1, 0, each);
    *(v4 *)space->poison += poison;
}

/* Folds the finished sums of candidates into their items' running maxima. */
INLINE void NAME(fold)(const Task *task, const Space *space, const float *scales, const int64_t *items, int count) {
    if (task->layout != MANY) {
        if (space->rows == 1)
            NAME(fold_few)(task, space, scales, items, count, 1);
        else if (space->rows == 2)
            NAME(fold_few)(task, space, scales, items, count, 2);
        else
            NAME(fold_few)(task, space, scales, items, count, 4);
        return;
    }
    const int64_t sums = task->rows / WIDTH;
    vf poison = {0};
    for (int c = 0; c < count; c++) {
        float *best = space->best + items[c] * space->stride;
        for (int64_t m = 0; m < sums; m++, best += WIDTH) {
            vf dots = space->sums[c * sums + m];
            if (STORAGE == INT8) dots *= scales[c];
            poison += dots - dots;
            *(vf *)best = LARGER(dots, *(vf *)best, vf, vi);
        }
    }
    *space->poison += poison;
}
#undef Codes
#undef Query
