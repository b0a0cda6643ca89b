/* Runs every C kernel on awkward sizes, each tensor in an allocation of exactly its size, so that
 * AddressSanitizer sees one byte too far. Built and run by test_sanitizers.py. Checks only that
 * nothing reads or writes outside of memory and that what is wrong is refused; other tests check
 * results. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attend.h"
#include "rest.h"

int vqkv_best_level(void);
int vqkv_attend(int level, const struct attention *a, int64_t begin, int64_t end);
int vqkv_rest(int level, const struct rest *a, int64_t begin, int64_t end);
int vqkv_decode(const int32_t *codes, const float *words, int64_t books, int64_t stages,
                int64_t size, int64_t dim, int64_t begin, int64_t end, float *vectors);
int vqkv_nearest(int level, const float *x, const float *words, int64_t subspaces, int64_t size,
                 int64_t dim, int64_t begin, int64_t end, int32_t *codes);
int vqkv_joint(int level, const float *x, const float *words, const float *metric,
               const float *ahead, int64_t units, int64_t groups, int64_t size, int64_t dim,
               int64_t width, int64_t sweeps, int64_t begin, int64_t end, int32_t *codes);
int vqkv_heads(int level, const float *x, const float *words, const float *coupling, int64_t sets,
               int64_t heads, int64_t groups, int64_t size, int64_t dim, int64_t sweeps,
               int64_t begin, int64_t end, int32_t *codes);
int vqkv_beam(int level, const float *x, const float *codewords, const float *words,
              const float *norms, int64_t books, int64_t stages, int64_t size, int64_t room,
              int64_t dim, int64_t width, int64_t begin, int64_t end, int32_t *codes);
void vqkv_sums(int level, const float *first, const float *second, const float *sizes,
               int64_t books, int64_t size, int64_t room, int64_t begin, int64_t end,
               int32_t *codes);
int vqkv_trellis(int level, const float *x, const float *cost, const float *table,
                 const int32_t *widths, int64_t pairs, int64_t memory, int64_t begin, int64_t end,
                 int32_t *codes);
void vqkv_accumulate(const float *x, const float *words, const int32_t *codes, const float *weights,
                     int64_t subspaces, int64_t size, int64_t dim, int64_t begin, int64_t end,
                     double *sums, double *counts, double *inertia);
void vqkv_pack(const int32_t *codes, int64_t count, int64_t bits, int64_t begin, int64_t end,
               uint8_t *packed);
void vqkv_unpack(const uint8_t *packed, int64_t stride, int64_t count, int64_t bits, int64_t begin,
                 int64_t end, int32_t *codes);

static void expect(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "%s\n", what);
        exit(1);
    }
}

static uint32_t state = 1;

static uint32_t random_below(uint32_t bound)
{
    state = state * 1664525u + 1013904223u;
    return (uint32_t)((uint64_t)(state >> 8) * bound >> 24);
}

static float *floats(int64_t count)
{
    float *values = malloc((size_t)count * sizeof(float));
    for (int64_t i = 0; i < count; i++)
        values[i] = (float)random_below(2001) / 1000.0f - 1.0f;
    return values;
}

static int32_t *integers(int64_t count, uint32_t bound)
{
    int32_t *values = malloc((size_t)count * sizeof(int32_t));
    for (int64_t i = 0; i < count; i++)
        values[i] = (int32_t)random_below(bound);
    return values;
}

static uint8_t *bytes(int64_t count, uint32_t bound)
{
    uint8_t *values = malloc((size_t)count);
    for (int64_t i = 0; i < count; i++)
        values[i] = (uint8_t)random_below(bound);
    return values;
}

static void packing(int64_t rows, int64_t count, int64_t bits)
{
    const int64_t size = (count * bits + 7) / 8;
    int32_t *codes = integers(rows * count, 1u << bits), *back = integers(rows * count, 1);
    uint8_t *packed = bytes(rows * size, 256);
    vqkv_pack(codes, count, bits, 0, rows, packed);
    vqkv_unpack(packed, size, count, bits, 0, rows, back);
    expect(memcmp(codes, back, (size_t)(rows * count) * sizeof(int32_t)) == 0, "codes changed");
    free(codes);
    free(back);
    free(packed);
}

static void coding(int level, int64_t rows, int64_t books, int64_t size, int64_t dim)
{
    float *x = floats(rows * books * dim), *words = floats(books * size * dim);
    float *vectors = floats(rows * books * dim), *weights = floats(rows * books);
    int32_t *codes = integers(rows * books, 1);
    double *sums = calloc((size_t)(books * size * dim), sizeof(double));
    double *counts = calloc((size_t)(books * size), sizeof(double));
    double *inertia = calloc((size_t)books, sizeof(double));
    expect(vqkv_nearest(level, x, words, books, size, dim, 0, rows, codes) == 0, "no memory");
    for (int64_t i = 0; i < rows * books; i++)
        expect(codes[i] >= 0 && codes[i] < size, "a code out of range");
    vqkv_accumulate(x, words, codes, weights, books, size, dim, 0, rows, sums, counts, inertia);
    expect(!vqkv_decode(codes, words, books, 1, size, dim, 0, rows, vectors), "refused codes");
    codes[rows * books - 1] = (int32_t)size;
    expect(vqkv_decode(codes, words, books, 1, size, dim, 0, rows, vectors), "took a bad code");
    free(x);
    free(words);
    free(vectors);
    free(weights);
    free(codes);
    free(sums);
    free(counts);
    free(inertia);
}

static void joint(int level, int64_t rows, int64_t groups, int64_t size, int64_t dim,
                  int64_t width)
{
    const int64_t units = 2, channels = groups * dim, books = units * groups;
    float *x = floats(rows * books * dim), *words = floats(books * size * dim);
    float *metric = floats(units * channels * channels);
    float *ahead = floats(units * channels * channels);
    int32_t *codes = integers(rows * books, 1);
    expect(vqkv_joint(level, x, words, metric, ahead, units, groups, size, dim, width, 2, 0, rows,
                      codes) == 0,
           "no memory");
    for (int64_t i = 0; i < rows * books; i++)
        expect(codes[i] >= 0 && codes[i] < size, "a code out of range");
    free(x);
    free(words);
    free(metric);
    free(ahead);
    free(codes);
}

static void heads(int level, int64_t rows, int64_t count, int64_t groups, int64_t size, int64_t dim)
{
    const int64_t sets = 2, channels = count * groups * dim, books = sets * count * groups;
    float *x = floats(rows * books * dim), *words = floats(books * size * dim);
    float *coupling = floats(sets * channels * channels);
    int32_t *codes = integers(rows * books, 1);
    expect(vqkv_heads(level, x, words, coupling, sets, count, groups, size, dim, 2, 0, rows,
                      codes) == 0,
           "no memory");
    for (int64_t i = 0; i < rows * books; i++)
        expect(codes[i] >= 0 && codes[i] < size, "a code out of range");
    free(x);
    free(words);
    free(coupling);
    free(codes);
}

/* With all that is in `words` times `scale`, where no sum may be a number. */
static void beam(int level, int64_t rows, int64_t stages, int64_t size, int64_t dim, int64_t width,
                 float scale)
{
    const int64_t books = 2, room = (size + 15) / 16 * 16;
    float *x = floats(rows * books * dim), *words = floats(books * stages * dim * room);
    float *codewords = floats(books * stages * size * dim), *norms = floats(books * stages * room);
    int32_t *codes = integers(rows * books * stages, 1);
    for (int64_t i = 0; i < books * stages * room; i++)
        norms[i] = i % room < size ? norms[i] * scale : INFINITY;
    for (int64_t i = 0; i < books * stages * dim * room; i++)
        words[i] *= scale;
    expect(vqkv_beam(level, x, codewords, words, norms, books, stages, size, room, dim, width, 0,
                     rows, codes) == 0, "no memory");
    for (int64_t i = 0; i < rows * books * stages; i++)
        expect(codes[i] >= 0 && codes[i] < size, "a code out of range");
    free(x);
    free(words);
    free(codewords);
    free(norms);
    free(codes);
}

