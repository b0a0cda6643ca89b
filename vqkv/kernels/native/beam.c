/* Codes of codewords that add up, several partial sums of every vector being kept at a time. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "levels.h"

/* Vectors at a time: products of a stage's codewords stay in the caches while all of them pass by. */
#define ROWS 64

/* One vector's sums after some stages, in no order. */
struct sums {
    float *scores;  /* [width]: squared distances, less the vector's own square */
    int32_t *codes; /* [width, S] */
    int64_t count;
};

/* More than any score that is taken. */
#define FAR 1e30f

/* The best continuations so far of one vector's sums, in no order. */
struct found {
    float *scores;    /* [wanted] */
    int32_t *parents; /* [wanted] */
    int32_t *codes;   /* [wanted] */
    int64_t count, wanted;
    int64_t worst; /* of them, once there are as many as are wanted */
    float bar;     /* what the score of any other must be less than */
};

/* Take a continuation if it is among the best; among equals the first stays. */
INLINE void offer(struct found *f, float score, int64_t parent, int64_t code)
{
    if (!(score < f->bar))
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
    f->bar = f->scores[f->worst];
}

#define NAME(x) x##_scalar
#define W 1
#include "beam_impl.h"

#ifdef HAVE_X86

#define NAME(x) x##_avx2
#define W 8
#include "beam_impl.h"

#define NAME(x) x##_avx512
#define W 16
#include "beam_impl.h"

#endif

typedef void starts(const float *x, int64_t stride, const float *words, const float *norms,
                    int64_t rows, int64_t dim, int64_t room, float *scores);
typedef void extend(const struct sums *before, const float *start, const float *products,
                    int64_t stage, int64_t stages, int64_t size, int64_t room, float *scratch,
                    struct found *f);

/* What was found becomes a vector's sums: codes of the parents, and one more. */
static void take(const struct found *f, const struct sums *before, int64_t stage, int64_t stages,
                 struct sums *after)
{
    after->count = f->count;
    for (int64_t i = 0; i < f->count; i++) {
        int32_t *codes = after->codes + i * stages;
        memcpy(codes, before->codes + f->parents[i] * stages, (size_t)stage * sizeof(int32_t));
        codes[stage] = f->codes[i];
        after->scores[i] = f->scores[i];
    }
}

/* Codes [N, M, S] of rows `begin` to `end` of x [N, M, d]. Of codewords c of which a codebook has
 * [S, K]: `words` [M, S, d, room] are −2 c, `norms` [M, S, room] their squares, huge beyond K, and
 * `products` [M, K (0 + … + S − 1), room] twice those of a stage's with all of the stages' before,
 * for stage after stage. Returns 0, or -1 where memory ran out. */
int vqkv_beam(int level, const float *x, const float *words, const float *norms,
              const float *products, int64_t books, int64_t stages, int64_t size, int64_t room,
              int64_t dim, int64_t width, int64_t begin, int64_t end, int32_t *codes)
{
    starts *start_scores = starts_scalar;
    extend *extended = extend_scalar;
#ifdef HAVE_X86
    if (level >= AVX2) {
        start_scores = level >= AVX512 ? starts_avx512 : starts_avx2;
        extended = level >= AVX512 ? extend_avx512 : extend_avx2;
    }
#endif
    float *numbers = malloc((size_t)((ROWS + width) * room + (2 * ROWS + 1) * width) * sizeof(float));
    int32_t *integers = malloc((size_t)((2 * ROWS * stages + 2) * width) * sizeof(int32_t));
    if (numbers == NULL || integers == NULL) {
        free(numbers);
        free(integers);
        return -1;
    }
    float *const start = numbers, *const scratch = numbers + ROWS * room;
    float *const scores = scratch + width * room;
    struct found f = {.scores = scores + 2 * ROWS * width,
                      .parents = integers + 2 * ROWS * stages * width};
    f.codes = f.parents + width;
    struct sums kept[2][ROWS];
    for (int64_t i = 0; i < 2 * ROWS; i++)
        kept[i / ROWS][i % ROWS] =
            (struct sums){scores + i * width, integers + i * stages * width, 0};
    const int64_t before_all = size * (stages * (stages - 1) / 2); /* rows of products per codebook */
    for (int64_t first = begin; first < end; first += ROWS) {
        const int64_t rows = end - first < ROWS ? end - first : ROWS;
        for (int64_t m = 0; m < books; m++) {
            const float *table = products + m * before_all * room;
            for (int64_t r = 0; r < rows; r++) {
                kept[0][r].count = 1;
                kept[0][r].scores[0] = 0;
            }
            for (int64_t s = 0; s < stages; s++) {
                const int64_t at = m * stages + s;
                start_scores(x + (first * books + m) * dim, books * dim, words + at * dim * room,
                             norms + at * room, rows, dim, room, start);
                for (int64_t r = 0; r < rows; r++) {
                    const struct sums *before = &kept[s % 2][r];
                    const int64_t all = before->count * size;
                    f.wanted = s + 1 == stages ? 1 : all < width ? all : width;
                    f.count = 0;
                    extended(before, start + r * room, table, s, stages, size, room, scratch, &f);
                    if (f.count == 0) /* no score is a number: any code will do */
                        f.scores[f.count++] = f.parents[0] = f.codes[0] = 0;
                    take(&f, before, s, stages, &kept[(s + 1) % 2][r]);
                }
                table += s * size * room;
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
