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

static const struct scoring *scoring_of(int level, const struct attention *a)
{
#ifdef HAVE_X86
    if (level >= AVX512_VBMI && tables_take(a))
        return &tables;
    if (level >= AVX512_VNNI && turned_vnni_takes(a))
        return &turned_vnni;
    if (level >= AVX2 && turned_madd_takes(a))
        return &turned_madd;
#endif
    return a->page_turns == NULL ? AT_LEVEL(level, &products) : AT_LEVEL(level, &turned);
}

static const struct summing *summing_of(int level, const struct attention *a,
                                        const struct plane *plane)
{
#ifdef HAVE_X86
    if (level >= AVX512_VNNI && sums_vnni_takes(a, plane))
        return &sums_vnni;
#endif
    (void)a;
    (void)plane;
    return AT_LEVEL(level, &weights);
}

float longest_turn(const struct attention *a)
{
    float longest = 0.0f, none = 0.0f; /* or NaN */
    for (int64_t i = 0; i < PAGE * a->head_dim; i += 2) {
        const float *turn = a->offset_turns + i;
        const float square = turn[0] * turn[0] + turn[1] * turn[1];
        longest = square > longest ? square : longest;
        none += 0.0f * square;
    }
    return sqrtf(longest) + none;
}

#ifdef HAVE_X86
/* What a level keeps for itself. */
static void *laid_out(const struct attention *a, size_t (*lay_out)(const struct attention *, char *),
                      char **memory, size_t *used)
{
    char *piece = take(memory, used, lay_out(a, NULL));
    if (piece != NULL)
        lay_out(a, piece);
    return piece;
}
#endif

static size_t lay_out(struct work *w, char *memory)
{
    const struct attention *a = w->a;
    const size_t rows = a->rows, dim = a->head_dim, real = sizeof(float);
    const size_t fours = (rows + 3) / 4;
    size_t used = 0;
    w->keys.plane = &a->keys;
    w->values.plane = &a->values;
    struct stream *const streams[2] = {&w->keys, &w->values};
    for (int i = 0; i < 2; i++) {
        const struct plane *plane = streams[i]->plane;
        const size_t columns = plane->groups * plane->stages;
        /* Vectors of 16 codes are read, so the last may reach 15 bytes too far. */
        streams[i]->codes = take(&memory, &used, TILE * columns + 15);
        streams[i]->sums = take(&memory, &used, rows * dim * real);
        streams[i]->weights = take(&memory, &used, fours * columns * plane->size * sizeof(quad));
    }
    w->scores = take(&memory, &used, rows * TILE * real);
    w->best = take(&memory, &used, rows * real);
    w->total = take(&memory, &used, rows * real);
    w->shrink = take(&memory, &used, rows * real);
    w->given = take(&memory, &used, rows * dim * real);
    w->query = take(&memory, &used, TILE_PAGES * rows * dim * real);
    w->decoded = take(&memory, &used, dim * PAGE * real);
    w->offset_turns = take(&memory, &used, dim * PAGE * real);
    /* Vectors of 64 are read. */
    w->products = take(&memory, &used, (fours * a->keys.groups * a->keys.stages * a->keys.size + 63) *
                                           sizeof(quad));
    w->side_by_side = take(&memory, &used, 2 * (dim > TILE ? dim : TILE) * sizeof(quad));
#ifdef HAVE_X86
    w->tables = laid_out(a, tables_lay_out, &memory, &used);
    w->madd = laid_out(a, madd_lay_out, &memory, &used);
    w->whole = laid_out(a, vnni_lay_out, &memory, &used);
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
static int copy_codes(const struct work *w, const struct stream *stream, int64_t first)
{
    const struct plane *plane = stream->plane;
    uint8_t *codes = stream->codes;
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
    const float *query =
        a->query + ((w->row * a->heads + w->head) * w->all_rows + w->first_row) * dim;
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t j = 0; j < dim; j++) {
            const int64_t to = half == 0 ? j : j % 2 * half + j / 2;
            w->given[r * dim + to] = query[r * dim + (order == NULL ? j : order[j])];
        }
}

