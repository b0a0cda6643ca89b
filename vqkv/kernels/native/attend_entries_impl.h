/* Attention by codeword, for one number of rows: ENTRY has a number for each, BY_ROWS(name) names what is
 * here. Included once for each, by attend_codewords_impl.h; takes both back. */

/* Adds a product of each of `columns` columns to tokens' sums. Constant where this is inlined:
 * `columns`. */
INLINE TARGET void BY_ROWS(add_products)(const struct work *w, int64_t column, int columns,
                                         int64_t tokens, const ENTRY *entries)
{
    const struct plane *keys = &w->a->keys;
    const int64_t pitch = keys->groups * keys->stages;
    const uint8_t *codes = w->keys.codes + column;
    ENTRY *sums = (ENTRY *)w->side_by_side;
    const ENTRY *of[COLUMNS];
    for (int c = 0; c < columns; c++)
        of[c] = kept(entries + (column + c) * keys->size);
    for (int64_t t = 0; t < tokens; t++, codes += pitch, sums++) {
        const uint32_t own = codes_of(codes, columns);
        ENTRY sum = column == 0 ? (ENTRY){0} : *sums;
        for (int c = 0; c < columns; c++)
            sum += of[c][code_of(own, c)];
        *sums = sum;
    }
}

/* Adds tokens' weights to the entries of their codes. Constant as above. */
INLINE TARGET void BY_ROWS(add_weights)(const struct work *w, const struct stream *stream,
                                        int64_t column, int columns, ENTRY *entries)
{
    const struct plane *plane = stream->plane;
    const int64_t pitch = plane->groups * plane->stages;
    const uint8_t *codes = stream->codes + w->begin * pitch + column;
    const ENTRY *weights = (const ENTRY *)w->side_by_side + w->begin;
    ENTRY *of[COLUMNS];
    for (int c = 0; c < columns; c++)
        of[c] = kept(entries + (column + c) * plane->size);
    for (int64_t left = w->end - w->begin; left > 0; left--, codes += pitch, weights++) {
        const uint32_t own = codes_of(codes, columns);
        const ENTRY weight = *weights; /* not to be read again after an entry is written */
        for (int c = 0; c < columns; c++)
            of[c][code_of(own, c)] += weight;
    }
}

/* Products of queries [D] with all codewords of the head. Constant where this is inlined, but for rare
 * shapes: `dim`. */
INLINE TARGET void BY_ROWS(multiply)(const struct work *w, ENTRY *entries, int64_t dim)
{
    const struct plane *keys = &w->a->keys;
    const int64_t stages = keys->stages, columns = keys->groups * stages;
    const float *word = keys->words + w->head * columns * keys->size * dim;
    const ENTRY *queries = (const ENTRY *)w->side_by_side;
    for (int64_t c = 0; c < columns; c++) {
        const ENTRY *query = queries + c / stages * dim;
        for (int64_t k = 0; k < keys->size; k++, word += dim, entries++) {
            ENTRY sum = {0};
            for (int64_t i = 0; i < dim; i++)
                sum += word[i] * query[i];
            *entries = sum;
        }
    }
}

/* Sums [D] of entries by their codewords, `channels` of them at a time. */
INLINE TARGET void BY_ROWS(multiply_entries)(const struct work *w, const struct stream *stream,
                                             const ENTRY *entries, int channels)
{
    const struct plane *plane = stream->plane;
    const int64_t dim = plane->dim, size = plane->stages * plane->size;
    const float *words = plane->words + w->head * plane->groups * size * dim;
    ENTRY *sums = (ENTRY *)w->side_by_side;
    for (int64_t g = 0; g < plane->groups; g++, words += size * dim, entries += size)
        for (int64_t i = 0; i < dim; i += channels, sums += channels) {
            ENTRY own[4] = {{0}};
            for (int64_t k = 0; k < size; k++)
                for (int j = 0; j < channels; j++)
                    own[j] += words[k * dim + i + j] * entries[k];
            for (int j = 0; j < channels; j++)
                sums[j] = own[j];
        }
}

/* Shrinks what earlier tiles left, of which the first finds nothing. */
INLINE TARGET void BY_ROWS(shrink)(const float *shrink, int64_t count, int64_t words, ENTRY *entries)
{
    ENTRY by;
    int same = 1, none = 1;
    gather_rows(shrink, count, 1, (float *)&by, sizeof by / sizeof(float));
    for (size_t r = 0; r < sizeof by / sizeof(float); r++) {
        same &= by[r] == 1.0f;
        none &= by[r] == 0.0f;
    }
    if (none)
        memset(entries, 0, words * sizeof(ENTRY));
    else if (!same)
        for (int64_t k = 0; k < words; k++)
            entries[k] *= by;
}

#undef ENTRY
#undef BY_ROWS
