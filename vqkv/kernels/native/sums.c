/* The nearest of all sums of two codewords, from products of each with the vector. */

#include <math.h>
#include <stdint.h>

#include "levels.h"

#define IMPL "sums_impl.h"
#include "each_level.h"

/* Codes [N, M], a·K + b, of the least `first[a] + second[b] + sizes[a, b]` in rows `begin` to `end`:
 * `first` is [N, M, K], `second` [N, M, room] and `sizes` [M, K, room], infinite beyond K; room is a
 * multiple of 16. */
void vqkv_sums(int level, const float *first, const float *second, const float *sizes,
               int64_t books, int64_t size, int64_t room, int64_t begin, int64_t end,
               int32_t *codes)
{
    AT_LEVEL(level, least_sums)(first, second, sizes, books, size, room, begin, end, codes);
}
