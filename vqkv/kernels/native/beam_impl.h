/* Scores of sums, W codes at a time; included once per level, with NAME and W. */

#include "lanes.h"

/* Rows that share what is loaded of the codewords. */
#define TOGETHER 4

/* What each code of a stage adds to the score of nothing: [rows, room]. Of the rows of x, the next
 * one is `stride` further. */
TARGET static void NAME(starts)(const float *x, int64_t stride, const float *words,
                                const float *norms, int64_t rows, int64_t dim, int64_t room,
                                float *scores)
{
    for (int64_t r = 0; r < rows; r += TOGETHER) {
        const float *row[TOGETHER];
        int64_t to[TOGETHER];
        for (int64_t i = 0; i < TOGETHER; i++) {
            to[i] = r + i < rows ? r + i : rows - 1; /* the last row again, where there is no other */
            row[i] = x + to[i] * stride;
        }
        for (int64_t v = 0; v < room; v += W) {
            const V norm = V_LOAD(norms + v);
            V sum[TOGETHER] = {norm, norm, norm, norm};
            for (int64_t j = 0; j < dim; j++) {
                const V word = V_LOAD(words + j * room + v);
                for (int64_t i = 0; i < TOGETHER; i++)
                    sum[i] = V_FMA(V_SET1(row[i][j]), word, sum[i]);
            }
            for (int64_t i = 0; i < TOGETHER; i++)
                V_STORE(scores + to[i] * room + v, sum[i]);
        }
    }
}

/* Scores of one sum with `vectors` times W codes, the first of which the pointers are at. */
TARGET INLINE V NAME(add_up)(float so_far, const int32_t *codes, const float *start,
                             const float *products, int64_t stage, int64_t size, int64_t room,
                             int vectors, V least, float *scores)
{
    V score[TOGETHER];
    for (int i = 0; i < vectors; i++)
        score[i] = V_ADD(V_SET1(so_far), V_LOAD(start + i * W));
    for (int64_t t = 0; t < stage; t++) {
        const float *row = products + (t * size + codes[t]) * room;
        for (int i = 0; i < vectors; i++)
            score[i] = V_ADD(score[i], V_LOAD(row + i * W));
    }
    for (int i = 0; i < vectors; i++) {
        least = V_MIN(score[i], least);
        V_STORE(scores + i * W, score[i]);
    }
    return least;
}

/* The best of all sums with each code of one more stage. `products` are those of that stage's
 * codewords with codewords of the stages before, [stage, size, room]; scratch is [count, room]. */
TARGET static void NAME(extend)(const struct sums *before, const float *start,
                                const float *products, int64_t stage, int64_t stages, int64_t size,
                                int64_t room, float *scratch, struct found *f)
{
    V least = V_SET1(FAR);
    for (int64_t p = 0; p < before->count; p++) {
        const float so_far = before->scores[p];
        const int32_t *codes = before->codes + p * stages;
        float *scores = scratch + p * room;
        int64_t v = 0;
        for (; v + TOGETHER * W <= room; v += TOGETHER * W)
            least = NAME(add_up)(so_far, codes, start + v, products + v, stage, size, room,
                                 TOGETHER, least, scores + v);
        for (; v < room; v += W)
            least = NAME(add_up)(so_far, codes, start + v, products + v, stage, size, room, 1,
                                 least, scores + v);
    }
    /* Lanes share no score, so as many as are wanted are no more than the wanted'th least minimum
     * of a lane: few others pass this bar. */
    f->bar = FAR;
    if (f->wanted <= W) {
        float minima[W], bar = -FAR;
        V_STORE(minima, least);
        for (int i = 0; i < W; i++)
            if (__builtin_popcount(V_LESS(least, V_SET1(minima[i]))) < f->wanted && minima[i] > bar)
                bar = minima[i];
        f->bar = nextafterf(bar, FAR);
    }
    for (int64_t i = 0; i < before->count * room; i += W)
        for (uint32_t bits = V_LESS(V_LOAD(scratch + i), V_SET1(f->bar)); bits; bits &= bits - 1) {
            const int64_t at = i + __builtin_ctz(bits);
            offer(f, scratch[at], at / room, at % room);
        }
}

#undef TOGETHER
#include "lanes_end.h"
