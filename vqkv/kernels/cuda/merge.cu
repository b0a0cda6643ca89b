// What splits of one row of queries found, merged by log-sum-exp. A block takes one of `rows` (over batch, query heads
// and query rows), a thread one channel. Splits that saw no token weigh nothing.
//
// Given by the compiler's command line: HEAD_DIM (D), and 0 or 1 for KEY_SUMS.

#include <warp.cuh>

#define FIRST 16

KERNEL(HEAD_DIM)
merge(const float *output, const float *lse, const float *key_mean, float *merged, float *merged_lse,
      float *merged_key_mean, int rows, int splits) {
    SHARED(shared);
    float *const weights = (float *)shared;  // [splits]
    const int lane = thread_index() % 32, row = block_index();
    let_later_begin();
    wait_for_earlier();

    const i64 channel = (i64)row * HEAD_DIM + thread_index(), stride = (i64)rows * HEAD_DIM;
    float first[FIRST], first_key[FIRST];  // parts that are on their way while weights are made
#pragma unroll
    for (int split = 0; split < FIRST; split++) {
        first[split] = split < splits ? output[split * stride + channel] : 0;
        first_key[split] = KEY_SUMS && split < splits ? key_mean[split * stride + channel] : 0;
    }

    // Every warp for itself, and each writes the same.
    float top = -INFINITY, whole = 0;
    for (int split = lane; split < splits; split += 32) top = fmaxf(top, lse[(i64)split * rows + row]);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) top = fmaxf(top, from_lane(top, distance));
    for (int split = lane; split < splits; split += 32) {
        const float part = lse[(i64)split * rows + row];
        whole += weights[split] = part == -INFINITY ? 0 : power_of_2((part - top) * LOG2_E);
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) whole += from_lane(whole, distance);
    barrier();

    float total = 0, key_total = 0;
#pragma unroll
    for (int split = 0; split < FIRST; split++)
        if (split < splits) total += weights[split] * first[split], key_total += weights[split] * first_key[split];
#pragma unroll 8
    for (int split = FIRST; split < splits; split++) {
        total += weights[split] * output[split * stride + channel];
        if (KEY_SUMS) key_total += weights[split] * key_mean[split * stride + channel];
    }
    const float inverse = 1 / (whole > 0 ? whole : 1);
    merged[channel] = total * inverse;
    if (KEY_SUMS) merged_key_mean[channel] = key_total * inverse;
    if (thread_index() == 0) merged_lse[row] = whole > 0 ? top + log2f(whole) * LN_2 : -INFINITY;
}
