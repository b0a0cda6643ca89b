/* What follows attention on codes: its output is mapped back to the head's channels, and becomes one
 * entry of a softmax over the exact tokens, whose score is its log-sum-exp. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "levels.h"
#include "rest.h"

#define TOGETHER 4 /* tokens */

/* Rows are lanes of scores, made up to whole vectors of any level. */
static int64_t padded(int64_t rows)
{
    return (rows + 15) / 16 * 16;
}

static int64_t tokens_of(const struct rest *a)
{
    int64_t tokens = 0;
    for (int64_t i = 0; i < a->run_count; i++)
        tokens += a->runs[i].tokens;
    return tokens;
}

/* Numbers from `at` on of states of either type, as floats. */
INLINE void read_states(const struct rest *a, const void *states, int64_t at, float *to)
{
    const uint16_t *halves = (const uint16_t *)states + at;
    if (a->type == FLOAT32) {
        memcpy(to, (const float *)states + at, a->head_dim * sizeof(float));
        return;
    }
    for (int64_t j = 0; j < a->head_dim; j++) {
        const uint32_t bits = (uint32_t)halves[j] << 16;
        memcpy(to + j, &bits, sizeof bits);
    }
}

/* Scratch of one thread. */
struct rest_work {
    float *query;         /* [D, padded R] */
    float *scores;        /* [n + TOGETHER, padded R], then weights */
    float *states;        /* [TOGETHER, D] */
    float *coded, *total; /* [padded R]: weight of what is coded, and of all */
};

#define IMPL "rest_impl.h"
#include "each_level.h"

/* Items `begin` to `end` of rows of the batch and heads: item b H + h is row b on head h. Returns 0, or
 * 1 where there is no memory. */
int vqkv_rest(int level, const struct rest *a, int64_t begin, int64_t end)
{
    const int64_t rows = padded(a->rows), dim = a->head_dim;
    const int64_t room = tokens_of(a) + TOGETHER;
    float *memory = calloc(rows * (dim + room + 2) + TOGETHER * dim, sizeof(float));
    if (memory == NULL)
        return 1;
    const struct rest_work w = {
        .query = memory,
        .scores = memory + rows * dim,
        .states = memory + rows * (dim + room + 2),
        .coded = memory + rows * (dim + room),
        .total = memory + rows * (dim + room + 1),
    };
    for (int64_t item = begin; item < end; item++)
        AT_LEVEL(level, rest)(a, &w, item);
    free(memory);
    return 0;
}
