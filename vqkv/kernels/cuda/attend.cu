// Split-KV attention on codes whose codebooks lie in shared memory, as fp8, in banks of a warp's lanes.
//
// A block of threads takes one split of one KV head of one row of the batch; `merge.cu` does the rest. Warp w
// reads tokens 16 (w % 4) to + 15 of every page it comes to, so that the turn of a token within its page is the
// same in every page and stays in registers.
//
// The way through shared memory takes a clock for each wavefront of look-ups, and for each `movmatrix`. So either
// stream is looked up as fragments of the product it is for, no codeword is transposed, and lanes of a warp never meet
// in a bank, whatever the codes are:
//
// Values. Lane (g, c) looks up the g-th eighth of the subvectors of rows 2c, 2c + 1, 2c + 8 and 2c + 9 of a tile.
// Interleaved by bytes, words of two tokens are fragments of V^T, whose product with weights gives the output. With four
// copies of the table every lane has banks of its own.
//
// Keys. Lane (g, c) looks up the c-th quarter of the subvectors of rows g and g + 8, words of four channels
// (x0, x1, y0, y1) of two pairs. A word's halves are fragments of K, whose product with q gives scores. Lanes of one
// c are after the same subvector; were they to read it at once, they would need eight copies. So they read subvectors of
// a SIDE of 16 / d in an order of their own, s ^ (g % SIDE), of two copies; then they put their words in order, by
// exchanging those whose places differ in one bit after those that differ in another. Up to four query rows leave half
// of a product's columns free, and these save the exchange of neighbours: in columns 0 to 3 queries have their order,
// in 4 to 7 neighbours are exchanged, and even rows find their scores in the former, odd rows in the latter. Weights of
// odd rows are zero in the former columns, and of even ones in the latter, so each counts once. At d = 4, row g = 3
// reads subvectors 3, 2, 1, 0, 7, .. of its quarter; after the exchange of places 0 and 2, 1 and 3, .. it has
// 1, 0, 3, 2, 5, ..: neighbours are still exchanged, as they are for every odd row.
//
// Where sums of keys are asked for, words of keys, transposed as 8 x 8 blocks of byte pairs, are fragments of K^T.
//
// Given by the compiler's command line: HEAD_DIM (D), DIM (d), ROWS (query rows of a KV head, padded to 4, 8 or 16),
// WARPS, TILES (that a warp reads at a time), CHUNK (pages whose turned queries are made between two barriers),
// KEY_TOKEN and VALUE_TOKEN (bytes from one token to the next), and 0 or 1 for ROPE, KEY_SUMS and PAGED.

#include <warp.cuh>

#define PAGE 64
#define TILE 16
#define HALF (HEAD_DIM / 2)
#define THREADS (32 * WARPS)
#define QUARTER (HEAD_DIM / DIM / 4)  // subvectors of keys that a lane looks up of a token
#define EIGHTH (HEAD_DIM / DIM / 8)   // and of values
#define WORDS (DIM / 4)               // of four channels in a codeword
#define STEPS (HEAD_DIM / 16)         // products of depth 16 that a score takes, each of a word of keys
#define BLOCKS ((ROWS + 7) / 8)       // of 8 query rows
#define COLUMNS (8 * BLOCKS)
#define STRIDE (WARPS / 4)            // pages that the warps read at a time, TILES times
#define BATCH (TILES * STRIDE)
#define OWN_QUERIES ((ROWS * HEAD_DIM + THREADS - 1) / THREADS)
#define NOTHING (-3e38f)              // a score that no token has
#define UNREACHED 3e38f               // and one that none comes near: codewords and queries are finite fp16 numbers
#define ROOM 0x5c005c00u              // two of 2^8, to which weights may grow before sums are scaled down

#define SIDE (16 / DIM)                // subvectors that a lane reads in an order of its own
#define COPIES 2                      // of an entry of keys
#define BY_COLUMNS (ROWS == 4)        // whether columns of queries save the exchange of neighbours
#define NEIGHBOUR (BY_COLUMNS * WORDS)  // a step ^ this is of the neighbour

