/* Scores of sums, W codes at a time; included once per level, with NAME and W. */

#include "lanes.h"

/* Sums that share what is loaded of the codewords. */
#define TOGETHER 4

/* Scores of `sums` sums, TOGETHER at most, with each code of a stage: their own, and
 * ‖c‖² − 2⟨r, c⟩ for what a sum leaves over; and the least of each lane. */
TARGET INLINE void NAME(score)(const float *own, const float *residuals, const float *words,
                               const float *norms, int64_t dim, int64_t room, int sums,
                               float *scores, float *minima)
{
    V least = V_SET1(INFINITY);
    for (int64_t v = 0; v < room; v += W) {
        V score[TOGETHER];
        for (int i = 0; i < sums; i++)
            score[i] = V_ADD(V_SET1(own[i]), V_LOAD(norms + v));
        for (int64_t j = 0; j < dim; j++) {
            const V word = V_LOAD(words + j * room + v);
            for (int i = 0; i < sums; i++)
                score[i] = V_FMA(V_SET1(residuals[i * dim + j]), word, score[i]);
        }
        for (int i = 0; i < sums; i++) {
            least = V_MIN(score[i], least);
            V_STORE(scores + i * room + v, score[i]);
        }
    }
    V_STORE(minima, least);
}

/* The best of all sums with each code of one more stage. */
TARGET static void NAME(extend)(const struct sums *before, const float *words, const float *norms,
                                int64_t dim, int64_t room, float *scratch, struct found *f)
{
    float *const minima = scratch + before->count * room;
    int64_t p = 0, lanes = 0;
    for (; p + TOGETHER <= before->count; p += TOGETHER, lanes += W)
        NAME(score)(before->scores + p, before->residuals + p * dim, words, norms, dim, room,
                    TOGETHER, scratch + p * room, minima + lanes);
    for (; p < before->count; p++, lanes += W)
        NAME(score)(before->scores + p, before->residuals + p * dim, words, norms, dim, room, 1,
                    scratch + p * room, minima + lanes);
    /* No score is in two lanes, so the wanted'th least of their minima is a bar that as many as are
     * wanted get past, and few others. */
    const float bar = wanted_least(minima, lanes, f);
    for (int64_t i = 0; i < before->count * room; i += W)
        for (uint32_t bits = V_AT_MOST(V_LOAD(scratch + i), V_SET1(bar)); bits; bits &= bits - 1) {
            const int64_t at = i + __builtin_ctz(bits);
            offer(f, scratch[at], at / room, at % room);
        }
}

/* What a sum leaves over when a codeword is added to it, `[dim]`. */
TARGET static void NAME(leave)(const float *residual, const float *word, int64_t dim, float *left)
{
    int64_t j = 0;
    for (; j + W <= dim; j += W)
        V_STORE(left + j, V_SUB(V_LOAD(residual + j), V_LOAD(word + j)));
    for (; j < dim; j++)
        left[j] = residual[j] - word[j];
}

#undef TOGETHER
#include "lanes_end.h"
