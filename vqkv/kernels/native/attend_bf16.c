/* Scores of keys that are turned by their offset in a page, with AVX-512 and products of bfloat16 pairs,
 * where subvectors are whole quads.
 *
 * A quad is four neighbouring channels, so a codeword's part of it is 8 bytes, and eight of them fill a
 * vector: 8 tokens' words of one quad side by side, a lane being a pair of channels of one token. Two
 * such vectors are turned into 16 tokens' x and y. One instruction multiplies 32 numbers by a pair that
 * is broadcast from memory, and adds to 16 lanes of fp32.
 *
 * Quads are taken 8 at a time over a whole tile: their codewords (16 KiB a stage) then stay in the
 * L1 cache.
 */

#include <string.h>

#include "attend.h"

#ifdef HAVE_X86

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define QUAD 4
#define MAX_QUADS 64
#define CHUNK 8 /* quads */

/* Four channels of a codeword as bfloat16. */
typedef uint64_t word;

/* Pieces of `own`. Quads beyond the last, up to whole chunks, have words of zeros. */
struct pieces {
    word *words;              /* [quads / width, S, 256, width] */
    uint8_t *codes;           /* [M S up to a multiple of 16, TILE] */
    uint32_t *turns;          /* [quads, 8, 2, 8, 2]: of 8 offsets and a quad's two pairs first
                                 (c, -s), then (s, c) */
    uint32_t *first, *second; /* [TILE_PAGES, R, MAX_QUADS]: pairs of queries, of all x and of all y */
};

/* How many quads of a codeword lie side by side: two can be read at once. */
INLINE int64_t width_of(const struct plane *plane)
{
    return plane->dim % (2 * QUAD) == 0 ? 2 : 1;
}

/* A quad's words of the first stage, which are `width_of` apart. */
INLINE const word *words_of(const word *words, const struct plane *plane, int64_t quad)
{
    const int64_t width = width_of(plane);
    return words + quad / width * plane->stages * 256 * width + quad % width;
}

static int64_t chunked(int64_t quads)
{
    return (quads + CHUNK - 1) / CHUNK * CHUNK;
}

static size_t lay_out(const struct attention *a, char *memory, struct pieces *p)
{
    const int64_t quads = chunked(a->head_dim / QUAD);
    const int64_t columns = (a->keys.groups * a->keys.stages + 15) / 16 * 16;
    const size_t words = quads * a->keys.stages * 256 * sizeof(word);
    const size_t codes = columns * TILE;
    const size_t turns = quads * PAGE * 4 * sizeof(uint32_t);
    const size_t queries = TILE_PAGES * a->rows * MAX_QUADS * sizeof(uint32_t);
    if (memory != NULL) {
        p->words = (word *)memory;
        p->codes = (uint8_t *)(memory += words);
        p->turns = (uint32_t *)(memory += codes);
        p->first = (uint32_t *)(memory += turns);
        p->second = (uint32_t *)(memory + queries);
    }
    return words + codes + turns + 2 * queries;
}

int turned_bf16_takes(const struct attention *a)
{
    return a->page_turns != NULL && a->keys.dim % QUAD == 0 && a->head_dim <= MAX_QUADS * QUAD;
}

size_t bf16_scratch(const struct attention *a)
{
    return turned_bf16_takes(a) ? lay_out(a, NULL, NULL) : 0;
}

static struct pieces pieces_of(const struct work *w)
{
    struct pieces pieces = {0};
    lay_out(w->a, w->own, &pieces);
    return pieces;
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
        }
    memset(rounded, 0, (quads - real) * stages * 256 * sizeof(word));
}

static TARGET void prepare(struct work *w)
{
    const struct attention *a = w->a;
    const struct pieces p = pieces_of(w);
    const int64_t half = a->head_dim / 2;
    round_words(&a->keys, w->head, chunked(a->head_dim / QUAD), p.words);
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
static TARGET void queries(struct work *w, int64_t page, const float *turns)
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

/* Of 8 tokens from token i. */
INLINE TARGET __m512i eight_tokens(const word *book, int64_t width, const uint64_t codes[2], int i)
{
    return eight(two_tokens(book, width, codes, i), two_tokens(book, width, codes, i + 2),
                 two_tokens(book, width, codes, i + 4), two_tokens(book, width, codes, i + 6));
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
        const __m512i low = eight_tokens(book, width, both, 0);
        x0 = dot(x0, low, _mm512_loadu_si512(turns));
        y0 = dot(y0, low, _mm512_loadu_si512(turns + 16));
        const __m512i high = eight_tokens(book, width, both, 8);
        x1 = dot(x1, high, _mm512_loadu_si512(turns + 32));
        y1 = dot(y1, high, _mm512_loadu_si512(turns + 48));
    }
    *x = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
    *y = (__m512i)_mm512_cvtne2ps_pbh(y1, y0);
}

