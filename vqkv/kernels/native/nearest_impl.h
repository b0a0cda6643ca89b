/* Nearest codewords at one SIMD level. Included once per level by nearest.c, which defines
 *
 *   NAME(x)     x with the level's suffix        W       floats per vector, at most BLOCK
 *   UNROLL      vectors of x at a time
 *
 * The score of a codeword is |c|^2 / 2 - <x, c>, which orders codewords as the squared distance
 * does. All blocks of codewords pass by, with different vectors x in the lanes and a codeword's
 * channels broadcast; only the least score of a block is kept, and which block had the least of
 * all. Then that block's scores are computed once more, with its codewords in the lanes and in the
 * same order, so that the least one is found by equality. A NaN score is never less, so a vector
 * with NaN gets code 0.
 */

#include "lanes.h"

#define LANES (UNROLL * W)

/* Least scores of LANES transposed vectors xt[j * LANES + lane], and the blocks that have them.
 * With dim known at compile time the vectors stay in registers while all codewords pass by. */
INLINE TARGET void NAME(search_small)(const float *xt, const float *book, int64_t blocks, int dim,
                                      float *least, int32_t *found)
{
    V x[8][UNROLL], best[UNROLL];
    I at[UNROLL];
    for (int j = 0; j < dim; j++)
        for (int u = 0; u < UNROLL; u++)
            x[j][u] = V_LOAD(xt + j * LANES + u * W);
    for (int u = 0; u < UNROLL; u++) {
        best[u] = V_SET1(INFINITY);
        at[u] = I_SET1(0);
    }
    for (int64_t b = 0; b < blocks; b++, book += (dim + 1) * BLOCK) {
        V low[UNROLL];
        for (int u = 0; u < UNROLL; u++)
            low[u] = V_SET1(INFINITY);
        for (int k = 0; k < BLOCK; k++)
            for (int u = 0; u < UNROLL; u++) {
                V score = V_SET1(book[dim * BLOCK + k]);
                for (int j = 0; j < dim; j++)
                    score = V_FNMA(x[j][u], V_SET1(book[j * BLOCK + k]), score);
                low[u] = V_MIN(score, low[u]);
            }
        for (int u = 0; u < UNROLL; u++)
            V_KEEP_LESS(best[u], at[u], low[u], I_SET1((int32_t)b));
    }
    for (int u = 0; u < UNROLL; u++) {
        V_STORE(least + u * W, best[u]);
        I_STORE(found + u * W, at[u]);
    }
}

/* The same for any dim: a tile of codewords times the block stays in registers while the channels
 * pass by, so each load feeds several multiplications. */
#define TILE 4
static TARGET void NAME(search_any)(const float *xt, const float *book, int64_t blocks, int64_t dim,
                                    float *least, int32_t *found)
{
    V best[UNROLL];
    I at[UNROLL];
    for (int u = 0; u < UNROLL; u++) {
        best[u] = V_SET1(INFINITY);
        at[u] = I_SET1(0);
    }
    for (int64_t b = 0; b < blocks; b++, book += (dim + 1) * BLOCK) {
        V low[UNROLL];
        for (int u = 0; u < UNROLL; u++)
            low[u] = V_SET1(INFINITY);
        for (int k = 0; k < BLOCK; k += TILE) {
            V score[TILE][UNROLL];
            for (int t = 0; t < TILE; t++)
                for (int u = 0; u < UNROLL; u++)
                    score[t][u] = V_SET1(book[dim * BLOCK + k + t]);
            for (int64_t j = 0; j < dim; j++) {
                V x[UNROLL];
                for (int u = 0; u < UNROLL; u++)
                    x[u] = V_LOAD(xt + j * LANES + u * W);
                for (int t = 0; t < TILE; t++) {
                    const V channel = V_SET1(book[j * BLOCK + k + t]);
                    for (int u = 0; u < UNROLL; u++)
                        score[t][u] = V_FNMA(x[u], channel, score[t][u]);
                }
            }
            for (int t = 0; t < TILE; t++)
                for (int u = 0; u < UNROLL; u++)
                    low[u] = V_MIN(score[t][u], low[u]);
        }
        for (int u = 0; u < UNROLL; u++)
            V_KEEP_LESS(best[u], at[u], low[u], I_SET1((int32_t)b));
    }
    for (int u = 0; u < UNROLL; u++) {
        V_STORE(least + u * W, best[u]);
        I_STORE(found + u * W, at[u]);
    }
}
#undef TILE

/* The first codeword of a block whose score is `least`. */
INLINE TARGET int32_t NAME(find)(const float *x, const float *block, int64_t dim, float least)
{
    for (int k = 0; k < BLOCK; k += W) {
        V score = V_LOAD(block + dim * BLOCK + k);
        for (int64_t j = 0; j < dim; j++)
            score = V_FNMA(V_SET1(x[j]), V_LOAD(block + j * BLOCK + k), score);
        const uint32_t equal = V_EQUAL(score, V_SET1(least));
        if (equal)
            return k + __builtin_ctz(equal);
    }
    return 0;
}

/* Codes of `rows` vectors of one subspace; consecutive vectors lie `stride` floats apart. */
INLINE TARGET void NAME(search_all)(const float *x, int64_t stride, int64_t rows, const float *book,
                                    int64_t blocks, int64_t dim, int small, int32_t *codes,
                                    int64_t code_stride, float *xt)
{
    for (int64_t first = 0; first < rows; first += LANES) {
        const int64_t count = rows - first < LANES ? rows - first : LANES;
        float least[LANES];
        int32_t found[LANES];
        for (int64_t lane = 0; lane < LANES; lane++) {
            /* Lanes past the end repeat the last vector; their codes are dropped. */
            const float *row = x + (first + (lane < count ? lane : count - 1)) * stride;
            for (int64_t j = 0; j < dim; j++)
                xt[j * LANES + lane] = row[j];
        }
        if (small)
            NAME(search_small)(xt, book, blocks, (int)dim, least, found);
        else
            NAME(search_any)(xt, book, blocks, dim, least, found);
        for (int64_t lane = 0; lane < count; lane++) {
            const float *block = book + found[lane] * (dim + 1) * BLOCK;
            const int32_t within = NAME(find)(x + (first + lane) * stride, block, dim, least[lane]);
            codes[(first + lane) * code_stride] = found[lane] * BLOCK + within;
        }
    }
}

static TARGET void NAME(search_rows)(const float *x, int64_t stride, int64_t rows,
                                     const float *book, int64_t blocks, int64_t dim, int32_t *codes,
                                     int64_t code_stride, float *xt)
{
#define SEARCH(dim, small) \
    NAME(search_all)(x, stride, rows, book, blocks, dim, small, codes, code_stride, xt)
    switch (dim) {
    case 1: SEARCH(1, 1); break;
    case 2: SEARCH(2, 1); break;
    case 3: SEARCH(3, 1); break;
    case 4: SEARCH(4, 1); break;
    case 8: SEARCH(8, 1); break;
    default: SEARCH(dim, 0);
    }
#undef SEARCH
}

#undef LANES
#undef UNROLL
#include "lanes_end.h"
