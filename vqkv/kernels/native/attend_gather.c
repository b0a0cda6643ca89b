/* Attention on codes with AVX-512 by gathers and products of fp32, which on Intel's is faster than what
 * attend_bf16.c does (docs/kernels.md).
 *
 * A word is four neighbouring channels of a codeword in bfloat16, as in attend_bf16.c, whose tables and
 * order of work these are. One gather reads eight: of keys one quad's of 8 tokens, of values 8 quads' of
 * one token. The even channels of all eight, and the odd ones, are then fp32 in two vectors; of a quad
 * that RoPE turns, these are the two x and the two y of 8 tokens.
 */

#include <string.h>

#include "attend_bf16.h"

#ifdef HAVE_X86

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define CHUNK 8 /* quads */
#define ROWS 8 /* rows of queries at a time, at most */
#define CODES 16 /* that are loaded for a chunk of a token */

/* Codes that the quads of a chunk have, at most: a group may begin before it and end in it. */
static int64_t codes_of(const struct plane *plane)
{
    const int64_t channels = CHUNK * QUAD, dim = plane->dim;
    const int apart = channels % dim == 0 || dim % channels == 0;
    return ((channels - QUAD) / dim + (apart ? 1 : 2)) * plane->stages;
}

int attend_gather_takes(const struct attention *a)
{
    return attend_bf16_takes(a) && codes_of(&a->keys) <= CODES && codes_of(&a->values) <= CODES;
}

/* Even channels [8 words, 2] of eight words, and odd ones. */
struct halves {
    __m512 even, odd;
};

INLINE TARGET struct halves words_at(const word *book, __m512i at)
{
    const __m512i words = _mm512_i64gather_epi64(at, book, sizeof(word));
    const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
    return (struct halves){(__m512)_mm512_slli_epi32(words, 16),
                           (__m512)_mm512_and_si512(words, high)};
}

INLINE TARGET struct halves added(struct halves a, struct halves b)
{
    return (struct halves){_mm512_add_ps(a.even, b.even), _mm512_add_ps(a.odd, b.odd)};
}

/* Cosines, then sines, of each 8 offsets for both pairs of a quad. */
TARGET void prepare_gather(struct work *w)
{
    const struct attention *a = w->a;
    round_all_words(w);
    if (a->page_turns == NULL)
        return;
    float *all = (float *)pieces_of(w).turns;
    const int32_t *pairs = a->pairs + w->head * a->head_dim / 2;
    for (int64_t j = 0; j < a->head_dim / 2; j++)
        for (int64_t o = 0; o < PAGE; o++) {
            const float *turn = a->offset_turns + o * a->head_dim + 2 * pairs[j];
            float *to = all + j / 2 * PAGE * 4 + o / 8 * 32 + o % 8 * 2 + j % 2;
            to[0] = turn[0];
            to[16] = turn[1];
        }
}

/* x of all pairs and then y, also where keys are not turned: there of even channels and odd ones. */
TARGET void queries_gather(struct work *w, int64_t page, const float *turns)
{
    queries_avx512(w, page, turns);
    const int64_t half = w->a->head_dim / 2;
    for (int64_t r = 0; turns == NULL && r < w->a->rows; r++) {
        float *query = w->query + r * 2 * half;
        memcpy(w->decoded, query, 2 * half * sizeof(float));
        for (int64_t j = 0; j < half; j++) {
            query[j] = w->decoded[2 * j];
            query[half + j] = w->decoded[2 * j + 1];
        }
    }
}

/* Of 8 tokens' codes, which words they name. */
INLINE TARGET __m512i places_of(const uint8_t *codes, int64_t width)
{
    const __m512i at = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)codes));
    return width == 2 ? _mm512_add_epi64(at, at) : at;
}

/* A quad of 8 tokens. */
INLINE TARGET struct halves quad_of(const word *book, const uint8_t *codes, int64_t stages,
                                    int64_t width)
{
    struct halves sum = words_at(book, places_of(codes, width));
    for (int64_t s = 1; s < stages; s++)
        sum = added(sum, words_at(book + s * 256 * width, places_of(codes + s * TILE, width)));
    return sum;
}

/* x and y of two pairs of 8 tokens, by cosines and sines of their offsets. */
INLINE TARGET struct halves turned_by(struct halves key, const float *turn)
{
    const __m512 cosine = _mm512_loadu_ps(turn), sine = _mm512_loadu_ps(turn + 16);
    return (struct halves){
        _mm512_fnmadd_ps(key.odd, sine, _mm512_mul_ps(key.even, cosine)),
        _mm512_fmadd_ps(key.even, sine, _mm512_mul_ps(key.odd, cosine)),
    };
}

