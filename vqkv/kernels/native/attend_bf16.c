/* Attention on codes with AVX-512 and products of bfloat16 pairs, where subvectors are whole quads.
 *
 * A quad is four neighbouring channels, so a codeword's part of it is 8 bytes, and eight of them
 * fill a vector. Scores: 8 tokens' words of one quad side by side, a lane being a pair of channels
 * of one token; two such vectors are sorted into 16 tokens' first pairs and second pairs, or are
 * turned into 16 tokens' x and y. Sums: 8 quads of one token side by side, two tokens interleaved,
 * so that a lane is one channel of two tokens. Either way one instruction multiplies 32 numbers by a
 * pair that is broadcast from memory, and adds to 16 lanes of fp32.
 *
 * Quads are taken 8 at a time over a whole tile: their codewords (16 KiB a stage) then stay in the
 * L1 cache.
 */

#include <stdlib.h>
#include <string.h>

#include "attend.h"

#ifdef HAVE_X86

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define QUAD 4
#define CHUNK 8        /* quads */
#define ROWS 8         /* rows of queries at a time, at most */
#define BOOK (256 * QUAD)

/* Pieces of `rounded`. Quads beyond the last, up to whole chunks, have words of zeros. */
struct pieces {
    uint16_t *keys, *values;    /* [quads, S, 256, 4] codewords */
    uint32_t *turns;            /* [quads, 8, 2, 8, 2] pairs (c, -s) and (s, c) of 8 offsets, 2 pairs */
    uint32_t *first, *second;   /* [TILE_PAGES, R, quads] pairs of queries */
    uint32_t *weights;          /* [R, TILE / 2] pairs of tokens' weights */
};

static int64_t chunked(int64_t quads)
{
    return (quads + CHUNK - 1) / CHUNK * CHUNK;
}

static size_t lay_out(const struct attention *a, char *memory, struct pieces *pieces)
{
    const int64_t quads = chunked(a->head_dim / QUAD);
    const size_t keys = quads * a->keys.stages * BOOK * sizeof(uint16_t);
    const size_t values = quads * a->values.stages * BOOK * sizeof(uint16_t);
    const size_t turns = a->page_turns == NULL ? 0 : quads * PAGE * 4 * sizeof(uint32_t);
    const size_t queries = TILE_PAGES * a->rows * quads * sizeof(uint32_t);
    if (memory != NULL) {
        pieces->keys = (uint16_t *)memory;
        pieces->values = (uint16_t *)(memory + keys);
        pieces->turns = (uint32_t *)(memory + keys + values);
        pieces->first = (uint32_t *)(memory + keys + values + turns);
        pieces->second = (uint32_t *)(memory + keys + values + turns + queries);
        pieces->weights = (uint32_t *)(memory + keys + values + turns + 2 * queries);
    }
    return keys + values + turns + 2 * queries + a->rows * TILE / 2 * sizeof(uint32_t);
}

int64_t attend_bf16_scratch(const struct attention *a)
{
    return lay_out(a, NULL, NULL);
}

int attend_bf16_takes(const struct attention *a)
{
    return a->keys.dim % QUAD == 0 && a->values.dim % QUAD == 0;
}

static struct pieces pieces_of(const struct work *w)
{
    struct pieces pieces;
    lay_out(w->a, (char *)w->rounded, &pieces);
    return pieces;
}

/* Two numbers to a pair of bfloat16, the first in the low half. */
INLINE TARGET uint32_t pair(float low, float high)
{
    return (uint32_t)_mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(_mm_setr_ps(low, high, 0, 0)));
}

static TARGET void round_words(const struct plane *plane, int64_t head, int64_t quads,
                               uint16_t *rounded)
{
    const int64_t stages = plane->stages, size = plane->size, dim = plane->dim;
    const int64_t real = plane->groups * dim / QUAD;
    const float *words = plane->words + head * plane->groups * stages * size * dim;
    for (int64_t quad = 0; quad < real; quad++)
        for (int64_t s = 0; s < stages; s++) {
            const int64_t column = quad * QUAD / dim * stages + s;
            const float *from = words + column * size * dim + quad * QUAD % dim;
            uint16_t *to = rounded + (quad * stages + s) * BOOK;
            for (int64_t k = 0; k < size; k++)
                _mm_storel_epi64((__m128i *)(to + k * QUAD),
                                 (__m128i)_mm_cvtneps_pbh(_mm_loadu_ps(from + k * dim)));
        }
    memset(rounded + real * stages * BOOK, 0, (quads - real) * stages * BOOK * sizeof(uint16_t));
}

