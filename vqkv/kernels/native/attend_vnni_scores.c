/* Attention on codes by whole numbers (attend_vnni.h): scores of keys that are turned.
 *
 * Numbers of a pair of channels are turned by products of 16 bits, lie side by side for each token, and meet
 * those of a query in one instruction. Queries are whole numbers so small that no sum of products exceeds 32
 * bits. Pairs are taken 16 at a time over a whole tile: their tables (16 KiB a stage) then stay in the L1
 * cache.
 */

#include <math.h>
#include <string.h>

#include "attend_vnni.h"

#ifdef HAVE_X86

#define TARGET VNNI_TARGET
#define CHUNK 16 /* pairs of channels */
#define MARGIN 8 /* of turns' lengths, which are 1 but for rounding */

/* A pair of channels of 64 tokens, 4 of every 16 to a vector. */
struct pairs {
    __m512i fours[4];
};

/* Turns of the offsets in the order of `numbers`, divided by the longest: RoPE may scale keys, too. */
static TARGET void round_turns(struct work *w)
{
    const struct attention *a = w->a;
    const struct whole_pieces *p = w->whole;
    w->whole->turn_scale = longest_turn(a);
    const float steps = MOST / p->turn_scale;
    for (int64_t o = 0; o < PAGE; o++)
        for (int64_t j = 0; j < a->head_dim / 2; j++) {
            const float *turn = a->offset_turns + o * a->head_dim + 2 * j;
            int16_t *to = p->all_turns + 2 * j * PAGE + o / 8 % 2 * 32 + o / 16 * 8 + o % 8;
            to[0] = (int16_t)_mm_cvtss_si32(_mm_set_ss(turn[0] * steps));
            to[PAGE] = (int16_t)_mm_cvtss_si32(_mm_set_ss(turn[1] * steps));
        }
}

/* Codewords as whole numbers, and the turns in the order of this head's pairs. */
static TARGET void prepare(struct work *w)
{
    const struct attention *a = w->a;
    const struct whole_pieces *p = w->whole;
    const int64_t half = a->head_dim / 2, numbers = 2 * PAGE;
    const int32_t *pairs = a->pairs + w->head * half;
    tabulate_vnni(&a->keys, w->head, 1, MOST_KEY, p->keys);
    for (int64_t j = 0; j < half; j++)
        memcpy(p->turns + j * numbers, p->all_turns + pairs[j] * numbers, numbers * sizeof(int16_t));
}

/* x and y of 16 pairs of channels. */
struct sixteen {
    __m512 x, y;
};

/* Of two vectors that have them side by side. */
INLINE TARGET struct sixteen apart(__m512 low, __m512 high)
{
    const __m512i evens =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    return (struct sixteen){_mm512_permutex2var_ps(low, evens, high),
                            _mm512_permutex2var_ps(low, odds, high)};
}

/* Of numbers that lie side by side, `left` pairs at most. */
INLINE TARGET struct sixteen apart_at(const float *numbers, int64_t left)
{
    const __mmask16 low = left >= 8 ? 0xffff : (1u << 2 * left) - 1;
    const __mmask16 high = left >= 16 ? 0xffff : left <= 8 ? 0 : (1u << 2 * (left - 8)) - 1;
    return apart(_mm512_maskz_loadu_ps(low, numbers), _mm512_maskz_loadu_ps(high, numbers + 16));
}

/* Cosines and sines of 16 pairs. */
INLINE TARGET struct sixteen turns_of(const float *turns, const int32_t *pairs, __mmask16 some)
{
    const __m512i which = _mm512_maskz_loadu_epi32(some, pairs);
    const __m512i none = _mm512_setzero_si512();
#define EIGHT(of, there) \
    (__m512)_mm512_mask_i32gather_epi64(none, (__mmask8)(there), of, turns, 2 * sizeof(float))
    return apart(EIGHT(_mm512_castsi512_si256(which), some),
                 EIGHT(_mm512_extracti64x4_epi64(which, 1), some >> 8));
#undef EIGHT
}

/* Pairs from pair j on that are there, of 16. */
INLINE __mmask16 some_of(int64_t half, int64_t j)
{
    return half - j >= 16 ? 0xffff : (__mmask16)((1u << (half - j)) - 1);
}

/* A row's query times scales of keys' channels, in steps so large that whole numbers of them and their sums
 * of products with keys fit into 16 and 32 bits however a page turns them. */
