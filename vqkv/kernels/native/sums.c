/* The nearest of all sums of two codewords, from products of each with the vector. */

#include <math.h>
#include <stdint.h>

#include "levels.h"

#define NAME(x) x##_scalar
#define W 1
#include "sums_impl.h"

#ifdef HAVE_X86

#define NAME(x) x##_avx2
#define W 8
#include "sums_impl.h"

#define NAME(x) x##_avx512
#define W 16
#include "sums_impl.h"

#endif

typedef void least_sums(const float *first, const float *second, const float *sizes, int64_t books,
                        int64_t size, int64_t room, int64_t begin, int64_t end, int32_t *codes);

/* Codes [N, M], a·K + b, of the least `first[a] + second[b] + sizes[a, b]` in rows `begin` to `end`:
 * `first` is [N, M, K], `second` [N, M, room] and `sizes` [M, K, room], infinite beyond K; room is a
 * multiple of 16. */
void vqkv_sums(int level, const float *first, const float *second, const float *sizes,
               int64_t books, int64_t size, int64_t room, int64_t begin, int64_t end,
               int32_t *codes)
{
    least_sums *search = least_sums_scalar;
#ifdef HAVE_X86
    if (level >= AVX2)
        search = level >= AVX512 ? least_sums_avx512 : least_sums_avx2;
#endif
    search(first, second, sizes, books, size, room, begin, end, codes);
}