static TARGET void prepare(struct work *w)
{
    const struct attention *a = w->a;
    const struct pieces p = pieces_of(w);
    const int64_t quads = chunked(a->head_dim / QUAD), half = a->head_dim / 2;
    round_words(&a->keys, w->head, quads, p.keys);
    round_words(&a->values, w->head, quads, p.values);
    if (a->page_turns == NULL)
        return;
    const int32_t *pairs = a->pairs + w->head * half;
    for (int64_t j = 0; j < half; j++)
        for (int64_t o = 0; o < PAGE; o++) {
            const float *turn = a->offset_turns + (o * half + pairs[j]) * 2;
            const uint32_t both = pair(turn[0], turn[1]);
            uint32_t *to = p.turns + j / 2 * PAGE * 4 + o / 8 * 32 + o % 8 * 2 + j % 2;
            to[0] = both ^ 0x80000000u;
            to[16] = both << 16 | both >> 16;
        }
}

/* Pairs of queries that belong to each quad's two vectors of scores. */
static TARGET void round_queries(const struct work *w, const struct pieces *p, int64_t pages)
{
    const struct attention *a = w->a;
    const int64_t real = a->head_dim / QUAD, quads = chunked(real);
    for (int64_t row = 0; row < pages * a->rows; row++) {
        const float *query = w->query + row * a->head_dim;
        uint32_t *first = p->first + row * quads, *second = p->second + row * quads;
        for (int64_t quad = 0; quad < real; quad++) {
            const float *q = query + (a->page_turns == NULL ? 4 : 2) * quad;
            const float *other = a->page_turns == NULL ? q + 2 : q + a->head_dim / 2;
            first[quad] = pair(q[0], q[1]);
            second[quad] = pair(other[0], other[1]);
        }
    }
}

/* Eight words of 8 bytes, from the lowest lanes up. */
INLINE TARGET __m512i eight(const uint16_t *a, const uint16_t *b, const uint16_t *c,
                            const uint16_t *d, const uint16_t *e, const uint16_t *f,
                            const uint16_t *g, const uint16_t *h)
{
#define TWO(x, y) _mm_loadh_pd(_mm_load_sd((const double *)(x)), (const double *)(y))
    const __m256d low = _mm256_insertf128_pd(_mm256_castpd128_pd256(TWO(a, b)), TWO(c, d), 1);
    const __m256d high = _mm256_insertf128_pd(_mm256_castpd128_pd256(TWO(e, f)), TWO(g, h), 1);
#undef TWO
    return _mm512_castpd_si512(_mm512_insertf64x4(_mm512_castpd256_pd512(low), high, 1));
}

#define WORD(t) (book + QUAD * codes[(t) * pitch])

/* Tokens a, a + 1, b, b + 1, ... */
INLINE TARGET __m512i eight_tokens(const uint16_t *book, const uint8_t *codes, int64_t pitch,
                                   int a, int step)
{
    return eight(WORD(a), WORD(a + 1), WORD(a + step), WORD(a + step + 1), WORD(a + 2 * step),
                 WORD(a + 2 * step + 1), WORD(a + 3 * step), WORD(a + 3 * step + 1));
}

INLINE TARGET __m512 dot(__m512 sum, __m512i a, __m512i b)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

/* 16 tokens' pairs: (x, y) of a quad's first and second pair, or of turned keys the two x and the
 * two y. `turns` of the first offset, or NULL. */
