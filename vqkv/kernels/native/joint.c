/* Codes of a unit's groups chosen together, as errors of groups add up or cancel in a metric. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "beam.h"
#include "levels.h"
#include "nearest.h"
#include "push.h"

/* Codewords are made up to a multiple of it, for the widest level. */
#define LANES 16

typedef void (*spread_fn)(const float *before, const float *error, const float *metric,
                          int64_t channels, int64_t first, int64_t last, int64_t dim, float *after);

#define IMPL "joint_impl.h"
#include "each_level.h"

/* A unit, and scratch for some of its vectors, a column being one of them. */
struct work {
    push_fn push;
    search_fn search;
    int64_t channels, dim, size;
    const float *metric; /* [n, n] */
    const float *ahead;  /* [n, n], upper triangular: V, with V V' the metric and a little more */
    float *books;        /* [G, floats]: codewords as they are searched */
    float *ahead_words;  /* [G, K, d]: codewords times the group's own block of V */
    float *ahead_books;  /* [G, floats]: as they are searched; NULL where several are kept */
    float *errors;       /* [n, ROWS] */
    float *target;       /* [d, ROWS] */
    float *gathered;     /* [ROWS, d]: the targets, row by row */
    float *scratch;
    int32_t *found;      /* [ROWS] */
};

/* Targets row by row, as searches take them. */
static void gather(const struct work *w, int64_t rows)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < w->dim; j++)
            w->gathered[r * w->dim + j] = w->target[j * ROWS + r];
}

/* Targets of the words of group g: x less what the other groups' errors push. `x` is the group's part
 * of the first vector, the next one's is `stride` further. */
static void set_target(const struct work *w, const float *x, int64_t stride, int64_t group,
                       int64_t rows)
{
    const int64_t dim = w->dim, first = group * dim;
    const float *columns = w->metric + first;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < dim; j++)
            w->target[j * ROWS + r] = x[r * stride + j];
    w->push(w->errors, columns, w->channels, 0, first, rows, dim, w->target);
    w->push(w->errors, columns, w->channels, first + dim, w->channels, rows, dim, w->target);
}

/* Targets of the group's words times its own block of V, when errors of later groups can make up for
 * what they can: x times that block, less what errors of the groups before push through V. */
static void set_target_ahead(const struct work *w, const float *x, int64_t stride, int64_t group,
                             int64_t rows)
{
    const int64_t dim = w->dim, first = group * dim;
    memset(w->target, 0, dim * ROWS * sizeof(float));
    for (int64_t r = 0; r < rows; r++) /* so much is missing before a word is chosen */
        for (int64_t j = 0; j < dim; j++)
            w->errors[(first + j) * ROWS + r] = -x[r * stride + j];
    w->push(w->errors, w->ahead + first, w->channels, 0, first + dim, rows, dim, w->target);
}

/* Codes `found` of one group of `rows` vectors, whose targets are set, and their errors. */
static void choose(const struct work *w, const float *x, int64_t stride, const float *words,
                   const float *books, int64_t group, int64_t rows)
{
    const int64_t dim = w->dim;
    gather(w, rows);
    w->search(w->gathered, dim, rows, books + group * vqkv_arranged_floats(w->size, dim),
              vqkv_word_blocks(w->size), dim, w->found, 1, w->scratch);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < dim; j++)
            w->errors[(group * dim + j) * ROWS + r] =
                words[w->found[r] * dim + j] - x[r * stride + j];
}

/* Codewords of a unit [G, K, d] as both searches take them. */
static void arrange(const struct work *w, const float *words, int64_t groups)
{
    const int64_t dim = w->dim, floats = vqkv_arranged_floats(w->size, dim);
    for (int64_t g = 0; g < groups; g++) {
        const float *own = words + g * w->size * dim;
        const float *block = w->ahead + g * dim * w->channels + g * dim;
        float *ahead = w->ahead_words + g * w->size * dim;
        for (int64_t k = 0; k < w->size; k++)
            for (int64_t j = 0; j < dim; j++) {
                float sum = 0.0f;
                for (int64_t i = 0; i <= j; i++)
                    sum += own[k * dim + i] * block[i * w->channels + j];
                ahead[k * dim + j] = sum;
            }
        vqkv_arrange(own, w->size, dim, w->books + g * floats);
        if (w->ahead_books != NULL)
            vqkv_arrange(ahead, w->size, dim, w->ahead_books + g * floats);
    }
}

/* What a search that keeps several choices needs beside it: of each vector `width` so far, before and
 * after a group. */
