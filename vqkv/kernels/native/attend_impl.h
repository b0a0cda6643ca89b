/* Attention on a tile of codes at one SIMD level, for all shapes. Included once per level by
 * attend_general.c, which defines
 *
 *   NAME(x)   x with the level's suffix      TARGET   the function attribute of the level
 *
 * Plain loops over tokens, or over channels, that compilers turn into vectors.
 */

#include "exponential.h"

/* Scores to weights relative to the best score so far. */
TARGET void NAME(softmax)(struct work *w)
{
    enum { LANES = 16 };
    for (int64_t r = 0; r < w->a->rows; r++) {
        float *scores = w->scores + r * TILE;
        for (int64_t t = 0; t < w->begin; t++)
            scores[t] = -INFINITY;
        for (int64_t t = w->end; t < TILE; t++)
            scores[t] = -INFINITY;
        float lanes[LANES];
        for (int i = 0; i < LANES; i++)
            lanes[i] = w->best[r];
        for (int t = 0; t < TILE; t += LANES)
            for (int i = 0; i < LANES; i++)
                lanes[i] = scores[t + i] > lanes[i] ? scores[t + i] : lanes[i];
        float best = lanes[0];
        for (int i = 1; i < LANES; i++)
            best = lanes[i] > best ? lanes[i] : best;
        for (int i = 0; i < LANES; i++)
            lanes[i] = 0.0f;
        for (int t = 0; t < TILE; t += LANES)
            for (int i = 0; i < LANES; i++) {
                const float weight = NAME(exponential)(scores[t + i] - best);
                scores[t + i] = weight;
                lanes[i] += weight;
            }
        float sum = 0.0f;
        for (int i = 0; i < LANES; i++)
            sum += lanes[i];
        w->shrink[r] = NAME(exponential)(w->best[r] - best);
        w->total[r] = w->total[r] * w->shrink[r] + sum;
        w->best[r] = best;
    }
}

/* Queries as scores of the tile's page number `page` need them: turned back by the page's first
 * position, or without turns as given. */
TARGET void NAME(queries)(struct work *w, int64_t page, const float *turns)
{
    const struct attention *a = w->a;
    const int64_t half = a->head_dim / 2, floats = a->rows * a->head_dim;
    const float *given = w->given;
    float *query = w->query + page * floats;
    if (turns == NULL) {
        memcpy(query, given, floats * sizeof(float));
        return;
    }
    const int32_t *pairs = a->pairs + w->head * half;
    float *restrict cosine = w->decoded, *restrict sine = cosine + half;
    for (int64_t j = 0; j < half; j++) {
        cosine[j] = turns[2 * pairs[j]];
        sine[j] = turns[2 * pairs[j] + 1];
    }
    for (int64_t r = 0; r < a->rows; r++, given += 2 * half) {
        float *restrict x = query + r * 2 * half, *restrict y = x + half;
        for (int64_t j = 0; j < half; j++) {
            x[j] = given[j] * cosine[j] + given[half + j] * sine[j];
            y[j] = given[half + j] * cosine[j] - given[j] * sine[j];
        }
    }
}

/* Turns of the offsets in the order of this head's pairs. */
static TARGET void NAME(prepare)(struct work *w)
{
    const struct attention *a = w->a;
    if (a->page_turns == NULL)
        return;
    const int64_t half = a->head_dim / 2;
    for (int64_t j = 0; j < half; j++) {
        const float *turns = a->offset_turns + 2 * a->pairs[w->head * half + j];
        float *cosine = w->offset_turns + 2 * j * PAGE, *sine = cosine + PAGE;
        for (int64_t o = 0; o < PAGE; o++) {
            cosine[o] = turns[o * 2 * half];
            sine[o] = turns[o * 2 * half + 1];
        }
    }
}