INLINE TARGET void sixteen_keys(const uint16_t *book, const uint8_t *codes, int64_t pitch,
                                int64_t stages, const uint32_t *turns, __m512i *first,
                                __m512i *second)
{
    const __m512 zero = _mm512_setzero_ps();
    __m512 x0 = zero, x1 = zero, y0 = zero, y1 = zero;
    for (int64_t s = 0; s < stages; s++, book += BOOK, codes++) {
        const __m512i low = eight_tokens(book, codes, pitch, 0, 2);
        x0 = dot(x0, low, _mm512_loadu_si512(turns));
        y0 = dot(y0, low, _mm512_loadu_si512(turns + 16));
        const __m512i high = eight_tokens(book, codes, pitch, 8, 2);
        x1 = dot(x1, high, _mm512_loadu_si512(turns + 32));
        y1 = dot(y1, high, _mm512_loadu_si512(turns + 48));
    }
    *first = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
    *second = (__m512i)_mm512_cvtne2ps_pbh(y1, y0);
}

/* Adds a chunk of quads to the scores of 16 tokens under `rows` rows; rows is known where this is
 * inlined. */
INLINE TARGET void score_chunk(const struct work *w, const struct pieces *p, int64_t row, int rows,
                               int64_t chunk, int64_t token, int turned)
{
    const struct plane *plane = &w->a->keys;
    const int64_t real = w->a->head_dim / QUAD, quads = chunked(real), stages = plane->stages;
    const int64_t pitch = plane->groups * stages;
    const int64_t last = chunk + CHUNK < real ? chunk + CHUNK : real;
    const int64_t query = (token / PAGE * w->a->rows + row) * quads;
    float *scores = w->scores + row * TILE + token;
    __m512 a[ROWS], b[ROWS];
    for (int r = 0; r < rows; r++) {
        a[r] = chunk == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(scores + r * TILE);
        b[r] = _mm512_setzero_ps();
    }
    for (int64_t quad = chunk; quad < last; quad++) {
        const uint16_t *book = p->keys + quad * stages * BOOK;
        const uint8_t *codes = w->keys + token * pitch + quad * QUAD / plane->dim * stages;
        __m512i first, second;
        if (turned) {
            const uint32_t *turns = p->turns + quad * PAGE * 4 + token % PAGE * 4;
            sixteen_keys(book, codes, pitch, stages, turns, &first, &second);
            for (int r = 0; r < rows; r++) {
                const int64_t at = query + r * quads + quad;
                a[r] = dot(a[r], first, _mm512_set1_epi32((int)p->first[at]));
                b[r] = dot(b[r], second, _mm512_set1_epi32((int)p->second[at]));
            }
            continue;
        }
        for (int64_t s = 0; s < stages; s++, book += BOOK, codes++) {
            /* In this order of tokens the shuffles below leave them in theirs. */
            const __m512 even = (__m512)eight_tokens(book, codes, pitch, 0, 4);
            const __m512 odd = (__m512)eight_tokens(book, codes, pitch, 2, 4);
            first = (__m512i)_mm512_shuffle_ps(even, odd, 0x88);
            second = (__m512i)_mm512_shuffle_ps(even, odd, 0xdd);
            for (int r = 0; r < rows; r++) {
                const int64_t at = query + r * quads + quad;
                a[r] = dot(a[r], first, _mm512_set1_epi32((int)p->first[at]));
                b[r] = dot(b[r], second, _mm512_set1_epi32((int)p->second[at]));
            }
        }
    }
    for (int r = 0; r < rows; r++)
        _mm512_storeu_ps(scores + r * TILE, _mm512_add_ps(a[r], b[r]));
}

