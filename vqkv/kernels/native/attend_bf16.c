/* Attention on codes with AVX-512 and products of bfloat16 pairs, where subvectors are whole quads.
 *
 * A quad is four neighbouring channels, so a codeword's part of it is 8 bytes, and eight of them
 * fill a vector. Scores: 8 tokens' words of one quad side by side, a lane being a pair of channels
 * of one token; two such vectors are sorted into 16 tokens' first pairs and second pairs, or are
 * turned into 16 tokens' x and y. Sums: 8 quads of one token side by side, two tokens interleaved,
 * so that a lane is one channel of two tokens. Either way one instruction multiplies 32 numbers by
 * a pair that is broadcast from memory, and adds to 16 lanes of fp32.
 *
 * Quads are taken 8 at a time over a whole tile: their codewords (16 KiB a stage) then stay in the
 * L1 cache.
 */

#include <stdlib.h>
#include <string.h>

#include "attend_bf16.h"

#ifdef HAVE_X86

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define CHUNK 8 /* quads */
#define ROWS 8 /* rows of queries at a time, at most */

static int64_t chunked(int64_t quads)
{
    return (quads + CHUNK - 1) / CHUNK * CHUNK;
}

static size_t lay_out(const struct attention *a, char *memory, struct pieces *p)
{
    const int64_t quads = chunked(a->head_dim / QUAD);
    const int64_t columns = (a->keys.groups * a->keys.stages + 15) / 16 * 16;
    const size_t keys = quads * a->keys.stages * 256 * sizeof(word);
    const size_t values = quads * a->values.stages * 256 * sizeof(word);
    const size_t codes = columns * TILE;
    const size_t turns = a->page_turns == NULL ? 0 : quads * PAGE * 4 * sizeof(uint32_t);
    const size_t queries = TILE_PAGES * a->rows * MAX_QUADS * sizeof(uint32_t);
    const size_t weights = a->rows * TILE / 2 * sizeof(uint32_t);
    if (memory != NULL) {
        p->keys = (word *)memory;
        p->values = (word *)(memory += keys);
        p->codes = (uint8_t *)(memory += values);
        p->turns = (uint32_t *)(memory += codes);
        p->first = (uint32_t *)(memory += turns);
        p->second = (uint32_t *)(memory += queries);
        p->weights = (uint32_t *)(memory += queries);
        p->tables = memory + weights;
    }
    return keys + values + codes + turns + 2 * queries + weights + attend_tables_scratch(a);
}

int64_t attend_bf16_scratch(const struct attention *a)
{
    return lay_out(a, NULL, NULL);
}

int attend_bf16_takes(const struct attention *a)
{
    return a->keys.dim % QUAD == 0 && a->values.dim % QUAD == 0 &&
           a->head_dim <= MAX_QUADS * QUAD;
}

struct pieces pieces_of(const struct work *w)
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
                               word *rounded)
{
    const int64_t stages = plane->stages, size = plane->size, dim = plane->dim;
    const int64_t real = plane->groups * dim / QUAD, width = width_of(plane);
    const float *words = plane->words + head * plane->groups * stages * size * dim;
    for (int64_t quad = 0; quad < real; quad += width)
        for (int64_t s = 0; s < stages; s++, rounded += 256 * width) {
            const int64_t column = quad * QUAD / dim * stages + s;
            const float *from = words + column * size * dim + quad * QUAD % dim;
            int64_t k = 0;
            for (; dim == QUAD && k + 4 <= size; k += 4) /* four whole codewords at once */
                _mm256_storeu_si256((__m256i *)(rounded + k),
                                    (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + k * QUAD)));
            for (; width == 1 && k < size; k++)
                _mm_storel_epi64((__m128i *)(rounded + k),
                                 (__m128i)_mm_cvtneps_pbh(_mm_loadu_ps(from + k * dim)));
            for (; k < size; k++)
                _mm_storeu_si128((__m128i *)(rounded + 2 * k),
                                 (__m128i)_mm256_cvtneps_pbh(_mm256_loadu_ps(from + k * dim)));
            /* Codes that name no codeword are refused; in tables of scores they are like code 0. */
            for (; k < 256; k++)
                memcpy(rounded + width * k, rounded, width * sizeof(word));
        }
    memset(rounded, 0, (quads - real) * stages * 256 * sizeof(word));
}

