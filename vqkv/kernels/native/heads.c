/* Codes of a set's heads chosen together: errors of a head push the others'. */

#include <stdlib.h>
#include <string.h>

#include "nearest.h"
#include "push.h"

/* A set, and scratch for some of its vectors, a column being one of them. */
struct work {
    push_fn push;
    search_fn search;
    int64_t heads, groups, size, dim;
    const float *coupling; /* [h n, h n], 0 between channels of one head */
    float *books;          /* [h G, floats]: codewords as they are searched */
    float *errors;         /* [h n, ROWS] */
    float *targets;        /* [n, ROWS], of one head */
    float *gathered;       /* [ROWS, d]: those of a group, row by row */
    float *scratch;
};

/* Targets of a head of `rows` vectors: x less what errors of the other heads push. `x` is the head's part
 * of the first vector, the next one's is `stride` further; heads from `reached` on have no errors yet. */
static void set_targets(const struct work *w, const float *x, int64_t stride, int64_t head,
                        int64_t reached, int64_t rows)
{
    const int64_t width = w->groups * w->dim, channels = w->heads * width;
    const float *columns = w->coupling + head * width;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < width; i++)
            w->targets[i * ROWS + r] = x[r * stride + i];
    w->push(w->errors, columns, channels, 0, head * width, rows, width, w->targets);
    w->push(w->errors, columns, channels, (head + 1) * width, reached * width, rows, width,
            w->targets);
}

/* Codes of a head of `rows` vectors `x`, whose targets are set, `code_stride` from one to the next, and
 * their errors; `words` are the set's. */
static void choose(const struct work *w, const float *x, const float *words, int64_t stride,
                   int64_t head, int64_t rows, int32_t *codes, int64_t code_stride)
{
    const int64_t dim = w->dim;
    for (int64_t group = 0; group < w->groups; group++) {
        const int64_t book = head * w->groups + group, channel = group * dim;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < dim; j++)
                w->gathered[r * dim + j] = w->targets[(channel + j) * ROWS + r];
        w->search(w->gathered, dim, rows, w->books + book * vqkv_arranged_floats(w->size, dim),
                  vqkv_word_blocks(w->size), dim, codes + group, code_stride, w->scratch);
        for (int64_t r = 0; r < rows; r++) {
            const float *word = words + (book * w->size + codes[r * code_stride + group]) * dim;
            for (int64_t j = 0; j < dim; j++)
                w->errors[(book * dim + j) * ROWS + r] = word[j] - x[r * stride + channel + j];
        }
    }
}

/* Hands out pieces of one allocation, or counts their floats where there is none. */
static size_t lay_out(struct work *w, float *floats)
{
    const size_t books = w->heads * w->groups, dim = w->dim;
    size_t used = 0;
#define TAKE(pointer, count) \
    do { (pointer) = floats == NULL ? NULL : floats + used; used += (count); } while (0)
    TAKE(w->books, books * vqkv_arranged_floats(w->size, dim));
    TAKE(w->errors, books * dim * ROWS);
    TAKE(w->targets, w->groups * dim * ROWS);
    TAKE(w->gathered, dim * ROWS);
    TAKE(w->scratch, vqkv_search_scratch(dim));
#undef TAKE
    return used;
}

/* Codes [N, B, h, G] of rows `begin` to `end` of x [N, B, h, G, d] in words [B, h, G, K, d], errors
 * pushing each other by coupling [B, h n, h n], n = G d; all contiguous. Returns 0, or -1 where memory
 * ran out. */
int vqkv_heads(int level, const float *x, const float *words, const float *coupling, int64_t sets,
               int64_t heads, int64_t groups, int64_t size, int64_t dim, int64_t sweeps,
               int64_t begin, int64_t end, int32_t *codes)
{
    const int64_t books = heads * groups, channels = books * dim, stride = sets * channels;
    struct work w = {.push = vqkv_push_of(level), .search = vqkv_search_of(level), .heads = heads,
                     .groups = groups, .size = size, .dim = dim};
    float *floats = malloc(lay_out(&w, NULL) * sizeof(float));
    if (floats == NULL)
        return -1;
    lay_out(&w, floats);
    /* Columns beyond the rows are pushed too, and are nothing. */
    memset(w.errors, 0, channels * ROWS * sizeof(float));
    memset(w.targets, 0, groups * dim * ROWS * sizeof(float));
    for (int64_t set = 0; set < sets; set++) {
        const float *own = words + set * books * size * dim;
        w.coupling = coupling + set * channels * channels;
        for (int64_t book = 0; book < books; book++)
            vqkv_arrange(own + book * size * dim, size, dim,
                         w.books + book * vqkv_arranged_floats(size, dim));
        for (int64_t first = begin; first < end; first += ROWS) {
            const int64_t rows = end - first < ROWS ? end - first : ROWS;
            for (int64_t step = 0; step < sweeps * heads; step++) {
                const int64_t head = step % heads;
                const int64_t reached = step < heads ? head : heads;
                const float *from = x + first * stride + set * channels + head * groups * dim;
                int32_t *to = codes + (first * sets + set) * books + head * groups;
                set_targets(&w, from, stride, head, reached, rows);
                choose(&w, from, own, stride, head, rows, to, sets * books);
            }
        }
    }
    free(floats);
    return 0;
}
