/* What attend_bf16.c, attend_tables.c and attend_vnni*.c share. */

#ifndef VQKV_ATTEND_BF16_H
#define VQKV_ATTEND_BF16_H

#include "attend.h"

#ifdef HAVE_X86

#pragma GCC visibility push(hidden)

#define QUAD 4
#define MAX_QUADS 64

/* Four channels of a codeword as bfloat16. */
typedef uint64_t word;

/* How many quads of a codeword lie side by side: two can be read at once. */
INLINE int64_t width_of(const struct plane *plane)
{
    return plane->dim % (2 * QUAD) == 0 ? 2 : 1;
}

/* A quad's words of a stage, which are `width_of` apart. */
INLINE const word *words_of(const word *words, const struct plane *plane, int64_t quad,
                            int64_t stage)
{
    const int64_t width = width_of(plane);
    return words + (quad / width * plane->stages + stage) * 256 * width + quad % width;
}

/* Pieces of `rounded`. Quads beyond the last, up to whole chunks, have words of zeros. */
struct pieces {
    word *keys, *values;      /* [quads / width, S, 256, width] */
    uint8_t *codes;           /* [M S up to a multiple of 16, TILE] of keys */
    uint32_t *turns;          /* [quads, 8, 2, 8, 2]: of 8 offsets and a quad's two pairs first
                                 (c, -s), then (s, c) */
    uint32_t *first, *second; /* [TILE_PAGES, R, MAX_QUADS] pairs of queries */
    uint32_t *weights;        /* [R, TILE / 2] pairs of tokens' weights */
    char *tables;             /* what attend_tables.c keeps */
};

struct pieces pieces_of(const struct work *w);

/* Keys' codewords of a head, to bfloat16. */
void round_keys(struct work *w);

/* The same for 8 at most. */
#define FOR_ROWS(remaining, call) \
    { \
        if ((remaining) >= 8) { \
            call(8); \
            row += 8; \
        } else \
            FOR_UP_TO_4_ROWS(remaining, call) \
    }

void prepare_bf16(struct work *w);
void queries_bf16(struct work *w, int64_t page, const float *turns);
void scores_bf16(struct work *w, int64_t tokens);
void sums_bf16(struct work *w, const struct plane *plane, const uint8_t *codes, float *sums);

/* What attend_vnni.c has for attend_tables.c. */
void prepare_sums_vnni(struct work *w);
void sums_vnni(struct work *w, const struct plane *plane, const uint8_t *codes, float *sums);

/* Codes [columns, TILE] of [TILE, columns], as far as there are tokens. */
void transpose(const uint8_t *codes, int64_t columns, int64_t tokens, uint8_t *transposed);

/* Bytes that attend_tables.c keeps for itself. */
size_t attend_tables_scratch(const struct attention *a);

#pragma GCC visibility pop

#endif

#endif
