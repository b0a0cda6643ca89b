/* Codes of codewords that add up, several partial sums of every vector being kept at a time. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "beam.h"
#include "levels.h"

/* Of the widest level. */
#define LANES 16
/* Vectors at a time: a stage's codewords stay in the caches while all of them pass by. */
#define ROWS 32

/* Take a continuation if it is a number and among the best. */
INLINE void offer(struct found *f, float score, int64_t parent, int64_t code)
{
    if (!(score < (f->count < f->wanted ? INFINITY : f->scores[f->worst])))
        return;
    const int64_t place = f->count < f->wanted ? f->count++ : f->worst;
    f->scores[place] = score;
    f->parents[place] = (int32_t)parent;
    f->codes[place] = (int32_t)code;
    if (f->count < f->wanted)
        return;
    f->worst = 0;
    for (int64_t i = 1; i < f->count; i++)
        if (f->scores[i] > f->scores[f->worst])
            f->worst = i;
}

/* The least number that as many of these are at most as are wanted; infinity where there are not so
 * many. What was found so far is lost. */
static float wanted_least(const float *numbers, int64_t count, struct found *f)
{
    float *const sorted = f->scores;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) {
        if (kept == f->wanted && !(numbers[i] < sorted[kept - 1]))
            continue;
        int64_t at = kept < f->wanted ? kept++ : kept - 1;
        for (; at > 0 && numbers[i] < sorted[at - 1]; at--)
            sorted[at] = sorted[at - 1];
        sorted[at] = numbers[i];
    }
    return kept == f->wanted ? sorted[kept - 1] : INFINITY;
}

#define IMPL "beam_impl.h"
#include "each_level.h"

extend_fn vqkv_extend_of(int level)
{
    return AT_LEVEL(level, extend);
}

/* Codes [N, M, S] of rows `begin` to `end` of x [N, M, d] in codewords c [M, S, K, d]; all
 * contiguous. `words` [M, S, d, room] are −2 c and `norms` [M, S, room] their squares, infinite
 * beyond K; room is a multiple of 16. Returns 0, or -1 where memory ran out. */
int vqkv_beam(int level, const float *x, const float *codewords, const float *words,
              const float *norms, int64_t books, int64_t stages, int64_t size, int64_t room,
              int64_t dim, int64_t width, int64_t begin, int64_t end, int32_t *codes)
{
    const extend_fn extended = vqkv_extend_of(level);
    void (*const left_over)(const float *, const float *, int64_t, float *) =
        AT_LEVEL(level, leave);
    const size_t kept_sums = 2 * ROWS * (size_t)width;
    float *numbers = malloc((kept_sums * (dim + 1) + width * (room + LANES + 1)) * sizeof(float));
    int32_t *integers = malloc((kept_sums * stages + 2 * width) * sizeof(int32_t));
    if (numbers == NULL || integers == NULL) {
        free(numbers);
        free(integers);
        return -1;
    }
    float *const scratch = numbers, *const scores = scratch + width * (room + LANES);
    struct sums kept[2][ROWS];
    for (int64_t i = 0; i < 2 * ROWS; i++)
        kept[i / ROWS][i % ROWS] =
            (struct sums){scores + i * width, scores + kept_sums + i * width * dim,
                          integers + i * width * stages, 0};
    struct found f = {.scores = scores + kept_sums * (dim + 1),
                      .parents = integers + kept_sums * stages};
    f.codes = f.parents + width;
    for (int64_t first = begin; first < end; first += ROWS) {
        const int64_t rows = end - first < ROWS ? end - first : ROWS;
        for (int64_t m = 0; m < books; m++) {
            for (int64_t r = 0; r < rows; r++) {
                kept[0][r].count = 1;
                kept[0][r].scores[0] = 0;
                memcpy(kept[0][r].residuals, x + ((first + r) * books + m) * dim,
                       (size_t)dim * sizeof(float));
            }
            for (int64_t s = 0; s < stages; s++) {
                const int64_t stage = m * stages + s;
                for (int64_t r = 0; r < rows; r++) {
                    const struct sums *before = &kept[s % 2][r];
                    struct sums *after = &kept[(s + 1) % 2][r];
                    const int64_t all = before->count * size;
                    f.wanted = s + 1 == stages ? 1 : all < width ? all : width;
                    f.count = f.worst = 0;
                    extended(before, words + stage * dim * room, norms + stage * room, dim, room,
                             scratch, &f);
                    if (f.count == 0) { /* no score is a number: any code will do */
                        f.scores[0] = 0;
                        f.parents[0] = f.codes[0] = 0;
                        f.count = 1;
                    }
                    after->count = f.count;
                    for (int64_t i = 0; i < f.count; i++) {
                        const int64_t parent = f.parents[i], code = f.codes[i];
                        after->scores[i] = f.scores[i];
                        memcpy(after->codes + i * stages, before->codes + parent * stages,
                               (size_t)s * sizeof(int32_t));
                        after->codes[i * stages + s] = (int32_t)code;
                        left_over(before->residuals + parent * dim,
                                  codewords + (stage * size + code) * dim, dim,
                                  after->residuals + i * dim);
                    }
                }
            }
            for (int64_t r = 0; r < rows; r++)
                memcpy(codes + ((first + r) * books + m) * stages, kept[stages % 2][r].codes,
                       (size_t)stages * sizeof(int32_t));
        }
    }
    free(numbers);
    free(integers);
    return 0;
}
