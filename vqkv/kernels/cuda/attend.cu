// Split-KV attention on codes whose codebooks lie in shared memory, as fp8, in banks of a warp's lanes.
//
// A block of threads takes one split of one KV head of one row of the batch; `merge_splits` does the rest. Warp w
// reads tokens 16 (w % 4) to + 15 of every page it comes to, so that the turn of a token within its page is the
// same in every page and stays in registers.
//
// A tile of 16 tokens is looked up as columns of 8 subvectors: lane (g, c) looks up the codewords of the subvectors
// g W to g W + W - 1 of tokens 2c, 2c + 1, 2c + 8 and 2c + 9. Taken apart, they are fragments of V^T, whose product with
// weights gives the output. Transposed 8 x 8, they are fragments of K, whose product with q gives scores.
//
// Banks. The eight subvectors that lanes read at once lie in banks of their own, in COPIES copies that lanes of
// c share.
//
// Given by the compiler's command line: HEAD_DIM (D), DIM (d), ROWS (query rows of a KV head, padded to 4, 8 or 16),
// WARPS, COPIES, KEY_TOKEN and VALUE_TOKEN (bytes from one token to the next), and 0 or 1 for ROPE, KEY_SUMS and PAGED.

#include <warp.cuh>

#define PAGE 64
#define TILE 16
#define HALF (HEAD_DIM / 2)
#define THREADS (32 * WARPS)
#define W (HEAD_DIM / DIM / 8)
#define PAIRS (DIM / 2)
#define STEPS (W * PAIRS)            // products of depth 16 that a score takes
#define BLOCKS ((ROWS + 7) / 8)      // of 8 query rows
#define COLUMNS (8 * BLOCKS)
#define STRIDE (WARPS / 4)           // pages that the warps read at a time
#define CHUNK (64 / ROWS / STRIDE * STRIDE)  // pages whose turned queries are made at a time
#define NOTHING (-3e38f)
#define ROOM 8.0f                    // weights may grow to 2^8 before sums are scaled down
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

#define ENTRIES (8 * COPIES * DIM)                 // bytes of one code: all copies of eight subvectors' entries
#define ROW (ENTRIES < 128 ? ENTRIES : 128)       // of them side by side; the rest are in tables of their own
#define TABLE_BYTES (W * 256 * ENTRIES)

#if W == 4
typedef u32 Codes;
#elif W == 2
typedef u16 Codes;
#else
typedef u8 Codes;
#endif

// Four tokens' codes of one lane.
struct Read {
    u32 token[4];
};

// The same four tokens of dimension i of the u-th subvector, as a column of V^T: tokens 2c and 2c + 1, then 2c + 8 and
// 2c + 9.
struct Columns {
    u32 of[W][DIM][2];
};

// Where the g-th subvector's entries begin, from a table's start.
DEVICE int entry_of(int g, int copy) {
    const int byte = (g * COPIES + copy) * DIM;
    return byte / ROW * (ROW * 256) + byte % ROW;
}

// A table [W, 256, 8, d] of fp8, spread over the banks.
DEVICE void spread(u8 *table, const u8 *from) {
    for (int entry = thread_index(); entry < W * 256 * 8; entry += THREADS) {
        const int g = entry & 7, code = entry >> 3 & 255, u = entry >> 11;
        for (int copy = 0; copy < COPIES; copy++) {
            u8 *to = table + u * (256 * ENTRIES) + entry_of(g, copy) + code * ROW;
#if DIM == 4
            *(u32 *)to = ((const u32 *)from)[entry];
#else
            *(uint2 *)to = ((const uint2 *)from)[entry];
#endif
        }
    }
}

// `from` is of the lane's first token.
DEVICE Read read_codes(const u8 *from, int stride) {
    Read codes;
#pragma unroll
    for (int j = 0; j < 4; j++)
        codes.token[j] = read_once((const Codes *)(from + ((j & 1) + (j >> 1) * 8) * stride));
    return codes;
}

// Codewords of a tile. Interleaving bytes of two tokens before they become fp16 makes columns of rows.
DEVICE Columns look_up(Read codes, u32 entry) {
    Columns columns;
#pragma unroll
    for (int u = 0; u < W; u++) {
        uint2 word[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 address = add_scaled_byte(entry, codes.token[j], u, ROW);
#if DIM == 4
            word[j].x = load_word(address, u * (256 * ENTRIES));
#else
            word[j] = load_words(address, u * (256 * ENTRIES));
#endif
        }
#pragma unroll
        for (int i = 0; i < DIM; i++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const u32 a = i < 4 ? word[2 * k].x : word[2 * k].y, b = i < 4 ? word[2 * k + 1].x : word[2 * k + 1].y;
                columns.of[u][i][k] = halves_of_e4m3(interleave(a, b, i & 2), i & 1);
            }
    }
    return columns;
}

