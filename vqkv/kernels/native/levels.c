/* Which SIMD levels this CPU has. */

#include "levels.h"

/* The best level of this CPU. */
int vqkv_best_level(void)
{
#ifdef HAVE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
        if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
            !__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512vnni"))
            return AVX512;
        return __builtin_cpu_is("intel") ? AVX512_VNNI : AVX512_VBMI;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return AVX2;
#endif
    return BASELINE;
}
