/* Attention on codes of keys after RoPE: their scores by look-ups of bytes in registers (VBMI); all
 * else as attend_bf16.c has it.
 *
 * A query's products with a column's codewords are 256 numbers, and a score is the sum of one of
 * each column. They are kept in steps so small that no score exceeds 15 bits, in bytes of 7 low bits
 * and of 8 high ones: then low bytes of two columns add up in a byte, and high bytes of all do. A byte
 * of 64 tokens is two look-ups in 128 bytes and a choice by the codes' highest bit.
 */

#include <math.h>
#include <string.h>

#include "attend_bf16.h"

#ifdef HAVE_X86

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx512vbmi")))
#define MOST_ROWS 16 /* of queries */
#define MOST_COLUMNS 64 /* of codes: each rounds scores once more, to steps that are larger */
#define LOW_BITS 7
#define MOST 32767

/* A query's products with a column's codewords, in steps. */
struct table {
    uint8_t low[256], high[256];
};

/* From steps to scores. */
struct scale {
    float step, least;
};

/* Pieces of `tables`. */
struct score_pieces {
    struct table *tables; /* [R, columns] */
    float *products;      /* [columns, 256] of one row */
    float *least;         /* [columns] of one row */
    struct scale *scales; /* [R] */
};

static size_t lay_out(const struct attention *a, char *memory, struct score_pieces *p)
{
    const size_t columns = a->keys.groups * a->keys.stages;
    const size_t tables = a->rows * columns * sizeof(struct table);
    const size_t products = columns * 256 * sizeof(float), least = columns * sizeof(float);
    if (memory != NULL) {
        p->tables = (struct table *)memory;
        p->products = (float *)(memory += tables);
        p->least = (float *)(memory += products);
        p->scales = (struct scale *)(memory + least);
    }
    return tables + products + least + a->rows * sizeof(struct scale);
}

static struct score_pieces score_pieces_of(const struct attention *a, const struct pieces *p)
{
    struct score_pieces own = {0};
    lay_out(a, p->tables, &own);
    return own;
}

int attend_tables_takes(const struct attention *a)
{
    return attend_bf16_takes(a) && a->page_turns == NULL && a->rows <= MOST_ROWS &&
           a->keys.groups * a->keys.stages <= MOST_COLUMNS;
}

/* Of a part: fewer do not pay for the tables, which take as long for each row. */
INLINE int64_t least_tokens(const struct attention *a)
{
    return 256 * (2 + a->rows);
}

size_t attend_tables_scratch(const struct attention *a)
{
    return attend_tables_takes(a) ? lay_out(a, NULL, NULL) : 0;
}

/* A quad's words of 8 codewords from codeword k. */
INLINE TARGET __m512 eight_words(const word *words, int64_t quad, int64_t width, int64_t k)
{
    if (width == 1)
        return _mm512_loadu_ps(words + k);
    const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    const word *twos = words - quad % 2 + 2 * k;
    return (__m512)_mm512_permutex2var_epi64(_mm512_loadu_si512(twos),
                                             _mm512_add_epi64(even, _mm512_set1_epi64(quad % 2)),
                                             _mm512_loadu_si512(twos + 8));
}

/* Products of a row's query with a column's codewords, 16 to a vector, of which every four lanes hold
 * numbers 2i, 2i + 1, 8 + 2i and 9 + 2i. Returns the least, and adds to `range`. */
static TARGET float multiply(const struct work *w, const struct pieces *p, int64_t row,
                             int64_t column, float *products, float *range)
{
    const struct plane *keys = &w->a->keys;
    const int64_t quads = keys->dim / QUAD, first = column / keys->stages * quads;
    const int64_t width = width_of(keys);
    __m512 least = _mm512_set1_ps(INFINITY), most = _mm512_set1_ps(-INFINITY);
    for (int64_t k = 0; k < 256; k += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t quad = first; quad < first + quads; quad++) {
            const word *words = words_of(p->keys, keys, quad, column % keys->stages);
            const __m512 low = eight_words(words, quad, width, k);
            const __m512 high = eight_words(words, quad, width, k + 8);
            const int64_t at = row * MAX_QUADS + quad;
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_shuffle_ps(low, high, 0x88),
                                   (__m512bh)_mm512_set1_epi32((int)p->first[at]));
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_shuffle_ps(low, high, 0xdd),
                                   (__m512bh)_mm512_set1_epi32((int)p->second[at]));
        }
        _mm512_storeu_ps(products + k, sum);
        least = _mm512_min_ps(least, sum);
        most = _mm512_max_ps(most, sum);
    }
    const float lowest = _mm512_reduce_min_ps(least);
    *range += _mm512_reduce_max_ps(most) - lowest;
    return lowest;
}