// sums[D, rows] += columns weights.
DEVICE void add_up(float sums[STEPS][BLOCKS][4], const Columns &columns, const u32 weights[BLOCKS][2]) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const u32(*column)[2] = &columns.of[step / PAIRS][step % PAIRS * 2];
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
            multiply(sums[step][block], column[0][0], column[1][0], column[0][1], column[1][1], weights[block][0],
                     weights[block][1]);
    }
}

// Which pair of a head's coded order is the first or second of a lane's two in a step.
DEVICE int pair_of(int step, int lane, int second) {
    return (W * (2 * (lane & 3) + second) + step / PAIRS) * PAIRS + step % PAIRS;
}

// Queries [ROWS, D] as fragments of a step: even channels of two pairs, then odd ones, turned back by a page's start.
DEVICE uint2 query_fragment(const float *query, const float *turns, const int *pairs, int step, int lane) {
    float even[2], odd[2];
#pragma unroll
    for (int second = 0; second < 2; second++) {
        const int pair = pair_of(step, lane, second);
        const float x = query[2 * pair], y = query[2 * pair + 1];
        even[second] = x, odd[second] = y;
#if ROPE
        const float cosine = turns[2 * pairs[pair]], sine = turns[2 * pairs[pair] + 1];
        even[second] = x * cosine + y * sine, odd[second] = y * cosine - x * sine;
#endif
    }
    uint2 both;
    both.x = halves(even[0], even[1]), both.y = halves(odd[0], odd[1]);
    return both;
}

#if ROPE
// Of all pages of a chunk, by all threads: [CHUNK, STEPS, ROWS, 4].
DEVICE void turn_queries(uint2 *fragments, const float *query, const float *turns, const int *pairs, int page, int end) {
    for (int item = thread_index(); item < CHUNK * STEPS * ROWS * 4; item += THREADS) {
        const int c = item & 3, row = item / 4 % ROWS, step = item / (4 * ROWS) % STEPS;
        const int at = page + item / (4 * ROWS * STEPS);
        if (at < end) fragments[item] = query_fragment(query + row * HEAD_DIM, turns + (i64)at * HEAD_DIM, pairs, step, c);
    }
}
#endif

// Rows of D: sums of all warps, each scaled by its own factor of a row. `room` is for WARPS D COLUMNS floats.
DEVICE void write_rows(float *to, float *room, const float *factors, float sums[STEPS][BLOCKS][4], int rows, int warp,
                       int lane) {
    barrier();
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int channel = (W * (lane >> 2) + step / PAIRS) * DIM + step % PAIRS * 2 + (i >> 1);
                const int row = block * 8 + 2 * (lane & 3) + (i & 1);
                room[(warp * COLUMNS + row) * HEAD_DIM + channel] = sums[step][block][i] * factors[warp * COLUMNS + row];
            }
    barrier();
    for (int place = thread_index(); place < rows * HEAD_DIM; place += THREADS) {
        float total = 0;
        for (int other = 0; other < WARPS; other++) total += room[other * COLUMNS * HEAD_DIM + place];
        to[place] = total;
    }
}

