/* Attention on codes: what a caller hands over, and the state that one thread works with. */

#ifndef VQKV_ATTEND_H
#define VQKV_ATTEND_H

#include <stddef.h>
#include <stdint.h>

#include "levels.h"

/* Between files, but not for other libraries. */
#pragma GCC visibility push(hidden)

#define PAGE 64
/* Tokens between two steps of the online softmax: few enough that scores and codes stay in the L1
 * cache, many enough that each slice of a codebook is used often while it lies there. */
#define TILE 512
#define TILE_PAGES (TILE / PAGE)
/* Query rows for which codes are read at a time: what levels keep of more would not stay in the L2 cache. */
#define MOST_ROWS 8

/* The largest whole number of 16 bits, and of a key's codeword, which leaves room for the rounding of so many
 * stages and of turns. */
#define MOST 32767
#define MOST_KEY 32700
#define MOST_STAGES 16
/* Channels for which queries keep 8 bits, their sign among them, or more: sums of products take the others. */
#define MOST_CHANNELS 512

/* Codes [B, H, T, M S] with strides in bytes, or with pages [blocks, H, 64, M S]; `words` is
 * [H, M, S, K, d], contiguous. `Plane` in attend.py is the same. */
struct plane {
    const uint8_t *codes;
    int64_t row_stride, head_stride, token_stride;
    const float *words;
    int64_t groups, stages, size, dim;
};

/* One call. Part i of `parts` takes the i-th run of a row's tiles. `Attention` in attend.py is the
 * same. */
struct attention {
    struct plane keys, values;
    int64_t batch, heads, rows, head_dim, parts;
    const float *query;          /* [B, H, R, D]: R rows of queries on one KV head */
    const int64_t *order;        /* [H, D]: which channel of a query meets each of keys, or NULL */
    const int32_t *start, *stop; /* [B] */
    const int32_t *pages;        /* [B, P], or NULL */
    int64_t page_count, blocks;  /* P, and how many blocks there are */
    const float *page_turns;     /* [B or 1, P, D / 2, 2] of length 1, or NULL for keys coded after RoPE */
    int64_t turn_stride;         /* floats from one row to the next, 0 where rows share */
    const float *offset_turns;   /* [64, D / 2, 2] */
    const int32_t *pairs;        /* [H, D / 2] */
    float *output, *lse;         /* [parts, B, H, R, D] and [parts, B, H, R] */
    float *key_mean;             /* like output, or NULL */
};

enum failure { NO_MEMORY = 1, BAD_CODE = 2, BAD_PAGE = 3, BAD_PAIR = 4, BAD_ORDER = 5 };

/* Memory to be fetched, from `at` to `end`, a cache line every `step` bytes. */
struct run {
    const uint8_t *at, *end;
    int64_t step;
};

/* Of a tile the codes of keys and values by page, and a share of the next head's codewords. */
#define RUNS (2 * TILE_PAGES + 2)

/* Keys or values of a row and head. */
struct stream {
    const struct plane *plane;
    uint8_t *codes; /* [TILE, M S]: of the tile, zeros where no token counts */
    float *sums;    /* [R, D]: vectors by weight */
    quad *weights;  /* of codewords, as attend_codewords_impl.h sums them */
    const struct summing *summing;
};

/* Scratch of one thread. */
struct work {
    const struct attention *a;
    int64_t first_row, all_rows;  /* of the call, of which rows are worked on */
    int64_t row, head;
    int64_t tokens;               /* of the part that count */
    int64_t begin, end;           /* tokens of the tile that count */
    struct run ahead[RUNS];       /* what will be read next, not fetched yet */
    int next;                     /* of `ahead` */
    float *scores;                /* [R, TILE], then weights */
    float *best, *total, *shrink; /* [R]: of the online softmax; `shrink` scales earlier sums */
    struct stream keys, values;
    float *given;                 /* [R, D]: queries; x of all pairs and then y where keys are turned */
    float *query;                 /* [TILE_PAGES, R, D]: turned back by a page's first position */
    float *decoded;               /* [D PAGE]: some channels of a page, or what a level sorts */
    float *offset_turns;          /* [D / 2, 2, PAGE]: cosines and sines in coded order */
    quad *products;               /* of queries with codewords of keys, where these are not turned */
    quad *side_by_side;           /* [TILE or D, 4 or 8]: numbers of all rows side by side */
    struct table_pieces *tables;  /* what attend_tables.c keeps */
    struct madd_pieces *madd;     /* what attend_madd.c keeps */
    struct whole_pieces *whole;   /* what attend_vnni*.c keep */
};

