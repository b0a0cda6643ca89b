/* Attention on codes by whole numbers of 16 bits with AVX2: scores of keys that are turned, where subvectors
 * are whole quads of channels.
 *
 * A codeword's pairs of channels lie side by side. Two multiplications of pairs, which add up their two
 * products (vpmaddwd), turn them, and another one multiplies them by a query's. A quad of four tokens
 * fills a vector. Quads are taken 8 at a time over a whole tile: their codewords (16 KiB a
 * stage) then stay in the L1 cache.
 */

#include <math.h>
#include <string.h>

#include "attend.h"

#ifdef HAVE_X86

#define TARGET __attribute__((target("avx2,fma")))
#define QUAD 4
#define CHUNK 8          /* quads */
#define FOURS (PAGE / 4) /* of tokens */
#define MARGIN 8         /* of turns' lengths, which are 1 but for rounding */

/* x and y, 16 bits each, of two pairs of channels of four tokens. */
struct four {
    int32_t pairs[4][2];
};

/* What they are multiplied by for x, cosines and negative sines, and for y, sines and cosines. */
struct turns {
    struct four x, y;
};

/* Pairs of channels, up to whole vectors. */
static int64_t pitch_of(const struct attention *a)
{
    return (a->head_dim / 2 + 7) / 8 * 8;
}

/* What is kept. P is that number. */
struct madd_pieces {
    int16_t *words;        /* [M, S, K, d] */
    float *scales;         /* [D / 2]: of pairs of channels */
    float *largest;        /* [D]: numbers of codewords */
    float turn_scale;      /* length of the longest turn */
    int32_t *all_turns;    /* [64, D / 2, 2]: for x and for y, in RoPE's order */
    struct turns *turns;   /* [D / 4, FOURS]: in this head's order */
    float *scaled;         /* [R, 2, P]: queries' x and y in steps */
    float *units;          /* [R]: of products of these and keys */
    float *page_turn;      /* [2, P]: cosines and sines of a page's first position */
    int32_t *queries;      /* [TILE_PAGES, R, P]: pairs, turned back by it */
    float *cut_off;        /* [TILE_PAGES, R]: what scores lack on average, as keys are rounded down */
    struct four *products; /* [R, TILE / 4]: 32 bits, of even and of odd pairs */
};

size_t madd_lay_out(const struct attention *a, char *memory)
{
    const size_t dim = a->head_dim, rows = a->rows, pitch = pitch_of(a), real = sizeof(float);
    size_t used = 0;
    if (!turned_madd_takes(a))
        return 0;
    struct madd_pieces *p = take(&memory, &used, sizeof *p);
    const struct madd_pieces pieces = {
        .words = take(&memory, &used, dim * a->keys.stages * a->keys.size * sizeof(int16_t)),
        .scales = take(&memory, &used, dim / 2 * real),
        .largest = take(&memory, &used, dim * real),
        .all_turns = take(&memory, &used, PAGE * dim * sizeof(int32_t)),
        .turns = take(&memory, &used, dim / QUAD * FOURS * sizeof(struct turns)),
        .scaled = take(&memory, &used, rows * 2 * pitch * real),
        .units = take(&memory, &used, rows * real),
        .page_turn = take(&memory, &used, 2 * pitch * real),
        .queries = take(&memory, &used, TILE_PAGES * rows * pitch * sizeof(int32_t)),
        .cut_off = take(&memory, &used, TILE_PAGES * rows * real),
        .products = take(&memory, &used, rows * TILE / 4 * sizeof(struct four)),
    };
    if (p != NULL)
        *p = pieces;
    return used;
}

/* Two numbers of 16 bits side by side. */
INLINE TARGET int32_t beside(float x, float y)
{
    const uint32_t low = (uint32_t)_mm_cvtss_si32(_mm_set_ss(x));
    const uint32_t high = (uint32_t)_mm_cvtss_si32(_mm_set_ss(y));
    return (int32_t)((low & 0xffff) | high << 16);
}

