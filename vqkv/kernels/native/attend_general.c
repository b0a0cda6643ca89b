/* Attention on codes of any shape: scalar, AVX2 and AVX-512. */

#include <math.h>
#include <string.h>

#include "attend.h"

#define NAME(x) x##_scalar
#define TARGET
#include "attend_impl.h"

#ifdef HAVE_X86

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "attend_impl.h"

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f")))
#include "attend_impl.h"

#endif
