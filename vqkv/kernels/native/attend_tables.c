/* Scores of keys that are not turned by look-ups of bytes in registers (VBMI).
 *
 * A query's products with a column's codewords, made as attend_codewords_impl.h does, are up to 256
 * numbers, and a score is the sum of one of each column. Here they are kept in steps so small that no score
 * exceeds 15 bits, in bytes of 7 low bits and of 8 high ones: then low bytes of two columns add up in a
 * byte, and high bytes of all do. A byte of 64 tokens is two look-ups in 128 bytes and a choice by the
 * codes' highest bit.
 */

#include <math.h>
#include <string.h>

#include "attend.h"

#ifdef HAVE_X86

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi")))
#define FEW_ROWS 4 /* of queries: with more, looking them up side by side is as fast */
#define MOST_COLUMNS 64 /* of codes: each rounds scores once more, to steps that are larger */
#define LOW_BITS 7

/* A query's products with a column's codewords, in steps. */
struct table {
    uint8_t low[256], high[256];
};

/* From steps to scores. */
struct scale {
    float step, least;
};

/* What is kept. */
struct table_pieces {
    struct table *tables; /* [R, columns] */
    quad *least;          /* [columns] */
    uint8_t *codes;       /* [columns up to a multiple of 16, TILE] */
    struct scale *scales; /* [R] */
};

int tables_take(const struct attention *a)
{
    return a->page_turns == NULL && a->rows <= FEW_ROWS &&
           a->keys.groups * a->keys.stages <= MOST_COLUMNS;
}

size_t tables_lay_out(const struct attention *a, char *memory)
{
    const size_t columns = a->keys.groups * a->keys.stages, rows = a->rows;
    size_t used = 0;
    if (!tables_take(a))
        return 0;
    struct table_pieces *p = take(&memory, &used, sizeof *p);
    const struct table_pieces pieces = {
        .tables = take(&memory, &used, rows * columns * sizeof(struct table)),
        .least = take(&memory, &used, columns * sizeof(quad)),
        .codes = take(&memory, &used, (columns + 15) / 16 * 16 * TILE),
        .scales = take(&memory, &used, rows * sizeof(struct scale)),
    };
    if (p != NULL)
        *p = pieces;
    return used;
}

/* Of a part: fewer do not pay for the tables, which take as long for each row. */
INLINE int64_t least_tokens(const struct attention *a)
{
    return 256 * (2 + a->rows);
}

/* The least of a column's products for each row, or NaN if any is; adds to `range` how far they reach. */
INLINE TARGET quad least_of(const quad *products, int64_t size, quad *range)
{
    __m128 least = (__m128)products[0], most = least;
    quad none = {0}; /* or NaN, which comparisons forget */
    for (int64_t k = 0; k < size; k++) {
        least = _mm_min_ps(least, (__m128)products[k]);
        most = _mm_max_ps(most, (__m128)products[k]);
        none += 0.0f * products[k];
    }
    *range += (quad)most - (quad)least;
    return (quad)least + none;
}

/* Products above the least in steps, as bytes, of `rows` rows whose tables are `apart`. */
static TARGET void tabulate(const quad *products, int64_t size, quad least, quad steps,
                            struct table *table, int64_t apart, int64_t rows)
{
    /* Transposing and packing leaves number 16 v + 4 j + i as byte 4 v + j of lane i. */
    uint8_t source[64];
    for (int i = 0; i < 64; i++)
        source[i] = (uint8_t)(i % 4 * 16 + i / 16 * 4 + i % 16 / 4);
    const __m512i order = _mm512_loadu_si512(source);
    const __m512i mask = _mm512_set1_epi16((1 << LOW_BITS) - 1);
    const __m512 start = _mm512_broadcast_f32x4((__m128)least);
    const __m512 scale = _mm512_broadcast_f32x4((__m128)steps);
    for (int64_t k = 0; k < size; k += 64) {
        __m512i whole[4][4]; /* of each row, of 16 numbers each */
        for (int v = 0; v < 4; v++) {
            __m512 x[4];
            for (int j = 0; j < 4; j++)
                x[j] = _mm512_mul_ps(
                    _mm512_sub_ps(_mm512_loadu_ps((const float *)(products + k + 16 * v + 4 * j)),
                                  start), scale);
            const __m512 low = _mm512_unpacklo_ps(x[0], x[1]), high = _mm512_unpackhi_ps(x[0], x[1]);
            const __m512 lower = _mm512_unpacklo_ps(x[2], x[3]);
            const __m512 higher = _mm512_unpackhi_ps(x[2], x[3]);
            whole[0][v] = _mm512_cvtps_epi32(_mm512_shuffle_ps(low, lower, 0x44));
            whole[1][v] = _mm512_cvtps_epi32(_mm512_shuffle_ps(low, lower, 0xee));
            whole[2][v] = _mm512_cvtps_epi32(_mm512_shuffle_ps(high, higher, 0x44));
            whole[3][v] = _mm512_cvtps_epi32(_mm512_shuffle_ps(high, higher, 0xee));
        }
        for (int64_t r = 0; r < rows; r++) {
            const __m512i first = _mm512_packus_epi32(whole[r][0], whole[r][1]);
            const __m512i second = _mm512_packus_epi32(whole[r][2], whole[r][3]);
            const __m512i low = _mm512_packus_epi16(_mm512_and_si512(first, mask),
                                                    _mm512_and_si512(second, mask));
            const __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(first, LOW_BITS),
                                                     _mm512_srli_epi16(second, LOW_BITS));
            struct table *own = table + r * apart;
            _mm512_storeu_si512(own->low + k, _mm512_permutexvar_epi8(order, low));
            _mm512_storeu_si512(own->high + k, _mm512_permutexvar_epi8(order, high));
        }
    }
}

