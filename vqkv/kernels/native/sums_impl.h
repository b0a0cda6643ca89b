/* W sums at a time; included once per level, with NAME and W. */

#include "lanes.h"

TARGET static void NAME(least_sums)(const float *first, const float *second, const float *sizes,
                                    int64_t books, int64_t size, int64_t room, int64_t begin,
                                    int64_t end, int32_t *codes)
{
    for (int64_t row = begin * books; row < end * books; row++) {
        const float *a = first + row * size, *b = second + row * room;
        const float *own = sizes + row % books * size * room;
        V best = V_SET1(INFINITY);
        I at = I_SET1(0);
        for (int64_t i = 0; i < size; i++)
            for (int64_t v = 0; v < room; v += W) {
                const V sum = V_ADD(V_ADD(V_SET1(a[i]), V_LOAD(own + i * room + v)), V_LOAD(b + v));
                const I number = I_SET1((int32_t)(i * size + v));
                V_KEEP_LESS(best, at, sum, number);
            }
        float scores[W];
        int32_t codes_of[W];
        V_STORE(scores, best);
        I_STORE(codes_of, at);
        float least = INFINITY; /* where no sum is a number, code 0 */
        codes[row] = 0;
        for (int l = 0; l < W; l++) {
            const int32_t code = codes_of[l] + l;
            if (scores[l] < least || (scores[l] == least && scores[l] < INFINITY && code < codes[row])) {
                least = scores[l];
                codes[row] = code;
            }
        }
    }
}

#include "lanes_end.h"
