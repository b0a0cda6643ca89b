/* Attention by codeword, at one SIMD level: what tokens of one code have in common is done once.
 *
 * Scores of keys that are not turned: a query's products with all codewords are made before any token is
 * read, and a score is a sum of one of them for each code of a token. Sums: the weights of all tokens
 * that have a code are added up, and multiplied by its codeword in the end.
 *
 * Either way a token takes one addition for each of its codes, whatever `dim` is. Entries have a number for
 * each of four rows of queries side by side, or of eight: [columns, size]. They are taken a few columns at a
 * time over a whole tile, so that they stay in the L1 cache.
 */

#define ENTRY quad
#define BY_ROWS(name) NAME(name##_4)
#include "attend_entries_impl.h"

#define ENTRY oct
#define BY_ROWS(name) NAME(name##_8)
#include "attend_entries_impl.h"

/* Queries that are not turned are the same for all tokens. */
static TARGET void NAME(multiply_queries)(struct work *w, int64_t page, const float *turns)
{
    (void)page;
    (void)turns;
    const struct attention *a = w->a;
#define MULTIPLY(ENTRY, n) \
    { \
        gather_rows(w->given, a->rows, a->head_dim, (float *)w->side_by_side, n); \
        WITH_DIM(a->keys.dim, NAME(multiply_##n)(w, (ENTRY *)w->products, DIM)) \
    }
    WITH_ENTRIES(a->rows, MULTIPLY)
#undef MULTIPLY
}

/* Scores of the first `tokens` tokens of the tile. */
static TARGET void NAME(add_up_products)(struct work *w, int64_t tokens)
{
    const struct attention *a = w->a;
    const int64_t columns = a->keys.groups * a->keys.stages, fours = (tokens + 3) / 4 * 4;
#define ADD(ENTRY, n) \
    { \
        FOR_COLUMNS(columns, PRODUCTS, n) \
        row_by_row(w->side_by_side, a->rows, fours, w->scores, n / 4); \
    }
#define PRODUCTS(column, columns, n) \
    NAME(add_products_##n)(w, column, columns, fours, (const void *)w->products)
    WITH_ENTRIES(a->rows, ADD)
#undef PRODUCTS
#undef ADD
}

/* Adds the tile's weights to entries. */
static TARGET void NAME(add_up_weights)(struct work *w, const struct stream *stream)
{
    const int64_t rows = w->a->rows, columns = stream->plane->groups * stream->plane->stages;
    void *entries = stream->weights;
#define ADD(ENTRY, n) \
    { \
        NAME(shrink_##n)(w->shrink, rows, columns * stream->plane->size, entries); \
        side_by_side(w->scores, rows, w->begin, w->end, w->side_by_side, n / 4); \
        FOR_COLUMNS(columns, WEIGHTS, n) \
    }
#define WEIGHTS(column, columns, n) NAME(add_weights_##n)(w, stream, column, columns, entries)
    WITH_ENTRIES(rows, ADD)
#undef WEIGHTS
#undef ADD
}

/* Sums [R, D] of entries. */
static TARGET void NAME(finish_sums)(struct work *w, const struct stream *stream)
{
    const int64_t dim = stream->plane->dim;
    const void *entries = stream->weights;
#define FINISH(ENTRY, n) \
    { \
        if (dim % 4 == 0) \
            NAME(multiply_entries_##n)(w, stream, entries, 4); \
        else if (dim % 2 == 0) \
            NAME(multiply_entries_##n)(w, stream, entries, 2); \
        else \
            NAME(multiply_entries_##n)(w, stream, entries, 1); \
        scatter_rows((const float *)w->side_by_side, w->a->rows, w->a->head_dim, stream->sums, n); \
    }
    WITH_ENTRIES(w->a->rows, FINISH)
#undef FINISH
}

const struct scoring NAME(products) = {.queries = NAME(multiply_queries),
                                       .scores = NAME(add_up_products)};
const struct summing NAME(weights) = {NULL, NAME(add_up_weights), NAME(finish_sums)};
