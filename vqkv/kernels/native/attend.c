/* Attention on codes: walks the tokens of a row and KV head tile by tile, with one online softmax
 * over all of them, and leaves the arithmetic to a kernel.
 *
 * Each tile's codes are first copied to one place. That settles strides, pages and ends of rows,
 * and is where codes and page numbers are checked, so that no kernel can read outside of memory.
 */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attend.h"

static const struct kernel *kernel_of(int level, const struct attention *a)
{
#ifdef HAVE_X86
    if (level >= AVX512_BF16 && attend_bf16_takes(a))
        return &attend_bf16;
    if (level >= AVX512)
        return &attend_avx512;
    if (level == AVX2)
        return &attend_avx2;
#endif
    (void)level;
    (void)a;
    return &attend_scalar;
}

/* Hands out cache-aligned pieces of one allocation; with memory == NULL it only counts. */
static void *take(char **memory, size_t *used, size_t bytes)
{
    void *piece = *memory == NULL ? NULL : *memory + *used;
    *used += (bytes + 63) / 64 * 64;
    return piece;
}

static size_t lay_out(struct work *w, char *memory)
{
    const struct attention *a = w->a;
    const size_t rows = a->rows, dim = a->head_dim, real = sizeof(float);
    size_t used = 0;
    w->keys = take(&memory, &used, TILE * a->keys.groups * a->keys.stages);
    w->values = take(&memory, &used, TILE * a->values.groups * a->values.stages);
    w->scores = take(&memory, &used, rows * TILE * real);
    w->best = take(&memory, &used, rows * real);
    w->total = take(&memory, &used, rows * real);
    w->shrink = take(&memory, &used, rows * real);
    w->value_sums = take(&memory, &used, rows * dim * real);
    w->key_sums = take(&memory, &used, rows * dim * real);
    w->query = take(&memory, &used, TILE_PAGES * rows * dim * real);
    w->decoded = take(&memory, &used, dim * PAGE * real);
    w->offset_turns = take(&memory, &used, dim * PAGE * real);
#ifdef HAVE_X86
    w->rounded = take(&memory, &used, attend_bf16_scratch(a));
#endif
    return used;
}

/* Copies the codes of tokens `first` to `end` of a row, at most a tile. */
static int copy_codes(const struct work *w, const struct plane *plane, int64_t first, int64_t end,
                      uint8_t *codes)
{
    const struct attention *a = w->a;
    const int64_t columns = plane->groups * plane->stages;
    for (int64_t page = first; page < end; page += PAGE) {
        const int64_t tokens = end - page < PAGE ? end - page : PAGE;
        const uint8_t *from = plane->codes + w->head * plane->head_stride;
        if (a->pages == NULL) {
            from += w->row * plane->row_stride + page * plane->token_stride;
        } else {
            const int32_t block = a->pages[w->row * a->page_count + page / PAGE];
            if (block < 0 || block >= a->blocks)
                return BAD_PAGE;
            from += block * plane->row_stride;
        }
        uint8_t *to = codes + (page - first) * columns;
        if (plane->token_stride == columns)
            memcpy(to, from, tokens * columns);
        else
            for (int64_t t = 0; t < tokens; t++)
                memcpy(to + t * columns, from + t * plane->token_stride, columns);
    }
    const int64_t used = (end - first) * columns;
    memset(codes + used, 0, TILE * columns - used);
    if (plane->size < 256) {
        uint8_t largest = 0;
        for (int64_t i = 0; i < used; i++)
            largest = codes[i] > largest ? codes[i] : largest;
        if (largest >= plane->size)
            return BAD_CODE;
    }
    return 0;
}

static void turn_queries(struct work *w, const struct kernel *kernel, int64_t first, int64_t end)
{
    const struct attention *a = w->a;
    const int64_t floats = a->rows * a->head_dim;
    for (int64_t page = first / PAGE; page * PAGE < end; page++) {
        float *query = w->query + (page - first / PAGE) * floats;
        if (a->page_turns == NULL)
            memcpy(query, a->query + (w->row * a->heads + w->head) * floats, floats * sizeof(float));
        else
            kernel->turn(w, a->page_turns + w->row * a->turn_stride + page * a->head_dim, query);
    }
}

/* Weighted means of sums [R, D]; zeros where nothing was summed. */
static void write_means(const struct work *w, const float *sums, float *means)
{
    for (int64_t r = 0; r < w->a->rows; r++)
        for (int64_t j = 0; j < w->a->head_dim; j++) {
            const int64_t at = r * w->a->head_dim + j;
            means[at] = w->total[r] > 0.0f || w->total[r] != w->total[r] ? sums[at] / w->total[r] : 0.0f;
        }
}

/* One part of one row and KV head. */
static int attend_part(struct work *w, const struct kernel *kernel, int64_t part)
{
    const struct attention *a = w->a;
    const int64_t start = a->start[w->row], stop = a->stop[w->row];
    const int64_t first_tile = start / TILE, tiles = stop > start ? (stop + TILE - 1) / TILE - first_tile : 0;
    const int64_t from = first_tile + tiles * part / a->parts;
    const int64_t to = first_tile + tiles * (part + 1) / a->parts;
    for (int64_t r = 0; r < a->rows; r++) {
        w->best[r] = -INFINITY;
        w->total[r] = 0.0f;
    }
    memset(w->value_sums, 0, a->rows * a->head_dim * sizeof(float));
    memset(w->key_sums, 0, a->rows * a->head_dim * sizeof(float));
    for (int64_t tile = from; tile < to; tile++) {
        const int64_t first = tile * TILE, end = stop < first + TILE ? stop : first + TILE;
        w->begin = start > first ? start - first : 0;
        w->end = end - first;
        int failed = copy_codes(w, &a->keys, first, end, w->keys);
        if (!failed)
            failed = copy_codes(w, &a->values, first, end, w->values);
        if (failed)
            return failed;
        turn_queries(w, kernel, first, end);
        kernel->scores(w, end - first);
        kernel->softmax(w);
        kernel->sums(w, &a->values, w->values, w->value_sums);
        if (a->key_mean != NULL)
            kernel->sums(w, &a->keys, w->keys, w->key_sums);
    }
    const int64_t at = ((part * a->batch + w->row) * a->heads + w->head) * a->rows;
    write_means(w, w->value_sums, a->output + at * a->head_dim);
    if (a->key_mean != NULL)
        write_means(w, w->key_sums, a->key_mean + at * a->head_dim);
    for (int64_t r = 0; r < a->rows; r++)
        a->lse[at + r] = w->best[r] + logf(w->total[r]);
    return 0;
}

/* Items `begin` to `end` of parts of rows of heads: item (h B + b) parts + i is part i of row b on
 * head h. Returns 0 or a failure. */
int vqkv_attend(int level, const struct attention *a, int64_t begin, int64_t end)
{
    const struct kernel *kernel = kernel_of(level, a);
    struct work w = {.a = a, .head = -1};
    void *memory = malloc(lay_out(&w, NULL) + 64);
    if (memory == NULL)
        return NO_MEMORY;
    lay_out(&w, (char *)(((uintptr_t)memory + 63) / 64 * 64));
    int failed = 0;
    for (int64_t item = begin; item < end && !failed; item++) {
        const int64_t head = item / a->parts / a->batch;
        w.row = item / a->parts % a->batch;
        if (head != w.head) {
            w.head = head;
            kernel->prepare(&w);
        }
        failed = attend_part(&w, kernel, item % a->parts);
    }
    free(memory);
    return failed;
}
