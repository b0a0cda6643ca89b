/* Nearest codewords at one SIMD level. Included once per level by nearest.c, which defines
 *
 *   NAME(x)     x with the level's suffix        TARGET      the function attribute of the level
 *   W           floats per vector                V, I        vectors of floats and of int32
 *   V_LOAD, V_SET1, V_FNMA(a, b, c) = c - a*b    I_SET1, V_STORE, I_STORE
 *   V_KEEP_LESS(best, at, score, k): where score < best, take score and k
 *
 * Lanes hold different vectors x; a codeword's channels are broadcast. The score of a codeword is
 * |c|^2 / 2 - <x, c>, which orders codewords as the squared distance does. A NaN score is never
 * less, so a vector with NaN gets code 0.
 */

#define LANES (UNROLL * W)

/* Best codeword of LANES transposed vectors xt[j * LANES + lane], dim known at compile time:
 * the vectors stay in registers while all codewords pass by. */
static inline __attribute__((always_inline)) TARGET void NAME(search_small)(
    const float *xt, const float *words, const float *half_norms, int64_t size, int dim, int32_t *out)
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
    for (int64_t k = 0; k < size; k++) {
        const float *word = words + k * dim;
        const V norm = V_SET1(half_norms[k]);
        const I code = I_SET1((int32_t)k);
        for (int u = 0; u < UNROLL; u++) {
            V score = norm;
            for (int j = 0; j < dim; j++)
                score = V_FNMA(x[j][u], V_SET1(word[j]), score);
            V_KEEP_LESS(best[u], at[u], score, code);
        }
    }
    for (int u = 0; u < UNROLL; u++)
        I_STORE(out + u * W, at[u]);
}

/* The same for any dim: a tile of TILE codewords times the block stays in registers while the
 * channels pass by, so each load feeds several multiplications. */
#define TILE 4
static TARGET void NAME(search_any)(
    const float *xt, const float *words, const float *half_norms, int64_t size, int64_t dim,
    int32_t *out)
{
    V best[UNROLL];
    I at[UNROLL];
    for (int u = 0; u < UNROLL; u++) {
        best[u] = V_SET1(INFINITY);
        at[u] = I_SET1(0);
    }
    int64_t k = 0;
    for (; k + TILE <= size; k += TILE) {
        V score[TILE][UNROLL];
        for (int t = 0; t < TILE; t++)
            for (int u = 0; u < UNROLL; u++)
                score[t][u] = V_SET1(half_norms[k + t]);
        for (int64_t j = 0; j < dim; j++) {
            V x[UNROLL];
            for (int u = 0; u < UNROLL; u++)
                x[u] = V_LOAD(xt + j * LANES + u * W);
            for (int t = 0; t < TILE; t++) {
                const V channel = V_SET1(words[(k + t) * dim + j]);
                for (int u = 0; u < UNROLL; u++)
                    score[t][u] = V_FNMA(x[u], channel, score[t][u]);
            }
        }
        for (int t = 0; t < TILE; t++) {
            const I code = I_SET1((int32_t)(k + t));
            for (int u = 0; u < UNROLL; u++)
                V_KEEP_LESS(best[u], at[u], score[t][u], code);
        }
    }
    for (; k < size; k++) {
        const I code = I_SET1((int32_t)k);
        for (int u = 0; u < UNROLL; u++) {
            V score = V_SET1(half_norms[k]);
            for (int64_t j = 0; j < dim; j++)
                score = V_FNMA(V_LOAD(xt + j * LANES + u * W), V_SET1(words[k * dim + j]), score);
            V_KEEP_LESS(best[u], at[u], score, code);
        }
    }
    for (int u = 0; u < UNROLL; u++)
        I_STORE(out + u * W, at[u]);
}
#undef TILE

/* Codes of `rows` vectors of one subspace; consecutive vectors lie `stride` floats apart. */
static TARGET void NAME(search_rows)(
    const float *x, int64_t stride, int64_t rows, const float *words, const float *half_norms,
    int64_t size, int64_t dim, int32_t *codes, int64_t code_stride, float *xt)
{
    for (int64_t first = 0; first < rows; first += LANES) {
        const int64_t count = rows - first < LANES ? rows - first : LANES;
        int32_t found[LANES];
        for (int64_t lane = 0; lane < LANES; lane++) {
            /* Lanes past the end repeat the last vector; their codes are dropped. */
            const float *row = x + (first + (lane < count ? lane : count - 1)) * stride;
            for (int64_t j = 0; j < dim; j++)
                xt[j * LANES + lane] = row[j];
        }
        switch (dim) {
        case 1: NAME(search_small)(xt, words, half_norms, size, 1, found); break;
        case 2: NAME(search_small)(xt, words, half_norms, size, 2, found); break;
        case 3: NAME(search_small)(xt, words, half_norms, size, 3, found); break;
        case 4: NAME(search_small)(xt, words, half_norms, size, 4, found); break;
        case 8: NAME(search_small)(xt, words, half_norms, size, 8, found); break;
        default: NAME(search_any)(xt, words, half_norms, size, dim, found);
        }
        for (int64_t lane = 0; lane < count; lane++)
            codes[(first + lane) * code_stride] = found[lane];
    }
}

#undef LANES
#undef UNROLL
#undef NAME
#undef TARGET
#undef W
#undef V
#undef I
#undef V_LOAD
#undef V_SET1
#undef V_FNMA
#undef V_KEEP_LESS
#undef I_SET1
#undef I_STORE
