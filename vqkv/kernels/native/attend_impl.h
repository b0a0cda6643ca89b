/* Attention on a tile of codes at one SIMD level, for all shapes; included once per level, with NAME and
 * W. A page of vectors is looked up at a time, and then multiplied. */

#include "lanes.h"

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
        const float base = best == -INFINITY ? 0.0f : best; /* nothing has a weight yet */
        for (int i = 0; i < LANES; i++)
            lanes[i] = 0.0f;
        for (int t = 0; t < TILE; t += LANES)
            for (int i = 0; i < LANES; i++) {
                const float weight = NAME(exponential)(scores[t + i] - base);
                scores[t + i] = weight;
                lanes[i] += weight;
            }
        float sum = 0.0f;
        for (int i = 0; i < LANES; i++)
            sum += lanes[i];
        w->shrink[r] = NAME(exponential)(w->best[r] - base);
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

/* Groups that are looked up together over a whole tile, as their codewords fit into the L1 cache; whole
 * pairs of channels. */
static int64_t NAME(together)(const struct plane *plane)
{
    const int64_t channels = W == 16 ? 32 : 16, groups = channels / plane->dim;
    const int64_t least = plane->dim % 2 == 0 ? 1 : 2;
    return groups < least ? least : groups / least * least;
}

/* Some groups, from `m` on, of a page's codes from token `begin` to `end`; a token's channels are
 * `channel` numbers apart, and tokens `token`. Constant where this is inlined, but for rare shapes: `dim`. */
INLINE TARGET void NAME(look_up)(const struct work *w, const struct plane *plane, int64_t m,
                                 int64_t groups, const uint8_t *codes, int64_t begin, int64_t end,
                                 int64_t channel, int64_t token, int64_t dim)
{
    const int64_t stages = plane->stages, columns = plane->groups * stages;
    const float *restrict words =
        plane->words + (w->head * columns + m * stages) * plane->size * dim;
    codes += m * stages;
    for (int64_t g = 0; g < groups; g++)
        for (int64_t s = 0; s < stages; s++, codes++, words += plane->size * dim) {
            float *all = w->decoded + g * dim * channel;
            for (int64_t t = begin; t < end; t++) {
                const float *restrict word = words + codes[t * columns] * dim;
                float *restrict to = all + t * token;
                if (s == 0 && channel == 1)
                    memcpy(to, word, dim * sizeof(float));
                else
                    for (int64_t i = 0; i < dim; i++)
                        to[i * channel] = s == 0 ? word[i] : to[i * channel] + word[i];
            }
        }
}

/* Pairs [n, 2, PAGE] of channels, from pair `first` on, turned by tokens' offsets. */
static TARGET void NAME(turn)(struct work *w, int64_t first, int64_t n)
{
    for (int64_t j = 0; j < n; j++) {
        const float *cosine = w->offset_turns + 2 * (first + j) * PAGE, *sine = cosine + PAGE;
        float *x = w->decoded + 2 * j * PAGE, *y = x + PAGE;
        for (int o = 0; o < PAGE; o += W) {
            const V c = V_LOAD(cosine + o), s = V_LOAD(sine + o);
            const V even = V_LOAD(x + o), odd = V_LOAD(y + o);
            V_STORE(x + o, V_FNMA(odd, s, V_MUL(even, c)));
            V_STORE(y + o, V_FMA(even, s, V_MUL(odd, c)));
        }
    }
}

/* Adds `count` channels from `first` on of a page of keys to its scores under `rows` rows from `row`. */
INLINE TARGET void NAME(score_rows)(struct work *w, int64_t page, int64_t first, int64_t count,
                                    int64_t row, int rows)
{
    const struct attention *a = w->a;
    const int64_t dim = a->head_dim, half = dim / 2;
    const int turned = a->page_turns != NULL;
    const float *query = w->query + ((turned ? page * a->rows : 0) + row) * dim;
    float *scores = w->scores + row * TILE + page * PAGE;
    for (int o = 0; o < PAGE; o += 2 * W) {
        V low[4], high[4];
        for (int r = 0; r < rows; r++) {
            low[r] = first == 0 ? V_SET1(0) : V_LOAD(scores + r * TILE + o);
            high[r] = first == 0 ? V_SET1(0) : V_LOAD(scores + r * TILE + o + W);
        }
        for (int64_t j = 0; j < count; j++) {
            const int64_t channel = first + j;
            const int64_t at = turned ? channel % 2 * half + channel / 2 : channel;
            const V lower = V_LOAD(w->decoded + j * PAGE + o);
            const V upper = V_LOAD(w->decoded + j * PAGE + o + W);
            for (int r = 0; r < rows; r++) {
                const V number = V_SET1(query[r * dim + at]);
                low[r] = V_FMA(number, lower, low[r]);
                high[r] = V_FMA(number, upper, high[r]);
            }
        }
        for (int r = 0; r < rows; r++) {
            V_STORE(scores + r * TILE + o, low[r]);
            V_STORE(scores + r * TILE + o + W, high[r]);
        }
    }
}