/* How one level computes scores of a tile. */
struct scoring {
    void (*begin)(struct work *w);   /* for a call, or NULL */
    void (*prepare)(struct work *w); /* for a head, or NULL */
    /* For page number `page` of a tile, from 0 on; where turns is NULL, page 0 serves all. */
    void (*queries)(struct work *w, int64_t page, const float *turns);
    void (*scores)(struct work *w, int64_t tokens);
};

/* And sums of a stream. `add` scales what earlier tiles left by `shrink`, which is 0 for the first. */
struct summing {
    void (*prepare)(struct work *w, const struct stream *stream); /* for a head, or NULL */
    void (*add)(struct work *w, const struct stream *stream);
    void (*finish)(struct work *w, const struct stream *stream); /* after the last tile, or NULL */
};

/* Of attend_general.c for each level: of keys that are turned, and of those that are not. */
extern const struct scoring turned_baseline, turned_avx2, turned_avx512;
extern const struct scoring products_baseline, products_avx2, products_avx512;
extern const struct summing weights_baseline, weights_avx2, weights_avx512;

void softmax_baseline(struct work *w);
void softmax_avx2(struct work *w);
void softmax_avx512(struct work *w);

/* With tables in registers, and with whole numbers; whether they take what a call has. */
extern const struct scoring tables, turned_madd, turned_vnni;
int tables_take(const struct attention *a);
int turned_madd_takes(const struct attention *a);
int turned_vnni_takes(const struct attention *a);

/* With whole numbers, and whether it takes these shapes and is the faster way. */
extern const struct summing sums_vnni;
int sums_vnni_takes(const struct attention *a, const struct plane *plane);

/* `call(n)` with the number of rows that remain, but for 4 at most, as a constant; moves `row` on. */
#define FOR_UP_TO_4_ROWS(remaining, call) \
    switch (remaining) { \
    case 1: call(1); row += 1; break; \
    case 2: call(2); row += 2; break; \
    case 3: call(3); row += 3; break; \
    default: call(4); row += 4; \
    }

/* The same, but for MOST_ROWS where there are as many. */
#define FOR_ROWS(remaining, call) \
    { \
        if ((remaining) == MOST_ROWS) { \
            call(MOST_ROWS); \
            row += MOST_ROWS; \
        } else \
            FOR_UP_TO_4_ROWS(remaining, call) \
    }

/* Hands out cache-aligned pieces of one allocation; with memory == NULL it only counts. */
INLINE void *take(char **memory, size_t *used, size_t bytes)
{
    void *piece = *memory == NULL ? NULL : *memory + *used;
    *used += (bytes + 63) / 64 * 64;
    return piece;
}

/* Has some cache lines of `ahead` fetched while a tile is worked on. */
INLINE void fetch_ahead(struct work *w, int64_t lines)
{
    while (lines > 0 && w->next < RUNS) {
        struct run *run = &w->ahead[w->next];
        if (run->at < run->end) {
            __builtin_prefetch(run->at, 0, 2); /* to L2: L1 holds what this tile looks up */
            run->at += run->step;
            lines--;
        } else {
            w->next++;
        }
    }
}

/* Lines to fetch ahead in each of `calls` calls a tile, so that all codes of the next one are. */
INLINE int64_t lines_ahead(const struct attention *a, int64_t calls)
{
    const struct plane *keys = &a->keys, *values = &a->values;
    const int64_t bytes = TILE * (keys->groups * keys->stages + values->groups * values->stages);
    return bytes / 64 / calls + 1;
}

/* Length of the longest turn within a page, NaN if any is not finite. */
float longest_turn(const struct attention *a);

/* Codes [columns, TILE] of [TILE, columns], as far as there are tokens. */
void transpose(const uint8_t *codes, int64_t columns, int64_t tokens, uint8_t *transposed);

/* Bytes that attend_tables.c, attend_madd.c and attend_vnni*.c keep for themselves, laid out where there is
 * `memory`. */
size_t tables_lay_out(const struct attention *a, char *memory);
size_t madd_lay_out(const struct attention *a, char *memory);
size_t vnni_lay_out(const struct attention *a, char *memory);

#pragma GCC visibility pop

#endif