// Both tables have the entries of a code in a row over all banks: of keys [QUARTER / SIDE, 256, COPIES, SIDE, 4, d]
// bytes, where the four lanes c are innermost; of values [EIGHTH, d / 4, 256, 32, 4] at d = 4 and
// [EIGHTH, 2, 256, 16, 8] at d = 8.
#define TABLE_ROW 128
#define KEY_BYTES (QUARTER / SIDE * 256 * TABLE_ROW)
#define VALUE_BYTES (EIGHTH * WORDS * 256 * TABLE_ROW)

static_assert(WARPS % 4 == 0 && WARPS * COLUMNS <= ROWS * HEAD_DIM, "factors take the place of queries");
static_assert(4 * (1 + KEY_SUMS) * WARPS * COLUMNS * (HEAD_DIM + 4) <= KEY_BYTES + VALUE_BYTES,
              "sums take that of tables");

#if ROPE
#define ITEMS (STEPS * ROWS * 4)              // fragments of turned queries of a page
static_assert(CHUNK > 0 && CHUNK % BATCH == 0, "warps read whole batches of a chunk");
#endif

#if QUARTER == 8
typedef uint2 KeyCodes;
#elif QUARTER == 4
typedef u32 KeyCodes;
#else
typedef u16 KeyCodes;
#endif
#if EIGHTH == 4
typedef u32 ValueCodes;
#elif EIGHTH == 2
typedef u16 ValueCodes;
#else
typedef u8 ValueCodes;
#endif

// A row of a tile's products is this token of it: such that what a warp reads of values at a time is of consecutive ones.
DEVICE int token_of(int row) { return row / 8 * 8 + row % 2 * 4 + row % 8 / 2; }

// One lane's codes of rows g and g + 8.
struct KeyRead {
    u32 token[2][(QUARTER + 3) / 4];
};
// And of rows 2c, 2c + 1, 2c + 8 and 2c + 9.
struct ValueRead {
    u32 token[4];
};

// Words of keys, of the first token and of the second.
struct Keys {
    u32 of[STEPS][2];
};
// In which order a lane looks up those of a side.
struct KeyOrder {
    u32 entry[SIDE];  // where the table of the n-th begins for it
    u32 byte[4];      // its code in a word of codes
    bool exchanges[SIDE];  // [n]: whether words whose places differ in bit n are exchanged

    DEVICE KeyOrder(u32 table, int g, int c) {
#pragma unroll
        for (int n = 0; n < SIDE; n++)
            entry[n] = kept(table + ((g / SIDE % COPIES * SIDE + (n ^ g % SIDE)) * 4 + c) * DIM), exchanges[n] = g & n;
#pragma unroll
        for (int n = 0; n < 4; n++) byte[n] = kept(scaled_byte(n ^ g % SIDE, TABLE_ROW));
    }
};
// Codewords of values, of the four tokens; at d = 4 the first word alone.
struct Values {
    uint2 of[EIGHTH][4];
};
// The four tokens of dimension i of the u-th subvector, as a column of V^T: rows 2c and 2c + 1, then 2c + 8 and 2c + 9.
struct Columns {
    u32 of[STEPS][2][2];
};

// Which of `COUNT` items are a thread's: threads take turns, and some may have one less.
template <int COUNT> struct Share {
    static constexpr int OWN = (COUNT + THREADS - 1) / THREADS;
    DEVICE static int item(int own) { return thread_index() + own * THREADS; }
    DEVICE static bool has(int own) { return COUNT % THREADS == 0 || item(own) < COUNT; }
};

// A thread's share of a table, all of it on its way at once.

// [QUARTER / SIDE, 256, SIDE, 4, d] of fp8, two copies of each code's part.
struct KeyTable : Share<QUARTER * 256> {
    uint4 words[OWN][WORDS];