static TARGET void scale_query(const struct work *w, int64_t row, const struct whole_pieces *p)
{
    const int64_t half = w->a->head_dim / 2, pitch = (half + 15) / 16 * 32;
    const float *given = w->given + row * 2 * half;
    float *scaled = p->scaled + row * pitch;
    __m512 most = _mm512_setzero_ps(), sum = most; /* of lengths */
    for (int64_t j = 0; j < half; j += 16) {
        const __mmask16 some = some_of(half, j);
        const __m512 scale = apart_at(p->keys.scales + 2 * j, half - j).x;
        const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, given + j), scale);
        const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, given + half + j), scale);
        const __m512 length = _mm512_sqrt_ps(_mm512_fmadd_ps(x, x, _mm512_mul_ps(y, y)));
        most = _mm512_max_ps(length, most);
        sum = _mm512_add_ps(length, sum);
        _mm512_storeu_ps(scaled + 2 * j, x);
        _mm512_storeu_ps(scaled + 2 * j + 16, y);
    }
    /* A key's x and y are at most `MOST` in length, and rounding leaves a query's less than 1 longer. */
    const float size = _mm512_reduce_max_ps(most), total = _mm512_reduce_add_ps(sum);
    const float by_size = (MOST - MARGIN) / size;
    const float by_sum = (float)(2 * (MOST - MARGIN) - half) / total;
    const float steps = size > 0.0f ? (by_size < by_sum ? by_size : by_sum) : 0.0f;
    for (int64_t j = 0; j < pitch; j++)
        scaled[j] *= steps;
    /* Of a query that is not finite, NaN. */
    p->units[row] = p->turn_scale * (size > 0.0f ? 1.0f / steps : 0.0f) + 0.0f * total;
}

/* Queries of a page, turned back by its first position, as whole numbers. */
static TARGET void queries(struct work *w, int64_t page, const float *turns)
{
    const struct attention *a = w->a;
    const struct whole_pieces *p = w->whole;
    const int64_t half = a->head_dim / 2, pitch = (half + 15) / 16 * 32;
    const int32_t *pairs = a->pairs + w->head * half;
    for (int64_t r = 0; page == 0 && r < a->rows; r++)
        scale_query(w, r, p);
    for (int64_t j = 0; j < half; j += 16) {
        const __mmask16 some = some_of(half, j);
        const struct sixteen turn = turns_of(turns, pairs + j, some);
        for (int64_t r = 0; r < a->rows; r++) {
            const float *scaled = p->scaled + r * pitch + 2 * j;
            const __m512 x = _mm512_loadu_ps(scaled), y = _mm512_loadu_ps(scaled + 16);
            const __m512i back_x =
                _mm512_cvtps_epi32(_mm512_fmadd_ps(y, turn.y, _mm512_mul_ps(x, turn.x)));
            const __m512i back_y =
                _mm512_cvtps_epi32(_mm512_fnmadd_ps(x, turn.y, _mm512_mul_ps(y, turn.x)));
            _mm512_mask_storeu_epi32(
                p->queries + (page * a->rows + r) * half + j, some,
                _mm512_mask_blend_epi16(0xaaaaaaaau, back_x, _mm512_slli_epi32(back_y, 16)));
        }
    }
}

/* A channel's numbers of all stages. */
INLINE TARGET struct numbers channel_of(const struct bytes *tables, const uint8_t *codes,
                                        int64_t stages)
{
    struct numbers sum = numbers_of(tables, codes);
    for (int64_t s = 1; s < stages; s++) {
        const struct numbers own = numbers_of(tables + s, codes + s * TILE);
        sum.first = _mm512_adds_epi16(sum.first, own.first);
        sum.second = _mm512_adds_epi16(sum.second, own.second);
    }
    return sum;
}

/* Turns x and y of 32 tokens by cosines and sines. */
INLINE TARGET void turn(__m512i *x, __m512i *y, const int16_t *turns)
{
    const __m512i cosine = _mm512_loadu_si512(turns), sine = _mm512_loadu_si512(turns + PAGE);
    const __m512i turned = _mm512_sub_epi16(_mm512_mulhrs_epi16(*x, cosine),
                                             _mm512_mulhrs_epi16(*y, sine));
    *y = _mm512_add_epi16(_mm512_mulhrs_epi16(*x, sine), _mm512_mulhrs_epi16(*y, cosine));
    *x = turned;
}

/* Products of a page's pairs so far with `rows` rows, which are constant where these are inlined. */
struct products {
    __m512i fours[4][4];
};

INLINE TARGET void load_products(struct products *sums, const int32_t *from, int more, int rows)
{
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++)
            sums->fours[r][i] = more ? _mm512_loadu_si512(from + r * TILE + 16 * i)
                                     : _mm512_setzero_si512();
}

INLINE TARGET void add_products(struct products *sums, const struct pairs *pair,
                                const int32_t *queries, int64_t all, int rows)
{
    for (int r = 0; r < rows; r++) {
        const __m512i query = _mm512_set1_epi32(queries[r * all]);
        for (int i = 0; i < 4; i++)
            sums->fours[r][i] = _mm512_dpwssd_epi32(sums->fours[r][i], pair->fours[i], query);
    }
}

INLINE TARGET void store_products(const struct products *sums, int32_t *to, int rows)
{
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++)
            _mm512_storeu_si512(to + r * TILE + 16 * i, sums->fours[r][i]);
}

/* Looks up pairs of a page from `pair` on, to `to`, and multiplies them by the first `rows` rows. Constant
 * where this is inlined: `rows`, and, in the case that matters most, `stages`. */