/* Turns of the offsets, divided by the longest: RoPE may scale keys, too. */
static TARGET void round_turns(struct work *w)
{
    const struct attention *a = w->a;
    w->madd->turn_scale = longest_turn(a);
    const float steps = MOST / w->madd->turn_scale;
    for (int64_t i = 0; i < PAGE * a->head_dim; i += 2) {
        const float cosine = a->offset_turns[i] * steps, sine = a->offset_turns[i + 1] * steps;
        w->madd->all_turns[i] = beside(cosine, -sine);
        w->madd->all_turns[i + 1] = beside(sine, cosine);
    }
}

/* Largest numbers of a stage's codewords by channel, added to `sums`; NaN if any is not finite. */
static TARGET void add_largest(const float *words, int64_t size, int64_t dim, float *sums)
{
    for (int64_t i = 0; i < dim; i += QUAD) {
        __m128 most = _mm_setzero_ps(), none = most;
        for (int64_t k = 0; k < size; k++) {
            const __m128 numbers = _mm_loadu_ps(words + k * dim + i);
            most = _mm_max_ps(most, _mm_andnot_ps(_mm_set1_ps(-0.0f), numbers));
            none = _mm_fmadd_ps(numbers, _mm_setzero_ps(), none);
        }
        _mm_storeu_ps(sums + i, _mm_add_ps(_mm_loadu_ps(sums + i), _mm_add_ps(most, none)));
    }
}

/* A quad of a stage's codewords in so many steps. */
static TARGET void round_quad(const float *words, int64_t size, int64_t dim, __m128 steps,
                              int16_t *to)
{
    for (int64_t k = 0; k < size; k++) {
        const __m128i whole = _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(words + k * dim), steps));
        _mm_storel_epi64((__m128i *)(to + k * dim), _mm_packs_epi32(whole, whole));
    }
}

/* A head's codewords; channels of a pair, which are turned by each other, have a scale that does for
 * both. */
static TARGET void round_words(const struct plane *keys, const float *words,
                               const struct madd_pieces *p)
{
    const int64_t dim = keys->dim, stages = keys->stages, channels = keys->groups * dim;
    const int64_t numbers = keys->size * dim; /* of a stage */
    memset(p->largest, 0, channels * sizeof(float));
    for (int64_t column = 0; column < keys->groups * stages; column++)
        add_largest(words + column * numbers, keys->size, dim, p->largest + column / stages * dim);
    for (int64_t c = 0; c < channels; c += 2)
        p->scales[c / 2] = hypotf(p->largest[c], p->largest[c + 1]) / MOST_KEY;
    for (int64_t column = 0; column < keys->groups * stages; column++)
        for (int64_t i = 0; i < dim; i += QUAD) {
            const float *scales = p->scales + (column / stages * dim + i) / 2;
            const float x = scales[0] > 0.0f ? 1.0f / scales[0] : 0.0f;
            const float y = scales[1] > 0.0f ? 1.0f / scales[1] : 0.0f;
            const int64_t at = column * numbers + i;
            round_quad(words + at, keys->size, dim, _mm_setr_ps(x, x, y, y), p->words + at);
        }
}

/* Codewords as whole numbers, and the turns in the order of this head's pairs. */
static void prepare(struct work *w)
{
    const struct attention *a = w->a;
    const struct madd_pieces *p = w->madd;
    const int32_t *pairs = a->pairs + w->head * a->head_dim / 2;
    const int64_t words = a->head_dim * a->keys.stages * a->keys.size;
    round_words(&a->keys, a->keys.words + w->head * words, p);
    for (int64_t j = 0; j < a->head_dim / 2; j++)
        for (int64_t o = 0; o < PAGE; o++) {
            const int32_t *turn = p->all_turns + o * a->head_dim + 2 * pairs[j];
            struct turns *to = p->turns + j / 2 * FOURS + o / 4;
            to->x.pairs[o % 4][j % 2] = turn[0];
            to->y.pairs[o % 4][j % 2] = turn[1];
        }
}

