/* What follows attention on codes: its output is mapped back to the head's channels, and becomes one
 * entry of a softmax over the exact tokens, whose score is its log-sum-exp. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "levels.h"
#include "rest.h"

#define TOGETHER 8 /* tokens that are scored at a time */
#define BLOCK 16   /* vectors that are read at a time */

/* Rows of queries are lanes of scores, channels of outputs; made up to whole vectors of any level. */
static int64_t padded(int64_t count)
{
    return (count + 15) / 16 * 16;
}

static int64_t tokens_of(const struct rest *a)
{
    int64_t tokens = 0;
    for (int64_t i = 0; i < EXACT_RUNS; i++)
        tokens += a->runs[i].tokens;
    return tokens;
}

/* Vectors of D numbers side by side, `step` numbers from one to the next. */
struct vectors {
    const void *numbers;
    int64_t step, type;
};

typedef uint32_t __attribute__((may_alias)) bits_of_float;

/* Vectors `first` to `first + count`, at most BLOCK, as floats that lie `*step` apart and can be read in
 * whole lanes: in place where they can, else copied. */
INLINE const float *as_floats(const struct vectors *from, int64_t first, int64_t count, int64_t dim,
                              float *copy, int64_t *step)
{
    const float *floats = (const float *)from->numbers + first * from->step;
    const uint16_t *halves = (const uint16_t *)from->numbers + first * from->step;
    *step = padded(dim);
    if (from->type == FLOAT32 && dim == *step) {
        *step = from->step;
        return floats;
    }
    for (int64_t i = 0; i < count; i++) {
        float *to = copy + i * *step;
        if (from->type == FLOAT32)
            memcpy(to, floats + i * from->step, dim * sizeof(float));
        else
            for (int64_t j = 0; j < dim; j++)
                ((bits_of_float *)to)[j] = (uint32_t)halves[i * from->step + j] << 16;
    }
    return copy;
}

/* Of one row and head. */
static struct vectors states_of(const struct rest *a, const void *states, const int64_t strides[3],
                                int64_t row, int64_t head)
{
    const int64_t first = row * strides[0] + head * strides[1];
    const size_t bytes = a->type == FLOAT32 ? sizeof(float) : sizeof(uint16_t);
    return (struct vectors){(const char *)states + first * bytes, strides[2], a->type};
}

/* Scratch of one thread, padded: R and D are made up to whole vectors. Zeros to begin with, so that what
 * is added in lanes that nobody reads is a number. */
struct rest_work {
    float *query;         /* [D, R] */
    float *scores;        /* [n + TOGETHER, R], then weights */
    float *means;         /* [D, R], by weight */
    float *copy;          /* [BLOCK, D] */
    float *output;        /* [R, D], sums by weight */
    float *coded, *total; /* [R]: weight of what is coded, and of all */
};

#define IMPL "rest_impl.h"
#include "each_level.h"

/* Items `begin` to `end` of rows of the batch and heads: item b H + h is row b on head h. Returns 0, or
 * 1 where there is no memory. */
int vqkv_rest(int level, const struct rest *a, int64_t begin, int64_t end)
{
    const int64_t rows = padded(a->rows), dim = padded(a->head_dim);
    const int64_t tokens = tokens_of(a) + TOGETHER;
    float *memory = calloc(rows * (3 * dim + tokens + 2) + BLOCK * dim, sizeof(float));
    if (memory == NULL)
        return 1;
    struct rest_work w = {.query = memory};
    w.means = w.query + dim * rows;
    w.output = w.means + dim * rows;
    w.scores = w.output + rows * dim;
    w.coded = w.scores + tokens * rows;
    w.total = w.coded + rows;
    w.copy = w.total + rows;
    for (int64_t item = begin; item < end; item++)
        AT_LEVEL(level, rest)(a, &w, item);
    free(memory);
    return 0;
}