static void sums(int level, int64_t rows, int64_t size, float scale)
{
    const int64_t books = 2, room = (size + 15) / 16 * 16;
    float *first = floats(rows * books * size), *second = floats(rows * books * room);
    float *sizes = floats(books * size * room);
    int32_t *codes = integers(rows * books, 1);
    for (int64_t i = 0; i < books * size * room; i++)
        sizes[i] = i % room < size ? sizes[i] * scale : INFINITY;
    vqkv_sums(level, first, second, sizes, books, size, room, 0, rows, codes);
    for (int64_t i = 0; i < rows * books; i++)
        expect(codes[i] >= 0 && codes[i] < size * size, "a code out of range");
    free(first);
    free(second);
    free(sizes);
    free(codes);
}

static void trellis(int level, int64_t rows, int64_t pairs, int64_t memory)
{
    float *x = floats(rows * pairs * 2), *cost = floats(pairs * 2);
    float *table = floats(((int64_t)1 << memory) * 2);
    int32_t *widths = integers(pairs, 1), *codes = integers(rows * pairs, 1);
    for (int64_t p = 0; p < pairs; p++)
        widths[p] = (int32_t)(p % 3 == 0 ? memory : 1 + p % memory);
    expect(vqkv_trellis(level, x, cost, table, widths, pairs, memory, 0, rows, codes) == 0,
           "no memory");
    for (int64_t i = 0; i < rows * pairs; i++)
        expect(codes[i] >= 0 && codes[i] < 1 << widths[i % pairs], "bits out of range");
    free(x);
    free(cost);
    free(table);
    free(widths);
    free(codes);
}

