/* What all levels of attend_codewords_impl.h share: numbers of four or eight rows side by side. */

#ifndef VQKV_ATTEND_CODEWORDS_H
#define VQKV_ATTEND_CODEWORDS_H

#include "attend.h"
#include "quads.h"

typedef float oct __attribute__((vector_size(32), may_alias));

/* Columns of codes at a time: their entries, of eight rows, are as large as most L1 caches. */
#define COLUMNS 4

/* `call(entry, n)`: entries of how many rows. */
#define WITH_ENTRIES(rows, call) \
    if ((rows) > 4) \
        call(oct, 8) \
    else \
        call(quad, 4)

/* `call(column, columns, n)` for all of them, COLUMNS at a time and then one by one. */
#define FOR_COLUMNS(all, call, n) \
    { \
        int64_t column = 0; \
        for (; column + COLUMNS <= (all); column += COLUMNS) \
            call(column, COLUMNS, n); \
        for (; column < (all); column++) \
            call(column, 1, n); \
    }

/* Codes of a token side by side: taking them apart leaves loads to entries. */
INLINE uint32_t codes_of(const uint8_t *codes, int columns)
{
    uint32_t all = 0;
    for (int c = 0; c < columns; c++)
        all |= (uint32_t)codes[c] << 8 * c;
    return all;
}

INLINE int64_t code_of(uint32_t codes, int c)
{
    return codes >> 8 * c & 255;
}

/* In a register, not reckoned anew from what it is near. */
INLINE void *kept(const void *entries)
{
    __asm__("" : "+r"(entries));
    return (void *)entries;
}

/* Weights of a block of rows [rows, TILE] from `begin` to `end` as [TILE, rows]. Where there are fewer rows,
 * the last stands for those that are not there. */
INLINE void side_by_side(const float *rows, int64_t count, int64_t begin, int64_t end,
                         quad *tokens, int quads)
{
    for (int64_t t = begin / 4 * 4; t < end; t += 4)
        for (int q = 0; q < quads; q++) {
            quad x[4];
            for (int r = 0; r < 4; r++) {
                const int64_t row = 4 * q + r < count ? 4 * q + r : count - 1;
                memcpy(&x[r], rows + row * TILE + t, sizeof(quad));
            }
            transpose_quads(x);
            for (int i = 0; i < 4; i++)
                tokens[(t + i) * quads + q] = x[i];
        }
}

/* Takes scores of whole fours of tokens apart. */
INLINE void row_by_row(const quad *tokens, int64_t count, int64_t end, float *rows, int quads)
{
    for (int64_t t = 0; t < end; t += 4)
        for (int q = 0; q < quads; q++) {
            quad x[4];
            for (int i = 0; i < 4; i++)
                x[i] = tokens[(t + i) * quads + q];
            transpose_quads(x);
            for (int r = 0; r < 4 && 4 * q + r < count; r++)
                memcpy(rows + (4 * q + r) * TILE + t, &x[r], sizeof(quad));
        }
}

/* Of numbers [count, n] those of up to `rows` rows side by side, the last for those that are not there; and
 * back. */
INLINE void gather_rows(const float *numbers, int64_t count, int64_t n, float *to, int64_t rows)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t r = 0; r < rows; r++)
            to[i * rows + r] = numbers[(r < count ? r : count - 1) * n + i];
}

INLINE void scatter_rows(const float *numbers, int64_t count, int64_t n, float *to, int64_t rows)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t r = 0; r < rows && r < count; r++)
            to[r * n + i] = numbers[i * rows + r];
}

#endif