TARGET void round_keys(struct work *w)
{
    const struct attention *a = w->a;
    round_words(&a->keys, w->head, chunked(a->head_dim / QUAD), pieces_of(w).keys);
}

TARGET void prepare_bf16(struct work *w)
{
    const struct attention *a = w->a;
    const struct pieces p = pieces_of(w);
    const int64_t half = a->head_dim / 2;
    round_keys(w);
    round_words(&a->values, w->head, chunked(a->head_dim / QUAD), p.values);
    if (a->page_turns == NULL)
        return;
    const int32_t *pairs = a->pairs + w->head * half;
    const __m128i sign = _mm_set1_epi32((int)0x80000000u);
    for (int64_t quad = 0; quad < half / 2; quad++)
        for (int64_t o = 0; o < PAGE; o++) {
            const float *turns = a->offset_turns + o * a->head_dim;
            const __m128i two = _mm_unpacklo_epi64(
                _mm_loadl_epi64((const __m128i *)(turns + 2 * pairs[2 * quad])),
                _mm_loadl_epi64((const __m128i *)(turns + 2 * pairs[2 * quad + 1])));
            const __m128i both = (__m128i)_mm_cvtneps_pbh(_mm_castsi128_ps(two));
            uint32_t *to = p.turns + quad * PAGE * 4 + o / 8 * 32 + o % 8 * 2;
            _mm_storel_epi64((__m128i *)to, _mm_xor_si128(both, sign));
            _mm_storel_epi64((__m128i *)(to + 16), _mm_rol_epi32(both, 16));
        }
}

/* x of all quads to `first` and y to `second`, turned back by a page's first position. */
static TARGET void turned_queries(struct work *w, int64_t page, const float *turns)
{
    const struct attention *a = w->a;
    const struct pieces p = pieces_of(w);
    const int64_t half = a->head_dim / 2, real = a->head_dim / QUAD;
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const int32_t *pairs = a->pairs + w->head * half;
    for (int64_t j = 0; j < half; j++)
        memcpy(w->decoded + 2 * j, turns + 2 * pairs[j], 2 * sizeof(float));
    for (int64_t quad = 0; quad < real; quad += 8) {
        const int64_t left = half - 2 * quad;
        const __mmask16 some = left >= 16 ? 0xffff : (1u << left) - 1;
        /* `decoded` has room for whole vectors. */
        const __m512 low = _mm512_loadu_ps(w->decoded + 4 * quad);
        const __m512 high = _mm512_loadu_ps(w->decoded + 4 * quad + 16);
        const __m512 cosine = _mm512_permutex2var_ps(low, even, high);
        const __m512 sine = _mm512_permutex2var_ps(low, odd, high);
        for (int64_t r = 0; r < a->rows; r++) {
            const float *given = w->given + r * a->head_dim + 2 * quad;
            const __m512 x = _mm512_maskz_loadu_ps(some, given);
            const __m512 y = _mm512_maskz_loadu_ps(some, given + half);
            const __m512 back_x = _mm512_fmadd_ps(y, sine, _mm512_mul_ps(x, cosine));
            const __m512 back_y = _mm512_fnmadd_ps(x, sine, _mm512_mul_ps(y, cosine));
            const int64_t to = (page * a->rows + r) * MAX_QUADS + quad;
            _mm256_storeu_si256((__m256i *)(p.first + to), (__m256i)_mm512_cvtneps_pbh(back_x));
            _mm256_storeu_si256((__m256i *)(p.second + to), (__m256i)_mm512_cvtneps_pbh(back_y));
        }
    }
}

/* Pairs of queries as a quad's two vectors of keys need them: those of x and of y where keys are
 * turned, else (x, y) of the quad's two pairs. */