struct beam {
    extend_fn extend;
    spread_fn spread;
    int64_t width, groups, room;
    float *words;     /* [G, d, room]: -2 c, c being the words of looking ahead */
    float *norms;     /* [G, room]: squares of c, infinite beyond K */
    float *scratch;   /* [width, room + LANES] */
    float *pushed[2]; /* [width, n]: what errors so far push through V */
    int32_t *codes[2]; /* [width, G] */
    float *error;      /* [d] */
    struct sums sums; /* of one group; its codes are not used */
    struct found found;
};

static void arrange_for_beam(const struct beam *b, const float *words, int64_t size, int64_t dim)
{
    for (int64_t g = 0; g < b->groups; g++)
        for (int64_t k = 0; k < b->room; k++) {
            float square = 0.0f;
            for (int64_t j = 0; j < dim; j++) {
                const float channel = k < size ? words[(g * size + k) * dim + j] : 0.0f;
                b->words[(g * dim + j) * b->room + k] = -2 * channel;
                square += channel * channel;
            }
            b->norms[g * b->room + k] = k < size ? square : INFINITY;
        }
}

/* What is near to the words of looking ahead in a group, and costs of the choices so far if a word is
 * at no distance of it: the cost of one is that, less the target's square, more than the distance. */
static void begin_group(const struct work *w, struct beam *b, const float *x, const float *pushed,
                        int64_t first)
{
    const int64_t dim = w->dim;
    for (int64_t i = 0; i < b->sums.count; i++)
        for (int64_t j = 0; j < dim; j++) {
            float target = -pushed[i * w->channels + first + j];
            for (int64_t k = 0; k <= j; k++)
                target += x[first + k] * w->ahead[(first + k) * w->channels + first + j];
            b->sums.residuals[i * dim + j] = target;
            b->sums.scores[i] += target * target;
        }
}

/* Errors of one vector `x` [n] after a search through the groups that keeps `width` choices, into
 * column r. */
static void search_beam(const struct work *w, struct beam *b, const float *x, const float *words,
                        int64_t r)
{
    const int64_t dim = w->dim, channels = w->channels;
    b->sums.count = 1;
    b->sums.scores[0] = 0.0f;
    memset(b->pushed[0], 0, channels * sizeof(float));
    for (int64_t g = 0; g < b->groups; g++) {
        const int64_t first = g * dim, all = b->sums.count * w->size;
        const float *before = b->pushed[g % 2];
        const int32_t *codes = b->codes[g % 2];
        begin_group(w, b, x, before, first);
        b->found.count = b->found.worst = 0;
        b->found.wanted = g + 1 == b->groups ? 1 : all < b->width ? all : b->width;
        b->extend(&b->sums, b->words + first * b->room, b->norms + g * b->room, dim, b->room,
                  b->scratch, &b->found);
        if (b->found.count == 0) { /* no cost is a number: any code will do */
            b->found.scores[0] = 0.0f;
            b->found.parents[0] = b->found.codes[0] = 0;
            b->found.count = 1;
        }
        for (int64_t i = 0; i < b->found.count; i++) {
            const int64_t parent = b->found.parents[i], code = b->found.codes[i];
            int32_t *mine = b->codes[(g + 1) % 2] + i * b->groups;
            for (int64_t j = 0; j < dim; j++)
                b->error[j] = words[(g * w->size + code) * dim + j] - x[first + j];
            memcpy(mine, codes + parent * b->groups, g * sizeof(int32_t));
            mine[g] = (int32_t)code;
            b->spread(before + parent * channels, b->error, w->ahead + first * channels, channels,
                      first + dim, channels, dim, b->pushed[(g + 1) % 2] + i * channels);
        }
        b->sums.count = b->found.count;
        memcpy(b->sums.scores, b->found.scores, b->found.count * sizeof(float));
    }
    const int32_t *best = b->codes[b->groups % 2];
    for (int64_t g = 0; g < b->groups; g++)
        for (int64_t j = 0; j < dim; j++)
            w->errors[(g * dim + j) * ROWS + r] =
                words[(g * w->size + best[g]) * dim + j] - x[g * dim + j];
}

/* Hands out pieces of one allocation of `what`s, or counts them where there is none. */
#define TAKE(pointer, count) \
    do { (pointer) = *what == NULL ? NULL : *what + used; used += (count); } while (0)

