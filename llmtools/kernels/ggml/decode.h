/* ggml's blocks to float32: each operation and its order as in reference.py, so the results are equal to the bit.
 *
 * A decoder takes one block and writes its 32 or 256 weights. The loops run over bytes without branches, and the
 * compiler vectorises them. With AVX-512 `codes.h` decodes instead.
 */
#ifndef LLMTOOLS_GGML_DECODE_H
#define LLMTOOLS_GGML_DECODE_H

#include "../native.h"

/* X(number, name, weights, bytes, offset) for each type. The offset is subtracted from codes before they are scaled; −1
 * where a minimum is added to the scaled ones instead. */
#define TYPES(X)                                                                                                       \
    X(2, q4_0, 32, 18, 8)                                                                                              \
    X(3, q4_1, 32, 20, -1)                                                                                             \
    X(6, q5_0, 32, 22, 16)                                                                                             \
    X(7, q5_1, 32, 24, -1)                                                                                             \
    X(8, q8_0, 32, 34, 128)                                                                                            \
    X(10, q2_k, 256, 84, -1)                                                                                           \
    X(11, q3_k, 256, 110, 4)                                                                                           \
    X(12, q4_k, 256, 144, -1)                                                                                          \
    X(13, q5_k, 256, 176, -1)                                                                                          \
    X(14, q6_k, 256, 210, 32)                                                                                          \
    X(20, iq4_nl, 32, 18, 128)                                                                                         \
    X(23, iq4_xs, 256, 136, 128)

static ALWAYS_INLINE float half_at(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return from_float16(h);
}

/* Nibbles of n bytes: the low ones to codes[0 … n), the high ones after them. */
static ALWAYS_INLINE void nibbles(const uint8_t *restrict p, int n, uint8_t *restrict codes) {
    for (int i = 0; i < n; i++) codes[i] = p[i] & 15;
    for (int i = 0; i < n; i++) codes[n + i] = p[i] >> 4;
}

static ALWAYS_INLINE void q4_0(const uint8_t *restrict b, float *restrict w) {
    const float d = half_at(b);
    uint8_t codes[32];
    nibbles(b + 2, 16, codes);
    for (int i = 0; i < 32; i++) w[i] = d * (float)((int)codes[i] - 8);
}

static ALWAYS_INLINE void q4_1(const uint8_t *restrict b, float *restrict w) {
    const float d = half_at(b), m = half_at(b + 2);
    uint8_t codes[32];
    nibbles(b + 4, 16, codes);
    for (int i = 0; i < 32; i++) w[i] = d * (float)codes[i] + m;
}

/* 32 codes of 5 bits: the top ones in 4 bytes, then nibbles. */
static ALWAYS_INLINE void fives(const uint8_t *restrict p, uint8_t *restrict codes) {
    nibbles(p + 4, 16, codes);
    for (int i = 0; i < 32; i++) codes[i] |= (uint8_t)(((p[i / 8] >> i % 8) & 1) << 4);
}

static ALWAYS_INLINE void q5_0(const uint8_t *restrict b, float *restrict w) {
    const float d = half_at(b);
    uint8_t codes[32];
    fives(b + 2, codes);
    for (int i = 0; i < 32; i++) w[i] = d * (float)((int)codes[i] - 16);
}

static ALWAYS_INLINE void q5_1(const uint8_t *restrict b, float *restrict w) {
    const float d = half_at(b), m = half_at(b + 2);
    uint8_t codes[32];
    fives(b + 4, codes);
    for (int i = 0; i < 32; i++) w[i] = d * (float)codes[i] + m;
}

static ALWAYS_INLINE void q8_0(const uint8_t *restrict b, float *restrict w) {
    const float d = half_at(b);
    for (int i = 0; i < 32; i++) w[i] = d * (float)(int8_t)b[2 + i];
}

static ALWAYS_INLINE void q2_k(const uint8_t *restrict b, float *restrict w) {
    const float d = half_at(b + 80), least = half_at(b + 82);
    for (int g = 0; g < 16; g++) { /* of 16 weights each */
        const float scale = d * (float)(b[g] & 15), shift = least * (float)(b[g] >> 4);
        const uint8_t *p = b + 16 + 32 * (g / 8) + 16 * (g % 2);
        const int bit = 2 * (g % 8 / 2);
        for (int i = 0; i < 16; i++) w[16 * g + i] = scale * (float)((p[i] >> bit) & 3) - shift;
    }
}