KERNEL(THREADS)
attend(const float *query, const u8 *key_codes, const u8 *key_table, const float *key_scale, const u8 *value_codes,
       const u8 *value_table, const float *value_scale, const int *start, const int *stop, const int *pages,
       const float *page_turns, const float *offset_turns, const int *pairs, float *output, float *lse, float *key_mean,
       i64 key_row, i64 key_head, i64 value_row, i64 value_head, i64 pages_row,
       i64 turns_row, int batches, int heads, int rows, int splits) {
    SHARED(shared);
    u8 *const keys_at = shared, *const values_at = keys_at + TABLE_BYTES;
    float *const queries = (float *)(values_at + TABLE_BYTES);  // [ROWS, D]
    float *const maxima = queries + ROWS * HEAD_DIM;                    // [WARPS, COLUMNS], and behind it as many weights
    uint2 *const fragments = (uint2 *)(maxima + 2 * WARPS * COLUMNS);   // two chunks' turned queries

    const int warp = thread_index() / 32, lane = thread_index() % 32, tile = warp % 4 * TILE;
    const int split = block_index() % splits, head = block_index() / splits % heads;
    const i64 batch = block_index() / splits / heads;
    const int begin = start[batch], end = stop[batch];
    const int first = begin / PAGE, count = end > begin ? (end + PAGE - 1) / PAGE - first : 0;
    const int share = (count + splits - 1) / splits, low = first + split * share;
    const int high = low + share < first + count ? low + share : first + count;

    spread(keys_at, key_table + (i64)head * (HEAD_DIM * 256));
    spread(values_at, value_table + (i64)head * (HEAD_DIM * 256));
    query += (batch * heads + head) * rows * HEAD_DIM;
    for (int at = thread_index(); at < ROWS * HEAD_DIM; at += THREADS)
        queries[at] = at < rows * HEAD_DIM ? query[at] * LOG2_E : 0;
    key_codes += head * key_head + (PAGED ? 0 : batch * key_row);
    value_codes += head * value_head + (PAGED ? 0 : batch * value_row);
    pages += batch * pages_row, page_turns += batch * turns_row, pairs += head * HALF;
    barrier();

    const int lane_entry = entry_of(lane >> 2, (lane & 3) % COPIES);
    const u32 key_entry = address_of(keys_at) + lane_entry, value_entry = address_of(values_at) + lane_entry;
    const float scale = key_scale[head];
    const bool has_row = (lane >> 2) < ROWS;
#if ROPE
    u32 cosine[STEPS][2], sine[STEPS][2];  // of tokens g and g + 8 of the tile
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float *turn = offset_turns + (tile + (lane >> 2) + 8 * k) * HEAD_DIM;
            const int a = 2 * pairs[pair_of(step, lane, 0)], b = 2 * pairs[pair_of(step, lane, 1)];
            cosine[step][k] = halves(turn[a], turn[b]), sine[step][k] = halves(turn[a + 1], turn[b + 1]);
        }
#else
    uint2 q[STEPS][BLOCKS];
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
            q[step][block] = has_row ? query_fragment(queries + (block * 8 + (lane >> 2)) * HEAD_DIM, 0, 0, step, lane)
                                     : make_uint2(0, 0);
#endif

    float sums[STEPS][BLOCKS][4] = {};
#if KEY_SUMS
    float key_sums[STEPS][BLOCKS][4] = {};
#endif
    float top[BLOCKS][2], weight[BLOCKS][2] = {};
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) top[block][0] = top[block][1] = NOTHING;

    const int lane_token = tile + 2 * (lane & 3);
    key_codes += lane_token * KEY_TOKEN + (lane >> 2) * W;
    value_codes += lane_token * VALUE_TOKEN + (lane >> 2) * W;
    Read key_read, value_read;
    int page = low + warp / 4;
#define READ_PAGE()                                                                                 \
    do {                                                                                            \
        const i64 at = PAGED ? pages[page] : page;                                                  \
        key_read = read_codes(key_codes + at * (PAGED ? key_row : PAGE * KEY_TOKEN), KEY_TOKEN);           \
        value_read = read_codes(value_codes + at * (PAGED ? value_row : PAGE * VALUE_TOKEN), VALUE_TOKEN); \
    } while (0)
    if (page < high) READ_PAGE();
#if ROPE
    turn_queries(fragments, queries, page_turns, pairs, low, high);
#endif

    for (int chunk = low, turn = 0; chunk < high; chunk += CHUNK, turn ^= 1) {
#if ROPE
        barrier();
        turn_queries(fragments + (turn ^ 1) * (CHUNK * STEPS * ROWS * 4), queries, page_turns, pairs, chunk + CHUNK, high);
        const u32 turned = address_of(fragments + turn * (CHUNK * STEPS * ROWS * 4) + lane);
#endif
        const int until = chunk + CHUNK < high ? chunk + CHUNK : high;
        while (page < until) {
            const int slot = page * PAGE + tile, here = page - chunk;
            const Columns keys = look_up(key_read, key_entry);
            const Read values_read = value_read;
            page += STRIDE;
            if (page < high) READ_PAGE();

            float score[BLOCKS][4] = {};
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                const u32(*column)[2] = &keys.of[step / PAIRS][step % PAIRS * 2];
                u32 x[2], y[2];
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const u32 even = transposed(column[0][k]), odd = transposed(column[1][k]);
#if ROPE
                    x[k] = product_minus(even, cosine[step][k], product(odd, sine[step][k]));
                    y[k] = product_plus(odd, cosine[step][k], product(even, sine[step][k]));
#else
                    x[k] = even, y[k] = odd;
#endif
                }
#pragma unroll
                for (int block = 0; block < BLOCKS; block++) {
#if ROPE
                    uint2 b = make_uint2(0, 0);
                    if (has_row) b = load_words(turned + here * (STEPS * ROWS * 32), (step * ROWS + block * 8) * 32);
#else
                    const uint2 b = q[step][block];
#endif
                    multiply(score[block], x[0], x[1], y[0], y[1], b.x, b.y);
                }
            }

            // Tokens g and g + 8 of the tile, query rows 2c and 2c + 1, in powers of two above what is the top so far.
            if (SELDOM(slot < begin || slot + TILE > end)) {
#pragma unroll
                for (int i = 0; i < 4 * BLOCKS; i++) {
                    const int token = slot + (lane >> 2) + (i & 2 ? 8 : 0);
                    if (token < begin || token >= end) score[i / 4][i % 4] = -INFINITY;
                }
            }
            bool higher = false;
