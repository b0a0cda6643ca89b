/* What follows attention on codes: what a caller hands over. */

#ifndef VQKV_REST_H
#define VQKV_REST_H

#include <stdint.h>

enum type { FLOAT32 = 0, BFLOAT16 = 1 };

enum { EXACT_RUNS = 2 }; /* before the coded tokens, and after them */

/* Exact tokens side by side: keys after RoPE and values [B, H, n, D] with strides in numbers, channels
 * side by side. `_Run` in rest.py is laid out alike. */
struct exact {
    const void *keys, *values;
    int64_t key_strides[3], value_strides[3]; /* of rows, heads and tokens */
    int64_t tokens;
};

/* `_Rest` in rest.py is the same. */
struct rest {
    struct exact runs[EXACT_RUNS];
    int64_t type;
    int64_t batch, heads, rows, head_dim;
    const float *query;       /* [B, H, R, D]: R rows of queries on one KV head */
    const float *means, *lse; /* [B, H, R, D] and [B, H, R]: of attention on codes */
    const float *key_means;   /* like means, or NULL */
    const float *map, *bias;  /* [H, D or 2 D, D]: of means, then key means; [H, D] or NULL */
    const uint8_t *hidden;    /* [B, H, R, n of all runs] or NULL */
    const float *null;        /* [H, R], scores that have no value, or NULL */
    float *output;            /* [B, H, R, D] */
};

#endif