    DEVICE explicit KeyTable(const u8 *from) {
#pragma unroll
        for (int own = 0; own < OWN; own++)
#pragma unroll
            for (int i = 0; i < WORDS; i++)
                if (has(own)) words[own][i] = ((const uint4 *)from)[item(own) * WORDS + i];
    }
    DEVICE void write(u8 *table) const {
        constexpr int PARTS = COPIES * WORDS;  // of 16 bytes that an item becomes
#pragma unroll
        for (int own = 0; own < OWN; own++)
#pragma unroll
            for (int i = 0; i < PARTS; i++) {
                const int row = item(own) / SIDE, part = (i + row) % PARTS;  // so that eight lanes write to all banks
                const uint4 word = WORDS == 2 && part % 2 ? words[own][WORDS - 1] : words[own][0];
                const int place = (part / WORDS * SIDE + item(own) % SIDE) * WORDS + part % WORDS;
                if (has(own)) ((uint4 *)table)[row * (TABLE_ROW / 16) + place] = word;
            }
    }
};

// [EIGHTH, 256, 8, d] of fp8, four copies of every entry.
struct ValueTable : Share<EIGHTH * 256 * 8> {
    u32 words[OWN][WORDS];

    DEVICE explicit ValueTable(const u8 *from) {
#pragma unroll
        for (int own = 0; own < OWN; own++)
            if (has(own)) {
#if DIM == 4
                words[own][0] = ((const u32 *)from)[item(own)];
#else
                const uint2 both = ((const uint2 *)from)[item(own)];
                words[own][0] = both.x, words[own][1] = both.y;
#endif
            }
    }
    DEVICE void write(u8 *table) const {
#pragma unroll
        for (int own = 0; own < OWN; own++) {
            const u32 first = words[own][0], second = words[own][WORDS - 1];
            const uint4 copies = make_uint4(first, second, first, second);
            if (!has(own)) continue;
#if DIM == 4
            ((uint4 *)table)[item(own)] = copies;
#else
            const int g = item(own) & 7, code = item(own) >> 3 & 255, u = item(own) >> 11;
            uint4 *to = (uint4 *)(table + ((2 * u + g / 4) * 256 + code) * TABLE_ROW + g % 4 * 32);
            to[g / 4] = to[1 - g / 4] = copies;  // lanes of either half of g write to other banks
#endif
        }
    }
};

DEVICE KeyRead read_keys(const u8 *from) {
    KeyRead codes;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const KeyCodes word = read_once((const KeyCodes *)(from + token_of(j * 8) * KEY_TOKEN));
#if QUARTER == 8
        codes.token[j][0] = word.x, codes.token[j][1] = word.y;
#else
        codes.token[j][0] = word;
#endif
    }
    return codes;
}

DEVICE ValueRead read_values(const u8 *from) {
    ValueRead codes;
#pragma unroll
    for (int j = 0; j < 4; j++)
        codes.token[j] = read_once((const ValueCodes *)(from + token_of(j % 2 + j / 2 * 8) * VALUE_TOKEN));
    return codes;
}

// Of a side's words that differ in bit 0 of their place, a lane's are exchanged where columns of queries are.
DEVICE Keys look_up_keys(KeyRead codes, const KeyOrder &order) {
    Keys keys;
#pragma unroll
    for (int s = 0; s < QUARTER; s++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const u32 address = dot(codes.token[j][s / 4], order.byte[s % 4], order.entry[s % SIDE]);
#if DIM == 4
            keys.of[s][j] = load_word(address, s / SIDE * (256 * TABLE_ROW));
#else
            const uint2 words = load_words(address, s / SIDE * (256 * TABLE_ROW));
            keys.of[2 * s][j] = words.x, keys.of[2 * s + 1][j] = words.y;
#endif
        }
#pragma unroll
    for (int bit = BY_COLUMNS ? 2 : 1; bit < SIDE; bit *= 2)
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (!(step / WORDS & bit))
                    exchange(order.exchanges[bit], keys.of[step][j], keys.of[step + bit * WORDS][j]);
    return keys;
}

DEVICE Values look_up_values(ValueRead codes, u32 entry) {
    Values values;
#pragma unroll
    for (int u = 0; u < EIGHTH; u++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 address = dot(codes.token[j], scaled_byte(u, TABLE_ROW), entry);
#if DIM == 4
            values.of[u][j].x = load_word(address, u * (256 * TABLE_ROW));
#else
            values.of[u][j] = load_words(address, u * (512 * TABLE_ROW));
#endif
        }
    return values;
}

