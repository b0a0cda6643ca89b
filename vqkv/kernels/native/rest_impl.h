/* At one SIMD level; included once per level, with NAME and W. */

#include "lanes.h"

#include "exponential.h"

/* Scores [n, R] of all exact tokens, TOGETHER at a time. */
static TARGET void NAME(score_exact)(const struct rest *a, const struct rest_work *w, int64_t row,
                                     int64_t head)
{
    const int64_t rows = padded(a->rows), dim = a->head_dim;
    float *scores = w->scores;
    for (const struct exact *run = a->runs; run < a->runs + EXACT_RUNS; run++) {
        const struct vectors keys = states_of(a, run->keys, run->key_strides, row, head);
        for (int64_t t = 0; t < run->tokens; t += TOGETHER) {
            const int64_t left = run->tokens - t < TOGETHER ? run->tokens - t : TOGETHER;
            int64_t step;
            const float *key = as_floats(&keys, t, left, dim, w->copy, &step);
            const float *of[TOGETHER];
            for (int64_t i = 0; i < TOGETHER; i++) /* beyond the run's end the last one again */
                of[i] = key + (i < left ? i : left - 1) * step;
            for (int64_t r = 0; r < rows; r += W) {
                V sums[TOGETHER];
                for (int i = 0; i < TOGETHER; i++)
                    sums[i] = V_SET1(0);
                for (int64_t j = 0; j < dim; j++) {
                    const V query = V_LOAD(w->query + j * rows + r);
                    for (int i = 0; i < TOGETHER; i++)
                        sums[i] = V_FMA(V_SET1(of[i][j]), query, sums[i]);
                }
                for (int i = 0; i < TOGETHER; i++)
                    V_STORE(scores + i * rows + r, sums[i]);
            }
            scores += left * rows; /* the next run writes over what is beyond */
        }
    }
}

/* Scores to weights relative to each row's best, and their totals. */
static TARGET void NAME(weigh)(const struct rest *a, const struct rest_work *w, int64_t item,
                               int64_t tokens)
{
    enum { LANES = 16 };
    const int64_t rows = padded(a->rows);
    const float *lse = a->lse + item * a->rows;
    const float *null = a->null == NULL ? NULL : a->null + item % a->heads * a->rows;
    const uint8_t *hidden = a->hidden == NULL ? NULL : a->hidden + item * a->rows * tokens;
    for (int64_t r = 0; r < a->rows && hidden != NULL; r++)
        for (int64_t t = 0; t < tokens; t++)
            if (hidden[r * tokens + t])
                w->scores[t * rows + r] = -INFINITY;
    for (int64_t first = 0; first < rows; first += LANES) {
        float best[LANES], total[LANES], without[LANES];
        for (int i = 0; i < LANES; i++) {
            best[i] = first + i < a->rows ? lse[first + i] : 0.0f;
            without[i] = null != NULL && first + i < a->rows ? null[first + i] : -INFINITY;
            best[i] = without[i] > best[i] ? without[i] : best[i];
        }
        for (int64_t t = 0; t < tokens; t++)
            for (int i = 0; i < LANES; i++) {
                const float score = w->scores[t * rows + first + i];
                best[i] = score > best[i] ? score : best[i];
            }
        for (int i = 0; i < LANES; i++) {
            best[i] = best[i] == -INFINITY ? 0.0f : best[i]; /* a row that sees nothing */
            const float own = first + i < a->rows ? lse[first + i] : -INFINITY;
            w->coded[first + i] = NAME(exponential)(own - best[i]);
            total[i] = w->coded[first + i] + NAME(exponential)(without[i] - best[i]);
        }
        for (int64_t t = 0; t < tokens; t++)
            for (int i = 0; i < LANES; i++) {
                float *score = w->scores + t * rows + first + i;
                *score = NAME(exponential)(*score - best[i]);
                total[i] += *score;
            }
        memcpy(w->total + first, total, sizeof total);
    }
}

