/* Codes of 1 to 16 bits to bytes and back, least significant bit first. Rows start at whole bytes.
 *
 * Eight codes take as many bytes as a code has bits. Each width has loops of its own, in which all
 * shifts are constants.
 */

#include <stdint.h>

#include "levels.h"

#define GROUP 8

/* `count` codes, at most 8, to the bytes that they take. */
INLINE void pack_group(const int32_t *codes, int64_t count, int64_t bits, uint8_t *packed)
{
    uint64_t low = 0, high = 0; /* the first 64 bits, and the next */
    for (int64_t i = 0; i < count; i++) {
        const uint64_t code = (uint32_t)codes[i];
        const int64_t at = i * bits;
        if (at < 64)
            low |= code << at;
        if (at >= 64)
            high |= code << (at - 64);
        else if (at + bits > 64)
            high |= code >> (64 - at);
    }
    for (int64_t byte = 0; byte < (count * bits + 7) / 8; byte++)
        packed[byte] = (uint8_t)(byte < 8 ? low >> 8 * byte : high >> 8 * (byte - 8));
}

INLINE void unpack_group(const uint8_t *packed, int64_t count, int64_t bits, int32_t *codes)
{
    uint64_t low = 0, high = 0;
    for (int64_t byte = 0; byte < (count * bits + 7) / 8; byte++) {
        if (byte < 8)
            low |= (uint64_t)packed[byte] << 8 * byte;
        else
            high |= (uint64_t)packed[byte] << 8 * (byte - 8);
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = i * bits;
        uint64_t code = at < 64 ? low >> at : high >> (at - 64);
        if (at < 64 && at + bits > 64)
            code |= high << (64 - at);
        codes[i] = (int32_t)(code & ((1u << bits) - 1));
    }
}

INLINE void pack_rows(const int32_t *codes, int64_t count, int64_t bits, int64_t begin, int64_t end,
                      uint8_t *packed)
{
    const int64_t size = (count * bits + 7) / 8;
    for (int64_t n = begin; n < end; n++) {
        const int32_t *from = codes + n * count;
        uint8_t *to = packed + n * size;
        int64_t left = count;
        for (; left >= GROUP; left -= GROUP, from += GROUP, to += bits)
            pack_group(from, GROUP, bits, to);
        pack_group(from, left, bits, to);
    }
}

INLINE void unpack_rows(const uint8_t *packed, int64_t stride, int64_t count, int64_t bits,
                        int64_t begin, int64_t end, int32_t *codes)
{
    for (int64_t n = begin; n < end; n++) {
        const uint8_t *from = packed + n * stride;
        int32_t *to = codes + n * count;
        int64_t left = count;
        for (; left >= GROUP; left -= GROUP, from += bits, to += GROUP)
            unpack_group(from, GROUP, bits, to);
        unpack_group(from, left, bits, to);
    }
}

#define FOR_BITS(bits, call) \
    switch (bits) { \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: call(4); break; \
    case 5: call(5); break; \
    case 6: call(6); break; \
    case 7: call(7); break; \
    case 8: call(8); break; \
    case 9: call(9); break; \
    case 10: call(10); break; \
    case 11: call(11); break; \
    case 12: call(12); break; \
    case 13: call(13); break; \
    case 14: call(14); break; \
    case 15: call(15); break; \
    case 16: call(16); break; \
    }

/* Rows `begin` to `end` of codes [N, count] to bytes [N, ceil(count bits / 8)]. */
void vqkv_pack(const int32_t *codes, int64_t count, int64_t bits, int64_t begin, int64_t end,
               uint8_t *packed)
{
#define PACK(bits) pack_rows(codes, count, bits, begin, end, packed)
    FOR_BITS(bits, PACK)
}

/* Rows `begin` to `end` of bytes, `stride` apart, to codes [N, count]. */
void vqkv_unpack(const uint8_t *packed, int64_t stride, int64_t count, int64_t bits, int64_t begin,
                 int64_t end, int32_t *codes)
{
#define UNPACK(bits) unpack_rows(packed, stride, count, bits, begin, end, codes)
    FOR_BITS(bits, UNPACK)
}
