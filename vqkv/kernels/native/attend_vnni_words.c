/* Attention on codes by whole numbers (attend_vnni.h): codewords as such. */

#include <math.h>
#include <string.h>

#include "attend_vnni.h"

#ifdef HAVE_X86

#define TARGET VNNI_TARGET

/* A channel of 16 codewords from codeword k; zeros beyond the last. */
INLINE TARGET __m512 channel_at(const float *words, int64_t dim, int64_t k, int64_t size)
{
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __mmask16 some = size - k >= 16 ? 0xffff : (1u << (size - k)) - 1;
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some,
                                    _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)dim)),
                                    words + k * dim, sizeof(float));
}

/* Of each channel of a stage's codewords [size, dim] the largest number, added to `sums`; NaN if any number
 * is not finite. */
static TARGET void add_largest(const float *words, int64_t size, int64_t dim, float *sums)
{
    for (int64_t i = 0; i < dim; i++) {
        __m512 most = _mm512_setzero_ps(), none = most;
        for (int64_t k = 0; k < size; k += 16) {
            const __m512 numbers = channel_at(words + i, dim, k, size);
            most = _mm512_max_ps(most, _mm512_abs_ps(numbers));
            none = _mm512_fmadd_ps(numbers, _mm512_setzero_ps(), none);
        }
        sums[i] += _mm512_reduce_max_ps(most) + _mm512_reduce_add_ps(none);
    }
}

/* The same where 16 numbers are whole codewords. */
static TARGET void add_largest_of_all(const float *words, int64_t size, int64_t dim, float *sums)
{
    __m512 most = _mm512_setzero_ps(), none = most;
    for (int64_t i = 0; i < size * dim; i += 16) {
        const __m512 numbers = _mm512_loadu_ps(words + i);
        most = _mm512_max_ps(most, _mm512_abs_ps(numbers));
        none = _mm512_fmadd_ps(numbers, _mm512_setzero_ps(), none);
    }
    float largest[16], nothing[16];
    _mm512_storeu_ps(largest, most);
    _mm512_storeu_ps(nothing, none);
    for (int64_t i = 0; i < 16; i++)
        largest[i % dim] = fmaxf(largest[i % dim], largest[i]);
    for (int64_t i = 0; i < 16; i++)
        largest[i % dim] += nothing[i];
    for (int64_t i = 0; i < dim; i++)
        sums[i] += largest[i];
}

/* A channel of a stage's codewords as bytes, in so many steps. */
static TARGET void write_bytes(const float *words, int64_t size, int64_t dim, float steps,
                               struct bytes *to)
{
    for (int64_t k = 0; k < size; k += 16) {
        const __m512i whole = _mm512_cvtps_epi32(
            _mm512_mul_ps(channel_at(words, dim, k, size), _mm512_set1_ps(steps)));
        _mm_storeu_si128((__m128i *)(to->high + k),
                         _mm512_cvtepi32_epi8(_mm512_srai_epi32(whole, 8)));
        _mm_storeu_si128((__m128i *)(to->low + k), _mm512_cvtepi32_epi8(whole));
    }
}

/* Low bytes of 64 numbers. */
INLINE TARGET __m512i low_bytes(const __m512i numbers[4])
{
    __m512i bytes = _mm512_castsi128_si512(_mm512_cvtepi32_epi8(numbers[0]));
    bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(numbers[1]), 1);
    bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(numbers[2]), 2);
    return _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(numbers[3]), 3);
}

/* The same of all channels, where 64 numbers are whole codewords, with the channels' steps 16 at a
 * time; their tables are `apart`. Constant where this is inlined, in the cases that matter most: `dim`. */
INLINE TARGET void write_all_bytes(const float *words, int64_t size, int64_t dim, __m512 steps,
                                   struct bytes *to, int64_t apart)
{
    const int64_t count = 64 / dim; /* codewords */
    uint8_t source[64], high[64], low[64];
    for (int64_t i = 0; i < 64; i++)
        source[i] = (uint8_t)(i % count * dim + i / count);
    const __m512i order = _mm512_loadu_si512(source);
    for (int64_t k = 0; k < size; k += count, words += 64) {
        __m512i lows[4], highs[4];
        for (int i = 0; i < 4; i++) {
            lows[i] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(words + 16 * i), steps));
            highs[i] = _mm512_srai_epi32(lows[i], 8);
        }
        _mm512_storeu_si512(high, _mm512_permutexvar_epi8(order, low_bytes(highs)));
        _mm512_storeu_si512(low, _mm512_permutexvar_epi8(order, low_bytes(lows)));
        for (int64_t i = 0; i < dim; i++) {
            memcpy(to[i * apart].high + k, high + i * count, count);
            memcpy(to[i * apart].low + k, low + i * count, count);
        }
    }
}

TARGET void tabulate_vnni(const struct plane *plane, int64_t head, int turned, int limit,
                          struct whole_words to)
{
    const int64_t stages = plane->stages, size = plane->size, dim = plane->dim;
    const int64_t channels = plane->groups * dim, stage_floats = size * dim;
    const float *words = plane->words + head * channels * stages * size;
    const int together = 16 % dim == 0 && stage_floats % 64 == 0;
    memset(to.scales, 0, channels * sizeof(float));
    for (int64_t m = 0; m < plane->groups; m++)
        for (int64_t s = 0; s < stages; s++) {
            const float *own = words + (m * stages + s) * stage_floats;
            if (together)
                add_largest_of_all(own, size, dim, to.scales + m * dim);
            else
                add_largest(own, size, dim, to.scales + m * dim);
        }
    for (int64_t c = 0; turned && c < channels; c += 2)
        to.scales[c] = to.scales[c + 1] = hypotf(to.scales[c], to.scales[c + 1]);
    for (int64_t m = 0; m < plane->groups; m++) {
        float steps[16];
        for (int64_t i = 0; together && i < 16; i++) {
            const float scale = to.scales[m * dim + i % dim];
            steps[i] = scale > 0.0f ? (float)limit / scale : 0.0f;
        }
        for (int64_t s = 0; s < stages; s++) {
            const float *own = words + (m * stages + s) * stage_floats;
            struct bytes *tables = to.tables + m * dim * stages + s;
#define TOGETHER(d) write_all_bytes(own, size, d, _mm512_loadu_ps(steps), tables, stages)
            if (together && dim == 4)
                TOGETHER(4);
            else if (together && dim == 8)
                TOGETHER(8);
            else if (together)
                TOGETHER(dim);
#undef TOGETHER
            for (int64_t i = 0; !together && i < dim; i++) {
                const float scale = to.scales[m * dim + i];
                write_bytes(own + i, size, dim, scale > 0.0f ? (float)limit / scale : 0.0f,
                            tables + i * stages);
            }
        }
    }
    for (int64_t c = 0; c < channels; c++)
        to.scales[c] /= (float)limit;
}

#endif