/* One call of attention. `spoil` 1 puts a code out of range into the last token, 2 a page, 3 a channel
 * of a query. */
static void attend(int level, int64_t tokens, int64_t rows, int64_t head_dim, int64_t dim,
                   int64_t stages, uint32_t size, int turned, int paged, int spoil)
{
    const int64_t heads = 2, columns = head_dim / dim * stages, pages = (tokens + PAGE - 1) / PAGE;
    const int64_t room = paged ? pages * PAGE : tokens, half = head_dim / 2;
    struct attention a = {.batch = 1, .heads = heads, .rows = rows, .head_dim = head_dim};
    a.parts = 3;
    float *words = floats(heads * columns * size * dim);
    uint8_t *codes = bytes(heads * room * columns, size);
    const int32_t start = tokens > 3 ? 2 : 0, stop = (int32_t)tokens;
    a.keys = (struct plane){codes, heads * (paged ? PAGE : room) * columns,
                            (paged ? PAGE : room) * columns, columns, words,
                            head_dim / dim, stages, size, dim};
    a.values = a.keys;
    a.query = floats(heads * rows * head_dim);
    a.start = &start;
    a.stop = &stop;
    int32_t *table = integers(pages, 1), *pairs = integers(heads * half, (uint32_t)half);
    int64_t *order = calloc((size_t)(heads * head_dim), sizeof *order);
    for (int64_t i = 0; i < heads * head_dim; i++)
        order[i] = head_dim - 1 - i % head_dim;
    a.order = (rows + turned) % 2 || spoil == 3 ? order : NULL;
    for (int64_t p = 0; p < pages; p++)
        table[p] = (int32_t)(pages - 1 - p);
    float *page_turns = floats(pages * head_dim), *offset_turns = floats(PAGE * head_dim);
    if (paged) {
        a.pages = table;
        a.page_count = a.blocks = pages;
    }
    if (turned) {
        a.page_turns = page_turns;
        a.offset_turns = offset_turns;
        a.pairs = pairs;
    }
    a.output = floats(a.parts * heads * rows * head_dim);
    a.key_mean = floats(a.parts * heads * rows * head_dim);
    a.lse = floats(a.parts * heads * rows);
    if (spoil == 1)
        codes[heads * room * columns - 1] = (uint8_t)size;
    if (spoil == 2)
        table[pages - 1] = (int32_t)pages;
    if (spoil == 3)
        order[heads * head_dim - 1] = head_dim;
    const int expected = spoil == 1 ? BAD_CODE : spoil == 2 ? BAD_PAGE : spoil == 3 ? BAD_ORDER : 0;
    expect(vqkv_attend(level, &a, 0, heads * a.parts) == expected, "attention's return value");
    free(words);
    free(codes);
    free(table);
    free(pairs);
    free(order);
    free(page_turns);
    free(offset_turns);
    free((void *)a.query);
    free(a.output);
    free(a.key_mean);
    free(a.lse);
}

/* Two runs of states, of 2 rows of the batch on 2 heads: of keys tokens lie side by side, of values heads
 * do. `extras` are bits: means of keys, a bias, a mask, scores without a value. */