/* Two numbers for every word. */
INLINE TARGET __m512 for_each_word(const float *numbers)
{
    double both;
    memcpy(&both, numbers, sizeof both);
    return (__m512)_mm512_set1_pd(both);
}

/* Adds a chunk of quads to the scores of a tile under `rows` rows from `row`. Constant where this is
 * inlined: `rows`, whether keys are `turned`, and, in the cases that matter most, `stages` and `width`. */
INLINE TARGET void score_chunk(struct work *w, const struct pieces *p, int64_t row, int rows,
                               int64_t chunk, int64_t tokens, int turned, int64_t stages,
                               int64_t width)
{
    const struct attention *a = w->a;
    const int64_t real = a->head_dim / QUAD, half = a->head_dim / 2;
    const int64_t count = real - chunk < CHUNK ? real - chunk : CHUNK;
    const float *turns = (const float *)p->turns + chunk * PAGE * 4;
    const int64_t lines = lines_ahead(a, (real + CHUNK - 1) / CHUNK * (TILE / 16));
    const __m512i evens =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    const uint8_t *columns[CHUNK];
    const word *books[CHUNK];
    for (int64_t i = 0; i < count; i++) {
        columns[i] = p->codes + (chunk + i) * QUAD / a->keys.dim * stages * TILE;
        books[i] = words_of(p->keys, &a->keys, chunk + i, 0);
    }
    for (int64_t token = 0; token < tokens; token += 16) {
        fetch_ahead(w, lines);
        const int64_t page = turned ? token / PAGE : 0;
        const float *query = w->query + (page * a->rows + row) * a->head_dim + 2 * chunk;
        /* Of 8 tokens each; what a quad's two pairs give lies side by side. */
        __m512 first[ROWS], second[ROWS];
        for (int r = 0; r < rows; r++)
            first[r] = second[r] = _mm512_setzero_ps();
        const float *turn = turns + token % PAGE * 4;
        for (int64_t i = 0; i < count; i++, turn += PAGE * 4) {
            const uint8_t *codes = columns[i] + token;
            struct halves low = quad_of(books[i], codes, stages, width);
            struct halves high = quad_of(books[i], codes + 8, stages, width);
            if (turned) {
                low = turned_by(low, turn);
                high = turned_by(high, turn + 32);
            }
            for (int r = 0; r < rows; r++) {
                const float *pairs = query + r * a->head_dim + 2 * i;
                const __m512 x = for_each_word(pairs), y = for_each_word(pairs + half);
                first[r] = _mm512_fmadd_ps(low.even, x, first[r]);
                second[r] = _mm512_fmadd_ps(high.even, x, second[r]);
                first[r] = _mm512_fmadd_ps(low.odd, y, first[r]);
                second[r] = _mm512_fmadd_ps(high.odd, y, second[r]);
            }
        }
        for (int r = 0; r < rows; r++) {
            float *scores = w->scores + (row + r) * TILE + token;
            const __m512 both =
                _mm512_add_ps(_mm512_permutex2var_ps(first[r], evens, second[r]),
                              _mm512_permutex2var_ps(first[r], odds, second[r]));
            _mm512_storeu_ps(scores,
                             chunk == 0 ? both : _mm512_add_ps(both, _mm512_loadu_ps(scores)));
        }
    }
}

/* Adds the tokens of a tile to a chunk of the sums of `rows` rows. Constant where this is inlined:
 * `rows`, and, in the cases that matter most, `stages` and `width`. */
