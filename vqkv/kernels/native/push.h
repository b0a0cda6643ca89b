/* What errors push, for kernels that choose codes together. */

#ifndef VQKV_PUSH_H
#define VQKV_PUSH_H

#include <stdint.h>

/* Vectors at a time, a column each: their errors stay in the caches while all codes are chosen. */
#define ROWS 128

/* Takes from targets [dim, ROWS] what errors [n, ROWS] of channels `first` to `last` push. `metric`
 * [n, n] begins with the column of the first target. Columns are so many that `rows` is among them,
 * up to the next multiple of 16. */
typedef void (*push_fn)(const float *errors, const float *metric, int64_t channels, int64_t first,
                        int64_t last, int64_t rows, int64_t dim, float *target);

push_fn vqkv_push_of(int level);

#endif