static ALWAYS_INLINE void q3_k(const uint8_t *restrict b, float *restrict w) {
    const float d = half_at(b + 108);
    const uint8_t *packed = b + 96;
    for (int g = 0; g < 16; g++) {
        const int low = (packed[g % 8] >> 4 * (g / 8)) & 15, high = (packed[8 + g % 4] >> 2 * (g / 4)) & 3;
        const float scale = d * (float)((low | high << 4) - 32);
        const uint8_t *p = b + 32 + 32 * (g / 8) + 16 * (g % 2), *tops = b + 16 * (g % 2);
        const int bit = 2 * (g % 8 / 2), top = g / 2;
        for (int i = 0; i < 16; i++) {
            const int code = ((p[i] >> bit) & 3) | ((tops[i] >> top) & 1) << 2;
            w[16 * g + i] = scale * (float)(code - 4);
        }
    }
}

/* Scale and minimum of group g of Q4_K and Q5_K: 6 bits each in 12 bytes, `_sixes` of reference.py. */
static ALWAYS_INLINE void sixes(const uint8_t *p, int g, float *scale, float *least) {
    if (g < 4) {
        *scale = (float)(p[g] & 63);
        *least = (float)(p[4 + g] & 63);
    } else {
        *scale = (float)((p[4 + g] & 15) | (p[g - 4] >> 6) << 4);
        *least = (float)((p[4 + g] >> 4) | (p[g] >> 6) << 4);
    }
}

static ALWAYS_INLINE void q4_k(const uint8_t *restrict b, float *restrict w) {
    const float d = half_at(b), m = half_at(b + 2);
    for (int g = 0; g < 8; g++) {
        float scale, least;
        sixes(b + 4, g, &scale, &least);
        scale = d * scale, least = m * least;
        const uint8_t *p = b + 16 + 32 * (g / 2);
        const int bit = 4 * (g % 2);
        for (int i = 0; i < 32; i++) w[32 * g + i] = scale * (float)((p[i] >> bit) & 15) - least;
    }
}

static ALWAYS_INLINE void q5_k(const uint8_t *restrict b, float *restrict w) {
    const float d = half_at(b), m = half_at(b + 2);
    for (int g = 0; g < 8; g++) {
        float scale, least;
        sixes(b + 4, g, &scale, &least);
        scale = d * scale, least = m * least;
        const uint8_t *p = b + 48 + 32 * (g / 2), *tops = b + 16;
        const int bit = 4 * (g % 2);
        for (int i = 0; i < 32; i++) {
            const int code = ((p[i] >> bit) & 15) | ((tops[i] >> g) & 1) << 4;
            w[32 * g + i] = scale * (float)code - least;
        }
    }
}

static ALWAYS_INLINE void q6_k(const uint8_t *restrict b, float *restrict w) {
    const float d = half_at(b + 208);
    for (int g = 0; g < 16; g++) {
        const float scale = d * (float)(int8_t)b[192 + g];
        const uint8_t *low = b + 64 * (g / 8) + 16 * (g % 4), *high = b + 128 + 32 * (g / 8) + 16 * (g % 2);
        const int bit = 4 * (g % 8 / 4), top = 2 * (g % 8 / 2);
        for (int i = 0; i < 16; i++) {
            const int code = ((low[i] >> bit) & 15) | ((high[i] >> top) & 3) << 4;
            w[16 * g + i] = scale * (float)(code - 32);
        }
    }
}

static const float iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static ALWAYS_INLINE void iq4(const uint8_t *restrict p, float scale, float *restrict w) {
    for (int i = 0; i < 16; i++) {
        w[i] = scale * iq4_levels[p[i] & 15];
        w[16 + i] = scale * iq4_levels[p[i] >> 4];
    }
}

static ALWAYS_INLINE void iq4_nl(const uint8_t *restrict b, float *restrict w) { iq4(b + 2, half_at(b), w); }

static ALWAYS_INLINE void iq4_xs(const uint8_t *restrict b, float *restrict w) {
    const float d = half_at(b);
    const int tops = b[2] | b[3] << 8;
    for (int g = 0; g < 8; g++) {
        const int code = ((b[4 + g / 2] >> 4 * (g % 2)) & 15) | ((tops >> 2 * g) & 3) << 4;
        iq4(b + 8 + 16 * g, d * (float)(code - 32), w + 32 * g);
    }
}

#endif
