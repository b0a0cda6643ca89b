/* The search for nearest codewords, for kernels that search the same codebooks again and again. */

#ifndef VQKV_NEAREST_H
#define VQKV_NEAREST_H

#include <stdint.h>

/* Codes of `rows` vectors, `stride` floats from one to the next, in an arranged codebook of so many
 * blocks; codes lie `code_stride` apart. `scratch` has room for vqkv_search_scratch(dim) floats. */
typedef void (*search_fn)(const float *x, int64_t stride, int64_t rows, const float *book,
                          int64_t blocks, int64_t dim, int32_t *codes, int64_t code_stride,
                          float *scratch);

search_fn vqkv_search_of(int level);
int64_t vqkv_search_scratch(int64_t dim);

/* Words [K, d] in blocks [d + 1, 16], the last row of a block being |c|^2 / 2: infinite where there
 * is no codeword. */
void vqkv_arrange(const float *words, int64_t size, int64_t dim, float *book);
int64_t vqkv_arranged_floats(int64_t size, int64_t dim);
int64_t vqkv_word_blocks(int64_t size);

#endif