// Interleaving bytes of two tokens before they become fp16 makes columns of rows.
DEVICE Columns columns_of(const Values &values) {
    Columns columns;
#pragma unroll
    for (int u = 0; u < EIGHTH; u++) {
        const uint2 *const word = values.of[u];
#pragma unroll
        for (int i = 0; i < DIM; i++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const u32 a = i < 4 ? word[2 * k].x : word[2 * k].y, b = i < 4 ? word[2 * k + 1].x : word[2 * k + 1].y;
                columns.of[(u * DIM + i) / 2][i % 2][k] = halves_of_e4m3(interleave(a, b, i & 2), i & 1);
            }
    }
    return columns;
}

#if KEY_SUMS
// Of words whose byte pairs are channels of K, columns of K^T: either byte of the pair that the lane's g names. A
// transposed word has an even row in its low half and an odd row in its high one, whose neighbours are exchanged.
DEVICE Columns columns_of(const Keys &keys) {
    Columns columns;
    Keys pairs;
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int k = 0; k < 2; k++)
            pairs.of[step][k] = transposed(keys.of[step][k]);  // of rows 2c and 2c + 1
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const u32 bytes = interleave_halves(pairs.of[step][k], pairs.of[step ^ NEIGHBOUR][k]);
#pragma unroll
            for (int i = 0; i < 2; i++) columns.of[step][i][k] = halves_of_e4m3(bytes, i);
        }
    return columns;
}
#endif

// sums[D, rows] += columns weights.
DEVICE void add_up(float sums[STEPS][BLOCKS][4], const Columns &columns, const u32 weights[BLOCKS][2]) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const u32(*column)[2] = columns.of[step];
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
            multiply(sums[step][block], column[0][0], column[1][0], column[0][1], column[1][1], weights[block][0],
                     weights[block][1]);
    }
}

// The first of the two pairs, in a head's coded order, of lane c's word in a step.
DEVICE int pair_of(int step, int c) { return c * (HALF / 4) + 2 * step; }

// Two pairs of a query [D] as a fragment: their even channels, then their odd ones.
DEVICE uint2 fragment(float4 query) { return make_uint2(halves(query.x, query.z), halves(query.y, query.w)); }

#if ROPE
// Turned back by a page's start.
DEVICE float4 turned_back(float4 query, float2 first, float2 second) {
    float4 turned;
    turned.x = query.x * first.x + query.y * first.y, turned.y = query.y * first.x - query.x * first.y;
    turned.z = query.z * second.x + query.w * second.y, turned.w = query.w * second.x - query.z * second.y;
    return turned;
}

// What a thread turns of queries [ROWS, D], once for BATCH pages: fragments [BATCH, STEPS, ROWS, 4], of some rows alike.
constexpr int TURNED_ALIKE = BATCH * ITEMS > THREADS ? BATCH * ITEMS / THREADS : 1;
struct Turning : Share<BATCH * ITEMS / TURNED_ALIKE> {
    // By which it turns them.
    struct Turns {
        float2 first, second;
    };
    const float2 *page_turns;
    float4 query[TURNED_ALIKE];
    int page, place, first, second;  // of its fragments among a batch's pages, in one, and of their pairs in the tables

    DEVICE Turning(const float *turns, const int *pairs) : page_turns((const float2 *)turns) {
        static_assert(OWN == 1 && ROWS % TURNED_ALIKE == 0, "threads have rows of one step and lane");
        const int c = item(0) % 4, at = item(0) / 4 * TURNED_ALIKE;
        page = at / (STEPS * ROWS), place = at % (STEPS * ROWS) * 4 + c;
        first = pairs[pair_of(step(), c)], second = pairs[pair_of(step(), c) + 1];
    }
    DEVICE int step() const { return place / (4 * ROWS); }
    DEVICE void take(const float *queries) {
#pragma unroll
        for (int n = 0; n < TURNED_ALIKE; n++)
            query[n] = *(const float4 *)(queries + (place / 4 % ROWS + n) * HEAD_DIM + 2 * pair_of(step(), place % 4));
    }
    // Of the pages from `from` on; past the last one it is read again, and what becomes of it is not.
    DEVICE Turns read(int from, int end) const {
        if (!has(0)) return {};
        const float2 *const turn = page_turns + (i64)(from + page < end ? from + page : end - 1) * HALF;
        return {read_early(turn + first), read_early(turn + second)};
    }
    DEVICE void write(uint2 *fragments, const Turns &turns) const {
#pragma unroll
        for (int n = 0; n < TURNED_ALIKE; n++)
            if (has(0)) fragments[page * ITEMS + place + n * 4] = fragment(turned_back(query[n], turns.first, turns.second));
    }
};
#endif