/* Adds the tokens of a tile to a chunk of the sums of `rows` rows. */
INLINE TARGET void sum_chunk(const struct work *w, const uint32_t *weights,
                             const struct plane *plane, const uint16_t *books,
                             const uint8_t *codes, int64_t row, int rows, int64_t chunk, float *sums)
{
    const int64_t stages = plane->stages, pitch = plane->groups * stages;
    const int64_t head_dim = w->a->head_dim, channel = chunk * QUAD, left = head_dim - channel;
    const __mmask16 lows = left >= 16 ? 0xffff : (1u << left) - 1;
    const __mmask16 highs = left >= 32 ? 0xffff : left <= 16 ? 0 : (1u << (left - 16)) - 1;
    int64_t column[CHUNK];
    for (int i = 0; i < CHUNK; i++)
        column[i] = (chunk + i) * QUAD < head_dim ? (chunk + i) * QUAD / plane->dim * stages : 0;
    __m512 low[ROWS], high[ROWS];
    for (int r = 0; r < rows; r++) {
        const float *sum = sums + (row + r) * head_dim + channel;
        const __m512 shrink = _mm512_set1_ps(w->shrink[row + r]);
        low[r] = _mm512_mul_ps(_mm512_maskz_loadu_ps(lows, sum), shrink);
        high[r] = _mm512_mul_ps(_mm512_maskz_loadu_ps(highs, sum + 16), shrink);
    }
    const int64_t step = stages * BOOK;
    for (int64_t t = w->begin / 2 * 2; t < w->end; t += 2)
        for (int64_t s = 0; s < stages; s++) {
            const uint16_t *book = books + chunk * step + s * BOOK;
            const uint8_t *own = codes + t * pitch + s, *next = own + pitch;
#define QUADS(c, i) (book + (i) * step + QUAD * c[column[i]])
#define TOKEN(c) \
    eight(QUADS(c, 0), QUADS(c, 4), QUADS(c, 1), QUADS(c, 5), QUADS(c, 2), QUADS(c, 6), \
          QUADS(c, 3), QUADS(c, 7))
            const __m512i x = TOKEN(own), y = TOKEN(next);
            const __m512i lower = _mm512_unpacklo_epi16(x, y), upper = _mm512_unpackhi_epi16(x, y);
#undef QUADS
#undef TOKEN
            for (int r = 0; r < rows; r++) {
                const __m512i weight =
                    _mm512_set1_epi32((int)weights[((row + r) * TILE + t) / 2]);
                low[r] = dot(low[r], lower, weight);
                high[r] = dot(high[r], upper, weight);
            }
        }
    for (int r = 0; r < rows; r++) {
        float *sum = sums + (row + r) * head_dim + channel;
        _mm512_mask_storeu_ps(sum, lows, low[r]);
        _mm512_mask_storeu_ps(sum + 16, highs, high[r]);
    }
}

/* `call` with each number of rows as a constant. */
#define FOR_ROWS(count, call) \
    switch (count) { \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: call(4); break; \
    case 5: call(5); break; \
    case 6: call(6); break; \
    case 7: call(7); break; \
    default: call(8); \
    }

static TARGET void scores(struct work *w, int64_t tokens)
{
    const struct attention *a = w->a;
    const struct pieces p = pieces_of(w);
    const int turned = a->page_turns != NULL;
    round_queries(w, &p, (tokens + PAGE - 1) / PAGE);
    for (int64_t row = 0; row < a->rows; row += ROWS)
        for (int64_t chunk = 0; chunk < a->head_dim / QUAD; chunk += CHUNK)
            for (int64_t token = 0; token < tokens; token += 16) {
#define TURNED(rows) score_chunk(w, &p, row, rows, chunk, token, 1)
#define GIVEN(rows) score_chunk(w, &p, row, rows, chunk, token, 0)
                if (turned)
                    FOR_ROWS(a->rows - row, TURNED)
                else
                    FOR_ROWS(a->rows - row, GIVEN)
            }
}

static TARGET void sums(struct work *w, const struct plane *plane, const uint8_t *codes, float *sums)
{
    const struct attention *a = w->a;
    const struct pieces p = pieces_of(w);
    const uint16_t *books = plane == &a->keys ? p.keys : p.values;
    for (int64_t i = 0; i < a->rows * TILE; i += 32) {
        const __m512 low = _mm512_loadu_ps(w->scores + i), high = _mm512_loadu_ps(w->scores + i + 16);
        _mm512_storeu_si512(p.weights + i / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    for (int64_t row = 0; row < a->rows; row += ROWS)
        for (int64_t chunk = 0; chunk < a->head_dim / QUAD; chunk += CHUNK) {
#define SUM(rows) sum_chunk(w, p.weights, plane, books, codes, row, rows, chunk, sums)
            FOR_ROWS(a->rows - row, SUM)
        }
}

const struct kernel attend_bf16 = {prepare, turn_avx512, scores, softmax_avx512, sums};

#endif