static TARGET void queries(struct work *w, int64_t page, const float *turns)
{
    products_avx512.queries(w, page, turns);
    if (w->tokens < least_tokens(w->a))
        return;
    const struct attention *a = w->a;
    const struct table_pieces *p = w->tables;
    const int64_t columns = a->keys.groups * a->keys.stages, size = a->keys.size;
    quad range = {0}, sum = {0}, steps = {0};
    for (int64_t c = 0; c < columns; c++) {
        p->least[c] = least_of(w->products + c * size, size, &range);
        sum += p->least[c];
    }
    for (int64_t r = 0; r < a->rows; r++) {
        /* Rounding may add half a step a column. */
        p->scales[r] = (struct scale){range[r] / (float)(MOST - columns), sum[r]};
        steps[r] = range[r] > 0.0f ? 1.0f / p->scales[r].step : 0.0f;
    }
    for (int64_t c = 0; c < columns; c++)
        tabulate(w->products + c * size, size, p->least[c], steps, p->tables + c, columns, a->rows);
}

/* Sums of 64 tokens: of high bytes; of low bytes as 16-bit numbers, of an even token and 256 times
 * the odd one after it, and of the odd ones alone. */
struct sums {
    __m512i high, low, odd;
};

/* A byte of a table for each of 64 codes; `upper` has those from 128 on. */
INLINE TARGET __m512i look_up(const uint8_t *table, __m512i codes, __mmask64 upper)
{
    const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), codes,
                                                 _mm512_loadu_si512(table + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), codes,
                                                  _mm512_loadu_si512(table + 192));
    return _mm512_mask_blend_epi8(upper, low, high);
}

/* Adds a column, or two. Constant where this is inlined: `columns`. */
INLINE TARGET void add_columns(struct sums *sums, const struct table *tables, const uint8_t *codes,
                               int columns)
{
    const __m512i x = _mm512_loadu_si512(codes);
    const __mmask64 upper_x = _mm512_movepi8_mask(x);
    __m512i low = look_up(tables->low, x, upper_x), high = look_up(tables->high, x, upper_x);
    if (columns == 2) {
        const __m512i y = _mm512_loadu_si512(codes + TILE);
        const __mmask64 upper_y = _mm512_movepi8_mask(y);
        low = _mm512_add_epi8(low, look_up(tables[1].low, y, upper_y));
        high = _mm512_add_epi8(high, look_up(tables[1].high, y, upper_y));
    }
    sums->high = _mm512_add_epi8(sums->high, high);
    sums->low = _mm512_add_epi16(sums->low, low);
    sums->odd = _mm512_add_epi16(sums->odd, _mm512_srli_epi16(low, 8));
}

INLINE TARGET void store_scores(const struct sums *sums, struct scale scale, float *scores)
{
    const __m512i even_low = _mm512_sub_epi16(sums->low, _mm512_slli_epi16(sums->odd, 8));
    const __m512i even_high = _mm512_and_si512(sums->high, _mm512_set1_epi16(255));
    const __m512i odd_high = _mm512_srli_epi16(sums->high, 8);
    const __m512i even = _mm512_add_epi16(even_low, _mm512_slli_epi16(even_high, LOW_BITS));
    const __m512i odd = _mm512_add_epi16(sums->odd, _mm512_slli_epi16(odd_high, LOW_BITS));
    /* The first 8 of every 16 tokens, and the other 8. */
    const __m512i first = _mm512_unpacklo_epi16(even, odd);
    const __m512i second = _mm512_unpackhi_epi16(even, odd);
    __m128i eights[8];
#define TAKE(i) \
    eights[2 * i] = _mm512_extracti32x4_epi32(first, i); \
    eights[2 * i + 1] = _mm512_extracti32x4_epi32(second, i);
    TAKE(0) TAKE(1) TAKE(2) TAKE(3)
#undef TAKE
    for (int i = 0; i < 4; i++) {
        const __m512i whole = _mm512_cvtepu16_epi32(
            _mm256_inserti128_si256(_mm256_castsi128_si256(eights[2 * i]), eights[2 * i + 1], 1));
        _mm512_storeu_ps(scores + 16 * i,
                         _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(scale.step),
                                         _mm512_set1_ps(scale.least)));
    }
}

static TARGET void scores(struct work *w, int64_t tokens)
{
    if (w->tokens < least_tokens(w->a)) {
        products_avx512.scores(w, tokens);
        return;
    }
    const struct attention *a = w->a;
    const struct table_pieces *p = w->tables;
    const int64_t columns = a->keys.groups * a->keys.stages;
    const int64_t pages = (tokens + PAGE - 1) / PAGE;
    const int64_t lines = lines_ahead(a, a->rows * (columns / 2 + 1));
    transpose(w->keys.codes, columns, pages * PAGE, p->codes);
    for (int64_t r = 0; r < a->rows; r++) {
        const struct table *tables = p->tables + r * columns;
        struct sums sums[TILE_PAGES];
        memset(sums, 0, sizeof sums);
        for (int64_t c = 0; c < columns; c += 2) {
            const uint8_t *codes = p->codes + c * TILE;
            fetch_ahead(w, lines);
            if (c + 1 < columns)
                for (int64_t i = 0; i < pages; i++)
                    add_columns(&sums[i], tables + c, codes + i * PAGE, 2);
            else
                for (int64_t i = 0; i < pages; i++)
                    add_columns(&sums[i], tables + c, codes + i * PAGE, 1);
        }
        for (int64_t i = 0; i < pages; i++)
            store_scores(&sums[i], p->scales[r], w->scores + r * TILE + i * PAGE);
    }
}

const struct scoring tables = {.queries = queries, .scores = scores};

#endif