/* Products above `least` in steps, as bytes in the order of codes. */
static TARGET void tabulate(const float *products, float least, float steps, struct table *table)
{
    /* Packing 64 numbers leaves four of each vector side by side in every 16 bytes. */
    uint8_t source[64];
    for (int i = 0; i < 64; i++)
        source[i] = (uint8_t)(i % 8 / 2 * 16 + i / 16 * 4 + i % 16 / 8 * 2 + i % 2);
    const __m512i order = _mm512_loadu_si512(source);
    const __m512i mask = _mm512_set1_epi16((1 << LOW_BITS) - 1);
    const __m512 scale = _mm512_set1_ps(steps), start = _mm512_set1_ps(least);
    for (int64_t k = 0; k < 256; k += 64) {
        __m512i whole[4];
        for (int i = 0; i < 4; i++)
            whole[i] = _mm512_cvtps_epi32(_mm512_mul_ps(
                _mm512_sub_ps(_mm512_loadu_ps(products + k + 16 * i), start), scale));
        const __m512i first = _mm512_packus_epi32(whole[0], whole[1]);
        const __m512i second = _mm512_packus_epi32(whole[2], whole[3]);
        const __m512i low = _mm512_packus_epi16(_mm512_and_si512(first, mask),
                                                _mm512_and_si512(second, mask));
        const __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(first, LOW_BITS),
                                                 _mm512_srli_epi16(second, LOW_BITS));
        _mm512_storeu_si512(table->low + k, _mm512_permutexvar_epi8(order, low));
        _mm512_storeu_si512(table->high + k, _mm512_permutexvar_epi8(order, high));
    }
}

static TARGET void queries(struct work *w, int64_t page, const float *turns)
{
    queries_bf16(w, page, turns);
    if (w->tokens < least_tokens(w->a))
        return;
    const struct attention *a = w->a;
    const struct pieces p = pieces_of(w);
    const struct score_pieces own = score_pieces_of(a, &p);
    const int64_t columns = a->keys.groups * a->keys.stages;
    for (int64_t r = 0; r < a->rows; r++) {
        struct scale *scale = own.scales + r;
        float range = 0.0f;
        scale->least = 0.0f;
        for (int64_t c = 0; c < columns; c++) {
            own.least[c] = multiply(w, &p, r, c, own.products + c * 256, &range);
            scale->least += own.least[c];
        }
        /* Rounding may add half a step a column. */
        scale->step = range / (float)(MOST - columns);
        const float steps = range > 0.0f ? 1.0f / scale->step : 0.0f;
        for (int64_t c = 0; c < columns; c++)
            tabulate(own.products + c * 256, own.least[c], steps, own.tables + r * columns + c);
    }
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
        scores_bf16(w, tokens);
        return;
    }
    const struct attention *a = w->a;
    const struct pieces p = pieces_of(w);
    const struct score_pieces own = score_pieces_of(a, &p);
    const int64_t columns = a->keys.groups * a->keys.stages;
    const int64_t pages = (tokens + PAGE - 1) / PAGE;
    const int64_t lines = lines_ahead(a, a->rows * (columns / 2 + 1));
    transpose(w->keys, columns, pages * PAGE, p.codes);
    for (int64_t r = 0; r < a->rows; r++) {
        const struct table *tables = own.tables + r * columns;
        struct sums sums[TILE_PAGES];
        memset(sums, 0, sizeof sums);
        for (int64_t c = 0; c < columns; c += 2) {
            const uint8_t *codes = p.codes + c * TILE;
            fetch_ahead(w, lines);
            if (c + 1 < columns)
                for (int64_t i = 0; i < pages; i++)
                    add_columns(&sums[i], tables + c, codes + i * PAGE, 2);
            else
                for (int64_t i = 0; i < pages; i++)
                    add_columns(&sums[i], tables + c, codes + i * PAGE, 1);
        }
        for (int64_t i = 0; i < pages; i++)
            store_scores(&sums[i], own.scales[r], w->scores + r * TILE + i * PAGE);
    }
}

const struct kernel attend_tables = {prepare_bf16, queries, scores, softmax_avx512, sums_bf16};
const struct kernel attend_tables_vnni = {prepare_sums_vnni, queries, scores, softmax_avx512,
                                          sums_vnni};

#endif
