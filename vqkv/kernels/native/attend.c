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
    const int whole = level >= AVX512_VNNI && attend_vnni_takes(a);
    if (level >= AVX512_VBMI && attend_tables_takes(a))
        return whole ? &attend_tables_vnni : &attend_tables;
    if (whole)
        return &attend_vnni;
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
    /* Vectors of 16 codes are read, so the last may reach 15 bytes too far. */
    w->keys = take(&memory, &used, TILE * a->keys.groups * a->keys.stages + 15);
    w->values = take(&memory, &used, TILE * a->values.groups * a->values.stages + 15);
    w->scores = take(&memory, &used, rows * TILE * real);
    w->best = take(&memory, &used, rows * real);
    w->total = take(&memory, &used, rows * real);
    w->shrink = take(&memory, &used, rows * real);
    w->value_sums = take(&memory, &used, rows * dim * real);
    w->key_sums = take(&memory, &used, rows * dim * real);
    w->given = take(&memory, &used, rows * dim * real);
    w->query = take(&memory, &used, TILE_PAGES * rows * dim * real);
    w->decoded = take(&memory, &used, dim * PAGE * real);
    w->offset_turns = take(&memory, &used, dim * PAGE * real);
#ifdef HAVE_X86
    w->rounded = take(&memory, &used, attend_bf16_scratch(a));
    w->whole = take(&memory, &used, attend_vnni_scratch(a));
#endif
    return used;
}

/* Codes of a page of this row and head, or NULL where its block does not exist. */
static const uint8_t *page_codes(const struct work *w, const struct plane *plane, int64_t page)
{
    const struct attention *a = w->a;
    const uint8_t *codes = plane->codes + w->head * plane->head_stride;
    if (a->pages == NULL)
        return codes + w->row * plane->row_stride + page * PAGE * plane->token_stride;
    const int32_t block = a->pages[w->row * a->page_count + page];
    return block < 0 || block >= a->blocks ? NULL : codes + block * plane->row_stride;
}

/* Copies the codes of the tokens that count of the tile that begins at `first`. */
static int copy_codes(const struct work *w, const struct plane *plane, int64_t first,
                      uint8_t *codes)
{
    const int64_t columns = plane->groups * plane->stages, room = TILE * columns;
    const int64_t begin = w->begin * columns, end = w->end * columns;
    for (int64_t t = w->begin / PAGE * PAGE; t < w->end; t += PAGE) {
        const int64_t tokens = w->end - t < PAGE ? w->end - t : PAGE;
        const uint8_t *from = page_codes(w, plane, (first + t) / PAGE);
        uint8_t *to = codes + t * columns;
        if (from == NULL)
            return BAD_PAGE;
        if (plane->token_stride == columns)
            memcpy(to, from, tokens * columns);
        else
            for (int64_t i = 0; i < tokens; i++)
                memcpy(to + i * columns, from + i * plane->token_stride, columns);
    }
    memset(codes, 0, begin);
    memset(codes + end, 0, room - end);
    if (plane->size < 256) {
        uint8_t largest = 0;
        for (int64_t i = begin; i < end; i++)
            largest = codes[i] > largest ? codes[i] : largest;
        if (largest >= plane->size)
            return BAD_CODE;
    }
    return 0;
}

/* Notes where the codes of tokens `first` to `end` lie, at most a tile, and the share of the next
 * head's codewords that falls to tile i of n. */
static void look_ahead(struct work *w, int64_t first, int64_t end, int64_t i, int64_t n)
{
    const struct attention *a = w->a;
    const struct plane *planes[2] = {&a->keys, &a->values};
    w->next = RUNS;
    for (int p = 0; p < 2 && w->head + 1 < a->heads; p++) {
        const int64_t floats = planes[p]->groups * planes[p]->stages * planes[p]->size *
                               planes[p]->dim;
        const float *words = planes[p]->words + (w->head + 1) * floats;
        w->ahead[--w->next] = (struct run){(const uint8_t *)(words + floats * i / n),
                                           (const uint8_t *)(words + floats * (i + 1) / n), 64};
    }
    for (int64_t t = first; t < end; t += PAGE)
        for (int p = 0; p < 2; p++) {
            const int64_t stride = planes[p]->token_stride;
            const uint8_t *codes = page_codes(w, planes[p], t / PAGE);
            const int64_t tokens = end - t < PAGE ? end - t : PAGE;
            if (codes != NULL)
                w->ahead[--w->next] = (struct run){codes, codes + tokens * stride,
                                                   stride < 64 ? 64 : stride};
        }
}

