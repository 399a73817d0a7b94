/* ggml's blocks to float32: each operation and its order as in reference.py, so the results are equal to the bit.
 *
 * A decoder takes one block and writes its 32 or 256 weights. The loops run over bytes without branches, and the
 * compiler vectorises them.
 */
#ifndef LLMTOOLS_GGML_DECODE_H
#define LLMTOOLS_GGML_DECODE_H

#include "../native.h"

/* X(number, decoder, weights, bytes) for each type. */
#define TYPES(X)                                                                                                       \
    X(2, q4_0, 32, 18)                                                                                                 \
    X(3, q4_1, 32, 20)                                                                                                 \
    X(8, q8_0, 32, 34)                                                                                                 \
    X(10, q2_k, 256, 84)                                                                                               \
    X(11, q3_k, 256, 110)                                                                                              \
    X(12, q4_k, 256, 144)                                                                                              \
    X(13, q5_k, 256, 176)                                                                                              \
    X(14, q6_k, 256, 210)                                                                                              \
    X(20, iq4_nl, 32, 18)                                                                                              \
    X(23, iq4_xs, 256, 136)

static ALWAYS_INLINE float half_at(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return from_float16(h);
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

static const float iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* ---- codes of 4 bits: with AVX-512 their 16 values are formed once, by the same operations, and looked up ---- */

#if defined(__AVX512F__)

static ALWAYS_INLINE __m512 sixteen(float scale, float zero, float shift) { /* scale · (code − zero) + shift */
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 values = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_sub_ps(codes, _mm512_set1_ps(zero)));
    return _mm512_add_ps(values, _mm512_set1_ps(shift));
}

/* The values of the low nibbles of 16 bytes, and of the high ones. A look-up ignores the bits above its four. */
static ALWAYS_INLINE void look_up(const uint8_t *p, __m512 low, __m512 high, float *first, float *second) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    _mm512_storeu_ps(first, _mm512_permutexvar_ps(bytes, low));
    _mm512_storeu_ps(second, _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), high));
}

static ALWAYS_INLINE void q4_0(const uint8_t *restrict b, float *restrict w) {
    const __m512 values = sixteen(half_at(b), 8, -0.0f); /* which adds nothing, also to −0 */
    look_up(b + 2, values, values, w, w + 16);
}

static ALWAYS_INLINE void q4_1(const uint8_t *restrict b, float *restrict w) {
    const __m512 values = sixteen(half_at(b), 0, half_at(b + 2));
    look_up(b + 4, values, values, w, w + 16);
}

static ALWAYS_INLINE void q4_k(const uint8_t *restrict b, float *restrict w) {
    const float d = half_at(b), m = half_at(b + 2);
    for (int g = 0; g < 8; g += 2) {
        float scale[2], least[2];
        for (int k = 0; k < 2; k++) sixes(b + 4, g + k, scale + k, least + k);
        const __m512 low = sixteen(d * scale[0], 0, -(m * least[0])), high = sixteen(d * scale[1], 0, -(m * least[1]));
        for (int i = 0; i < 32; i += 16) look_up(b + 16 + 16 * g + i, low, high, w + 32 * g + i, w + 32 * g + 32 + i);
    }
}

static ALWAYS_INLINE void iq4(const uint8_t *restrict p, float scale, float *restrict w) {
    const __m512 values = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_loadu_ps(iq4_levels));
    look_up(p, values, values, w, w + 16);
}

#else

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

static ALWAYS_INLINE void iq4(const uint8_t *restrict p, float scale, float *restrict w) {
    for (int i = 0; i < 16; i++) {
        w[i] = scale * iq4_levels[p[i] & 15];
        w[16 + i] = scale * iq4_levels[p[i] >> 4];
    }
}

#endif

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
