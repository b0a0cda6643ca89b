// The names of `vqkv/kernels/cuda/warp.cuh` on a CPU: every GPU thread is a fiber. Instructions of a whole warp wait
// until all its lanes have come to them; a lane that never comes is an error, as are out-of-order barriers.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
struct uint2 {
    u32 x, y;
};
struct uint4 {
    u32 x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

#define KERNEL(threads) static void
#define DEVICE inline
#define SHARED(name) u8 *const name = emulation::shared.data()

namespace emulation {

constexpr int LANES = 32, STACK = 1 << 17;
enum Wait { RUNS, IN_WARP, IN_BLOCK, DONE };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Wait wait;
    int instruction;        // which one of a warp it waits in
    i64 met;                // how many of them it has come to
    u32 given[10], result;  // operands and result of such an instruction
    float sums[4];
    std::vector<u32> addresses;  // of its look-ups
};

static std::vector<u8> shared;
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current, block;
static u32 table_end[2];      // look-ups of keys go to shared memory below the first, of values below the second
static i64 lookups[2], wavefronts[2];

[[noreturn]] static inline void fail(const char *why) {
    std::fprintf(stderr, "emulated kernel: %s (block %d, thread %d)\n", why, block, current);
    std::abort();
}

static inline void wait(Wait kind) {
    Fiber &fiber = fibers[current];
    fiber.wait = kind;
    swapcontext(&fiber.context, &scheduler);
}

// Operands given, wait for the other lanes; `combine` sees all lanes and writes their results.
template <class Combine> static inline void together(int instruction, Combine combine) {
    Fiber &fiber = fibers[current];
    fiber.instruction = instruction;
    fiber.met++;
    Fiber *const warp = &fibers[current / LANES * LANES];
    fiber.wait = IN_WARP;
    bool all = true;
    for (int lane = 0; lane < LANES; lane++) all &= warp[lane].wait == IN_WARP;
    if (!all) {
        wait(IN_WARP);
        return;
    }
    for (int lane = 0; lane < LANES; lane++)
        if (warp[lane].instruction != instruction || warp[lane].met != fiber.met) fail("lanes of a warp came to different instructions");
    combine(warp);
    for (int lane = 0; lane < LANES; lane++) warp[lane].wait = RUNS;
}

static inline void run_lane(int thread) {
    current = thread;
    swapcontext(&scheduler, &fibers[thread].context);
}

// Until every thread of the block is done. Warps take turns in any order, as on a GPU, so that what one reads before
// another has written it, for want of a barrier, is found.
static inline void schedule() {
    static std::minstd_rand any;
    std::vector<size_t> first_threads;
    for (size_t thread = 0; thread < fibers.size(); thread += LANES) first_threads.push_back(thread);
    for (;;) {
        bool moved = false;
        std::shuffle(first_threads.begin(), first_threads.end(), any);
        for (size_t thread : first_threads)
            for (bool warp_moved = true; warp_moved;) {
                warp_moved = false;
                for (int lane = 0; lane < LANES; lane++)
                    if (fibers[thread + lane].wait == RUNS) {
                        run_lane(int(thread) + lane);
                        warp_moved = moved = true;
                    }
            }
        int waiting = 0, done = 0;
        for (Fiber &fiber : fibers) waiting += fiber.wait == IN_BLOCK, done += fiber.wait == DONE;
        if (done == int(fibers.size())) return;
        if (waiting == int(fibers.size())) {
            for (Fiber &fiber : fibers) fiber.wait = RUNS;
        } else if (!moved) {
            fail("threads wait for others that never come");
        }
    }
}

// What look-ups of a warp take: as many wavefronts as the fullest of 32 banks has different words; of words of
// 8 bytes, each half of the warp for itself.
static inline void count_wavefronts() {
    for (size_t first = 0; first < fibers.size(); first += LANES)
        for (size_t n = 0; n < fibers[first].addresses.size(); n++) {
            const u32 wide = fibers[first].addresses[n] & 1;  // marked below
            const int stream = fibers[first].addresses[n] >= table_end[0];
            const int group = wide ? LANES / 2 : LANES;
            for (int start = 0; start < LANES; start += group) {
                size_t fullest = 0;
                for (u32 bank = 0; bank < 32; bank++) {
                    std::vector<u32> words;
                    for (int lane = start; lane < start + group; lane++)
                        for (u32 part = 0; part <= wide; part++) {
                            const u32 word = (fibers[first + lane].addresses[n] >> 2) + part;
                            bool seen = word % 32 != bank;
                            for (u32 other : words) seen |= other == word;
                            if (!seen) words.push_back(word);
                        }
                    fullest = words.size() > fullest ? words.size() : fullest;
                }
                wavefronts[stream] += fullest;
            }
            lookups[stream] += LANES;
        }
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*(A *)arguments[I]...);
}

