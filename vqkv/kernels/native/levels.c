/* Which SIMD levels this CPU has. */

#include "levels.h"

/* The best level of this CPU. */
int vqkv_best_level(void)
{
#ifdef HAVE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
        const int bf16 = __builtin_cpu_supports("avx512bf16") &&
                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
        if (!bf16)
            return AVX512;
        if (!__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512vnni"))
            return AVX512_BF16;
        return __builtin_cpu_is("intel") ? AVX512_VNNI : AVX512_VBMI;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return AVX2;
#endif
    return BASELINE;
}
