/* The best paths of W vectors; included once per level, with NAME and W. */

#include "lanes.h"

/* Vectors at a time. */
enum { NAME(lanes) = W };

/* Of `states`, each reached at the cost `best[state >> width]` and the distance of a pair of
 * channels to its entry of the table, those of least cost among the ones that agree in all but
 * their oldest bits: `kept` of them, with the oldest bits of each in `came`. So costs of states are
 * never stored, only of what they have in common, which is small where pairs have many bits. */
TARGET static void NAME(step)(const float *x, const float *cost, const float *table, int width,
                              int64_t states, int64_t kept, const float *best, float *next,
                              int32_t *came)
{
    const V first = V_LOAD(x), second = V_LOAD(x + W);
    const V heavy = V_SET1(cost[0]), second_heavy = V_SET1(cost[1]);
    for (int64_t r = 0; r < kept; r++) {
        V least = V_SET1(2 * FAR);
        I from = I_SET1(0);
        for (int64_t s = r, q = 0; s < states; s += kept, q++) {
            const V a = V_SUB(first, V_SET1(table[2 * s]));
            const V b = V_SUB(second, V_SET1(table[2 * s + 1]));
            const V before = V_LOAD(best + (s >> width) * W);
            const V reached = V_FMA(V_MUL(heavy, a), a, V_FMA(V_MUL(second_heavy, b), b, before));
            const I number = I_SET1((int32_t)q);
            V_KEEP_LESS(least, from, reached, number);
        }
        V_STORE(next + r * W, least);
        I_STORE(came + r * W, from);
    }
}

/* `best` and `next` are [states, W]; `came` holds [2^L / 2^k, W] for every pair, and behind them the
 * last state. x is [pairs, 2, W]. */
TARGET static void NAME(paths)(const float *x, const float *cost, const float *table,
                               const int32_t *widths, int64_t pairs, int64_t states, float *best,
                               float *next, int32_t *came)
{
    for (int64_t i = 0; i < (states >> widths[0]) * W; i++) {
        best[i] = i < W ? 0 : FAR; /* before the first bit the state is 0 */
        came[i] = 0;
    }
    came += (states >> widths[0]) * W;
    for (int64_t p = 0; p < pairs; p++) {
        const int64_t kept = p + 1 < pairs ? states >> widths[p + 1] : 1;
        NAME(step)(x + 2 * p * W, cost + 2 * p, table, widths[p], states, kept, best, next, came);
        came += kept * W;
        float *const swapped = best;
        best = next;
        next = swapped;
    }
}

#include "lanes_end.h"
