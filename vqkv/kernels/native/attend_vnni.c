/* Attention on codes by whole numbers (attend_vnni.h): weighted sums.
 *
 * A channel of 64 tokens meets their weights in two instructions for each row, which multiply two
 * tokens a lane; lanes of 16 channels are added up when a tile has been read. Values have 12 bits, and
 * weights 15, in steps of the tile's largest, so that sums of 32 products fit into 32 bits.
 */

#include <string.h>

#include "attend_vnni.h"

#ifdef HAVE_X86

#define TARGET VNNI_TARGET
#define CHANNELS 16
/* Values, of which 32 are multiplied by `MOST` and added up in 32 bits, with room for the rounding of
 * stages. */
#define MOST_VALUE 2000

size_t vnni_lay_out(const struct attention *a, char *memory)
{
    const size_t dim = a->head_dim, rows = a->rows, real = sizeof(float), word = sizeof(struct bytes);
    const int64_t keys = a->keys.groups * a->keys.stages;
    const int64_t values = a->values.groups * a->values.stages;
    const size_t columns = ((keys > values ? keys : values) + 15) / 16 * 16;
    const size_t turns = dim * PAGE * sizeof(int16_t);
    size_t used = 0;
    struct whole_pieces *p = take(&memory, &used, sizeof *p);
    const struct whole_pieces pieces = {
        .keys = {take(&memory, &used, dim * a->keys.stages * word),
                 take(&memory, &used, dim * real)},
        .values = {take(&memory, &used, dim * a->values.stages * word),
                   take(&memory, &used, dim * real)},
        .codes = take(&memory, &used, columns * TILE),
        .all_turns = take(&memory, &used, turns),
        .turns = take(&memory, &used, turns),
        .scaled = take(&memory, &used, rows * ((dim + 31) / 32 * 32) * real),
        .queries = take(&memory, &used, TILE_PAGES * rows * dim / 2 * sizeof(int32_t)),
        .units = take(&memory, &used, rows * real),
        .products = take(&memory, &used, rows * TILE * sizeof(int32_t)),
        .weights = take(&memory, &used, rows * TILE * sizeof(int16_t)),
        .weight_units = take(&memory, &used, rows * real),
    };
    if (p != NULL)
        *p = pieces;
    return used;
}

/* Keys that scores are of this way are there already. */
static void prepare(struct work *w, const struct stream *stream)
{
    const struct attention *a = w->a;
    const struct whole_pieces *p = w->whole;
    if (stream == &w->values)
        tabulate_vnni(&a->values, w->head, 0, MOST_VALUE, p->values);
    else if (!turned_vnni_takes(a))
        tabulate_vnni(&a->keys, w->head, 0, MOST_KEY, p->keys);
}

/* 16 weights of a page in steps. */
INLINE TARGET __m512 stepped(const float *weights, int i, __m512 steps)
{
    return _mm512_mul_ps(_mm512_loadu_ps(weights + 16 * i), steps);
}

/* Whole numbers of a page in the order of `numbers`. */
INLINE TARGET void store_page(const __m512 x[4], int16_t *to)
{
#define SIXTEEN(i) _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x[i]))
    const __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(SIXTEEN(0)), SIXTEEN(1), 1);
    const __m512i high = _mm512_inserti64x4(_mm512_castsi256_si512(SIXTEEN(2)), SIXTEEN(3), 1);
#undef SIXTEEN
    _mm512_store_si512(to, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_store_si512(to + 32, _mm512_shuffle_i32x4(low, high, 0xdd));
}

/* What rounding leaves of numbers. */
INLINE TARGET __m512 left_of(__m512 x)
{
    return _mm512_sub_ps(x, _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT));
}

/* A row's weights of a tile as whole numbers, in steps of the largest. Returns whether that takes more than a
 * 256th of the others: the largest may belong to a value that is next to nothing. */
