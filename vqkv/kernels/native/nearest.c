/* Nearest codewords and k-means statistics on CPUs: AVX-512, AVX2 or the baseline, chosen at run time.
 */

#include "nearest.h"

#include <math.h>
#include <stdlib.h>

#include "levels.h"

/* Rows whose subvectors are searched subspace by subspace while they lie in the L2 cache. */
#define BLOCK_ROWS 512
#define MAX_LANES 64
/* Codewords of which only the least score is kept. */
#define BLOCK 16

#define NAME(x) x##_baseline
#define W 4
#define UNROLL 4
#include "nearest_impl.h"

#ifdef HAVE_X86

#define NAME(x) x##_avx2
#define W 8
#define UNROLL 2
#include "nearest_impl.h"

#define NAME(x) x##_avx512
#define W 16
#define UNROLL 4
#include "nearest_impl.h"

#endif

search_fn vqkv_search_of(int level)
{
#ifdef HAVE_X86
    if (level >= AVX512)
        return search_rows_avx512;
    if (level == AVX2)
        return search_rows_avx2;
#endif
    (void)level;
    return search_rows_baseline;
}

int64_t vqkv_word_blocks(int64_t size)
{
    return (size + BLOCK - 1) / BLOCK;
}

int64_t vqkv_arranged_floats(int64_t size, int64_t dim)
{
    return vqkv_word_blocks(size) * (dim + 1) * BLOCK;
}

int64_t vqkv_search_scratch(int64_t dim)
{
    return dim * MAX_LANES;
}

void vqkv_arrange(const float *words, int64_t size, int64_t dim, float *book)
{
    for (int64_t k = 0; k < vqkv_word_blocks(size) * BLOCK; k++) {
        float *to = book + k / BLOCK * (dim + 1) * BLOCK + k % BLOCK;
        float square = 0.0f;
        for (int64_t j = 0; j < dim; j++) {
            const float channel = k < size ? words[k * dim + j] : 0.0f;
            to[j * BLOCK] = channel;
            square += channel * channel;
        }
        to[dim * BLOCK] = k < size ? square / 2 : INFINITY;
    }
}

/* Codes [N, M] of rows `begin` to `end` of x [N, M, d] in words [M, K, d], both contiguous. Returns
 * 0, or -1 where memory ran out. */
int vqkv_nearest(int level, const float *x, const float *words, int64_t subspaces, int64_t size,
                 int64_t dim, int64_t begin, int64_t end, int32_t *codes)
{
    const search_fn search = vqkv_search_of(level);
    const int64_t blocks = vqkv_word_blocks(size), floats = vqkv_arranged_floats(size, dim);
    float *books = malloc((size_t)(subspaces * floats + vqkv_search_scratch(dim)) * sizeof(float));
    if (books == NULL)
        return -1;
    for (int64_t m = 0; m < subspaces; m++)
        vqkv_arrange(words + m * size * dim, size, dim, books + m * floats);
    for (int64_t first = begin; first < end; first += BLOCK_ROWS) {
        const int64_t rows = end - first < BLOCK_ROWS ? end - first : BLOCK_ROWS;
        for (int64_t m = 0; m < subspaces; m++)
            search(x + (first * subspaces + m) * dim, subspaces * dim, rows, books + m * floats,
                   blocks, dim, codes + first * subspaces + m, subspaces,
                   books + subspaces * floats);
    }
    free(books);
    return 0;
}

/* Adds rows `begin` to `end` to k-means statistics, given their codes: sums [M, K, d], counts
 * [M, K] and inertia [M]. weights [N, M] may be NULL for ones. */
void vqkv_accumulate(const float *x, const float *words, const int32_t *codes, const float *weights,
                     int64_t subspaces, int64_t size, int64_t dim, int64_t begin, int64_t end,
                     double *sums, double *counts, double *inertia)
{
    for (int64_t n = begin; n < end; n++)
        for (int64_t m = 0; m < subspaces; m++) {
            const int64_t at = n * subspaces + m;
            const double weight = weights == NULL ? 1.0 : weights[at];
            const float *row = x + at * dim;
            const int64_t book = m * size + codes[at];
            const float *word = words + book * dim;
            double *sum = sums + book * dim;
            double distance = 0.0;
            for (int64_t j = 0; j < dim; j++) {
                const double gap = (double)row[j] - word[j];
                distance += gap * gap;
                sum[j] += weight * row[j];
            }
            counts[book] += weight;
            inertia[m] += weight * distance;
        }
}
