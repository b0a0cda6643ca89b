/* What errors push, W columns at a time; included once per level, with NAME and W. */

#include "lanes.h"

/* For `count` channels of the targets and `vectors` times W columns. */
INLINE TARGET void NAME(push_some)(const float *errors, const float *metric, int64_t channels,
                                   int64_t first, int64_t last, int count, int vectors,
                                   float *target)
{
    V left[PUSHED][2];
    for (int j = 0; j < count; j++)
        for (int v = 0; v < vectors; v++)
            left[j][v] = V_LOAD(target + j * ROWS + v * W);
    for (int64_t i = first; i < last; i++) {
        V error[2];
        for (int v = 0; v < vectors; v++)
            error[v] = V_LOAD(errors + i * ROWS + v * W);
        for (int j = 0; j < count; j++) {
            const V weight = V_SET1(metric[i * channels + j]);
            for (int v = 0; v < vectors; v++)
                left[j][v] = V_FNMA(error[v], weight, left[j][v]);
        }
    }
    for (int j = 0; j < count; j++)
        for (int v = 0; v < vectors; v++)
            V_STORE(target + j * ROWS + v * W, left[j][v]);
}

static TARGET void NAME(push)(const float *errors, const float *metric, int64_t channels,
                              int64_t first, int64_t last, int64_t rows, int64_t dim, float *target)
{
    const int64_t columns = (rows + COLUMNS - 1) / COLUMNS * COLUMNS;
#define PUSH(count, vectors) \
    NAME(push_some)(errors + r, metric + j, channels, first, last, count, vectors, \
                    target + j * ROWS + r)
#define PUSH_ANY(vectors) \
    do { \
        int64_t j = 0; \
        for (; j + 8 <= dim; j += 8) \
            PUSH(8, vectors); \
        for (; j + 4 <= dim; j += 4) \
            PUSH(4, vectors); \
        switch (dim - j) { \
        case 1: PUSH(1, vectors); break; \
        case 2: PUSH(2, vectors); break; \
        case 3: PUSH(3, vectors); break; \
        } \
    } while (0)
    int64_t r = 0;
    for (; r + 2 * W <= columns; r += 2 * W)
        PUSH_ANY(2);
    for (; r < columns; r += W)
        PUSH_ANY(1);
#undef PUSH_ANY
#undef PUSH
}

#include "lanes_end.h"
