/* One kernel: STORAGE (BF16, F32, INT8) x WIDTH (floats in a register). Included by _maxsim_width.h. */
#define vf NAME(vf)
#define vi NAME(vi)
#define vu NAME(vu)
#define vs NAME(vs)
#define Space NAME(Space)
#undef BYTES
#define BYTES (STORAGE == BF16 ? 2 : STORAGE == F32 ? 4 : 1)
typedef float vf __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias));
typedef int8_t vs __attribute__((vector_size(WIDTH), aligned(1), may_alias));

/* What a range of items needs beside its input and output. */
typedef struct {
    int64_t rows;   /* as packed: query vectors with padding */
    int64_t stride; /* of `best`: rows, and what the last whole vector of maxima overhangs */
    vf *sums;       /* few rows: [FLAT][rows] lanes of a sum; many: [FLAT][rows / WIDTH]; dots: [FLAT][tiles of rows] */
    float *best;    /* [BLOCK_ITEMS][stride] running maxima */
    vf *poison;     /* 0, or NaN for good after a NaN or an infinity, which a maximum could hide */
} Space;

#ifdef DOTS
#include "_maxsim_dots.h"
#else
#include "_maxsim_floats.h"
#endif

/* Scores up to FLAT consecutive vectors of a group, `vector` being counted over all items. */
static void NAME(flat)(const Task *task, const Space *space, const Group *group, int64_t first_item, int64_t vector,
                       int count) {
    const char *candidates[FLAT], *tails[FLAT];
    char tail[FLAT][CHUNK * BYTES];
    int64_t items[FLAT], item = vector / group->vectors, j = vector % group->vectors;
    float scales[FLAT];
    const int64_t whole = task->dims / CHUNK, rest = task->dims % CHUNK;
    /* What follows is read next, unless the items are chosen ones; what lies closer is on its way already. */
    const int64_t ahead = task->chosen && group->vectors < 2 * FLAT ? 0 : MAX(FLAT * task->dims * BYTES, NEAR);
    for (int c = 0; c < count; c++) {
        const int64_t row = task->chosen ? task->chosen[item] : item;
        candidates[c] = (const char *)group->data + (row * group->item_stride + j * task->dims) * BYTES;
        scales[c] = STORAGE == INT8 ? group->scales[row * group->scale_stride + j] : 1.0f;
        items[c] = item - first_item;
        if (++j == group->vectors) item++, j = 0;
    }
    for (int64_t k = 0; k < whole; k += STEP_CHUNKS) {
        int64_t chunks = MIN(STEP_CHUNKS, whole - k);
        NAME(products)(task, space, k, chunks, candidates, count, ahead);
        for (int c = 0; c < count; c++) candidates[c] += chunks * CHUNK * BYTES;
    }
    if (rest) { /* the last dims through a padded copy: nothing is read beyond a vector's end */
        memset(tail, 0, sizeof tail);
        for (int c = 0; c < count; c++) tails[c] = memcpy(tail[c], candidates[c], rest * BYTES);
        NAME(products)(task, space, whole, 1, tails, count, 0);
    }
    NAME(fold)(task, space, scales, items, count);
}

static void NAME(block)(const Task *task, const Space *space, int64_t first, int64_t last) {
    for (int64_t i = 0; i < (last - first) * space->stride; i++) space->best[i] = -INFINITY;
    *space->poison = (vf){0};
    for (int64_t g = 0; g < task->group_count; g++) {
        const Group *group = &task->groups[g];
        for (int64_t v = first * group->vectors; v < last * group->vectors; v += FLAT)
            NAME(flat)(task, space, group, first, v, MIN(FLAT, last * group->vectors - v));
    }
    float poison = 0;
    for (int i = 0; i < WIDTH; i++) poison += ((const float *)space->poison)[i];
    if (isnan(poison) && last - first > 1) { /* rare: find the item */
        for (int64_t item = first; item < last; item++) NAME(block)(task, space, item, item + 1);
        return;
    }
    for (int64_t item = first; item < last; item++) {
        const float *best = space->best + (item - first) * space->stride;
        for (int64_t query = 0; query < task->queries; query++, best += task->vectors) {
            float score = poison;
            for (int64_t r = 0; r < task->vectors; r++) score += best[r];
            task->scores[query * task->score_stride + item] = score;
        }
    }
}

static int NAME(maxsim)(const Task *task, int64_t first, int64_t last) {
    const int64_t stride = MAX(task->rows, 8);
    const size_t sums = FLAT * MAX(NAME(sums)(task), 4) * sizeof(vf), best = BLOCK_ITEMS * stride * sizeof(float);
    char *memory = NULL;
    if (posix_memalign((void **)&memory, LINE, sums + best + sizeof(vf)))
        return NO_MEMORY;
    const Space space = {task->rows, stride, (vf *)memory, (float *)(memory + sums), (vf *)(memory + sums + best)};
    for (int64_t item = first; item < last; item += BLOCK_ITEMS)
        NAME(block)(task, &space, item, MIN(item + BLOCK_ITEMS, last));
    free(memory);
    return DONE;
}
#undef vf
#undef vi
#undef vu
#undef vs
#undef Space
