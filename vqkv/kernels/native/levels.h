/* SIMD levels, ordered; which of them this CPU has is asked at run time. */

#ifndef VQKV_LEVELS_H
#define VQKV_LEVELS_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_X86 1
#include <immintrin.h>
#endif

/* The baseline is what all CPUs of an architecture have, with vectors of four floats: SSE2, NEON. VBMI is
 * AVX-512 with look-ups of bytes in registers, VNNI that and sums of products of pairs of 16 bits, where
 * these are the faster way; either is used where a CPU has all of F, BW, VL, VBMI and VNNI. */
enum level {
    BASELINE = 0,
    AVX2 = 1,
    AVX512 = 2,
    AVX512_VBMI = 3,
    AVX512_VNNI = 4
};

/* Of a function that each_level.h made, the one for a level. */
#ifdef HAVE_X86
#define AT_LEVEL(level, name) \
    ((level) >= AVX512 ? name##_avx512 : (level) >= AVX2 ? name##_avx2 : name##_baseline)
#else
#define AT_LEVEL(level, name) ((void)(level), name##_baseline)
#endif

#define INLINE static inline __attribute__((always_inline))

/* Four floats, or int32, of which compilers make what a CPU has. */
typedef float quad __attribute__((vector_size(16), may_alias));
typedef int32_t quad_of_int __attribute__((vector_size(16), may_alias));

#endif
