/* Scores of keys that are turned by their offset in a page, at one SIMD level. A page is looked up and
 * turned, some channels at a time, and then multiplied by all queries. */

/* Turns of the offsets in the order of this head's pairs. */
static TARGET void NAME(prepare_turns)(struct work *w)
{
    const struct attention *a = w->a;
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

/* Queries turned back by the first position of the tile's page number `page`. */
static TARGET void NAME(turn_back)(struct work *w, int64_t page, const float *turns)
{
    const struct attention *a = w->a;
    const int64_t half = a->head_dim / 2, floats = a->rows * a->head_dim;
    const float *given = w->given;
    float *query = w->query + page * floats;
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

/* Groups that are looked up together over a whole tile, as their codewords fit into the L1 cache. */
static int64_t NAME(together)(const struct plane *plane)
{
    const int64_t groups = (W == 16 ? 32 : 16) / plane->dim;
    return groups < 1 ? 1 : groups;
}

/* Some groups of keys, from `m` on, of a page's codes, as [channels, PAGE]. Constant where this is inlined,
 * but for rare shapes: `dim`. */
INLINE TARGET void NAME(look_up)(const struct work *w, int64_t m, int64_t groups,
                                 const uint8_t *codes, int64_t dim)
{
    const struct plane *keys = &w->a->keys;
    const int64_t stages = keys->stages, columns = keys->groups * stages;
    const float *restrict words = keys->words + (w->head * columns + m * stages) * keys->size * dim;
    codes += m * stages;
    for (int64_t g = 0; g < groups; g++)
        for (int64_t s = 0; s < stages; s++, codes++, words += keys->size * dim) {
            float *to = w->decoded + g * dim * PAGE;
            for (int64_t t = 0; t < PAGE; t++, to++) {
                const float *restrict word = words + codes[t * columns] * dim;
                for (int64_t i = 0; i < dim; i++)
                    to[i * PAGE] = s == 0 ? word[i] : to[i * PAGE] + word[i];
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

/* As `look_up` and `turn`, of groups of whole quads: codewords of four tokens are transposed in registers.
 * Constant where this is inlined, but for rare shapes: `dim` and `stages`. */
INLINE TARGET void NAME(look_up_quads)(const struct work *w, int64_t m, int64_t groups,
                                       const uint8_t *page_codes, int64_t dim, int64_t stages)
{
    const struct plane *keys = &w->a->keys;
    const int64_t columns = keys->groups * stages, size = keys->size, channels = groups * dim;
    const float *words = keys->words + (w->head * columns + m * stages) * size * dim;
    const float *turns = w->offset_turns + m * dim * PAGE;
    float *to = w->decoded;
    for (int64_t i = 0; i < channels; i += 4, turns += 3 * PAGE, to += 3 * PAGE) {
        const int64_t first = i / dim * stages;
        const uint8_t *codes = page_codes + m * stages + first;
        for (int64_t t = 0; t < PAGE; t += 4, codes += 4 * columns, turns += 4, to += 4) {
            const float *word = words + first * size * dim + i % dim;
            const uint8_t *code = codes;
#define WORD(t) load_quad(word + code[(t) * columns] * dim)
            quad x[4] = {WORD(0), WORD(1), WORD(2), WORD(3)};
            for (int64_t s = 1; s < stages; s++) {
                word += size * dim;
                code++;
                x[0] += WORD(0);
                x[1] += WORD(1);
                x[2] += WORD(2);
                x[3] += WORD(3);
            }
#undef WORD
            transpose_quads(x);
            for (int j = 0; j < 2; j++) {
                const quad cosine = load_quad(turns + 2 * j * PAGE);
                const quad sine = load_quad(turns + (2 * j + 1) * PAGE);
                const quad even = x[2 * j], odd = x[2 * j + 1];
                store_quad(to + 2 * j * PAGE, even * cosine - odd * sine);
                store_quad(to + (2 * j + 1) * PAGE, odd * cosine + even * sine);
            }
        }
    }
}

/* Adds `pairs` pairs of channels from pair `first` on of a page of keys to its scores under `rows` rows from
 * `row`. */
INLINE TARGET void NAME(score_rows)(struct work *w, int64_t page, int64_t first, int64_t pairs,
                                    int64_t row, int rows)
{
    const int64_t dim = w->a->head_dim;
    const float *all = w->query + (page * w->a->rows + row) * dim + first;
    float *scores = w->scores + row * TILE + page * PAGE;
    for (int o = 0; o < PAGE; o += 2 * W) {
        V low[4], high[4];
        for (int r = 0; r < rows; r++) {
            low[r] = first == 0 ? V_SET1(0) : V_LOAD(scores + r * TILE + o);
            high[r] = first == 0 ? V_SET1(0) : V_LOAD(scores + r * TILE + o + W);
        }
        for (int xy = 0; xy < 2; xy++) {
            const float *query = all + xy * (dim / 2);
            const float *keys = w->decoded + xy * PAGE + o;
            for (int64_t j = 0; j < pairs; j++, query++, keys += 2 * PAGE) {
                const V lower = V_LOAD(keys), upper = V_LOAD(keys + W);
                for (int r = 0; r < rows; r++) {
                    const V number = V_SET1(query[r * dim]);
                    low[r] = V_FMA(number, lower, low[r]);
                    high[r] = V_FMA(number, upper, high[r]);
                }
            }
        }
        for (int r = 0; r < rows; r++) {
            V_STORE(scores + r * TILE + o, low[r]);
            V_STORE(scores + r * TILE + o + W, high[r]);
        }
    }
}

/* Looks some groups of a page up and turns them. */
static TARGET void NAME(decode_turned)(struct work *w, int64_t m, int64_t groups, const uint8_t *codes)
{
    const struct plane *keys = &w->a->keys;
    const int64_t dim = keys->dim;
    if (dim == 4 && keys->stages == 1) {
        NAME(look_up_quads)(w, m, groups, codes, 4, 1);
        return;
    }
    if (dim % 4 == 0) {
        NAME(look_up_quads)(w, m, groups, codes, dim, keys->stages);
        return;
    }
    if (dim == 2)
        NAME(look_up)(w, m, groups, codes, 2);
    else
        NAME(look_up)(w, m, groups, codes, dim);
    NAME(turn)(w, m * dim / 2, groups * dim / 2);
}

/* Scores of the first `tokens` tokens of the tile. */
static TARGET void NAME(scores_turned)(struct work *w, int64_t tokens)
{
    const struct attention *a = w->a;
    const struct plane *keys = &a->keys;
    const int64_t dim = keys->dim, step = NAME(together)(keys);
    for (int64_t m = 0; m < keys->groups; m += step) {
        const int64_t groups = keys->groups - m < step ? keys->groups - m : step;
        for (int64_t page = 0; page * PAGE < tokens; page++) {
            NAME(decode_turned)(w, m, groups, w->keys.codes + page * PAGE * keys->groups * keys->stages);
#define SCORE(rows) NAME(score_rows)(w, page, m * dim / 2, groups * dim / 2, row, rows)
            for (int64_t row = 0; row < a->rows;)
                FOR_UP_TO_4_ROWS(a->rows - row, SCORE)
#undef SCORE
        }
    }
}

const struct scoring NAME(turned) = {.prepare = NAME(prepare_turns),
                                     .queries = NAME(turn_back),
                                     .scores = NAME(scores_turned)};
