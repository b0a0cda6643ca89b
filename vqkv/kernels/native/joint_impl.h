/* What errors push, W vectors or channels at a time; included once per level, with NAME and W. */

#include "lanes.h"

/* Takes from `count` channels of targets [d, ROWS] what the errors [n, ROWS] of channels `first` to
 * `last` push: `metric` [n, n] begins with the column of the first of them. */
INLINE TARGET void NAME(push_some)(const float *errors, const float *metric, int64_t channels,
                                   int64_t first, int64_t last, int64_t rows, int count,
                                   float *target)
{
    for (int64_t r = 0; r < rows; r += W) {
        V left[PUSHED];
        for (int j = 0; j < count; j++)
            left[j] = V_LOAD(target + j * ROWS + r);
        for (int64_t i = first; i < last; i++) {
            const V error = V_LOAD(errors + i * ROWS + r);
            for (int j = 0; j < count; j++)
                left[j] = V_FNMA(error, V_SET1(metric[i * channels + j]), left[j]);
        }
        for (int j = 0; j < count; j++)
            V_STORE(target + j * ROWS + r, left[j]);
    }
}

/* The same for all `dim` channels. */
static TARGET void NAME(push)(const float *errors, const float *metric, int64_t channels,
                              int64_t first, int64_t last, int64_t rows, int64_t dim, float *target)
{
#define PUSH(count) \
    NAME(push_some)(errors, metric + j, channels, first, last, rows, count, target + j * ROWS)
    for (int64_t j = 0; j < dim; j += PUSHED)
        switch (dim - j) {
        case 1: PUSH(1); break;
        case 2: PUSH(2); break;
        case 3: PUSH(3); break;
        default: PUSH(PUSHED);
        }
#undef PUSH
}

/* What an error of one group pushes, added to what is pushed in the channels from `first` to
 * `last`; `metric` [d, n] are the group's rows. */
static TARGET void NAME(spread)(const float *before, const float *error, const float *metric,
                                int64_t channels, int64_t first, int64_t last, int64_t dim,
                                float *after)
{
    int64_t i = first;
    for (; i + W <= last; i += W) {
        V sum = V_LOAD(before + i);
        for (int64_t j = 0; j < dim; j++)
            sum = V_FMA(V_SET1(error[j]), V_LOAD(metric + j * channels + i), sum);
        V_STORE(after + i, sum);
    }
    for (; i < last; i++) {
        float sum = before[i];
        for (int64_t j = 0; j < dim; j++)
            sum += error[j] * metric[j * channels + i];
        after[i] = sum;
    }
}

#include "lanes_end.h"