/* Adds vectors [count, D], by weights [count, R], to the output. */
static TARGET void NAME(add_vectors)(const struct rest *a, const struct rest_work *w,
                                     const float *weights, struct vectors vectors, int64_t count)
{
    const int64_t rows = padded(a->rows), dim = padded(a->head_dim);
    for (int64_t first = 0; first < count; first += BLOCK) {
        const int64_t block = count - first < BLOCK ? count - first : BLOCK;
        int64_t step;
        const float *from = as_floats(&vectors, first, block, a->head_dim, w->copy, &step);
        for (int64_t r = 0; r < a->rows; r += 4)
            for (int64_t j = 0; j < dim; j += W) {
                float *to = w->output + r * dim + j;
                V sum0 = V_LOAD(to), sum1 = V_LOAD(to + dim);
                V sum2 = V_LOAD(to + 2 * dim), sum3 = V_LOAD(to + 3 * dim);
                for (int64_t i = 0; i < block; i++) {
                    const V vector = V_LOAD(from + i * step + j);
                    const float *weight = weights + (first + i) * rows + r;
                    sum0 = V_FMA(V_SET1(weight[0]), vector, sum0);
                    sum1 = V_FMA(V_SET1(weight[1]), vector, sum1);
                    sum2 = V_FMA(V_SET1(weight[2]), vector, sum2);
                    sum3 = V_FMA(V_SET1(weight[3]), vector, sum3);
                }
                V_STORE(to, sum0);
                V_STORE(to + dim, sum1);
                V_STORE(to + 2 * dim, sum2);
                V_STORE(to + 3 * dim, sum3);
            }
    }
}

/* Adds means [R, D] through a map [D, D]. */
static TARGET void NAME(add_mapped)(const struct rest *a, const struct rest_work *w,
                                    const float *means, const float *map)
{
    const int64_t rows = padded(a->rows), dim = a->head_dim;
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t z = 0; z < dim; z++)
            w->means[z * rows + r] = w->coded[r] * means[r * dim + z];
    NAME(add_vectors)(a, w, w->means, (struct vectors){map, dim, FLOAT32}, dim);
}

/* Row `item / H` of the batch on head `item % H`. */
static TARGET void NAME(rest)(const struct rest *a, const struct rest_work *w, int64_t item)
{
    const int64_t row = item / a->heads, head = item % a->heads, tokens = tokens_of(a);
    const int64_t rows = padded(a->rows), dim = a->head_dim, at = item * a->rows * dim;
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t j = 0; j < dim; j++)
            w->query[j * rows + r] = a->query[at + r * dim + j];
    NAME(score_exact)(a, w, row, head);
    NAME(weigh)(a, w, item, tokens);

    memset(w->output, 0, rows * padded(dim) * sizeof(float));
    for (int64_t r = 0; r < a->rows && a->bias != NULL; r++)
        for (int64_t j = 0; j < dim; j++)
            w->output[r * padded(dim) + j] = w->coded[r] * a->bias[head * dim + j];
    const float *map = a->map + head * (a->key_means == NULL ? 1 : 2) * dim * dim;
    NAME(add_mapped)(a, w, a->means + at, map);
    if (a->key_means != NULL)
        NAME(add_mapped)(a, w, a->key_means + at, map + dim * dim);
    const float *weights = w->scores;
    for (const struct exact *run = a->runs; run < a->runs + EXACT_RUNS; run++) {
        const struct vectors values = states_of(a, run->values, run->value_strides, row, head);
        NAME(add_vectors)(a, w, weights, values, run->tokens);
        weights += run->tokens * rows;
    }
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t j = 0; j < dim; j++) {
            const float sum = w->output[r * padded(dim) + j];
            a->output[at + r * dim + j] = w->total[r] == 0.0f ? 0.0f : sum / w->total[r];
        }
}

#include "lanes_end.h"