/* Sums of the even numbers, and of the odd ones. */
INLINE TARGET __m128 by_parity(__m256 x)
{
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    return _mm_add_ps(four, _mm_movehl_ps(four, four));
}

INLINE TARGET float largest_of(__m256 x)
{
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_shuffle_ps(most, most, 1)));
}

INLINE TARGET __m256 length_of(__m256 x, __m256 y)
{
    return _mm256_sqrt_ps(_mm256_fmadd_ps(x, x, _mm256_mul_ps(y, y)));
}

/* A row's query times scales of keys' pairs, in steps so large that whole numbers of them and their sums
 * of products with keys, of the even pairs or of the odd ones, fit into 16 and 32 bits however a page
 * turns them: a key's x and y are below 2^14 in length. */
static TARGET void scale_query(const struct work *w, int64_t row, const struct madd_pieces *p)
{
    const int64_t dim = w->a->head_dim, half = dim / 2, pitch = pitch_of(w->a);
    const float *given = w->given + row * dim;
    float *x = p->scaled + row * 2 * pitch, *y = x + pitch;
    memset(x, 0, 2 * pitch * sizeof(float));
    for (int64_t j = 0; j < half; j++) {
        x[j] = given[j] * p->scales[j];
        y[j] = given[half + j] * p->scales[j];
    }
    __m256 most = _mm256_setzero_ps(), sum = most;
    for (int64_t j = 0; j < pitch; j += 8) {
        const __m256 length = length_of(_mm256_loadu_ps(x + j), _mm256_loadu_ps(y + j));
        most = _mm256_max_ps(length, most);
        sum = _mm256_add_ps(length, sum);
    }
    const float size = largest_of(most);
    const __m128 sums = by_parity(sum);
    const float even = _mm_cvtss_f32(sums), odd = _mm_cvtss_f32(_mm_shuffle_ps(sums, sums, 1));
    const float by_size = (MOST - MARGIN) / size;
    const float by_sum = (float)(4 * (MOST - MARGIN) - dim) / (even > odd ? even : odd);
    const float steps = size > 0.0f ? (by_size < by_sum ? by_size : by_sum) : 0.0f;
    for (int64_t j = 0; j < 2 * pitch; j++)
        x[j] *= steps;
    /* Of a query that is not finite, NaN. What a turn leaves of a key is the upper half of 32 bits. */
    p->units[row] = 65536.0f / MOST * p->turn_scale * (size > 0.0f ? 1.0f / steps : 0.0f) +
                    0.0f * (even + odd);
}

/* Cosines and sines of a page's first position in this head's order. */
static void take_turn(const struct work *w, const float *turns, const struct madd_pieces *p)
{
    const int64_t half = w->a->head_dim / 2, pitch = pitch_of(w->a);
    const int32_t *pairs = w->a->pairs + w->head * half;
    float *cosine = p->page_turn, *sine = cosine + pitch;
    memset(cosine + half, 0, (pitch - half) * sizeof(float));
    memset(sine + half, 0, (pitch - half) * sizeof(float));
    for (int64_t j = 0; j < half; j++) {
        cosine[j] = turns[2 * pairs[j]];
        sine[j] = turns[2 * pairs[j] + 1];
    }
}