// The channel of a lane's i-th sum in a step.
DEVICE int value_channel(int step, int g, int i) { return g * (HEAD_DIM / 8) + step * 2 + i; }
DEVICE int key_channel(int step, int g, int i) { return 2 * (pair_of(step, g / 2) + i) + g % 2; }

// Columns of sums in shared memory: side by side what lanes g have at a time, and four words from one column's end to
// the next, so that lanes of a warp meet in no bank.
#define COLUMN_STRIDE (HEAD_DIM + 4)

// A warp's sums, scaled by its own factor of a column, to its own columns among those of all warps.
DEVICE void put_columns(float *room, const float *factors, float sums[STEPS][BLOCKS][4], int warp, int g, int c) {
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = warp * COLUMNS + block * 8 + 2 * c + i % 2;
                room[column * COLUMN_STRIDE + (step * 2 + i / 2) * 8 + g] = sums[step][block][i] * factors[column];
            }
}
// Rows of D: sums of all columns that are theirs.
DEVICE void add_columns(float *to, const float *room, int rows, int (*channel)(int, int, int)) {
    for (int item = thread_index(); item < rows * HEAD_DIM; item += THREADS) {
        const int row = item / HEAD_DIM, place = item % HEAD_DIM;
        float total = 0;
#pragma unroll
        for (int other = 0; other < WARPS * COLUMNS / ROWS; other++)
            total += room[(other * ROWS + row) * COLUMN_STRIDE + place];
        to[row * HEAD_DIM + channel(place / 16, place % 8, place / 8 % 2)] = total;
    }
}

