/* Vectors coded by a trellis whose state is its last L bits: the best bits of all pairs of channels,
 * found by Viterbi's algorithm, a vector per SIMD lane; and back. */

#include <stdint.h>
#include <stdlib.h>

#include "levels.h"

/* More than any cost; and a sum with one is none either. */
#define FAR 1e30f

#define IMPL "trellis_impl.h"
#include "each_level.h"

/* Bits [N, pairs] of rows `begin` to `end` of x [N, pairs, 2], `widths` [pairs] of them each, under
 * `table` [2^memory, 2] and `cost` [pairs, 2]; all contiguous. Returns 0, or -1 where memory ran out. */
int vqkv_trellis(int level, const float *x, const float *cost, const float *table,
                 const int32_t *widths, int64_t pairs, int64_t memory, int64_t begin, int64_t end,
                 int32_t *codes)
{
    const int64_t lanes = AT_LEVEL(level, lanes);
    const int64_t states = (int64_t)1 << memory;
    int64_t paths = 0;
    for (int64_t p = 0; p < pairs; p++)
        paths += states >> widths[p];
    float *const numbers = malloc((size_t)((2 * states + 2 * pairs) * lanes) * sizeof(float));
    int32_t *const came = malloc((size_t)((paths + 1) * lanes) * sizeof(int32_t));
    if (numbers == NULL || came == NULL) {
        free(numbers);
        free(came);
        return -1;
    }
    float *const turned = numbers + 2 * states * lanes; /* [pairs, 2, lanes] */
    for (int64_t first = begin; first < end; first += lanes) {
        const int64_t rows = end - first < lanes ? end - first : lanes;
        for (int64_t i = 0; i < 2 * pairs; i++)
            for (int64_t l = 0; l < lanes; l++)
                turned[i * lanes + l] = l < rows ? x[(first + l) * 2 * pairs + i] : 0;
        AT_LEVEL(level, paths)(turned, cost, table, widths, pairs, states, numbers,
                               numbers + states * lanes, came);
        for (int64_t l = 0; l < rows; l++) {
            const int32_t *back = came + paths * lanes;
            int64_t state = back[l];
            for (int64_t p = pairs - 1; p >= 0; p--) {
                const int64_t kept = states >> widths[p];
                back -= kept * lanes;
                codes[(first + l) * pairs + p] = (int32_t)(state & ((1 << widths[p]) - 1));
                state >>= widths[p];
                state += back[state * lanes + l] * kept;
            }
        }
    }
    free(numbers);
    free(came);
    return 0;
}

/* Pairs [N, P, 2] of tokens `begin` to `end`: token t has `counts[t]` bytes of `codes` from
 * `offsets[t]` on; `ends` and `units` are [sizes, P] and [sizes, P, 2]. A state is the `memory` bits
 * that end with its pair's, of its own token. Returns 0, or -1 where bytes lie outside of the codes. */
int vqkv_trellis_decode(const int32_t *codes, int64_t length, const int64_t *offsets,
                        const int64_t *counts, const int64_t *ends, const float *units,
                        const float *table, int64_t sizes, int64_t pairs, int64_t memory,
                        int64_t begin, int64_t end, float *found)
{
    for (int64_t t = begin; t < end; t++) {
        const int64_t first = offsets[t], count = counts[t];
        if (count < 0 || count >= sizes || first < 0 || first + count > length ||
            ends[count * pairs + pairs - 1] > 8 * count)
            return -1;
        const int64_t *const stops = ends + count * pairs;
        const float *const scale = units + count * pairs * 2;
        float *const to = found + t * pairs * 2;
        for (int64_t p = 0; p < pairs; p++) {
            const int64_t bits = stops[p], last = (bits - 1) >> 3;
            uint32_t state = 0;
            for (int64_t b = last < 2 ? 0 : last - 2; b <= last; b++)
                state = state << 8 | (uint32_t)codes[first + b];
            if (bits > 0)
                state >>= 7 - ((bits - 1) & 7);
            state &= ((uint32_t)1 << (bits < memory ? bits : memory)) - 1;
            to[2 * p] = scale[2 * p] * table[2 * state];
            to[2 * p + 1] = scale[2 * p + 1] * table[2 * state + 1];
        }
    }
    return 0;
}
