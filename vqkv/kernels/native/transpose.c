/* Codes by column, of codes by token. */

#include "attend.h"

#ifdef HAVE_X86

/* In blocks of 64 tokens by 16 columns, every 16 tokens in a lane of 16 bytes: interleaving the halves of a
 * block four times transposes lanes. */
__attribute__((target("avx512f,avx512bw")))
void transpose(const uint8_t *codes, int64_t columns, int64_t tokens, uint8_t *transposed)
{
    for (int64_t c = 0; c < columns; c += 16)
        for (int64_t t = 0; t < tokens; t += 64) {
            __m512i x[16], y[16];
            for (int i = 0; i < 16; i++) {
                const uint8_t *from = codes + (t + i) * columns + c;
#define LANE(n) _mm_loadu_si128((const __m128i *)(from + 16 * (n) * columns))
                x[i] = _mm512_castsi128_si512(LANE(0));
                x[i] = _mm512_inserti32x4(x[i], LANE(1), 1);
                x[i] = _mm512_inserti32x4(x[i], LANE(2), 2);
                x[i] = _mm512_inserti32x4(x[i], LANE(3), 3);
#undef LANE
            }
            for (int round = 0; round < 4; round++) {
                for (int i = 0; i < 8; i++) {
                    y[2 * i] = _mm512_unpacklo_epi8(x[i], x[i + 8]);
                    y[2 * i + 1] = _mm512_unpackhi_epi8(x[i], x[i + 8]);
                }
                for (int i = 0; i < 16; i++)
                    x[i] = y[i];
            }
            for (int i = 0; i < 16; i++)
                _mm512_storeu_si512(transposed + (c + i) * TILE + t, x[i]);
        }
}

#endif
