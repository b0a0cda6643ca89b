/* Codes to vectors: look up one codeword per stage and add them up. */

#include <stdint.h>
#include <string.h>

#include "levels.h"

/* Rows [begin, end) of vectors [N, M, d]. `dim` and `stages` are constants where that helps. */
INLINE int decode_rows(const int32_t *codes, const float *words, int64_t books, int64_t stages,
                       int64_t size, int64_t dim, int64_t begin, int64_t end, float *vectors)
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
                    memcpy(vector, word, dim * sizeof(float));
                else
                    for (int64_t j = 0; j < dim; j++)
                        vector[j] += word[j];
            }
        }
    return failed;
}

/* Rows `begin` to `end` of vectors [N, M, d] of codes [N, M, S] in words [M, S, K, d], all
 * contiguous. Returns 1 where a code names no codeword, else 0. */
int vqkv_decode(const int32_t *codes, const float *words, int64_t books, int64_t stages,
                int64_t size, int64_t dim, int64_t begin, int64_t end, float *vectors)
{
#define ROWS(stages, dim) \
    decode_rows(codes, words, books, stages, size, dim, begin, end, vectors)
    switch (stages == 1 ? dim : 0) {
    case 1: return ROWS(1, 1);
    case 2: return ROWS(1, 2);
    case 4: return ROWS(1, 4);
    case 8: return ROWS(1, 8);
    default: return ROWS(stages, dim);
    }
}
