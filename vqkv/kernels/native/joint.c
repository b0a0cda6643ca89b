/* Codes of a unit's groups chosen together, as errors of groups add up or cancel in a metric. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Vectors at a time: their errors stay in the caches while all groups pass by. */
#define ROWS 128

int vqkv_nearest(int level, const float *x, const float *words, int64_t subspaces, int64_t size,
                 int64_t dim, int64_t begin, int64_t end, int32_t *codes);

/* Scratch for one unit of some vectors, a column being one of them. */
struct work {
    float *errors;  /* [n, ROWS] */
    float *target;  /* [d, ROWS] */
    float *gathered; /* [ROWS, d]: the targets, row by row */
    int32_t *found; /* [ROWS] */
};

/* What the words of group g are to be near to: x less what the other groups' errors push. `metric`
 * is [n, n]; `x` is the group's part of the first vector, the next one's is `stride` further. */
static void set_target(const struct work *w, const float *x, int64_t stride, const float *metric,
                       int64_t channels, int64_t group, int64_t dim, int64_t rows)
{
    for (int64_t j = 0; j < dim; j++)
        for (int64_t r = 0; r < rows; r++)
            w->target[j * ROWS + r] = x[r * stride + j];
    for (int64_t i = 0; i < channels; i++) {
        if (i / dim == group)
            continue;
        const float *restrict error = w->errors + i * ROWS;
        for (int64_t j = 0; j < dim; j++) {
            const float weight = metric[i * channels + group * dim + j];
            float *restrict target = w->target + j * ROWS;
            for (int64_t r = 0; r < ROWS; r++)
                target[r] -= weight * error[r];
        }
    }
    for (int64_t j = 0; j < dim; j++)
        for (int64_t r = 0; r < rows; r++)
            w->gathered[r * dim + j] = w->target[j * ROWS + r];
}

/* Codes [N, U, G] of rows `begin` to `end` of x [N, U, G, d] in words [U, G, K, d], in the metric
 * [U, n, n], n = G d, whose diagonal blocks of d are taken as ones; all contiguous. Returns 0, or -1
 * where memory ran out. */
int vqkv_joint(int level, const float *x, const float *words, const float *metric, int64_t units,
               int64_t groups, int64_t size, int64_t dim, int64_t sweeps, int64_t begin,
               int64_t end, int32_t *codes)
{
    const int64_t channels = groups * dim, stride = units * channels;
    float *memory = malloc((size_t)((channels + 2 * dim + 1) * ROWS) * sizeof(float));
    if (memory == NULL)
        return -1;
    const struct work w = {memory, memory + channels * ROWS, memory + (channels + dim) * ROWS,
                           (int32_t *)(memory + (channels + 2 * dim) * ROWS)};
    int failed = 0;
    for (int64_t first = begin; first < end && !failed; first += ROWS) {
        const int64_t rows = end - first < ROWS ? end - first : ROWS;
        for (int64_t u = 0; u < units; u++) {
            memset(w.errors, 0, channels * ROWS * sizeof(float));
            memset(w.target, 0, dim * ROWS * sizeof(float));
            for (int64_t step = 0; step < sweeps * groups && !failed; step++) {
                const int64_t g = step % groups, book = u * groups + g;
                const float *part = x + first * stride + book * dim;
                const float *own = words + book * size * dim;
                set_target(&w, part, stride, metric + u * channels * channels, channels, g, dim,
                           rows);
                failed = vqkv_nearest(level, w.gathered, own, 1, size, dim, 0, rows, w.found);
                for (int64_t r = 0; r < rows && !failed; r++) {
                    codes[(first + r) * units * groups + book] = w.found[r];
                    for (int64_t j = 0; j < dim; j++)
                        w.errors[(g * dim + j) * ROWS + r] =
                            own[w.found[r] * dim + j] - part[r * stride + j];
                }
            }
        }
    }
    free(memory);
    return failed;
}