template <class... A> struct Launch {
    static void (*kernel)(A...);
    static void **arguments;
    static void thread() {
        call(kernel, arguments, std::index_sequence_for<A...>());
        wait(DONE);
    }
};
template <class... A> void (*Launch<A...>::kernel)(A...);
template <class... A> void **Launch<A...>::arguments;

// As `cuLaunchKernel` has it: pointers to arguments.
template <class... A>
static void launch(void (*kernel)(A...), int blocks, int threads, int shared_bytes, void **arguments) {
    Launch<A...>::kernel = kernel, Launch<A...>::arguments = arguments;
    fibers = std::vector<Fiber>(threads);
    for (Fiber &fiber : fibers) fiber.stack.resize(STACK);
    for (block = 0; block < blocks; block++) {
        shared.assign(shared_bytes, 0xff);  // what nobody has written is no number
        for (Fiber &fiber : fibers) {
            getcontext(&fiber.context);
            fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, Launch<A...>::thread, 0);
            fiber.wait = RUNS, fiber.met = 0, fiber.addresses.clear();
        }
        schedule();
        count_wavefronts();
    }
}

static inline float float_of(u16 half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                : exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
    return half >> 15 ? -size : size;
}

static inline u16 half_of(float x) {
    const u16 sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (std::isnan(x)) return 0x7e00;
    if (size == 0) return sign;
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(size, &exponent);
    const int scale = exponent - 11 < -24 ? -24 : exponent - 11;       // of the last bit
    const int units = int(std::nearbyint(std::ldexp(size, -scale)));  // to even
    return sign | u16(units + (scale == -24 ? 0 : (scale + 24) * 1024));
}

static inline u32 both(float low, float high) { return half_of(low) | u32(half_of(high)) << 16; }
static inline float low(u32 two) { return float_of(u16(two)); }
static inline float high(u32 two) { return float_of(u16(two >> 16)); }

static inline float float_of_e4m3(u8 byte) {
    const int exponent = byte >> 3 & 15, fraction = byte & 7;
    if ((byte & 127) == 127) return NAN;
    const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp(float(fraction), -9);
    return byte >> 7 ? -size : size;
}

}  // namespace emulation

DEVICE int thread_index() { return emulation::current; }
DEVICE int block_index() { return emulation::block; }
DEVICE void wait_for_earlier() {}
DEVICE void let_later_begin() {}
DEVICE void barrier() { emulation::wait(emulation::IN_BLOCK); }

template <class T> DEVICE T read_once(const T *from) {
    if ((size_t)from % sizeof(T)) emulation::fail("codes are read askew");
    return *from;
}

DEVICE float2 read_early(const float2 *from) { return *from; }

DEVICE u32 address_of(const void *at) { return u32((const u8 *)at - emulation::shared.data()); }
DEVICE uint2 load_words(u32 address, int constant) {
    const u32 at = address + constant;
    if (at % 8 || at + 8 > emulation::shared.size()) emulation::fail("shared memory is read askew or past its end");
    if (at < emulation::table_end[1]) emulation::fibers[emulation::current].addresses.push_back(at | 1);
    uint2 words;
    std::memcpy(&words, &emulation::shared[at], 8);
    return words;
}
DEVICE u32 load_word(u32 address, int constant) {
    const u32 at = address + constant;
    if (at % 4 || at + 4 > emulation::shared.size()) emulation::fail("shared memory is read askew or past its end");
    if (at < emulation::table_end[1]) emulation::fibers[emulation::current].addresses.push_back(at);
    u32 word;
    std::memcpy(&word, &emulation::shared[at], 4);
    return word;
}

