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
    const float *page_turns;     /* [B or 1, P, D / 2, 2], or NULL for keys coded after RoPE */
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

/* Scratch of one thread. */
struct work {
    const struct attention *a;
    int64_t row, head;
    int64_t tokens;               /* of the part that count */
    int64_t begin, end;           /* tokens of the tile that count */
    struct run ahead[RUNS];       /* what will be read next, not fetched yet */
    int next;                     /* of `ahead` */
    uint8_t *keys, *values;       /* [TILE, M S]: codes of the tile, zeros where no token counts */
    float *scores;                /* [R, TILE], then weights */
    float *best, *total, *shrink; /* [R]: of the online softmax; `shrink` scales earlier sums */
    float *value_sums, *key_sums; /* [R, D] */
    float *given;                 /* [R, D]: queries; x of all pairs and then y where keys are turned */
    float *query;                 /* [TILE_PAGES, R, D]: turned back by a page's first position, or
                                     in the order of one, as a level needs them */
    float *decoded;               /* [D PAGE]: some channels of a page, or what a level sorts */
    float *offset_turns;          /* [D / 2, 2, PAGE]: cosines and sines in coded order */
    void *rounded;                /* what attend_bf16.c and attend_tables.c keep */
    char *whole;                  /* what attend_vnni.c keeps */
};

/* How one level computes scores and sums of a tile. */
struct kernel {
    void (*prepare)(struct work *w); /* for a head */
    /* For page number `page` of a tile; where turns is NULL, page 0 serves all. */
    void (*queries)(struct work *w, int64_t page, const float *turns);
    void (*scores)(struct work *w, int64_t tokens);
    void (*softmax)(struct work *w);
    void (*sums)(struct work *w, const struct plane *plane, const uint8_t *codes, float *sums);
};

extern const struct kernel attend_scalar, attend_avx2, attend_avx512, attend_bf16, attend_tables,
    attend_vnni, attend_tables_vnni;

/* What levels have in common: one for each, of which attend_bf16 borrows these. */
void queries_scalar(struct work *w, int64_t page, const float *turns);
void queries_avx2(struct work *w, int64_t page, const float *turns);
void queries_avx512(struct work *w, int64_t page, const float *turns);
void softmax_scalar(struct work *w);
void softmax_avx2(struct work *w);
void softmax_avx512(struct work *w);

/* `call(n)` with the number of rows that remain, but for 4 at most, as a constant; moves `row` on. */
#define FOR_UP_TO_4_ROWS(remaining, call) \
    switch (remaining) { \
    case 1: call(1); row += 1; break; \
    case 2: call(2); row += 2; break; \
    case 3: call(3); row += 3; break; \
    default: call(4); row += 4; \
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

/* Bytes that attend_bf16 keeps for itself, and whether it takes these shapes; whether attend_tables does,
 * which takes no others. */
int64_t attend_bf16_scratch(const struct attention *a);
int attend_bf16_takes(const struct attention *a);
int attend_tables_takes(const struct attention *a);

/* The same of attend_vnni. */
size_t attend_vnni_scratch(const struct attention *a);
int attend_vnni_takes(const struct attention *a);

#pragma GCC visibility pop

#endif