INLINE TARGET void look_up_pairs(const struct work *w, const struct whole_pieces *p, int64_t page,
                                 int64_t pair, int64_t count, int64_t stages, int rows,
                                 struct pairs *to)
{
    const int64_t dim = w->a->keys.dim, all = w->a->head_dim / 2;
    const int32_t *queries = p->queries + page * w->a->rows * all;
    struct products sums;
    load_products(&sums, p->products + page * PAGE, pair > 0, rows);
    const struct bytes *tables = p->keys.tables + 2 * pair * stages;
    const uint8_t *codes = p->codes + 2 * pair / dim * stages * TILE + page * PAGE;
    const int16_t *turns = p->turns + 2 * pair * PAGE;
    int64_t left = dim / 2 - pair % (dim / 2);
    for (int64_t j = pair; j < pair + count; j++, to++, tables += 2 * stages, turns += 2 * PAGE) {
        struct numbers x = channel_of(tables, codes, stages);
        struct numbers y = channel_of(tables + stages, codes, stages);
        turn(&x.first, &y.first, turns);
        turn(&x.second, &y.second, turns + 32);
        const struct pairs own = {
            {_mm512_unpacklo_epi16(x.first, y.first), _mm512_unpackhi_epi16(x.first, y.first),
             _mm512_unpacklo_epi16(x.second, y.second),
             _mm512_unpackhi_epi16(x.second, y.second)}};
        add_products(&sums, &own, queries + j, all, rows);
        if (w->a->rows > rows)
            *to = own;
        if (--left == 0) {
            left = dim / 2;
            codes += stages * TILE;
        }
    }
    store_products(&sums, p->products + page * PAGE, rows);
}

/* The same for further rows, of pairs that were looked up. */
INLINE TARGET void multiply(const struct pairs *pairs, int64_t count, const int32_t *queries,
                            int64_t all, int32_t *products, int more, int rows)
{
    struct products sums;
    load_products(&sums, products, more, rows);
    for (int64_t j = 0; j < count; j++)
        add_products(&sums, &pairs[j], queries + j, all, rows);
    store_products(&sums, products, rows);
}

/* Scores of 64 tokens: of vectors with 4 of every 16. */
static TARGET void write_scores(const int32_t *products, float unit, float *scores)
{
    __m512 x[4], y[4];
    for (int i = 0; i < 4; i++)
        x[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(products + 16 * i)),
                             _mm512_set1_ps(unit));
    for (int i = 0; i < 2; i++) {
        y[i] = _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x44);
        y[2 + i] = _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xee);
    }
    for (int i = 0; i < 2; i++) {
        const __m512 even = y[2 * i], odd = y[2 * i + 1];
        _mm512_storeu_ps(scores + 32 * i, _mm512_shuffle_f32x4(even, odd, 0x88));
        _mm512_storeu_ps(scores + 32 * i + 16, _mm512_shuffle_f32x4(even, odd, 0xdd));
    }
}

static TARGET void scores(struct work *w, int64_t tokens)
{
    const struct attention *a = w->a;
    const struct whole_pieces *p = w->whole;
    const int64_t stages = a->keys.stages, all = a->head_dim / 2;
    const int64_t pages = (tokens + PAGE - 1) / PAGE;
    const int64_t lines = lines_ahead(a, (all + CHUNK - 1) / CHUNK * TILE_PAGES);
    transpose(w->keys.codes, a->keys.groups * stages, tokens, p->codes);
    struct pairs pairs[CHUNK];
    for (int64_t pair = 0; pair < all; pair += CHUNK)
        for (int64_t page = 0; page < pages; page++) {
            const int64_t count = all - pair < CHUNK ? all - pair : CHUNK;
            fetch_ahead(w, lines);
            int64_t row = 0;
#define LOOK_UP(stages, rows) look_up_pairs(w, p, page, pair, count, stages, rows, pairs)
#define SINGLE(rows) LOOK_UP(1, rows)
#define ANY(rows) LOOK_UP(stages, rows)
            if (stages == 1)
                FOR_UP_TO_4_ROWS(a->rows, SINGLE)
            else
                FOR_UP_TO_4_ROWS(a->rows, ANY)
#undef ANY
#undef SINGLE
#undef LOOK_UP
            while (row < a->rows) {
                const int64_t query = page * a->rows + row;
#define MULTIPLY(rows) \
    multiply(pairs, count, p->queries + query * all + pair, all, \
             p->products + row * TILE + page * PAGE, pair > 0, rows)
                FOR_UP_TO_4_ROWS(a->rows - row, MULTIPLY)
#undef MULTIPLY
            }
        }
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t page = 0; page < pages; page++)
            write_scores(p->products + r * TILE + page * PAGE, p->units[r],
                         w->scores + r * TILE + page * PAGE);
}

/* A code has whole pairs. */
int turned_vnni_takes(const struct attention *a)
{
    return a->page_turns != NULL && a->keys.dim % 2 == 0 && a->keys.stages <= MOST_STAGES &&
           a->head_dim <= MOST_CHANNELS;
}

const struct scoring turned_vnni = {round_turns, prepare, queries, scores};

#endif
