/* One step of a beam search, for kernels that keep several choices of every vector. */

#ifndef VQKV_BEAM_H
#define VQKV_BEAM_H

#include <stdint.h>

/* One vector's sums after some stages, in no order. */
struct sums {
    float *scores;    /* [width]: squared distances, less the vector's own square */
    float *residuals; /* [width, d] */
    int32_t *codes;   /* [width, S] */
    int64_t count;
};

/* The best continuations so far of one vector's sums, in no order. */
struct found {
    float *scores;    /* [wanted] */
    int32_t *parents; /* [wanted] */
    int32_t *codes;   /* [wanted] */
    int64_t count, wanted;
    int64_t worst; /* of them, once there are as many as are wanted */
};

/* The best of all sums with each code of one more stage; none where no score is a number. `words`
 * [d, room] are -2 c and `norms` [room] their squares, infinite beyond K; room is a multiple of 16.
 * Scratch is [count, room + 16]. */
typedef void (*extend_fn)(const struct sums *before, const float *words, const float *norms,
                          int64_t dim, int64_t room, float *scratch, struct found *f);

extend_fn vqkv_extend_of(int level);

#endif
