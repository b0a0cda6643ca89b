/* Attention on codes of any shape: with what all CPUs have, AVX2 and AVX-512. */

#include <math.h>
#include <string.h>

#include "attend_codewords.h"

/* `call`, in which DIM is `given`: a constant where that is usual, as loops of so few steps are slow
 * where a compiler does not know how many. */
#define WITH_DIM(given, call) \
    switch (given) { \
    case 2: { enum { DIM = 2 }; call; break; } \
    case 4: { enum { DIM = 4 }; call; break; } \
    case 8: { enum { DIM = 8 }; call; break; } \
    default: { const int64_t DIM = given; call; } \
    }

#define IMPL "attend_impl.h"
#include "each_level.h"