INLINE TARGET void sum_chunk(const struct work *w, const struct plane *plane, const word *books,
                             const uint8_t *codes, int64_t row, int rows, int64_t chunk,
                             int64_t stages, int64_t width, float *sums)
{
    const int64_t pitch = plane->groups * stages, head_dim = w->a->head_dim;
    const int64_t channel = chunk * QUAD, left = head_dim - channel;
    const int64_t column = channel / plane->dim;
    const __mmask16 lows = left >= 16 ? 0xffff : (1u << left) - 1;
    const __mmask16 highs = left >= 32 ? 0xffff : left <= 16 ? 0 : (1u << (left - 16)) - 1;
    const __m512i evens =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    /* Which of a token's codes each quad has, and where its words begin. */
    uint8_t which[16] = {0};
    int64_t begins[CHUNK];
    for (int64_t i = 0; i < CHUNK; i++) {
        which[i] = (uint8_t)(((channel + i * QUAD) / plane->dim - column) * stages);
        begins[i] = words_of(books, plane, chunk + i, 0) - books;
    }
    const __m128i order = _mm_loadu_si128((const __m128i *)which);
    const __m512i begin = _mm512_loadu_si512(begins);
    __m512 even[ROWS], odd[ROWS];
    for (int r = 0; r < rows; r++) {
        const float *sum = sums + (row + r) * head_dim + channel;
        const __m512 shrink = _mm512_set1_ps(w->shrink[row + r]);
        const __m512 low = _mm512_maskz_loadu_ps(lows, sum);
        const __m512 high = _mm512_maskz_loadu_ps(highs, sum + 16);
        even[r] = _mm512_mul_ps(_mm512_permutex2var_ps(low, evens, high), shrink);
        odd[r] = _mm512_mul_ps(_mm512_permutex2var_ps(low, odds, high), shrink);
    }
    for (int64_t t = w->begin; t < w->end; t++) {
        const float *weight = w->scores + row * TILE + t;
        /* Codes of the next token, and 15 bytes after the last one's, may be among these. */
        const __m128i own =
            _mm_loadu_si128((const __m128i *)(codes + t * pitch + column * stages));
        struct halves value;
        for (int64_t s = 0; s < stages; s++) {
            const __m128i chosen =
                _mm_shuffle_epi8(own, _mm_add_epi8(order, _mm_set1_epi8((char)s)));
            __m512i at = _mm512_cvtepu8_epi64(chosen);
            at = _mm512_add_epi64(width == 2 ? _mm512_add_epi64(at, at) : at, begin);
            const struct halves words = words_at(books + s * 256 * width, at);
            value = s == 0 ? words : added(value, words);
        }
        for (int r = 0; r < rows; r++) {
            const __m512 own_weight = _mm512_set1_ps(weight[r * TILE]);
            even[r] = _mm512_fmadd_ps(value.even, own_weight, even[r]);
            odd[r] = _mm512_fmadd_ps(value.odd, own_weight, odd[r]);
        }
    }
    const __m512i lower =
        _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    for (int r = 0; r < rows; r++) {
        float *sum = sums + (row + r) * head_dim + channel;
        _mm512_mask_storeu_ps(sum, lows, _mm512_permutex2var_ps(even[r], lower, odd[r]));
        _mm512_mask_storeu_ps(sum + 16, highs, _mm512_permutex2var_ps(even[r], upper, odd[r]));
    }
}

TARGET void scores_gather(struct work *w, int64_t tokens)
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
#define ANY(rows) SCORE(rows, 0, stages, width)
            if (turned && stages == 1 && width == 1)
                FOR_ROWS(a->rows - row, TURNED_SINGLE)
            else if (turned && stages == 1)
                FOR_ROWS(a->rows - row, TURNED_WIDE)
            else if (turned)
                FOR_ROWS(a->rows - row, TURNED)
            else
                FOR_ROWS(a->rows - row, ANY)
#undef ANY
        }
}

TARGET void sums_gather(struct work *w, const struct plane *plane, const uint8_t *codes,
                        float *sums)
{
    const struct attention *a = w->a;
    const struct pieces p = pieces_of(w);
    const word *books = plane == &a->keys ? p.keys : p.values;
    const int64_t stages = plane->stages, width = width_of(plane);
    for (int64_t chunk = 0; chunk < a->head_dim / QUAD; chunk += CHUNK)
        for (int64_t row = 0; row < a->rows;) {
#define SUM(rows, stages, width) \
    sum_chunk(w, plane, books, codes, row, rows, chunk, stages, width, sums)
#define SINGLE(rows) SUM(rows, 1, 1)
#define WIDE(rows) SUM(rows, 1, 2)
#define ANY(rows) SUM(rows, stages, width)
            if (stages == 1 && width == 1)
                FOR_ROWS(a->rows - row, SINGLE)
            else if (stages == 1)
                FOR_ROWS(a->rows - row, WIDE)
            else
                FOR_ROWS(a->rows - row, ANY)
        }
}

const struct kernel attend_gather = {prepare_gather, queries_gather, scores_gather, softmax_avx512,
                                     sums_gather};

#endif
