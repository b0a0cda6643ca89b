/* Includes IMPL once for each SIMD level of lanes.h, with NAME and W; takes IMPL back. */

#define NAME(x) x##_baseline
#define W 4
#include IMPL

#ifdef HAVE_X86

#define NAME(x) x##_avx2
#define W 8
#include IMPL

#define NAME(x) x##_avx512
#define W 16
#include IMPL

#endif

#undef IMPL