/* Scores of the first `tokens` tokens of the tile. */
static TARGET void NAME(scores)(struct work *w, int64_t tokens)
{
    const struct attention *a = w->a;
    const struct plane *plane = &a->keys;
    const int64_t dim = plane->dim, step = NAME(together)(plane);
    for (int64_t m = 0; m < plane->groups; m += step) {
        const int64_t groups = plane->groups - m < step ? plane->groups - m : step;
        for (int64_t page = 0; page * PAGE < tokens; page++) {
            const uint8_t *codes = w->keys + page * PAGE * plane->groups * plane->stages;
            WITH_DIM(dim, NAME(look_up)(w, plane, m, groups, codes, 0, PAGE, PAGE, 1, DIM))
            if (a->page_turns != NULL)
                NAME(turn)(w, m * dim / 2, groups * dim / 2);
#define SCORE(rows) NAME(score_rows)(w, page, m * dim, groups * dim, row, rows)
            for (int64_t row = 0; row < a->rows;)
                FOR_UP_TO_4_ROWS(a->rows - row, SCORE)
#undef SCORE
        }
    }
}

/* Adds 2 W channels of vectors [PAGE, width] of tokens `begin` to `end` of a page, by weights [R, TILE], to
 * sums of `rows` rows. */
INLINE TARGET void NAME(sum_rows)(const float *vectors, int64_t width, const float *weights,
                                  int64_t begin, int64_t end, float *sums, int64_t dim, int rows)
{
    V low[4], high[4];
    for (int r = 0; r < rows; r++) {
        low[r] = V_LOAD(sums + r * dim);
        high[r] = V_LOAD(sums + r * dim + W);
    }
    for (int64_t t = begin; t < end; t++) {
        const V lower = V_LOAD(vectors + t * width), upper = V_LOAD(vectors + t * width + W);
        for (int r = 0; r < rows; r++) {
            const V weight = V_SET1(weights[r * TILE + t]);
            low[r] = V_FMA(weight, lower, low[r]);
            high[r] = V_FMA(weight, upper, high[r]);
        }
    }
    for (int r = 0; r < rows; r++) {
        V_STORE(sums + r * dim, low[r]);
        V_STORE(sums + r * dim + W, high[r]);
    }
}

/* Adds a page of vectors [PAGE, width], by weight, to channels from `first` on of all sums. */
static TARGET void NAME(add_page)(const struct work *w, const float *weights, int64_t begin,
                                  int64_t end, float *sums, int64_t first, int64_t width)
{
    const int64_t all = w->a->rows, dim = w->a->head_dim, whole = width / (2 * W) * (2 * W);
#define SUM(rows) \
    NAME(sum_rows)(w->decoded + j, width, weights + row * TILE, begin, end, \
                   sums + row * dim + first + j, dim, rows)
    for (int64_t j = 0; j < whole; j += 2 * W)
        for (int64_t row = 0; row < all;)
            FOR_UP_TO_4_ROWS(all - row, SUM)
#undef SUM
    for (int64_t r = 0; r < all; r++)
        for (int64_t t = begin; t < end; t++)
            for (int64_t j = whole; j < width; j++)
                sums[r * dim + first + j] += weights[r * TILE + t] * w->decoded[t * width + j];
}

/* Adds the tile's vectors, by weight, to sums [R, D]. */
static TARGET void NAME(sums)(struct work *w, const struct plane *plane, const uint8_t *codes,
                              float *sums)
{
    const int64_t dim = plane->dim, columns = plane->groups * plane->stages;
    const int64_t step = NAME(together)(plane);
    for (int64_t r = 0; r < w->a->rows; r++)
        for (int64_t j = 0; j < w->a->head_dim; j++)
            sums[r * w->a->head_dim + j] *= w->shrink[r];
    for (int64_t m = 0; m < plane->groups; m += step) {
        const int64_t groups = plane->groups - m < step ? plane->groups - m : step;
        const int64_t width = groups * dim;
        for (int64_t from = w->begin / PAGE * PAGE; from < w->end; from += PAGE) {
            const int64_t begin = w->begin > from ? w->begin - from : 0;
            const int64_t end = w->end - from < PAGE ? w->end - from : PAGE;
            WITH_DIM(dim, NAME(look_up)(w, plane, m, groups, codes + from * columns, begin, end, 1,
                                        width, DIM))
            NAME(add_page)(w, w->scores + from, begin, end, sums, m * dim, width);
        }
    }
}

const struct kernel NAME(attend) = {NAME(prepare), NAME(queries), NAME(scores), NAME(softmax),
                                    NAME(sums)};

#include "lanes_end.h"
