/* Codes to vectors: look up one codeword per stage and add them up. */

#include <stdint.h>
#include <string.h>

#include "levels.h"

/* Bytes of output beyond which it goes past the caches: it would not stay there, and its memory
 * would be read before it is written. */
#define STREAMED (8 << 20)

INLINE void copy(float *to, const float *from, int64_t dim, int streamed)
{
#ifdef HAVE_X86
    if (streamed) {
        for (int64_t j = 0; j < dim; j += 4)
            _mm_stream_ps(to + j, _mm_loadu_ps(from + j));
        return;
    }
#endif
    (void)streamed;
    memcpy(to, from, dim * sizeof(float));
}

/* Rows [begin, end) of vectors [N, M, d]. All but the rows are constants where that helps;
 * `streamed` needs one stage, whole fours of channels and a multiple of 16 as address. */
INLINE int decode_rows(const int32_t *codes, const float *words, int64_t books, int64_t stages,
                       int64_t size, int64_t dim, int streamed, int64_t begin, int64_t end,
                       float *vectors)
{
    int failed = 0;
    for (int64_t n = begin; n < end; n++)
        for (int64_t m = 0; m < books; m++) {
            float *restrict vector = vectors + (n * books + m) * dim;
            for (int64_t s = 0; s < stages; s++) {
                const int64_t book = m * stages + s;
                const uint32_t given = (uint32_t)codes[n * books * stages + book];
                const uint32_t code = given < size ? given : 0;
                const float *word = words + (book * size + code) * dim;
                failed |= code != given;
                if (s == 0)
                    copy(vector, word, dim, streamed);
                else
                    for (int64_t j = 0; j < dim; j++)
                        vector[j] += word[j];
            }
        }
#ifdef HAVE_X86
    if (streamed)
        _mm_sfence();
#endif
    return failed;
}

/* Rows `begin` to `end` of vectors [N, M, d] of codes [N, M, S] in words [M, S, K, d], all
 * contiguous. Returns 1 where a code names no codeword, else 0. */
int vqkv_decode(const int32_t *codes, const float *words, int64_t books, int64_t stages,
                int64_t size, int64_t dim, int64_t begin, int64_t end, float *vectors)
{
#define ROWS(stages, dim, streamed) \
    decode_rows(codes, words, books, stages, size, dim, streamed, begin, end, vectors)
    const int64_t bytes = (end - begin) * books * dim * (int64_t)sizeof(float);
    const int streamed = bytes > STREAMED && (uintptr_t)vectors % 16 == 0;
    switch (stages == 1 ? dim : 0) {
    case 1: return ROWS(1, 1, 0);
    case 2: return ROWS(1, 2, 0);
    case 4: return streamed ? ROWS(1, 4, 1) : ROWS(1, 4, 0);
    case 8: return streamed ? ROWS(1, 8, 1) : ROWS(1, 8, 0);
    default: return ROWS(stages, dim, 0);
    }
}