TARGET void queries_bf16(struct work *w, int64_t page, const float *turns)
{
    if (turns != NULL) {
        turned_queries(w, page, turns);
        return;
    }
    queries_avx512(w, page, NULL);
    const struct attention *a = w->a;
    const struct pieces p = pieces_of(w);
    for (int64_t r = page * a->rows; r < (page + 1) * a->rows; r++) {
        const float *query = w->query + r * a->head_dim;
        uint32_t *first = p.first + r * MAX_QUADS, *second = p.second + r * MAX_QUADS;
        for (int64_t quad = 0; quad < a->head_dim / QUAD; quad++) {
            first[quad] = pair(query[4 * quad], query[4 * quad + 1]);
            second[quad] = pair(query[4 * quad + 2], query[4 * quad + 3]);
        }
    }
}

INLINE TARGET __m128d two(const word *a, const word *b)
{
    return _mm_loadh_pd(_mm_load_sd((const double *)a), (const double *)b);
}

/* From the lowest lanes up. */
INLINE TARGET __m512i eight(__m128d a, __m128d b, __m128d c, __m128d d)
{
    const __m256d low = _mm256_insertf128_pd(_mm256_castpd128_pd256(a), b, 1);
    const __m256d high = _mm256_insertf128_pd(_mm256_castpd128_pd256(c), d, 1);
    return _mm512_castpd_si512(_mm512_insertf64x4(_mm512_castpd256_pd512(low), high, 1));
}

/* Eight codes are loaded at once: taking them apart leaves the loads to codewords. */
INLINE uint64_t eight_codes(const uint8_t *codes)
{
    uint64_t eight;
    memcpy(&eight, codes, sizeof eight);
    return eight;
}

INLINE int64_t code_of(uint64_t eight, int i)
{
    return eight >> 8 * i & 255;
}

/* Words, `width` apart, of two tokens from token i of 16. */
INLINE TARGET __m128d two_tokens(const word *book, int64_t width, const uint64_t codes[2], int i)
{
    const uint64_t eight = codes[i / 8];
    return two(book + code_of(eight, i % 8) * width, book + code_of(eight, i % 8 + 1) * width);
}

/* Of 8 tokens from token i, every two of them `step` further. */
INLINE TARGET __m512i eight_tokens(const word *book, int64_t width, const uint64_t codes[2], int i,
                                   int step)
{
    return eight(two_tokens(book, width, codes, i), two_tokens(book, width, codes, i + step),
                 two_tokens(book, width, codes, i + 2 * step),
                 two_tokens(book, width, codes, i + 3 * step));
}

INLINE TARGET __m512 dot(__m512 sum, __m512i a, __m512i b)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

/* Two pairs of each of 16 tokens: the two x and the two y of turned keys. `turns` of their
 * offsets. */
INLINE TARGET void turned_keys(const word *book, int64_t width, const uint8_t *codes,
                               int64_t stages, const uint32_t *turns, __m512i *x, __m512i *y)
{
    const __m512 zero = _mm512_setzero_ps();
    __m512 x0 = zero, x1 = zero, y0 = zero, y1 = zero;
    for (int64_t s = 0; s < stages; s++, book += 256 * width, codes += TILE) {
        const uint64_t both[2] = {eight_codes(codes), eight_codes(codes + 8)};
        const __m512i low = eight_tokens(book, width, both, 0, 2);
        x0 = dot(x0, low, _mm512_loadu_si512(turns));
        y0 = dot(y0, low, _mm512_loadu_si512(turns + 16));
        const __m512i high = eight_tokens(book, width, both, 8, 2);
        x1 = dot(x1, high, _mm512_loadu_si512(turns + 32));
        y1 = dot(y1, high, _mm512_loadu_si512(turns + 48));
    }
    *x = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
    *y = (__m512i)_mm512_cvtne2ps_pbh(y1, y0);
}

/* Adds a chunk of quads to the scores of a tile under `rows` rows from `row`. Constant where this
 * is inlined: `rows`, whether keys are `turned`, and, in the cases that matter most, `stages` and
 * `width`. */