DEVICE u32 dot(u32 bytes, u32 others, u32 start) {
    for (int n = 0; n < 32; n += 8) start += (bytes >> n & 255) * (others >> n & 255);
    return start;
}
DEVICE u32 scaled_byte(int which, u32 scale) {
    if (scale > 255) emulation::fail("a scale of more than a byte");
    return scale << 8 * which;
}
DEVICE u32 interleave(u32 a, u32 b, bool high) {
    a >>= 16 * high, b >>= 16 * high;
    return (a & 255) | (b & 255) << 8 | (a >> 8 & 255) << 16 | (b >> 8 & 255) << 24;
}
DEVICE u32 interleave_halves(u32 low, u32 high) { return interleave(low, high >> 16, false); }
DEVICE void exchange(bool truly, u32 &a, u32 &b) {
    if (truly) std::swap(a, b);
}
DEVICE u32 halves_of_e4m3(u32 word, bool high) {
    word >>= 16 * high;
    return emulation::both(emulation::float_of_e4m3(u8(word)), emulation::float_of_e4m3(u8(word >> 8)));
}
DEVICE u32 kept(u32 x) { return x; }
DEVICE u32 halves(float low, float high) { return emulation::both(low, high); }
DEVICE u32 product_plus(u32 a, u32 b, u32 c) {
    using namespace emulation;
    return both(low(a) * low(b) + low(c), high(a) * high(b) + high(c));
}
DEVICE u32 product_minus(u32 a, u32 b, u32 c) { return product_plus(a, b, c ^ 0x80008000u); }
DEVICE u32 product(u32 a, u32 b) { return product_plus(a, b, 0); }
DEVICE u32 larger(u32 a, u32 b) {
    using namespace emulation;
    return both(std::fmax(low(a), low(b)), std::fmax(high(a), high(b)));
}
DEVICE float power_of_2(float x) { return std::exp2(x); }

#define SELDOM(condition) (condition)

DEVICE bool any_lane(bool here) {
    emulation::Fiber &fiber = emulation::fibers[emulation::current];
    fiber.given[0] = here;
    emulation::together(1, [](emulation::Fiber *warp) {
        u32 any = 0;
        for (int lane = 0; lane < 32; lane++) any |= warp[lane].given[0];
        for (int lane = 0; lane < 32; lane++) warp[lane].result = any;
    });
    return fiber.result;
}
DEVICE float from_lane(float x, int distance) {
    emulation::Fiber &fiber = emulation::fibers[emulation::current];
    fiber.sums[0] = x;
    emulation::together(2 + distance, [distance](emulation::Fiber *warp) {
        for (int lane = 0; lane < 32; lane++) warp[lane].sums[1] = warp[lane ^ distance].sums[0];
    });
    return fiber.sums[1];
}
DEVICE int uniform(int x) {
    emulation::Fiber &fiber = emulation::fibers[emulation::current];
    fiber.given[0] = x;
    emulation::together(102, [](emulation::Fiber *warp) {
        for (int lane = 0; lane < 32; lane++)
            if (warp[lane].given[0] != warp[0].given[0]) emulation::fail("lanes differ in what is said to be uniform");
    });
    return x;
}
DEVICE u32 transposed(u32 block) {
    emulation::Fiber &fiber = emulation::fibers[emulation::current];
    fiber.given[0] = block;
    emulation::together(100, [](emulation::Fiber *warp) {
        const auto element = [warp](int row, int column) {
            return warp[4 * row + column / 2].given[0] >> 16 * (column % 2) & 0xffff;
        };
        for (int lane = 0; lane < 32; lane++) {
            const int row = lane / 4, column = lane % 4 * 2;
            warp[lane].result = element(column, row) | element(column + 1, row) << 16;
        }
    });
    return fiber.result;
}
DEVICE void multiply(float sum[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    emulation::Fiber &fiber = emulation::fibers[emulation::current];
    const u32 given[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(fiber.given, given, sizeof given);
    std::memcpy(fiber.sums, sum, sizeof fiber.sums);
    emulation::together(101, [](emulation::Fiber *warp) {
        const auto half = [](u32 two, int which) { return emulation::float_of(u16(two >> 16 * which)); };
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 2; i++) {
                const int g = lane / 4, column = lane % 4 * 2 + i;
                for (int part = 0; part < 4; part++)
                    a[g + part % 2 * 8][column + part / 2 * 8] = half(warp[lane].given[part], i);
                for (int part = 0; part < 2; part++) b[column + part * 8][g] = half(warp[lane].given[4 + part], i);
            }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                float total = 0;
                for (int k = 0; k < 16; k++) total += a[row][k] * b[k][column];
                warp[lane].sums[i] += total;
            }
    });
    std::memcpy(sum, fiber.sums, sizeof fiber.sums);
}
