/* What an error pushes, W channels at a time; included once per level, with NAME and W. */

#include "lanes.h"

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