static TARGET int weigh(const struct work *w, int64_t row, const struct whole_pieces *p)
{
    const float *weights = w->scores + row * TILE;
    __m512 most = _mm512_setzero_ps();
    for (int64_t t = 0; t < TILE; t += 16)
        most = _mm512_max_ps(most, _mm512_loadu_ps(weights + t));
    const float best = _mm512_reduce_max_ps(most);
    const __m512 steps = _mm512_set1_ps(best > 0.0f ? MOST / best : 0.0f);
    __m512 sum = _mm512_setzero_ps(), lost = sum;
    for (int64_t t = w->begin / PAGE * PAGE; t < w->end; t += PAGE) {
        __m512 x[4];
        for (int i = 0; i < 4; i++) {
            x[i] = stepped(weights + t, i, steps);
            sum = _mm512_add_ps(sum, x[i]);
            lost = _mm512_add_ps(lost, _mm512_abs_ps(left_of(x[i])));
        }
        store_page(x, p->weights + row * TILE + t);
    }
    p->weight_units[row] = best / MOST;
    return 256.0f * _mm512_reduce_add_ps(lost) > _mm512_reduce_add_ps(sum) - MOST;
}

/* What that takes of a row's weights, in steps that are so much smaller. */
static TARGET void weigh_rest(const struct work *w, int64_t row, const struct whole_pieces *p)
{
    const float *weights = w->scores + row * TILE, unit = p->weight_units[row];
    const __m512 steps = _mm512_set1_ps(unit > 0.0f ? 1.0f / unit : 0.0f);
    for (int64_t t = w->begin / PAGE * PAGE; t < w->end; t += PAGE) {
        __m512 x[4];
        for (int i = 0; i < 4; i++)
            x[i] = _mm512_mul_ps(left_of(stepped(weights + t, i, steps)),
                                 _mm512_set1_ps(2 * MOST));
        store_page(x, p->weights + row * TILE + t);
    }
    p->weight_units[row] = unit / (2 * MOST);
}