#pragma unroll
            for (int i = 0; i < 4 * BLOCKS; i++)
                higher |= score[i / 4][i % 4] * scale - top[i / 4][i & 1] > ROOM;
            if (SELDOM(any_lane(higher))) {
#pragma unroll
                for (int i = 0; i < 2 * BLOCKS; i++) {
                    float most = fmaxf(score[i / 2][i % 2], score[i / 2][i % 2 + 2]) * scale;
#pragma unroll
                    for (int distance = 4; distance < 32; distance *= 2) most = fmaxf(most, from_lane(most, distance));
                    most = fmaxf(most, top[i / 2][i % 2]);
                    const float factor = power_of_2(top[i / 2][i % 2] - most);
                    top[i / 2][i % 2] = most, weight[i / 2][i % 2] *= factor;
#pragma unroll
                    for (int step = 0; step < STEPS; step++)
#pragma unroll
                        for (int k = 0; k < 4; k += 2) {
                            sums[step][i / 2][i % 2 + k] *= factor;
#if KEY_SUMS
                            key_sums[step][i / 2][i % 2 + k] *= factor;
#endif
                        }
                }
            }
            u32 weights[BLOCKS][2];
#pragma unroll
            for (int block = 0; block < BLOCKS; block++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const float p = power_of_2(score[block][2 * k] * scale - top[block][0]);
                    const float r = power_of_2(score[block][2 * k + 1] * scale - top[block][1]);
                    weight[block][0] += p, weight[block][1] += r;
                    weights[block][k] = transposed(halves(p, r));
                }
#if KEY_SUMS
            add_up(key_sums, keys, weights);
#endif
            add_up(sums, look_up(values_read, value_entry), weights);
        }
    }

    // Of all warps: the highest top, and what each one's sums count in units of it.
#pragma unroll
    for (int i = 0; i < 2 * BLOCKS; i++) {
        float all = weight[i / 2][i % 2];
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) all += from_lane(all, distance);
        const int place = warp * COLUMNS + i / 2 * 8 + 2 * (lane & 3) + i % 2;
        if (lane < 4) maxima[place] = top[i / 2][i % 2], maxima[WARPS * COLUMNS + place] = all;
    }
    barrier();
    float *const factors = queries;  // [WARPS, COLUMNS]
    const i64 place = ((split * (i64)batches + batch) * heads + head) * rows;
    if (thread_index() < COLUMNS) {
        const int row = thread_index();
        float most = NOTHING, total = 0;
        for (int other = 0; other < WARPS; other++) most = fmaxf(most, maxima[other * COLUMNS + row]);
        for (int other = 0; other < WARPS; other++)
            total += maxima[(WARPS + other) * COLUMNS + row] * power_of_2(maxima[other * COLUMNS + row] - most);
        for (int other = 0; other < WARPS; other++)
            factors[other * COLUMNS + row] = power_of_2(maxima[other * COLUMNS + row] - most) / (total > 0 ? total : 1);
        if (row < rows) lse[place + row] = total > 0 ? (most + log2f(total)) * LN_2 : -INFINITY;
    }
    barrier();
    const float value_factor = value_scale[head];
#pragma unroll
    for (int i = 0; i < STEPS * BLOCKS * 4; i++) {
        sums[i / (4 * BLOCKS)][i / 4 % BLOCKS][i % 4] *= value_factor;
#if KEY_SUMS
        key_sums[i / (4 * BLOCKS)][i / 4 % BLOCKS][i % 4] *= scale;
#endif
    }
    write_rows(output + place * HEAD_DIM, (float *)shared, factors, sums, rows, warp, lane);
#if KEY_SUMS
    write_rows(key_mean + place * HEAD_DIM, (float *)shared, factors, key_sums, rows, warp, lane);
#endif
}