/* Queries of a page, turned back by its first position, as whole numbers. */
static TARGET void queries(struct work *w, int64_t page, const float *turns)
{
    const struct attention *a = w->a;
    const struct madd_pieces *p = w->madd;
    const int64_t pitch = pitch_of(a);
    take_turn(w, turns, p);
    for (int64_t r = 0; r < a->rows; r++) {
        if (page == 0)
            scale_query(w, r, p);
        const float *given = p->scaled + r * 2 * pitch;
        const int64_t at = page * a->rows + r;
        __m256i sum = _mm256_setzero_si256();
        for (int64_t j = 0; j < pitch; j += 8) {
            const __m256 cosine = _mm256_loadu_ps(p->page_turn + j);
            const __m256 sine = _mm256_loadu_ps(p->page_turn + pitch + j);
            const __m256 x = _mm256_loadu_ps(given + j), y = _mm256_loadu_ps(given + pitch + j);
            const __m256i back_x =
                _mm256_cvtps_epi32(_mm256_fmadd_ps(y, sine, _mm256_mul_ps(x, cosine)));
            const __m256i back_y =
                _mm256_cvtps_epi32(_mm256_fnmadd_ps(x, sine, _mm256_mul_ps(y, cosine)));
            sum = _mm256_add_epi32(sum, _mm256_add_epi32(back_x, back_y));
            _mm256_storeu_si256((__m256i *)(p->queries + at * pitch + j),
                                _mm256_blend_epi16(back_x, _mm256_slli_epi32(back_y, 16), 0xaa));
        }
        const __m128 sums = by_parity(_mm256_cvtepi32_ps(sum));
        p->cut_off[at] = 0.5f * p->units[r] *
                        _mm_cvtss_f32(_mm_add_ss(sums, _mm_shuffle_ps(sums, sums, 1)));
    }
}

INLINE TARGET __m256i load(const struct four *four)
{
    return _mm256_loadu_si256((const __m256i *)four);
}

INLINE TARGET void store(struct four *to, __m256i four)
{
    _mm256_storeu_si256((__m256i *)to, four);
}

/* A quad of four codewords, each `apart` codes from the next. */
INLINE TARGET __m256i words_of(const int16_t *words, int64_t dim, const uint8_t *codes,
                               int64_t apart)
{
#define WORD(i) (words + codes[(i) * apart] * dim)
#define TWO(i) \
    _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)WORD(i))), \
                                  (const __m64 *)WORD((i) + 1)))
    return _mm256_inserti128_si256(_mm256_castsi128_si256(TWO(0)), TWO(2), 1);
#undef TWO
#undef WORD
}

/* A quad of four tokens that is turned. */
INLINE TARGET __m256i turned(__m256i words, const struct turns *turns)
{
    const __m256i x = _mm256_madd_epi16(words, load(&turns->x));
    const __m256i y = _mm256_madd_epi16(words, load(&turns->y));
    return _mm256_blend_epi16(_mm256_srli_epi32(x, 16), y, 0xaa);
}

/* Looks `count` quads of a page up, from the `first` on, turns them, and multiplies them by `rows` rows.
 * Constant where this is inlined: `rows`, how many `fours` are worked on at a time, and, in the cases
 * that matter most, `dim` and `stages`. */
INLINE TARGET void look_up(const struct plane *keys, const struct madd_pieces *p, int64_t first,
                           int64_t count, const uint8_t *codes, int64_t dim, int64_t stages,
                           const int32_t *queries, int64_t pitch, struct four *products, int fours,
                           int rows)
{
    const int64_t columns = keys->groups * stages, numbers = keys->size * dim, share = dim / QUAD;
    for (int i = 0; i < FOURS; i += fours, codes += fours * 4 * columns) {
        __m256i sums[MOST_ROWS][2];
        for (int r = 0; r < rows; r++)
            for (int f = 0; f < fours; f++)
                sums[r][f] = first > 0 ? load(products + r * (TILE / 4) + i + f)
                                       : _mm256_setzero_si256();
        const uint8_t *column = codes + first / share * stages;
        const int16_t *words = p->words + first / share * stages * numbers + first % share * QUAD;
        int64_t left = share - first % share;
        for (int64_t quad = first; quad < first + count; quad++) {
            __m256i own[2];
            for (int f = 0; f < fours; f++) {
                const uint8_t *code = column + f * 4 * columns;
                own[f] = words_of(words, dim, code, columns);
                for (int64_t s = 1; s < stages; s++)
                    own[f] = _mm256_adds_epi16(
                        own[f], words_of(words + s * numbers, dim, code + s, columns));
                own[f] = turned(own[f], p->turns + quad * FOURS + i + f);
            }
            for (int r = 0; r < rows; r++) {
                int64_t query;
                memcpy(&query, queries + r * pitch + 2 * quad, sizeof query);
                for (int f = 0; f < fours; f++)
                    sums[r][f] = _mm256_add_epi32(
                        sums[r][f], _mm256_madd_epi16(own[f], _mm256_set1_epi64x(query)));
            }
            words += QUAD;
            if (--left == 0) {
                left = share;
                column += stages;
                words += stages * numbers - dim;
            }
        }
        for (int r = 0; r < rows; r++)
            for (int f = 0; f < fours; f++)
                store(products + r * (TILE / 4) + i + f, sums[r][f]);
    }
}

