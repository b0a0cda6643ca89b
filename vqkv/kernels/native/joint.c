/* Codes of a unit's groups chosen together, as errors of groups add up or cancel in a metric. */

#include <stdlib.h>
#include <string.h>

#include "levels.h"
#include "nearest.h"

/* Vectors at a time: their errors stay in the caches while all groups pass by. */
#define ROWS 128
/* Vectors are made up to a multiple of it, for the widest level. */
#define LANES 16
/* Channels of a group that errors are taken from at a time. */
#define PUSHED 4

typedef void (*push_fn)(const float *errors, const float *metric, int64_t channels, int64_t first,
                        int64_t last, int64_t rows, int64_t dim, float *target);

#define IMPL "joint_impl.h"
#include "each_level.h"

/* A unit, and scratch for some of its vectors, a column being one of them. */
struct work {
    push_fn push;
    search_fn search;
    int64_t channels, dim, size;
    const float *metric; /* [n, n] */
    float *books;        /* [G, floats]: codewords as they are searched */
    float *errors;       /* [n, ROWS] */
    float *target;       /* [d, ROWS] */
    float *gathered;     /* [ROWS, d]: the targets, row by row */
    float *scratch;
    int32_t *found;      /* [ROWS] */
};

/* What the words of group g are to be near to: x less what the other groups' errors push. `x` is the
 * group's part of the first vector, the next one's is `stride` further. */
static void set_target(const struct work *w, const float *x, int64_t stride, int64_t group,
                       int64_t rows)
{
    const int64_t dim = w->dim, first = group * dim, lanes = (rows + LANES - 1) / LANES * LANES;
    const float *columns = w->metric + first;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < dim; j++)
            w->target[j * ROWS + r] = x[r * stride + j];
    w->push(w->errors, columns, w->channels, 0, first, lanes, dim, w->target);
    w->push(w->errors, columns, w->channels, first + dim, w->channels, lanes, dim, w->target);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < dim; j++)
            w->gathered[r * dim + j] = w->target[j * ROWS + r];
}

/* Codes of one group of `rows` vectors, given the errors of the others. */
static void choose(const struct work *w, const float *x, int64_t stride, const float *words,
                   int64_t group, int64_t rows, int32_t *codes, int64_t code_stride)
{
    const int64_t dim = w->dim;
    set_target(w, x, stride, group, rows);
    w->search(w->gathered, dim, rows, w->books + group * arranged_floats(w->size, dim),
              word_blocks(w->size), dim, w->found, 1, w->scratch);
    for (int64_t r = 0; r < rows; r++) {
        codes[r * code_stride] = w->found[r];
        for (int64_t j = 0; j < dim; j++)
            w->errors[(group * dim + j) * ROWS + r] =
                words[w->found[r] * dim + j] - x[r * stride + j];
    }
}

/* Codes [N, U, G] of rows `begin` to `end` of x [N, U, G, d] in words [U, G, K, d], in the metric
 * [U, n, n], n = G d, whose diagonal blocks of d are taken as ones; all contiguous. Returns 0, or -1
 * where memory ran out. */
int vqkv_joint(int level, const float *x, const float *words, const float *metric, int64_t units,
               int64_t groups, int64_t size, int64_t dim, int64_t sweeps, int64_t begin,
               int64_t end, int32_t *codes)
{
    const int64_t channels = groups * dim, stride = units * channels;
    const int64_t floats = arranged_floats(size, dim), books = groups * floats;
    float *memory = malloc((size_t)(books + (channels + 2 * dim + 1) * ROWS + search_scratch(dim)) *
                           sizeof(float));
    if (memory == NULL)
        return -1;
    struct work w = {.push = AT_LEVEL(level, push), .search = search_of(level),
                     .channels = channels, .dim = dim, .size = size, .books = memory};
    w.errors = w.books + books;
    w.target = w.errors + channels * ROWS;
    w.gathered = w.target + dim * ROWS;
    w.found = (int32_t *)(w.gathered + dim * ROWS);
    w.scratch = (float *)(w.found + ROWS);
    memset(w.target, 0, dim * ROWS * sizeof(float));
    for (int64_t u = 0; u < units; u++) {
        w.metric = metric + u * channels * channels;
        for (int64_t g = 0; g < groups; g++)
            arrange(words + (u * groups + g) * size * dim, size, dim, w.books + g * floats);
        for (int64_t first = begin; first < end; first += ROWS) {
            const int64_t rows = end - first < ROWS ? end - first : ROWS;
            memset(w.errors, 0, channels * ROWS * sizeof(float));
            for (int64_t step = 0; step < sweeps * groups; step++) {
                const int64_t g = step % groups, book = u * groups + g;
                choose(&w, x + first * stride + book * dim, stride, words + book * size * dim, g,
                       rows, codes + first * units * groups + book, units * groups);
            }
        }
    }
    free(memory);
    return 0;
}
