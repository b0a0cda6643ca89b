/* What errors push, at the level of the CPU. */

#include "push.h"

#include "levels.h"

/* Channels that errors are taken from at a time: with two vectors of columns for each, as many sums
 * as multiplications are under way. */
#define PUSHED 8
/* Columns are made up to a multiple of it, for the widest level. */
#define COLUMNS 16

#define IMPL "push_impl.h"
#include "each_level.h"

push_fn vqkv_push_of(int level)
{
    return AT_LEVEL(level, push);
}