/* Weighted means of sums [R, D]; zeros where nothing was summed. */
static void write_means(const struct work *w, const float *sums, float *means)
{
    for (int64_t r = 0; r < w->a->rows; r++)
        for (int64_t j = 0; j < w->a->head_dim; j++) {
            const int64_t at = r * w->a->head_dim + j;
            means[at] = w->total[r] == 0.0f ? 0.0f : sums[at] / w->total[r];
        }
}

/* The queries of this row and head as `queries` takes them. */
static void take_queries(const struct work *w)
{
    const struct attention *a = w->a;
    const int64_t dim = a->head_dim, half = a->page_turns == NULL ? 0 : dim / 2;
    const int64_t *order = a->order == NULL ? NULL : a->order + w->head * dim;
    const float *query = a->query + (w->row * a->heads + w->head) * a->rows * dim;
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t j = 0; j < dim; j++) {
            const int64_t to = half == 0 ? j : j % 2 * half + j / 2;
            w->given[r * dim + to] = query[r * dim + (order == NULL ? j : order[j])];
        }
}

/* One part of one row and KV head. */
static int attend_part(struct work *w, const struct kernel *kernel, int64_t part)
{
    const struct attention *a = w->a;
    const int64_t start = a->start[w->row], stop = a->stop[w->row];
    const int64_t first_tile = start / TILE;
    const int64_t tiles = stop > start ? (stop + TILE - 1) / TILE - first_tile : 0;
    const int64_t from = first_tile + tiles * part / a->parts;
    const int64_t to = first_tile + tiles * (part + 1) / a->parts;
    const int64_t last = to * TILE < stop ? to * TILE : stop;
    w->tokens = last - (from * TILE > start ? from * TILE : start);
    for (int64_t r = 0; r < a->rows; r++) {
        w->best[r] = -INFINITY;
        w->total[r] = 0.0f;
    }
    memset(w->value_sums, 0, a->rows * a->head_dim * sizeof(float));
    memset(w->key_sums, 0, a->rows * a->head_dim * sizeof(float));
    take_queries(w);
    const float *turns = a->page_turns == NULL ? NULL : a->page_turns + w->row * a->turn_stride;
    if (turns == NULL)
        kernel->queries(w, 0, NULL);
    for (int64_t tile = from; tile < to; tile++) {
        const int64_t first = tile * TILE, end = stop < first + TILE ? stop : first + TILE;
        w->begin = start > first ? start - first : 0;
        w->end = end - first;
        int failed = copy_codes(w, &a->keys, first, w->keys);
        if (!failed)
            failed = copy_codes(w, &a->values, first, w->values);
        if (failed)
            return failed;
        for (int64_t page = 0; turns != NULL && first + page * PAGE < end; page++)
            kernel->queries(w, page, turns + (first / PAGE + page) * a->head_dim);
        const int64_t beyond = end + TILE < stop ? end + TILE : stop;
        look_ahead(w, end, tile + 1 < to ? beyond : end, tile - from, to - from);
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

/* A failure, where pairs or channels are named that are not there. */
static int bad_numbers(const struct attention *a)
{
    for (int64_t i = 0; a->pairs != NULL && i < a->heads * a->head_dim / 2; i++)
        if (a->pairs[i] < 0 || a->pairs[i] >= a->head_dim / 2)
            return BAD_PAIR;
    for (int64_t i = 0; a->order != NULL && i < a->heads * a->head_dim; i++)
        if (a->order[i] < 0 || a->order[i] >= a->head_dim)
            return BAD_ORDER;
    return 0;
}

/* Items `begin` to `end` of parts of rows of heads: item (h B + b) parts + i is part i of row b on
 * head h. Returns 0 or a failure. */
int vqkv_attend(int level, const struct attention *a, int64_t begin, int64_t end)
{
    const struct kernel *kernel = kernel_of(level, a);
    struct work w = {.a = a, .head = -1};
    int failed = bad_numbers(a);
    if (failed)
        return failed;
    void *memory = malloc(lay_out(&w, NULL) + 64);
    if (memory == NULL)
        return NO_MEMORY;
    lay_out(&w, (char *)(((uintptr_t)memory + 63) / 64 * 64));
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
