/* At one SIMD level; included once per level, with NAME and W. */

#include "lanes.h"

#include "exponential.h"

/* Scores [n, padded R] of all exact tokens, TOGETHER at a time. */
static TARGET void NAME(score_exact)(const struct rest *a, const struct rest_work *w, int64_t row,
                                     int64_t head)
{
    const int64_t rows = padded(a->rows), dim = a->head_dim;
    float *scores = w->scores;
    for (const struct exact *run = a->runs; run < a->runs + a->run_count; run++) {
        const int64_t *strides = run->key_strides;
        const int64_t first = row * strides[0] + head * strides[1];
        for (int64_t t = 0; t < run->tokens; t += TOGETHER) {
            const int64_t left = run->tokens - t < TOGETHER ? run->tokens - t : TOGETHER;
            for (int64_t i = 0; i < left; i++)
                read_states(a, run->keys, first + (t + i) * strides[2], w->states + i * dim);
            /* Scores beyond a run's last token are of older states; the next run writes over them. */
            for (int64_t r = 0; r < rows; r += W) {
                V sum0 = V_SET1(0), sum1 = V_SET1(0), sum2 = V_SET1(0), sum3 = V_SET1(0);
                for (int64_t j = 0; j < dim; j++) {
                    const V query = V_LOAD(w->query + j * rows + r);
                    const float *key = w->states + j;
                    sum0 = V_FMA(V_SET1(key[0]), query, sum0);
                    sum1 = V_FMA(V_SET1(key[dim]), query, sum1);
                    sum2 = V_FMA(V_SET1(key[2 * dim]), query, sum2);
                    sum3 = V_FMA(V_SET1(key[3 * dim]), query, sum3);
                }
                V_STORE(scores + r, sum0);
                V_STORE(scores + rows + r, sum1);
                V_STORE(scores + 2 * rows + r, sum2);
                V_STORE(scores + 3 * rows + r, sum3);
            }
            scores += left * rows;
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
    const uint8_t *hidden = a->hidden == NULL ? NULL : a->hidden + item * a->rows * tokens;
    for (int64_t r = 0; r < a->rows && hidden != NULL; r++)
        for (int64_t t = 0; t < tokens; t++)
            if (hidden[r * tokens + t])
                w->scores[t * rows + r] = -INFINITY;
    for (int64_t first = 0; first < rows; first += LANES) {
        float best[LANES], total[LANES];
        for (int i = 0; i < LANES; i++)
            best[i] = first + i < a->rows ? lse[first + i] : 0.0f;
        for (int64_t t = 0; t < tokens; t++)
            for (int i = 0; i < LANES; i++) {
                const float score = w->scores[t * rows + first + i];
                best[i] = score > best[i] ? score : best[i];
            }
        for (int i = 0; i < LANES; i++) {
            best[i] = best[i] == -INFINITY ? 0.0f : best[i]; /* a row that sees nothing */
            const float own = first + i < a->rows ? lse[first + i] : -INFINITY;
            w->coded[first + i] = total[i] = NAME(exponential)(own - best[i]);
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

/* Adds means [R, D], by each row's weight, through a map [D, D] to output [R, D]. */
static TARGET void NAME(add_mapped)(const struct rest *a, const float *means, const float *map,
                                    const float *weights, float *output)
{
    const int64_t dim = a->head_dim;
    for (int64_t z = 0; z < dim; z++)
        for (int64_t r = 0; r < a->rows; r++) {
            const float mean = weights[r] * means[r * dim + z];
            float *restrict to = output + r * dim;
            for (int64_t j = 0; j < dim; j++)
                to[j] += mean * map[z * dim + j];
        }
}

/* Row `item / H` of the batch on head `item % H`. */
static TARGET void NAME(rest)(const struct rest *a, const struct rest_work *w, int64_t item)
{
    const int64_t row = item / a->heads, head = item % a->heads, tokens = tokens_of(a);
    const int64_t rows = padded(a->rows), dim = a->head_dim, at = item * a->rows * dim;
    for (int64_t j = 0; j < dim; j++)
        for (int64_t r = 0; r < rows; r++)
            w->query[j * rows + r] = r < a->rows ? a->query[at + r * dim + j] : 0.0f;
    NAME(score_exact)(a, w, row, head);
    NAME(weigh)(a, w, item, tokens);

    float *output = a->output + at;
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t j = 0; j < dim; j++)
            output[r * dim + j] = a->bias == NULL ? 0.0f : w->coded[r] * a->bias[head * dim + j];
    const float *map = a->map + head * (a->key_means == NULL ? 1 : 2) * dim * dim;
    NAME(add_mapped)(a, a->means + at, map, w->coded, output);
    if (a->key_means != NULL)
        NAME(add_mapped)(a, a->key_means + at, map + dim * dim, w->coded, output);

    const float *weights = w->scores;
    for (const struct exact *run = a->runs; run < a->runs + a->run_count; run++) {
        const int64_t *strides = run->value_strides;
        const int64_t first = row * strides[0] + head * strides[1];
        for (int64_t t = 0; t < run->tokens; t++, weights += rows) {
            read_states(a, run->values, first + t * strides[2], w->states);
            for (int64_t r = 0; r < a->rows; r++) {
                float *restrict to = output + r * dim;
                for (int64_t j = 0; j < dim; j++)
                    to[j] += weights[r] * w->states[j];
            }
        }
    }
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t j = 0; j < dim; j++)
            output[r * dim + j] = w->total[r] == 0.0f ? 0.0f : output[r * dim + j] / w->total[r];
}

#include "lanes_end.h"