/* Sums of the lanes of 16 vectors; in fp32, as these may exceed 32 bits. */
INLINE TARGET __m512 lanes_of(const __m512i lanes[CHANNELS])
{
    __m512 x[16], y[8], z[4], u[2];
    for (int i = 0; i < 16; i++)
        x[i] = _mm512_cvtepi32_ps(lanes[i]);
    for (int i = 0; i < 8; i++)
        y[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                             _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    for (int i = 0; i < 4; i++)
        z[i] = _mm512_add_ps(_mm512_shuffle_ps(y[2 * i], y[2 * i + 1], 0x44),
                             _mm512_shuffle_ps(y[2 * i], y[2 * i + 1], 0xee));
    for (int i = 0; i < 2; i++)
        u[i] = _mm512_add_ps(_mm512_shuffle_f32x4(z[2 * i], z[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(z[2 * i], z[2 * i + 1], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88),
                         _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
}

/* Sums of products of `channels` channels, one or two that have the same codes, with weights of `rows` rows,
 * two tokens a lane. Constant where this is inlined: `channels`, `rows`, and, in the case that
 * matters most, `stages` and whether these are `keys`. */
INLINE TARGET void sum_channels(const struct work *w, const struct bytes *tables,
                                const uint8_t *codes, const int16_t *weights, int channels,
                                int keys, int64_t stages, int rows, __m512i *lanes)
{
    /* Keys' numbers are larger than sums have room for. */
    const __m512i less = _mm512_set1_epi16(MOST_VALUE);
    __m512i sums[2][MOST_ROWS];
    for (int i = 0; i < channels; i++)
        for (int r = 0; r < rows; r++)
            sums[i][r] = _mm512_setzero_si512();
    for (int64_t s = 0; s < stages; s++, tables++, codes += TILE)
        for (int64_t t = w->begin / PAGE * PAGE; t < w->end; t += PAGE)
            for (int i = 0; i < channels; i++) {
                struct numbers own = numbers_of(tables + i * stages, codes + t);
                if (keys) {
                    own.first = _mm512_mulhrs_epi16(own.first, less);
                    own.second = _mm512_mulhrs_epi16(own.second, less);
                }
                for (int r = 0; r < rows; r++) {
                    const __m512i *weight = (const __m512i *)(weights + r * TILE + t);
                    sums[i][r] = _mm512_dpwssd_epi32(sums[i][r], own.first, weight[0]);
                    sums[i][r] = _mm512_dpwssd_epi32(sums[i][r], own.second, weight[1]);
                }
            }
    for (int i = 0; i < channels; i++)
        for (int r = 0; r < rows; r++)
            lanes[r * CHANNELS + i] = sums[i][r];
}

/* Adds the tokens of a tile to the sums of `rows` rows from `row`. */
INLINE TARGET void sum_rows(const struct work *w, const struct whole_pieces *p,
                            const struct plane *plane, int64_t row, int keys, int64_t stages,
                            int channels, int rows, const float *shrink,
                            float *sums)
{
    const int64_t dim = w->a->head_dim;
    const struct whole_words words = keys ? p->keys : p->values;
    const float more = keys ? 32768.0f / MOST_VALUE : 1.0f;
    __m512i lanes[MOST_ROWS * CHANNELS];
    for (int64_t first = 0; first < dim; first += CHANNELS) {
        const int64_t count = dim - first < CHANNELS ? dim - first : CHANNELS;
        if (count < CHANNELS)
            memset(lanes, 0, sizeof lanes);
        for (int64_t c = first; c < first + count; c += channels)
            sum_channels(w, words.tables + c * stages, p->codes + c / plane->dim * stages * TILE,
                         p->weights + row * TILE, channels, keys, stages, rows,
                         lanes + (c - first));
        const __mmask16 some = (__mmask16)((1u << count) - 1);
        const __m512 scale = _mm512_maskz_loadu_ps(some, words.scales + first);
        for (int r = 0; r < rows; r++) {
            float *sum = sums + (row + r) * dim + first;
            const __m512 added = _mm512_mul_ps(
                lanes_of(lanes + r * CHANNELS),
                _mm512_mul_ps(scale, _mm512_set1_ps(p->weight_units[row + r] * more)));
            _mm512_mask_storeu_ps(sum, some,
                                  _mm512_fmadd_ps(_mm512_maskz_loadu_ps(some, sum),
                                                  _mm512_set1_ps(shrink == NULL ? 1.0f : shrink[row + r]),
                                                  added));
        }
    }
}

/* Adds a tile to the sums of all rows; `shrink` earlier ones. */
static TARGET void sum_all(const struct work *w, const struct plane *plane, const float *shrink,
                           float *sums)
{
    const struct attention *a = w->a;
    const struct whole_pieces *p = w->whole;
    const int64_t stages = plane->stages;
    const int keys = plane == &a->keys;
    for (int64_t row = 0; row < a->rows;) {
#define SUM(rows, keys, stages, channels) \
    sum_rows(w, p, plane, row, keys, stages, channels, rows, shrink, sums)
#define VALUES(rows) SUM(rows, 0, 1, 2)
#define EVEN(rows) SUM(rows, keys, stages, 2)
#define ANY(rows) SUM(rows, keys, stages, 1)
        if (stages == 1 && plane->dim % 2 == 0 && !keys)
            FOR_ROWS(a->rows - row, VALUES)
        else if (plane->dim % 2 == 0)
            FOR_ROWS(a->rows - row, EVEN)
        else
            FOR_ROWS(a->rows - row, ANY)
#undef ANY
#undef EVEN
#undef VALUES
#undef SUM
    }
}

static TARGET void add(struct work *w, const struct stream *stream)
{
    const struct attention *a = w->a;
    const struct plane *plane = stream->plane;
    const struct whole_pieces *p = w->whole;
    int coarse = 0;
    transpose(stream->codes, plane->groups * plane->stages, w->end, p->codes);
    for (int64_t r = 0; r < a->rows; r++)
        coarse |= weigh(w, r, p);
    sum_all(w, plane, w->shrink, stream->sums);
    if (!coarse)
        return;
    for (int64_t r = 0; r < a->rows; r++)
        weigh_rest(w, r, p);
    sum_all(w, plane, NULL, stream->sums);
}

/* Sums by codeword take an addition for each code, of four rows or of eight; these take as long for any
 * `dim`, but longer for more rows. */
int sums_vnni_takes(const struct attention *a, const struct plane *plane)
{
    return plane->stages <= MOST_STAGES && a->head_dim % 2 == 0 &&
           plane->dim <= (a->rows <= 4 ? 4 : 2);
}

const struct summing sums_vnni = {prepare, add, NULL};

#endif