/* What a head's parts have in common. */
static void prepare(struct work *w, const struct scoring *scoring)
{
    const struct stream *const streams[2] = {&w->values, &w->keys};
    if (scoring->prepare != NULL)
        scoring->prepare(w);
    for (int i = 0; i < (w->a->key_mean == NULL ? 1 : 2); i++)
        if (streams[i]->summing->prepare != NULL)
            streams[i]->summing->prepare(w, streams[i]);
}

/* One part of one row and KV head. */
static int attend_part(struct work *w, int level, const struct scoring *scoring, int64_t part)
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
    memset(w->values.sums, 0, a->rows * a->head_dim * sizeof(float));
    memset(w->keys.sums, 0, a->rows * a->head_dim * sizeof(float));
    take_queries(w);
    const struct stream *const streams[2] = {&w->values, &w->keys};
    const int summed = a->key_mean == NULL ? 1 : 2;
    const float *turns = a->page_turns == NULL ? NULL : a->page_turns + w->row * a->turn_stride;
    if (turns == NULL && to > from)
        scoring->queries(w, 0, NULL);
    for (int64_t tile = from; tile < to; tile++) {
        const int64_t first = tile * TILE, end = stop < first + TILE ? stop : first + TILE;
        w->begin = start > first ? start - first : 0;
        w->end = end - first;
        int failed = copy_codes(w, &w->keys, first);
        if (!failed)
            failed = copy_codes(w, &w->values, first);
        if (failed)
            return failed;
        for (int64_t page = 0; turns != NULL && first + page * PAGE < end; page++)
            scoring->queries(w, page, turns + (first / PAGE + page) * a->head_dim);
        const int64_t beyond = end + TILE < stop ? end + TILE : stop;
        look_ahead(w, end, tile + 1 < to ? beyond : end, tile - from, to - from);
        scoring->scores(w, end - first);
        AT_LEVEL(level, softmax)(w);
        for (int i = 0; i < summed; i++)
            streams[i]->summing->add(w, streams[i]);
    }
    for (int i = 0; i < summed && to > from; i++)
        if (streams[i]->summing->finish != NULL)
            streams[i]->summing->finish(w, streams[i]);
    const int64_t before = (part * a->batch + w->row) * a->heads + w->head;
    const int64_t at = before * w->all_rows + w->first_row;
    write_means(w, w->values.sums, a->output + at * a->head_dim);
    if (a->key_mean != NULL)
        write_means(w, w->keys.sums, a->key_mean + at * a->head_dim);
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

/* As `vqkv_attend`, of the rows of `a`, which are those from `first_row` on of `all_rows`. */
static int attend_rows(int level, const struct attention *a, int64_t first_row, int64_t all_rows,
                       int64_t begin, int64_t end)
{
    const struct scoring *scoring = scoring_of(level, a);
    struct work w = {.a = a, .first_row = first_row, .all_rows = all_rows, .head = -1};
    void *memory = malloc(lay_out(&w, NULL) + 64);
    if (memory == NULL)
        return NO_MEMORY;
    lay_out(&w, (char *)(((uintptr_t)memory + 63) / 64 * 64));
    w.keys.summing = summing_of(level, a, &a->keys);
    w.values.summing = summing_of(level, a, &a->values);
    if (scoring->begin != NULL)
        scoring->begin(&w);
    int failed = 0;
    for (int64_t item = begin; item < end && !failed; item++) {
        const int64_t head = item / a->parts / a->batch;
        w.row = item / a->parts % a->batch;
        if (head != w.head) {
            w.head = head;
            prepare(&w, scoring);
        }
        failed = attend_part(&w, level, scoring, item % a->parts);
    }
    free(memory);
    return failed;
}

/* Items `begin` to `end` of parts of rows of heads: item (h B + b) parts + i is part i of row b on
 * head h. Returns 0 or a failure. */
int vqkv_attend(int level, const struct attention *a, int64_t begin, int64_t end)
{
    int failed = bad_numbers(a);
    for (int64_t row = 0; row < a->rows && !failed; row += MOST_ROWS) {
        struct attention some = *a;
        some.rows = a->rows - row < MOST_ROWS ? a->rows - row : MOST_ROWS;
        failed = attend_rows(level, &some, row, a->rows, begin, end);
    }
    return failed;
}
