/* Of a level, by NAME and TARGET; included once for each, without a guard. */

/* e^x for x <= 0, within 2 units in the last place; 0 below -87. 2^n e^f with |f| <= ln 2 / 2. */
INLINE TARGET float NAME(exponential)(float x)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    const float shifted = x * 1.44269504f + shift;
    const float n = shifted - shift;
    const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float series = 1.0f / 720;
    series = series * f + 1.0f / 120;
    series = series * f + 1.0f / 24;
    series = series * f + 1.0f / 6;
    series = series * f + 0.5f;
    series = series * f + 1.0f;
    series = series * f + 1.0f;
    uint32_t power, bits;
    memcpy(&power, &shifted, sizeof power);
    memcpy(&bits, &series, sizeof bits);
    bits += power << 23;
    float result;
    memcpy(&result, &bits, sizeof result);
    return x < -87.0f ? 0.0f : result;
}