KERNEL(THREADS)
attend(const float *query, const u8 *key_codes, const u8 *key_table, const float *key_scale, const u8 *value_codes,
       const u8 *value_table, const float *value_scale, const int *start, const int *stop, const int *pages,
       const float *page_turns, const uint4 *offset_turns, const int *pairs, float *output, float *lse, float *key_mean,
       i64 key_row, i64 key_head, i64 value_row, i64 value_head, i64 pages_row,
       i64 turns_row, int batches, int heads, int rows, int splits) {
    SHARED(shared);
    u8 *const keys_at = shared, *const values_at = keys_at + KEY_BYTES;
    float *const queries = (float *)(values_at + VALUE_BYTES);  // [ROWS, D]
    float *const maxima = queries + ROWS * HEAD_DIM;            // [WARPS, COLUMNS], and behind it as many weights

    const int warp = uniform(thread_index() / 32), lane = thread_index() % 32, tile = warp % 4 * TILE;
    const int split = block_index() % splits, head = block_index() / splits % heads;
    const i64 batch = block_index() / splits / heads;
    let_later_begin();
    // Nobody writes tables any more: they are read before the wait.
    const KeyTable key_entries(key_table + (i64)head * (HEAD_DIM * 256));
    const ValueTable value_entries(value_table + (i64)head * (HEAD_DIM * 256));
    wait_for_earlier();

    // What is needed first, before any of it is waited for.
    const int begin = start[batch], end = stop[batch];
    query += (batch * heads + head) * rows * HEAD_DIM;
    float own_query[OWN_QUERIES];
#pragma unroll
    for (int own = 0; own < OWN_QUERIES; own++) {
        const int at = thread_index() + own * THREADS;
        own_query[own] = at < rows * HEAD_DIM ? query[at] : 0;
    }
    const int g = lane >> 2, c = lane & 3;
    pages += batch * pages_row, page_turns += batch * turns_row, pairs += head * HALF;
#if ROPE
    Turning turning(page_turns, pairs);
#endif
    key_entries.write(keys_at);
    value_entries.write(values_at);

    const int first = begin / PAGE, count = end > begin ? (end + PAGE - 1) / PAGE - first : 0;
    const int share = (count + splits - 1) / splits, low = first + split * share;
    const int high = low + share < first + count ? low + share : first + count;

    key_codes += head * key_head + (PAGED ? 0 : batch * key_row);
    value_codes += head * value_head + (PAGED ? 0 : batch * value_row);
    key_codes += (tile + token_of(g)) * KEY_TOKEN + c * QUARTER;
    value_codes += (tile + token_of(2 * c)) * VALUE_TOKEN + g * EIGHTH;
    KeyRead key_read[TILES] = {};
    ValueRead value_read[TILES] = {};
    // Past the last page it is read again, and its tokens are masked: no branch keeps what is around from being mixed.
    const auto read_pages = [&](int page) {
#pragma unroll
        for (int t = 0; t < TILES; t++, page += STRIDE) {
            const int there = page < high ? page : high - 1;
            const i64 at = PAGED ? pages[there] : there;
            key_read[t] = read_keys(key_codes + at * (PAGED ? key_row : PAGE * KEY_TOKEN));
            value_read[t] = read_values(value_codes + at * (PAGED ? value_row : PAGE * VALUE_TOKEN));
        }
    };
    if (low + warp / 4 < high) read_pages(low + warp / 4);
#if ROPE
    // Of the first chunk, pages there are alone; all on their way at once.
    Turning::Turns first_turns[CHUNK / BATCH] = {};
#pragma unroll
    for (int i = 0; i < CHUNK / BATCH; i++)
        if (low + i * BATCH < high) first_turns[i] = turning.read(low + i * BATCH, high);
    u32 cosine[STEPS][2], sine[STEPS][2];  // of rows g and g + 8 of the tile
    offset_turns += (head * 4 + warp % 4) * (STEPS * 32) + lane;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const uint4 turn = offset_turns[(step ^ g % 2 * NEIGHBOUR) * 32];
        cosine[step][0] = turn.x, sine[step][0] = turn.y, cosine[step][1] = turn.z, sine[step][1] = turn.w;
    }
#endif
#pragma unroll
    for (int own = 0; own < OWN_QUERIES; own++) {
        const int at = thread_index() + own * THREADS;
        if (at < ROWS * HEAD_DIM) queries[at] = own_query[own] * LOG2_E;
    }
    barrier();

    const KeyOrder key_order(address_of(keys_at), g, c);
    const u32 value_entry = address_of(values_at) + (DIM == 4 ? lane * 4 : g / 4 * (256 * TABLE_ROW) + lane % 16 * 8);
    const float scale = key_scale[head];
    const int lane_row = g % ROWS, exchanged = g / ROWS % 2 * NEIGHBOUR;  // of the lane's column of queries
#if ROPE
    uint2 *const fragments = (uint2 *)(maxima + 2 * WARPS * COLUMNS);  // [2 CHUNK, STEPS, ROWS, 4]
    turning.take(queries);
#pragma unroll
    for (int i = 0; i < CHUNK / BATCH; i++)
        if (low + i * BATCH < high) turning.write(fragments + i * BATCH * ITEMS, first_turns[i]);
    // Of the fragments, passes read one chunk and write the other; a barrier at each chunk's first pass is between.
    int turned = 0;  // place of the pages at hand among them
    Turning::Turns turns = {};  // of the next pages whose queries are to be turned, a chunk ahead
    if (low < high) turns = turning.read(low + CHUNK, high);
#else
    uint2 q[STEPS][BLOCKS];
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
            q[step][block] = fragment(*(const float4 *)(queries + (block * 8 + lane_row) * HEAD_DIM +
                                                        2 * pair_of(step ^ exchanged, c)));
#endif

    float sums[STEPS][BLOCKS][4] = {};
#if KEY_SUMS
    float key_sums[STEPS][BLOCKS][4] = {};
