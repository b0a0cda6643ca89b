/* Attention on a tile of codes at one SIMD level, for all shapes; included once per level, with NAME and
 * W. */

#include "lanes.h"

#include "exponential.h"

#include "attend_codewords_impl.h"
#include "attend_turned_impl.h"

/* Scores to weights relative to the best score so far. */
TARGET void NAME(softmax)(struct work *w)
{
    enum { LANES = W };
    for (int64_t r = 0; r < w->a->rows; r++) {
        float *scores = w->scores + r * TILE;
        for (int64_t t = 0; t < w->begin; t++)
            scores[t] = -INFINITY;
        for (int64_t t = w->end; t < TILE; t++)
            scores[t] = -INFINITY;
        float lanes[LANES];
        for (int i = 0; i < LANES; i++)
            lanes[i] = w->best[r];
        for (int t = 0; t < TILE; t += LANES)
            for (int i = 0; i < LANES; i++)
                lanes[i] = scores[t + i] > lanes[i] ? scores[t + i] : lanes[i];
        float best = lanes[0];
        for (int i = 1; i < LANES; i++)
            best = lanes[i] > best ? lanes[i] : best;
        const float base = best == -INFINITY ? 0.0f : best; /* nothing has a weight yet */
        for (int t = 0; t < TILE; t++)
            scores[t] = NAME(exponential)(scores[t] - base);
        for (int i = 0; i < LANES; i++)
            lanes[i] = 0.0f;
        for (int t = 0; t < TILE; t += LANES)
            for (int i = 0; i < LANES; i++)
                lanes[i] += scores[t + i];
        float sum = 0.0f;
        for (int i = 0; i < LANES; i++)
            sum += lanes[i];
        w->shrink[r] = NAME(exponential)(w->best[r] - base);
        w->total[r] = w->total[r] * w->shrink[r] + sum;
        w->best[r] = best;
    }
}

#include "lanes_end.h"
