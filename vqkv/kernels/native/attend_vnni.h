/* What attend_vnni*.c share: codewords as whole numbers of 16 bits, whose bytes are looked up in
 * registers (VBMI), and which are multiplied in pairs (VNNI).
 *
 * A channel's numbers in all codewords have a scale, and are 256 high bytes, which have the sign, and 256
 * low ones.
 */

#ifndef VQKV_ATTEND_VNNI_H
#define VQKV_ATTEND_VNNI_H

#include "attend.h"

#ifdef HAVE_X86

#pragma GCC visibility push(hidden)

#define VNNI_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))

/* A channel's numbers of a stage's codewords. */
struct bytes {
    uint8_t high[256], low[256];
};

/* Codewords of a plane's head. */
struct whole_words {
    struct bytes *tables; /* [D, S] */
    float *scales;        /* [D], alike for two channels that are turned */
};

/* Pieces of `whole`. */
struct whole_pieces {
    struct whole_words keys, values;
    uint8_t *codes;    /* [M S up to a multiple of 16, TILE] */
    int16_t *all_turns; /* [D / 2, 2, PAGE]: cosines and sines, as scores need them */
    int16_t *turns;    /* those of a head, in its order */
    float turn_scale;  /* length of the longest turn */
    float *scaled;     /* [R, P / 16, 2, 16]: queries in steps; P is D / 2 up to a multiple of 16 */
    int32_t *queries;  /* [TILE_PAGES, R, D / 2]: pairs of 16 bits */
    float *units;      /* [R]: of products of queries and keys */
    int32_t *products; /* [R, TILE]: scores as whole numbers */
    int16_t *weights;  /* [R, TILE]: as sums need them */
    float *weight_units; /* [R] */
};

/* A channel of 64 tokens: of the first 8 of every 16, and of the other 8. */
struct numbers {
    __m512i first, second;
};

/* Which of 64 codes lie in the second, third and last quarter of a table. */
struct quarters {
    __mmask64 second, third, last;
};

INLINE VNNI_TARGET struct quarters quarters_of(__m512i codes)
{
    const __mmask64 high = _mm512_movepi8_mask(codes);
    const __mmask64 odd = _mm512_test_epi8_mask(codes, _mm512_set1_epi8(0x40));
    return (struct quarters){_kandn_mask64(high, odd), _kandn_mask64(odd, high),
                             _kand_mask64(high, odd)};
}

/* A byte for each of 64 codes. */
INLINE VNNI_TARGET __m512i bytes_of(const uint8_t *table, __m512i codes, struct quarters q)
{
    __m512i bytes = _mm512_permutexvar_epi8(codes, _mm512_loadu_si512(table));
    bytes = _mm512_mask_permutexvar_epi8(bytes, q.second, codes, _mm512_loadu_si512(table + 64));
    bytes = _mm512_mask_permutexvar_epi8(bytes, q.third, codes, _mm512_loadu_si512(table + 128));
    return _mm512_mask_permutexvar_epi8(bytes, q.last, codes, _mm512_loadu_si512(table + 192));
}

INLINE VNNI_TARGET struct numbers numbers_of(const struct bytes *table, const uint8_t *codes)
{
    const __m512i code = _mm512_loadu_si512(codes);
    const struct quarters q = quarters_of(code);
    const __m512i low = bytes_of(table->low, code, q), high = bytes_of(table->high, code, q);
    return (struct numbers){_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

/* A head's codewords as whole numbers of at most `limit` when stages are added up. Two channels that are
 * `turned` by each other have a scale that does for both. */
void tabulate_vnni(const struct plane *plane, int64_t head, int turned, int limit,
                   struct whole_words to);

#pragma GCC visibility pop

#endif

#endif