#endif
    // Where columns of queries are exchanged, half of the lanes find no scores; under a top that is never reached, what
    // they find weighs nothing.
    const bool counts = !BY_COLUMNS || g % 2 == c / 2;
    float top[BLOCKS][2], weight[BLOCKS][2] = {};
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) top[block][0] = top[block][1] = counts ? NOTHING : UNREACHED;

    const int limit = high * PAGE < end ? high * PAGE : end;
    for (int first_page = low; first_page < high; first_page += BATCH) {
        const int page = first_page + warp / 4;
#if ROPE
        if (turned % CHUNK == 0) barrier();
        turning.write(fragments + (turned < CHUNK ? turned + CHUNK : turned - CHUNK) * ITEMS, turns);
        turns = turning.read(first_page + CHUNK + BATCH, high);
#endif
        if (page < high) {
            Keys keys[TILES];
            Values values[TILES];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                keys[t] = look_up_keys(key_read[t], key_order);
                values[t] = look_up_values(value_read[t], value_entry);
            }
            read_pages(page + BATCH);

#if ROPE
            const u32 turned_at = address_of(fragments) + ((turned + warp / 4) * ITEMS + lane_row * 4 + c) * 8;
            constexpr int STEP_BYTES = ROWS * 4 * 8;
            const u32 turned_in[2] = {turned_at + exchanged * STEP_BYTES, turned_at - exchanged * STEP_BYTES};
#endif
            float score[TILES][BLOCKS][4] = {};
#pragma unroll
            for (int step_and_tile = 0; step_and_tile < STEPS * TILES; step_and_tile++) {
                const int step = step_and_tile / TILES, t = step_and_tile % TILES;
                u32 x[2], y[2];  // even channels and odd ones
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const u32 word = keys[t].of[step][k];
                    const u32 even = halves_of_e4m3(word, false), odd = halves_of_e4m3(word, true);
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
                    const uint2 b = load_words(turned_in[step / WORDS % 2],
                                               t * STRIDE * ITEMS * 8 + step * STEP_BYTES + block * 8 * 4 * 8);
#else
                    const uint2 b = q[step][block];
#endif
                    multiply(score[t][block], x[0], x[1], y[0], y[1], b.x, b.y);
                }
            }

            // Rows g and g + 8 of a tile, columns 2c and 2c + 1, in powers of two above what is the top so far.
            const int slot = page * PAGE + tile;
            if (SELDOM(slot < begin || slot + (TILES - 1) * STRIDE * PAGE + TILE > limit)) {
#pragma unroll
                for (int i = 0; i < 4 * BLOCKS * TILES; i++) {
                    const int token = slot + i / (4 * BLOCKS) * STRIDE * PAGE + token_of(g + (i & 2 ? 8 : 0));
                    if (token < begin || token >= limit) score[i / (4 * BLOCKS)][i / 4 % BLOCKS][i % 4] = -INFINITY;
                }
            }
            float power[TILES][BLOCKS][4];
            u32 packed[TILES][BLOCKS][2];
            // Two of the largest of them.
            const auto find_powers = [&] {
                u32 largest = 0;
#pragma unroll
                for (int i = 0; i < 4 * BLOCKS * TILES; i++) {
                    const int t = i / (4 * BLOCKS), block = i / 4 % BLOCKS;
                    power[t][block][i % 4] = power_of_2(score[t][block][i % 4] * scale - top[block][i & 1]);
                }
#pragma unroll
                for (int i = 0; i < 2 * BLOCKS * TILES; i++) {
                    const int t = i / (2 * BLOCKS), block = i / 2 % BLOCKS, k = i % 2;
                    packed[t][block][k] = halves(power[t][block][2 * k], power[t][block][2 * k + 1]);
                    largest = larger(largest, packed[t][block][k]);
                }
                return largest;
            };
            const bool higher = larger(find_powers(), ROOM) != ROOM;
            if (SELDOM(any_lane(higher))) {
#pragma unroll
                for (int i = 0; i < 2 * BLOCKS; i++) {
                    float most = NOTHING;
#pragma unroll
                    for (int t = 0; t < TILES; t++)
                        if (counts) most = fmaxf(most, fmaxf(score[t][i / 2][i % 2], score[t][i / 2][i % 2 + 2]) * scale);
#pragma unroll
                    for (int distance = 4; distance < 32; distance *= 2) most = fmaxf(most, from_lane(most, distance));
                    // That of a column is with one of two neighbours.
                    const float old = fminf(top[i / 2][i % 2], from_lane(top[i / 2][i % 2], 4));
                    most = fmaxf(most, old);
                    const float factor = power_of_2(old - most);
                    weight[i / 2][i % 2] *= factor;
                    if (counts) top[i / 2][i % 2] = most;
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
                find_powers();
            }
            u32 weights[TILES][BLOCKS][2];
#pragma unroll
            for (int i = 0; i < 2 * BLOCKS * TILES; i++) {
                const int t = i / (2 * BLOCKS), block = i / 2 % BLOCKS, k = i % 2;
                weight[block][0] += power[t][block][2 * k], weight[block][1] += power[t][block][2 * k + 1];
                weights[t][block][k] = transposed(packed[t][block][k]);
            }
#pragma unroll
            for (int t = 0; t < TILES; t++) {
#if KEY_SUMS
                add_up(key_sums, columns_of(keys[t]), weights[t]);
#endif
                add_up(sums, columns_of(values[t]), weights[t]);
            }
        }
