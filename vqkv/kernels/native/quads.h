/* Vectors of four floats for lanes.h, whatever the CPU: compilers make of these what it has. */

#ifndef VQKV_QUADS_H
#define VQKV_QUADS_H

#include "levels.h"

INLINE quad load_quad(const float *from)
{
    quad x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store_quad(float *to, quad x)
{
    memcpy(to, &x, sizeof x);
}

INLINE quad all_of(float x)
{
    return (quad){x, x, x, x};
}

/* Of each lane a where `which` is -1, b where it is 0. */
INLINE quad_of_int chosen(quad_of_int which, quad_of_int a, quad_of_int b)
{
    return (a & which) | (b & ~which);
}

INLINE quad least_of_quads(quad a, quad b)
{
    return (quad)chosen(a < b, (quad_of_int)a, (quad_of_int)b);
}

/* A bit for each lane that is -1. */
INLINE uint32_t bits_of(quad_of_int which)
{
    const quad_of_int bits = which & (quad_of_int){1, 2, 4, 8};
    return (uint32_t)(bits[0] | bits[1] | bits[2] | bits[3]);
}

/* Four by four floats. */
INLINE void transpose_quads(quad x[4])
{
#ifdef HAVE_X86
    _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
#else
    quad y[4];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            y[i][j] = x[j][i];
    memcpy(x, y, sizeof y);
#endif
}

#endif