/* Adds a chunk of quads to the scores of a tile under `rows` rows from `row`. Constant where this
 * is inlined: `rows`, and, in the cases that matter most, `stages` and `width`. */
INLINE TARGET void score_chunk(struct work *w, const struct pieces *p, int64_t row, int rows,
                               int64_t chunk, int64_t tokens, int64_t stages, int64_t width)
{
    const int64_t real = w->a->head_dim / QUAD;
    const int64_t count = real - chunk < CHUNK ? real - chunk : CHUNK;
    const uint32_t *turns = p->turns + chunk * PAGE * 4;
    const uint8_t *columns[CHUNK];
    const word *books[CHUNK];
    for (int64_t i = 0; i < count; i++) {
        columns[i] = p->codes + (chunk + i) * QUAD / w->a->keys.dim * stages * TILE;
        books[i] = words_of(p->words, &w->a->keys, chunk + i);
    }
    const int64_t lines = lines_ahead(w->a, chunked(real) / CHUNK * (TILE / 16));
    for (int64_t token = 0; token < tokens; token += 16) {
        fetch_ahead(w, lines);
        const int64_t query = (token / PAGE * w->a->rows + row) * MAX_QUADS + chunk;
        float *scores = w->scores + row * TILE + token;
        __m512 a[MOST_ROWS], b[MOST_ROWS];
        for (int r = 0; r < rows; r++) {
            a[r] = chunk == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(scores + r * TILE);
            b[r] = _mm512_setzero_ps();
        }
        const uint32_t *turn = turns + token % PAGE * 4;
        __m512i x, y;
        turned_keys(books[0], width, columns[0] + token, stages, turn, &x, &y);
        for (int64_t i = 0; i < count; i++) {
            const uint32_t *first = p->first + query + i, *second = p->second + query + i;
            const __m512i own_x = x, own_y = y;
            /* The next quad is turned before this one is multiplied: neither waits for the other. */
            if (i + 1 < count)
                turned_keys(books[i + 1], width, columns[i + 1] + token, stages,
                            turn + (i + 1) * PAGE * 4, &x, &y);
            for (int r = 0; r < rows; r++) {
                a[r] = dot(a[r], own_x, _mm512_set1_epi32((int)first[r * MAX_QUADS]));
                b[r] = dot(b[r], own_y, _mm512_set1_epi32((int)second[r * MAX_QUADS]));
            }
        }
        for (int r = 0; r < rows; r++)
            _mm512_storeu_ps(scores + r * TILE, _mm512_add_ps(a[r], b[r]));
    }
}

static TARGET void scores(struct work *w, int64_t tokens)
{
    const struct attention *a = w->a;
    const struct pieces p = pieces_of(w);
    const int64_t stages = a->keys.stages, width = width_of(&a->keys);
    transpose(w->keys.codes, a->keys.groups * stages, tokens, p.codes);
    for (int64_t chunk = 0; chunk < a->head_dim / QUAD; chunk += CHUNK)
        for (int64_t row = 0; row < a->rows;) {
#define SCORE(rows, stages, width) score_chunk(w, &p, row, rows, chunk, tokens, stages, width)
#define SINGLE(rows) SCORE(rows, 1, 1)
#define WIDE(rows) SCORE(rows, 1, 2)
#define ANY(rows) SCORE(rows, stages, width)
            if (stages == 1 && width == 1)
                FOR_ROWS(a->rows - row, SINGLE)
            else if (stages == 1)
                FOR_ROWS(a->rows - row, WIDE)
            else
                FOR_ROWS(a->rows - row, ANY)
#undef ANY
#undef WIDE
#undef SINGLE
#undef SCORE
        }
}

const struct scoring turned_bf16 = {.prepare = prepare, .queries = queries, .scores = scores};

#endif