INLINE TARGET void score_chunk(struct work *w, const struct pieces *p, int64_t row, int rows,
                               int64_t chunk, int64_t tokens, int turned, int64_t stages,
                               int64_t width)
{
    const int64_t real = w->a->head_dim / QUAD;
    const int64_t count = real - chunk < CHUNK ? real - chunk : CHUNK;
    const uint32_t *turns = p->turns + chunk * PAGE * 4;
    const uint8_t *columns[CHUNK];
    const word *books[CHUNK];
    for (int64_t i = 0; i < count; i++) {
        columns[i] = p->codes + (chunk + i) * QUAD / w->a->keys.dim * stages * TILE;
        books[i] = words_of(p->keys, &w->a->keys, chunk + i, 0);
    }
    const int64_t lines = lines_ahead(w->a, chunked(real) / CHUNK * (TILE / 16));
    for (int64_t token = 0; token < tokens; token += 16) {
        fetch_ahead(w, lines);
        const int64_t page = turned ? token / PAGE : 0;
        const int64_t query = (page * w->a->rows + row) * MAX_QUADS + chunk;
        float *scores = w->scores + row * TILE + token;
        __m512 a[ROWS], b[ROWS];
        for (int r = 0; r < rows; r++) {
            a[r] = chunk == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(scores + r * TILE);
            b[r] = _mm512_setzero_ps();
        }
        const uint32_t *turn = turns + token % PAGE * 4;
        __m512i x, y, next_x, next_y;
        /* A quad is turned before the one ahead of it is multiplied: neither waits for the other. */
        if (turned)
            turned_keys(books[0], width, columns[0] + token, stages, turn, &next_x, &next_y);
        for (int64_t i = 0; i < count; i++) {
            const uint32_t *first = p->first + query + i, *second = p->second + query + i;
            const word *book = books[i];
            const uint8_t *codes = columns[i] + token;
            for (int64_t s = 0; s < (turned ? 1 : stages); s++, codes += TILE) {
                if (turned) {
                    x = next_x;
                    y = next_y;
                    if (i + 1 < count)
                        turned_keys(books[i + 1], width, columns[i + 1] + token, stages,
                                    turn + (i + 1) * PAGE * 4, &next_x, &next_y);
                } else {
                    /* In this order of tokens the shuffles leave them in theirs. */
                    const uint64_t both[2] = {eight_codes(codes), eight_codes(codes + 8)};
                    const __m512 even = (__m512)eight_tokens(book, width, both, 0, 4);
                    const __m512 odd = (__m512)eight_tokens(book, width, both, 2, 4);
                    book += 256 * width;
                    x = (__m512i)_mm512_shuffle_ps(even, odd, 0x88);
                    y = (__m512i)_mm512_shuffle_ps(even, odd, 0xdd);
                }
                for (int r = 0; r < rows; r++) {
                    a[r] = dot(a[r], x, _mm512_set1_epi32((int)first[r * MAX_QUADS]));
                    b[r] = dot(b[r], y, _mm512_set1_epi32((int)second[r * MAX_QUADS]));
                }
            }
        }
        for (int r = 0; r < rows; r++)
            _mm512_storeu_ps(scores + r * TILE, _mm512_add_ps(a[r], b[r]));
    }
}

/* Words of a chunk for one token: lane i has quads i and i + 4, or, of words that lie in twos, 2i and
 * 2i + 1. `at` are their columns; where a chunk is `whole`, its codes follow the first. */
INLINE TARGET __m512i chunk_of(const word *book, int64_t step, const uint8_t *codes,
                               const int64_t at[CHUNK], int whole, int64_t stages, int64_t width)
{
    const uint64_t next = whole ? eight_codes(codes + at[0]) : 0;
#define CODE(i) (whole ? code_of(next, (int)((i) / width * stages)) : codes[at[i]])
#define TWO(i) _mm_loadu_pd((const double *)(book + (i) * step + 2 * CODE(2 * (i))))
#define APART(i) two(book + (i) * step + CODE(i), book + ((i) + 4) * step + CODE((i) + 4))
    return width == 2 ? eight(TWO(0), TWO(1), TWO(2), TWO(3))
                      : eight(APART(0), APART(1), APART(2), APART(3));
#undef APART
#undef TWO
#undef CODE
}

