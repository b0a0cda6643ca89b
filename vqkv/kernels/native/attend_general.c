/* Attention on codes of any shape: scalar, AVX2 and AVX-512. */

#include <math.h>
#include <string.h>

#include "attend.h"

/* `call`, in which DIM is `given`: a constant where that is usual, as loops of so few steps are slow
 * where a compiler does not know how many. */
#define WITH_DIM(given, call) \
    switch (given) { \
    case 2: { enum { DIM = 2 }; call; break; } \
    case 4: { enum { DIM = 4 }; call; break; } \
    case 8: { enum { DIM = 8 }; call; break; } \
    default: { const int64_t DIM = given; call; } \
    }

/* `call(n)` with the number of rows that remain, but for 4 at most, as a constant; moves `row` on. */
#define FOR_UP_TO_4_ROWS(remaining, call) \
    switch (remaining) { \
    case 1: call(1); row += 1; break; \
    case 2: call(2); row += 2; break; \
    case 3: call(3); row += 3; break; \
    default: call(4); row += 4; \
    }

#define IMPL "attend_impl.h"
#include "each_level.h"
