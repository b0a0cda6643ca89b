// What a warp of an NVIDIA GPU does in one instruction, by name. `tests/kernels/emulated/warp.cuh` has the
// same names for a CPU, so that kernels which go by them alone are tested where there is no GPU.
//
// Lane l of a fragment is (g, c) = (l / 4, l % 4), as PTX counts. A register of two fp16 numbers holds
// columns 2c and 2c + 1 of row g of an 8 x 8 block.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define INFINITY __int_as_float(0x7f800000)
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
#define DEVICE __device__ __forceinline__
#define SHARED(name) extern __shared__ __align__(128) u8 name[]

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE void barrier() { __syncthreads(); }

// A kernel begins while the one before it in a stream still runs, if launched so. What that one wrote, and what it
// still reads, are to be touched after `wait_for_earlier` alone; `let_later_begin` is for the next one.
DEVICE void wait_for_earlier() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_later_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Codes are read once, and leave L1 to others.
DEVICE uint2 read_once(const uint2 *from) {
    uint2 words;
    asm("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(from));
    return words;
}
DEVICE u32 read_once(const u32 *from) {
    u32 word;
    asm("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(word) : "l"(from));
    return word;
}
DEVICE u32 read_once(const u16 *from) {
    u16 word;
    asm("ld.global.L1::no_allocate.u16 %0, [%1];" : "=h"(word) : "l"(from));
    return word;
}
DEVICE u32 read_once(const u8 *from) {
    u32 word;
    asm("ld.global.L1::no_allocate.u8 %0, [%1];" : "=r"(word) : "l"(from));
    return word;
}
// Here, not where it is first needed.
DEVICE float2 read_early(const float2 *from) {
    float2 numbers;
    asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(numbers.x), "=f"(numbers.y) : "l"(from));
    return numbers;
}

// Of shared memory, at a byte that is a sum: the constant part of it becomes part of the instruction.
DEVICE u32 address_of(const void *shared) { return (u32)__cvta_generic_to_shared(shared); }
DEVICE u32 load_word(u32 address, int constant) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address + constant));
    return word;
}
DEVICE uint2 load_words(u32 address, int constant) {
    uint2 words;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "r"(address + constant));
    return words;
}

// start and the dot product of four bytes each, in one instruction.
DEVICE u32 dot(u32 bytes, u32 others, u32 start) { return __dp4a(bytes, others, start); }

// With which a dot product is one byte of the other operand, scaled; scale < 256.
DEVICE u32 scaled_byte(int which, u32 scale) { return scale << 8 * which; }

// Bytes (a0, b0, a1, b1), or with `high` (a2, b2, a3, b3).
DEVICE u32 interleave(u32 a, u32 b, bool high) { return __byte_perm(a, b, high ? 0x7362 : 0x5140); }
// In a register, not reckoned anew where it is needed.
DEVICE u32 kept(u32 x) {
    asm volatile("mov.u32 %0, %0;" : "+r"(x));
    return x;
}

// Of the low half of one word (a0, a1) and the high half of another (b0, b1).
DEVICE u32 interleave_halves(u32 low, u32 high) { return __byte_perm(low, high, 0x7160); }
DEVICE void exchange(bool truly, u32 &a, u32 &b) {
    const u32 first = a;
    a = truly ? b : a, b = truly ? first : b;
}

// Two fp16 numbers of the two e4m3 numbers in a half of a word; all of them have an exact one.
DEVICE u32 halves_of_e4m3(u32 word, bool high) {
    u32 halves;
    if (high)
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, h;}" : "=r"(halves) : "r"(word));
    else
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, l;}" : "=r"(halves) : "r"(word));
    return halves;
}

DEVICE u32 halves(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Two fp16 numbers at once: a b, a b + c, a b - c.
DEVICE u32 product(u32 a, u32 b) {
    u32 both;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
    return both;
}
DEVICE u32 product_plus(u32 a, u32 b, u32 c) {
    u32 both;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(both) : "r"(a), "r"(b), "r"(c));
    return both;
}
DEVICE u32 product_minus(u32 a, u32 b, u32 c) {
    u32 both;
    asm("{.reg .b32 n; neg.f16x2 n, %3; fma.rn.f16x2 %0, %1, %2, n;}" : "=r"(both) : "r"(a), "r"(b), "r"(c));
    return both;
}

// The larger of either two.
DEVICE u32 larger(u32 a, u32 b) {
    u32 both;
    asm("max.f16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
    return both;
}

DEVICE float power_of_2(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

// What hardly any pass through a loop has; left out where the others' instructions are counted.
#ifdef WITHOUT_SELDOM
#define SELDOM(condition) ((condition), false)
#else
#define SELDOM(condition) __builtin_expect(condition, 0)
#endif

// All lanes of a warp together.
DEVICE bool any_lane(bool here) { return __any_sync(0xffffffffu, here); }
// What all lanes have alike, as the compiler sees then.
DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
DEVICE float from_lane(float x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }

// An 8 x 8 block of fp16 numbers, transposed.
DEVICE u32 transposed(u32 block) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(block));
    return result;
}

// sum[16, 8] += a[16, 16] b[16, 8], a in four blocks (rows 0-7 and 8-15 of columns 0-7, then of 8-15), b in two
// (rows 0-7, rows 8-15), each transposed in its registers.
DEVICE void multiply(float sum[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