/* Keys [D, PAGE] of a page's codes, turned by their offsets. */
static TARGET void NAME(decode_keys)(struct work *w, const uint8_t *codes)
{
    const struct attention *a = w->a;
    const struct plane *plane = &a->keys;
    const int64_t columns = plane->groups * plane->stages, dim = plane->dim;
    const float *words = plane->words + w->head * columns * plane->size * dim;
    for (int64_t m = 0; m < plane->groups; m++) {
        float *restrict keys = w->decoded + m * dim * PAGE;
        memset(keys, 0, dim * PAGE * sizeof(float));
        for (int64_t c = m * plane->stages; c < (m + 1) * plane->stages; c++)
            for (int64_t o = 0; o < PAGE; o++) {
                const float *word = words + (c * plane->size + codes[o * columns + c]) * dim;
                for (int64_t i = 0; i < dim; i++)
                    keys[i * PAGE + o] += word[i];
            }
    }
    if (a->page_turns == NULL)
        return;
    for (int64_t j = 0; j < a->head_dim / 2; j++) {
        const float *cosine = w->offset_turns + 2 * j * PAGE, *sine = cosine + PAGE;
        float *restrict x = w->decoded + 2 * j * PAGE, *restrict y = x + PAGE;
        for (int o = 0; o < PAGE; o++) {
            const float turned = x[o] * cosine[o] - y[o] * sine[o];
            y[o] = y[o] * cosine[o] + x[o] * sine[o];
            x[o] = turned;
        }
    }
}

/* Scores of the first `tokens` tokens of the tile. */
static TARGET void NAME(scores)(struct work *w, int64_t tokens)
{
    const struct attention *a = w->a;
    const int64_t columns = a->keys.groups * a->keys.stages, half = a->head_dim / 2;
    for (int64_t page = 0; page * PAGE < tokens; page++) {
        NAME(decode_keys)(w, w->keys + page * PAGE * columns);
        for (int64_t r = 0; r < a->rows; r++) {
            const int64_t turned = a->page_turns == NULL ? 0 : page;
            const float *query = w->query + (turned * a->rows + r) * a->head_dim;
            float sum[PAGE] = {0};
            for (int64_t j = 0; j < a->head_dim; j++) {
                const float channel =
                    a->page_turns == NULL ? query[j] : query[j % 2 * half + j / 2];
                const float *keys = w->decoded + j * PAGE;
                for (int o = 0; o < PAGE; o++)
                    sum[o] += channel * keys[o];
            }
            memcpy(w->scores + r * TILE + page * PAGE, sum, sizeof sum);
        }
    }
}

/* Adds the tile's vectors, by weight, to sums [R, D]. */
static TARGET void NAME(sums)(struct work *w, const struct plane *plane, const uint8_t *codes,
                              float *sums)
{
    const int64_t columns = plane->groups * plane->stages, dim = plane->dim;
    const int64_t rows = w->a->rows, head_dim = w->a->head_dim;
    const float *words = plane->words + w->head * columns * plane->size * dim;
    float *restrict vector = w->decoded;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < head_dim; j++)
            sums[r * head_dim + j] *= w->shrink[r];
    for (int64_t t = w->begin; t < w->end; t++) {
        memset(vector, 0, head_dim * sizeof(float));
        for (int64_t c = 0; c < columns; c++) {
            const float *word = words + (c * plane->size + codes[t * columns + c]) * dim;
            for (int64_t i = 0; i < dim; i++)
                vector[c / plane->stages * dim + i] += word[i];
        }
        for (int64_t r = 0; r < rows; r++) {
            const float weight = w->scores[r * TILE + t];
            float *restrict sum = sums + r * head_dim;
            for (int64_t j = 0; j < head_dim; j++)
                sum[j] += weight * vector[j];
        }
    }
}

const struct kernel NAME(attend) = {NAME(prepare), NAME(queries), NAME(scores), NAME(softmax),
                                    NAME(sums)};

#undef NAME
#undef TARGET