static size_t lay_out_floats(struct work *w, struct beam *b, float **what)
{
    const size_t width = b->width, dim = w->dim;
    size_t used = 0;
    TAKE(w->books, b->groups * vqkv_arranged_floats(w->size, dim));
    TAKE(w->ahead_words, b->groups * w->size * dim);
    TAKE(w->errors, w->channels * ROWS);
    TAKE(w->target, dim * ROWS);
    TAKE(w->gathered, dim * ROWS);
    TAKE(w->scratch, vqkv_search_scratch(dim));
    if (width < 2) {
        TAKE(w->ahead_books, b->groups * vqkv_arranged_floats(w->size, dim));
        return used;
    }
    TAKE(b->words, b->groups * dim * b->room);
    TAKE(b->norms, b->groups * b->room);
    TAKE(b->scratch, width * (b->room + LANES));
    TAKE(b->pushed[0], width * w->channels);
    TAKE(b->pushed[1], width * w->channels);
    TAKE(b->error, dim);
    TAKE(b->sums.scores, width);
    TAKE(b->sums.residuals, width * dim);
    TAKE(b->found.scores, width);
    return used;
}

static size_t lay_out_integers(struct work *w, struct beam *b, int32_t **what)
{
    size_t used = 0;
    TAKE(w->found, ROWS);
    TAKE(b->codes[0], b->width * b->groups);
    TAKE(b->codes[1], b->width * b->groups);
    TAKE(b->found.parents, b->width);
    TAKE(b->found.codes, b->width);
    return used;
}
#undef TAKE

/* Codes [N, U, G] of rows `begin` to `end` of x [N, U, G, d] in words [U, G, K, d], in the metric
 * [U, n, n], n = G d, whose diagonal blocks of d are taken as ones; all contiguous. A search that
 * looks ahead, by upper triangular matrices [U, n, n], and keeps `width` choices comes before the
 * sweeps. Returns 0, or -1 where memory ran out. */
int vqkv_joint(int level, const float *x, const float *words, const float *metric,
               const float *ahead, int64_t units, int64_t groups, int64_t size, int64_t dim, int64_t width,
               int64_t sweeps, int64_t begin, int64_t end, int32_t *codes)
{
    const int64_t channels = groups * dim, stride = units * channels;
    struct work w = {.push = vqkv_push_of(level), .search = vqkv_search_of(level),
                     .channels = channels, .dim = dim, .size = size};
    struct beam b = {.extend = vqkv_extend_of(level), .spread = AT_LEVEL(level, spread), .width = width,
                     .groups = groups, .room = (size + LANES - 1) / LANES * LANES};
    float *floats = NULL;
    int32_t *integers = NULL;
    floats = malloc(lay_out_floats(&w, &b, &floats) * sizeof(float));
    integers = malloc(lay_out_integers(&w, &b, &integers) * sizeof(int32_t));
    if (floats == NULL || integers == NULL) {
        free(floats);
        free(integers);
        return -1;
    }
    lay_out_floats(&w, &b, &floats);
    lay_out_integers(&w, &b, &integers);
    memset(w.target, 0, dim * ROWS * sizeof(float));
    memset(w.errors, 0, channels * ROWS * sizeof(float));
    for (int64_t u = 0; u < units; u++) {
        const float *unit = words + u * groups * size * dim;
        w.metric = metric + u * channels * channels;
        w.ahead = ahead + u * channels * channels;
        arrange(&w, unit, groups);
        if (width > 1)
            arrange_for_beam(&b, w.ahead_words, size, dim);
        for (int64_t first = begin; first < end; first += ROWS) {
            const int64_t rows = end - first < ROWS ? end - first : ROWS;
            const float *own = x + first * stride + u * channels;
            for (int64_t r = 0; width > 1 && r < rows; r++)
                search_beam(&w, &b, own + r * stride, unit, r);
            for (int64_t g = 0; width == 1 && g < groups; g++) {
                set_target_ahead(&w, own + g * dim, stride, g, rows);
                choose(&w, own + g * dim, stride, unit + g * size * dim, w.ahead_books, g, rows);
            }
            for (int64_t step = 0; step < sweeps * groups; step++) {
                const int64_t g = step % groups;
                int32_t *to = codes + (first * units + u) * groups + g;
                set_target(&w, own + g * dim, stride, g, rows);
                choose(&w, own + g * dim, stride, unit + g * size * dim, w.books, g, rows);
                for (int64_t r = 0; r < rows; r++)
                    to[r * units * groups] = w.found[r];
            }
        }
    }
    free(floats);
    free(integers);
    return 0;
}