/* Scores of a page. */
static TARGET void write_scores(const struct four *products, float unit, float cut_off,
                                float *scores)
{
    for (int i = 0; i < FOURS; i += 2) {
        const __m256 low = _mm256_cvtepi32_ps(load(products + i));
        const __m256 high = _mm256_cvtepi32_ps(load(products + i + 1));
        const __m256 sums = _mm256_hadd_ps(low, high); /* of tokens 0, 1, 4, 5, 2, 3, 6 and 7 */
        const __m256 order = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(sums), 0xd8));
        _mm256_storeu_ps(scores + 4 * i,
                         _mm256_fmadd_ps(order, _mm256_set1_ps(unit), _mm256_set1_ps(cut_off)));
    }
}

static TARGET void scores(struct work *w, int64_t tokens)
{
    const struct attention *a = w->a;
    const struct madd_pieces *p = w->madd;
    const struct plane *keys = &a->keys;
    const int64_t dim = keys->dim, stages = keys->stages;
    const int64_t quads = a->head_dim / QUAD, pitch = pitch_of(a);
    const int64_t pages = (tokens + PAGE - 1) / PAGE;
    const int64_t lines = lines_ahead(a, (quads + CHUNK - 1) / CHUNK * TILE_PAGES);
    for (int64_t quad = 0; quad < quads; quad += CHUNK)
        for (int64_t page = 0; page < pages; page++) {
            const int64_t count = quads - quad < CHUNK ? quads - quad : CHUNK;
            const uint8_t *codes = w->keys.codes + page * PAGE * keys->groups * stages;
            fetch_ahead(w, lines);
            for (int64_t row = 0; row < a->rows;) {
                const int32_t *queries = p->queries + (page * a->rows + row) * pitch;
                struct four *products = p->products + (row * TILE + page * PAGE) / 4;
#define LOOK_UP(rows, dim, stages, fours) \
    look_up(keys, p, quad, count, codes, dim, stages, queries, pitch, products, fours, rows)
#define SINGLE(rows) LOOK_UP(rows, QUAD, 1, (rows) > 4 ? 1 : 2)
#define DOUBLE(rows) LOOK_UP(rows, 2 * QUAD, 1, (rows) > 4 ? 1 : 2)
#define ANY(rows) LOOK_UP(rows, dim, stages, 1)
                if (dim == QUAD && stages == 1)
                    FOR_ROWS(a->rows - row, SINGLE)
                else if (dim == 2 * QUAD && stages == 1)
                    FOR_ROWS(a->rows - row, DOUBLE)
                else
                    FOR_ROWS(a->rows - row, ANY)
#undef ANY
#undef DOUBLE
#undef SINGLE
#undef LOOK_UP
            }
        }
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t page = 0; page < pages; page++)
            write_scores(p->products + (r * TILE + page * PAGE) / 4, p->units[r],
                         p->cut_off[page * a->rows + r], w->scores + r * TILE + page * PAGE);
}

/* Subvectors are whole quads. */
int turned_madd_takes(const struct attention *a)
{
    return a->page_turns != NULL && a->keys.dim % QUAD == 0 && a->keys.stages <= MOST_STAGES &&
           a->head_dim <= MOST_CHANNELS;
}

const struct scoring turned_madd = {round_turns, prepare, queries, scores};

#endif