/* Adds the tokens of a tile to a chunk of the sums of `rows` rows. Constant where this is inlined:
 * `rows` and `width`; where a chunk is whole and its codes lie together, `whole` and `stages`. */
INLINE TARGET void sum_chunk(const struct work *w, const uint32_t *weights,
                             const struct plane *plane, const word *books, const uint8_t *codes,
                             int64_t row, int rows, int64_t chunk, int whole, int64_t stages,
                             int64_t width, float *sums)
{
    const int64_t pitch = plane->groups * stages;
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
        const __m512 first = _mm512_mul_ps(_mm512_maskz_loadu_ps(lows, sum), shrink);
        const __m512 second = _mm512_mul_ps(_mm512_maskz_loadu_ps(highs, sum + 16), shrink);
        /* Words in twos give sums of every other quad. */
        low[r] = width == 1 ? first : _mm512_shuffle_f32x4(first, second, 0x88);
        high[r] = width == 1 ? second : _mm512_shuffle_f32x4(first, second, 0xdd);
    }
    const int64_t step = stages * 256 * width;
    for (int64_t t = w->begin / 2 * 2; t < w->end; t += 2) {
        const uint32_t *weight = weights + row * (TILE / 2) + t / 2;
        for (int64_t s = 0; s < stages; s++) {
            const word *book = books + chunk / width * step + s * 256 * width;
            const uint8_t *own = codes + t * pitch + s;
            const __m512i x = chunk_of(book, step, own, column, whole, stages, width);
            const __m512i y = chunk_of(book, step, own + pitch, column, whole, stages, width);
            const __m512i lower = _mm512_unpacklo_epi16(x, y), upper = _mm512_unpackhi_epi16(x, y);
            for (int r = 0; r < rows; r++) {
                const __m512i both =
                    _mm512_set1_epi32((int)weight[r * (TILE / 2)]);
                low[r] = dot(low[r], lower, both);
                high[r] = dot(high[r], upper, both);
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        float *sum = sums + (row + r) * head_dim + channel;
        __m512 first = low[r], second = high[r];
        if (width == 2) {
            const __m512 lower = _mm512_shuffle_f32x4(first, second, 0x44);
            const __m512 upper = _mm512_shuffle_f32x4(first, second, 0xee);
            first = _mm512_shuffle_f32x4(lower, lower, 0xd8);
            second = _mm512_shuffle_f32x4(upper, upper, 0xd8);
        }
        _mm512_mask_storeu_ps(sum, lows, first);
        _mm512_mask_storeu_ps(sum + 16, highs, second);
    }
}

/* In blocks of 64 tokens by 16 columns, every 16 tokens in a lane of 16 bytes: interleaving the halves of a
 * block four times transposes lanes. */
TARGET void transpose(const uint8_t *codes, int64_t columns, int64_t tokens, uint8_t *transposed)
{
    for (int64_t c = 0; c < columns; c += 16)
        for (int64_t t = 0; t < tokens; t += 64) {
            __m512i x[16], y[16];
            for (int i = 0; i < 16; i++) {
                const uint8_t *from = codes + (t + i) * columns + c;
#define LANE(n) _mm_loadu_si128((const __m128i *)(from + 16 * (n) * columns))
                x[i] = _mm512_castsi128_si512(LANE(0));
                x[i] = _mm512_inserti32x4(x[i], LANE(1), 1);
                x[i] = _mm512_inserti32x4(x[i], LANE(2), 2);
                x[i] = _mm512_inserti32x4(x[i], LANE(3), 3);
#undef LANE
            }
            for (int round = 0; round < 4; round++) {
                for (int i = 0; i < 8; i++) {
                    y[2 * i] = _mm512_unpacklo_epi8(x[i], x[i + 8]);
                    y[2 * i + 1] = _mm512_unpackhi_epi8(x[i], x[i + 8]);
                }
                for (int i = 0; i < 16; i++)
                    x[i] = y[i];
            }
            for (int i = 0; i < 16; i++)
                _mm512_storeu_si512(transposed + (c + i) * TILE + t, x[i]);
        }
}

TARGET void scores_bf16(struct work *w, int64_t tokens)
{
    const struct attention *a = w->a;
    const struct pieces p = pieces_of(w);
    const int64_t stages = a->keys.stages, width = width_of(&a->keys);
    const int turned = a->page_turns != NULL;
    transpose(w->keys, a->keys.groups * stages, tokens, p.codes);
    for (int64_t chunk = 0; chunk < a->head_dim / QUAD; chunk += CHUNK)
        for (int64_t row = 0; row < a->rows;) {
#define SCORE(rows, turned, stages, width) \
    score_chunk(w, &p, row, rows, chunk, tokens, turned, stages, width)
#define TURNED_SINGLE(rows) SCORE(rows, 1, 1, 1)
#define TURNED_WIDE(rows) SCORE(rows, 1, 1, 2)
#define TURNED(rows) SCORE(rows, 1, stages, width)
#define SINGLE(rows) SCORE(rows, 0, 1, 1)
#define ANY(rows) SCORE(rows, 0, stages, width)
            if (turned && stages == 1 && width == 1)
                FOR_ROWS(a->rows - row, TURNED_SINGLE)
            else if (turned && stages == 1)
                FOR_ROWS(a->rows - row, TURNED_WIDE)
            else if (turned)
                FOR_ROWS(a->rows - row, TURNED)
            else if (stages == 1 && width == 1)
                FOR_ROWS(a->rows - row, SINGLE)
            else
                FOR_ROWS(a->rows - row, ANY)
#undef ANY
#undef SINGLE
        }
}

TARGET void sums_bf16(struct work *w, const struct plane *plane, const uint8_t *codes, float *sums)
{
    const struct attention *a = w->a;
    const struct pieces p = pieces_of(w);
    const word *books = plane == &a->keys ? p.keys : p.values;
    const int64_t stages = plane->stages, width = width_of(plane);
    const int together = plane->dim == QUAD * width; /* no code but that of a word or two */
    for (int64_t i = 0; i < a->rows * TILE; i += 32) {
        const __m512 low = _mm512_loadu_ps(w->scores + i);
        const __m512 high = _mm512_loadu_ps(w->scores + i + 16);
        _mm512_storeu_si512(p.weights + i / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    for (int64_t chunk = 0; chunk < a->head_dim / QUAD; chunk += CHUNK)
        for (int64_t row = 0; row < a->rows;) {
#define SUM(rows, whole, stages, width) \
    sum_chunk(w, p.weights, plane, books, codes, row, rows, chunk, whole, stages, width, sums)
#define SINGLE(rows) SUM(rows, 1, 1, 1)
#define WIDE(rows) SUM(rows, 1, 1, 2)
#define WIDE_TWICE(rows) SUM(rows, 1, 2, 2)
#define ANY_WIDE(rows) SUM(rows, 0, stages, 2)
#define ANY(rows) SUM(rows, 0, stages, 1)
            const int whole = together && a->head_dim / QUAD - chunk >= CHUNK;
            if (whole && stages == 1 && width == 1)
                FOR_ROWS(a->rows - row, SINGLE)
            else if (whole && stages == 1)
                FOR_ROWS(a->rows - row, WIDE)
            else if (whole && stages == 2 && width == 2)
                FOR_ROWS(a->rows - row, WIDE_TWICE)
            else if (width == 2)
                FOR_ROWS(a->rows - row, ANY_WIDE)
            else
                FOR_ROWS(a->rows - row, ANY)
        }
}

const struct kernel attend_bf16 = {prepare_bf16, queries_bf16, scores_bf16, softmax_avx512,
                                   sums_bf16};

#endif
