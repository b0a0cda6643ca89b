/* Vectors of W floats (V) and as many int32 (I) for what follows, W being 4, 8 (AVX2) or 16
 * (AVX-512); TARGET is the attribute of a function that has them. Included once per level, without a
 * guard; lanes_end.h takes all of it back.
 *
 *   V_FMA(a, b, c) = a*b + c                     V_FNMA(a, b, c) = c - a*b
 *   V_MIN(a, b) = a < b ? a : b
 *   V_EQUAL(a, b), V_AT_MOST(a, b): bits of the lanes where a == b, a <= b
 *   V_KEEP_LESS(best, at, score, k): where score < best, take score and k
 */

#include "quads.h"

#if W == 4

#define TARGET
#define V quad
#define I quad_of_int
#define V_LOAD(p) load_quad(p)
#define V_STORE(p, a) store_quad(p, a)
#define V_SET1(a) all_of(a)
#define V_ADD(a, b) ((a) + (b))
#define V_SUB(a, b) ((a) - (b))
#define V_MUL(a, b) ((a) * (b))
#define V_FMA(a, b, c) ((a) * (b) + (c))
#define V_FNMA(a, b, c) ((c) - (a) * (b))
#define V_MIN(a, b) least_of_quads(a, b)
#define V_EQUAL(a, b) bits_of((a) == (b))
#define V_AT_MOST(a, b) bits_of((a) <= (b))
#define V_KEEP_LESS(best, at, score, k) \
    do { \
        const quad_of_int less_ = (score) < (best); \
        (best) = (quad)chosen(less_, (quad_of_int)(score), (quad_of_int)(best)); \
        (at) = chosen(less_, k, at); \
    } while (0)
#define I_SET1(a) ((quad_of_int){a, a, a, a})
#define I_STORE(p, a) memcpy(p, &(a), sizeof(quad_of_int))

#elif W == 8

#define TARGET __attribute__((target("avx2,fma")))
#define V __m256
#define I __m256i
#define V_LOAD(p) _mm256_loadu_ps(p)
#define V_STORE(p, a) _mm256_storeu_ps(p, a)
#define V_SET1(a) _mm256_set1_ps(a)
#define V_ADD(a, b) _mm256_add_ps(a, b)
#define V_SUB(a, b) _mm256_sub_ps(a, b)
#define V_MUL(a, b) _mm256_mul_ps(a, b)
#define V_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define V_FNMA(a, b, c) _mm256_fnmadd_ps(a, b, c)
#define V_MIN(a, b) _mm256_min_ps(a, b)
#define V_EQUAL(a, b) (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ))
#define V_AT_MOST(a, b) (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ))
#define V_KEEP_LESS(best, at, score, k) \
    do { \
        const __m256 less_ = _mm256_cmp_ps(score, best, _CMP_LT_OQ); \
        (best) = _mm256_blendv_ps(best, score, less_); \
        (at) = _mm256_blendv_epi8(at, k, _mm256_castps_si256(less_)); \
    } while (0)
#define I_SET1(a) _mm256_set1_epi32(a)
#define I_STORE(p, a) _mm256_storeu_si256((__m256i *)(p), a)

#else

#define TARGET __attribute__((target("avx512f")))
#define V __m512
#define I __m512i
#define V_LOAD(p) _mm512_loadu_ps(p)
#define V_STORE(p, a) _mm512_storeu_ps(p, a)
#define V_SET1(a) _mm512_set1_ps(a)
#define V_ADD(a, b) _mm512_add_ps(a, b)
#define V_SUB(a, b) _mm512_sub_ps(a, b)
#define V_MUL(a, b) _mm512_mul_ps(a, b)
#define V_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define V_FNMA(a, b, c) _mm512_fnmadd_ps(a, b, c)
#define V_MIN(a, b) _mm512_min_ps(a, b)
#define V_EQUAL(a, b) _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ)
#define V_AT_MOST(a, b) _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ)
#define V_KEEP_LESS(best, at, score, k) \
    do { \
        const __mmask16 less_ = _mm512_cmp_ps_mask(score, best, _CMP_LT_OQ); \
        (best) = _mm512_mask_mov_ps(best, less_, score); \
        (at) = _mm512_mask_mov_epi32(at, less_, k); \
    } while (0)
#define I_SET1(a) _mm512_set1_epi32(a)
#define I_STORE(p, a) _mm512_storeu_si512(p, a)

#endif
