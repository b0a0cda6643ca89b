/* The best paths of W vectors; included once per level, with the macros of that level. */

/* `least` and `next` are [states, W], `came` holds [2^L / 2^k, W] for every pair; x is [pairs, 2, W].
 * Returns where the costs of the last states are. */
TARGET static float *NAME(paths)(const float *x, const float *cost, const float *table,
                                 const int32_t *widths, int64_t pairs, int64_t states,
                                 float *least, float *next, int32_t *came)
{
    for (int64_t i = 0; i < states * W; i++)
        least[i] = i < W ? 0 : FAR;
    for (int64_t p = 0; p < pairs; p++, x += 2 * W) {
        const int64_t fresh = (int64_t)1 << widths[p], kept = states >> widths[p];
        const V first = V_LOAD(x), second = V_LOAD(x + W);
        const V heavy = V_SET1(cost[2 * p]), second_heavy = V_SET1(cost[2 * p + 1]);
        for (int64_t r = 0; r < kept; r++) {
            V best = V_LOAD(least + r * W);
            I from = I_SET1(0);
            for (int64_t q = 1; q < fresh; q++) {
                const V other = V_LOAD(least + (q * kept + r) * W);
                const I number = I_SET1((int32_t)q);
                V_KEEP_LESS(best, from, other, number);
            }
            I_STORE(came + r * W, from);
            const float *entry = table + r * fresh * 2;
            float *to = next + r * fresh * W;
            for (int64_t c = 0; c < fresh; c++, entry += 2, to += W) {
                const V a = V_SUB(first, V_SET1(entry[0])), b = V_SUB(second, V_SET1(entry[1]));
                V_STORE(to, V_FMA(V_MUL(heavy, a), a, V_FMA(V_MUL(second_heavy, b), b, best)));
            }
        }
        came += kept * W;
        float *const swapped = least;
        least = next;
        next = swapped;
    }
    return least;
}

#undef NAME
#undef TARGET
#undef W
#undef V
#undef I
#undef V_LOAD
#undef V_STORE
#undef V_SET1
#undef V_SUB
#undef V_MUL
#undef V_FMA
#undef V_KEEP_LESS
#undef I_SET1
#undef I_STORE