#if ROPE
        turned = turned + BATCH < 2 * CHUNK ? turned + BATCH : 0;
#endif
    }

    // Of all warps: the highest top, and what each one's sums count in units of it.
#pragma unroll
    for (int i = 0; i < 2 * BLOCKS; i++) {
        float all = weight[i / 2][i % 2];
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) all += from_lane(all, distance);
        const int place = warp * COLUMNS + i / 2 * 8 + 2 * c + i % 2;
        if (g == (BY_COLUMNS ? c / 2 : 0)) maxima[place] = top[i / 2][i % 2], maxima[WARPS * COLUMNS + place] = all;
    }
    barrier();
    float *const factors = queries;  // [WARPS, COLUMNS]
    const i64 place = ((split * (i64)batches + batch) * heads + head) * rows;
    if (thread_index() < ROWS) {
        constexpr int SHARED_BY = WARPS * COLUMNS / ROWS;  // columns of a row, which are every ROWS-th
        const int row = thread_index();
        const float *const tops = maxima + row, *const weights = tops + WARPS * COLUMNS;
        float most = NOTHING, total = 0, parts[SHARED_BY];
#pragma unroll
        for (int n = 0; n < SHARED_BY; n++) most = fmaxf(most, tops[n * ROWS]);
#pragma unroll
        for (int n = 0; n < SHARED_BY; n++) {
            parts[n] = power_of_2(tops[n * ROWS] - most);
            total += weights[n * ROWS] * parts[n];
        }
        const float whole = 1 / (total > 0 ? total : 1);
#pragma unroll
        for (int n = 0; n < SHARED_BY; n++) factors[row + n * ROWS] = parts[n] * whole;
        if (row < rows) lse[place + row] = total > 0 ? (most + log2f(total)) * LN_2 : -INFINITY;
    }
    barrier();
    // Held through the loop it would have ptxas order that in another way, which took a fifth longer at d = 4.
    const float value_factor = value_scale[head];
#pragma unroll
    for (int i = 0; i < STEPS * BLOCKS * 4; i++) {
        sums[i / (4 * BLOCKS)][i / 4 % BLOCKS][i % 4] *= value_factor;
#if KEY_SUMS
        key_sums[i / (4 * BLOCKS)][i / 4 % BLOCKS][i % 4] *= scale;
#endif
    }
    float *const room = (float *)shared;  // [WARPS, COLUMNS], where the tables were
    put_columns(room, factors, sums, warp, g, c);
#if KEY_SUMS
    float *const key_room = room + WARPS * COLUMNS * COLUMN_STRIDE;
    put_columns(key_room, factors, key_sums, warp, g, c);
#endif
    barrier();
    add_columns(output + place * HEAD_DIM, room, rows, value_channel);
#if KEY_SUMS
    add_columns(key_mean + place * HEAD_DIM, key_room, rows, key_channel);
#endif
}