static void rest(int level, int64_t tokens, int64_t rows, int64_t head_dim, int type, int extras)
{
    const int64_t batch = 2, heads = 2, counts[2] = {3, tokens}, items = batch * heads;
    struct rest a = {.type = type, .batch = batch, .heads = heads};
    void *keys[2], *values[2];
    for (int i = 0; i < 2; i++) {
        const int64_t n = counts[i], count = items * n * head_dim;
        keys[i] = type == FLOAT32 ? (void *)floats(count) : (void *)bytes(2 * count, 128);
        values[i] = type == FLOAT32 ? (void *)floats(count) : (void *)bytes(2 * count, 128);
        a.runs[i] = (struct exact){
            .keys = keys[i],
            .values = values[i],
            .key_strides = {heads * n * head_dim, n * head_dim, head_dim},
            .value_strides = {n * heads * head_dim, head_dim, heads * head_dim},
            .tokens = n,
        };
    }
    a.rows = rows;
    a.head_dim = head_dim;
    a.query = floats(items * rows * head_dim);
    a.means = a.query;
    a.lse = floats(items * rows);
    a.key_means = extras & 1 ? a.query : NULL;
    a.map = floats(heads * (1 + extras % 2) * head_dim * head_dim);
    a.bias = extras & 2 ? floats(heads * head_dim) : NULL;
    a.hidden = extras & 4 ? bytes(items * rows * (tokens + 3), 2) : NULL;
    a.null = extras & 8 ? floats(heads * rows) : NULL;
    a.output = floats(items * rows * head_dim);
    expect(vqkv_rest(level, &a, 0, items) == 0, "the return value of what follows attention");
    for (int i = 0; i < 2; i++) {
        free(keys[i]);
        free(values[i]);
    }
    free((void *)a.query);
    free((void *)a.lse);
    free((void *)a.map);
    free((void *)a.bias);
    free((void *)a.hidden);
    free((void *)a.null);
    free(a.output);
}

int main(void)
{
    for (int64_t bits = 1; bits <= 16; bits++)
        for (int64_t count = 1; count < 20; count += 3)
            packing(3, count, bits);
    static const int64_t shapes[][4] = {
        {64, 4, 1, 256}, {80, 4, 1, 100}, {96, 8, 1, 256}, {128, 8, 2, 256},
        {256, 16, 1, 7}, {66, 2, 1, 256}, {66, 3, 1, 5},   {128, 32, 3, 256},
        {4, 4, 1, 256}};
    /* CPUs with look-ups of bytes have products of pairs of 16 bits, if not as the faster way. */
    const int best = vqkv_best_level() == AVX512_VBMI ? AVX512_VNNI : vqkv_best_level();
    for (int level = BASELINE; level <= best; level++) {
        for (int64_t dim = 1; dim <= 17; dim++)
            for (int64_t rows = 1; rows < 140; rows += 63)
                coding(level, rows, 3, 33, dim);
        for (int64_t dim = 1; dim <= 9; dim++)
            for (int64_t rows = 1; rows < 140; rows += 127) {
                heads(level, rows, 3, 2, 5, dim);
                for (int64_t width = 1; width < 40; width += 19)
                    joint(level, rows, 3, 5, dim, width);
            }
        static const float scales[] = {1.0f, 1e38f, NAN};
        for (int i = 0; i < 3; i++)
            for (int64_t size = 1; size < 100; size += 9) {
                for (int64_t width = 1; width < 40; width += 7)
                    beam(level, 34, 1 + size % 4, size, 1 + width % 19, width, scales[i]);
                sums(level, 3, size, scales[i]);
            }
        for (int64_t pairs = 1; pairs < 6; pairs++)
            for (int64_t rows = 1; rows < 40; rows += 19)
                trellis(level, rows, pairs, 5);
        for (int i = 0; i < 9; i++)
            for (int turned = 0; turned < 2; turned++) {
                const int64_t *s = shapes[i];
                const int turns = turned && s[1] % 2 == 0;
                for (int64_t rows = 1; rows < 20; rows += 6)
                    attend(level, 65, rows, s[0], s[1], s[2], (uint32_t)s[3], turns, turned, 0);
                attend(level, 1, 3, s[0], s[1], s[2], (uint32_t)s[3], turns, 0, 0);
                attend(level, TILE + 63, 4, s[0], s[1], s[2], (uint32_t)s[3], turns, 0, 0);
                attend(level, 6 * TILE + 63, 1 + i, s[0], s[1], s[2], (uint32_t)s[3], turns, 0, 0);
                attend(level, 130, 4, s[0], s[1], s[2], (uint32_t)s[3], turns, 1, 2);
            }
        attend(level, 70, 4, 64, 4, 1, 100, 1, 0, 1);
        attend(level, 70, 4, 64, 4, 1, 256, 0, 0, 3);
        for (int64_t tokens = 0; tokens < 18; tokens++)
            for (int type = FLOAT32; type <= BFLOAT16; type++)
                rest(level, tokens, 1 + 4 * tokens, tokens % 3 ? 16 * (tokens % 5 + 1) : 7 + tokens,
                     type, (int)tokens % 16);
    }
    return 0;
}
