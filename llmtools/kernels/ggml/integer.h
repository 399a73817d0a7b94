/* y = x Wᵀ for few tokens by the processor's products of bytes (AVX-512 VNNI), whose sums are exact integers.
 *
 * For activations of half precision. Those of 32 columns are quantized to 16 bits (native.h), and v, what is stored of
 * one, is two signed bytes. With codes, scales and shifts as in codes.h
 *
 *     Σ weight · x = Σ over units of 16 columns of (scale · x_scale · Σ code · v − shift · x_scale · Σ v)
 */
#ifndef LLMTOOLS_GGML_INTEGER_H
#define LLMTOOLS_GGML_INTEGER_H

#include <stdlib.h>

#include "codes.h"

typedef struct {
    const uint8_t *blocks; /* [rows, ·], rows `stride` bytes apart */
    int64_t stride, columns;
    int kind; /* number of the type in files */
} Weight;     /* `_Weight` of native.py */

enum { SOME_TOKENS = 64 }; /* whose activations are integers at a time */

#if defined(__AVX512VNNI__) && DECODES

enum { TOGETHER = 4, AHEAD = 2048 }; /* tokens; bytes that are fetched before they are used */

typedef struct {
    int tokens;
    int64_t supers;    /* columns / SUPER, rounded up; zeros are added */
    int8_t *bytes;     /* [tokens, supers, 4, 2, CHUNK]: high bytes, low bytes */
    float *scale, *sum; /* [tokens, supers, 16]: of the activations of a unit; Σ v times that */
} Inputs;

/* ---- activations ---- */

static int goes_by_integers(int type) { return type != FLOAT32; }

/* 32 activations as bytes; whether all are finite. */
static int quantize_run(const float *x, int8_t *bytes, float *scale, float *sum) {
    int16_t quantized[32];
    if (!quantize_activations(x, 32, quantized, scale)) return 0;
    scale[1] = scale[0];
    for (int u = 0; u < 2; u++) {
        int32_t total = 0;
        for (int i = 0; i < UNIT; i++) total += quantized[UNIT * u + i];
        sum[u] = (float)total * *scale;
        const __m256i v = _mm256_loadu_si256((const __m256i *)(quantized + UNIT * u));
        const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
        const __m256i high = _mm256_srai_epi16(_mm256_sub_epi16(v, low), 8);
        _mm_storeu_si128((__m128i *)(bytes + UNIT * u), _mm256_cvtepi16_epi8(high));
        _mm_storeu_si128((__m128i *)(bytes + CHUNK + UNIT * u), _mm256_cvtepi16_epi8(low));
    }
    return 1;
}

/* x [tokens, columns]. Returns whether it could be done; `bytes` is to be freed either way. */
static int read_inputs(const Weight *w, const float *x, int tokens, Inputs *to) {
    const int64_t supers = (w->columns + SUPER - 1) / SUPER;
    *to = (Inputs){tokens, supers, NULL, NULL, NULL};
    const size_t bytes = (size_t)(tokens * supers * 2 * SUPER), units = (size_t)(tokens * supers * 16);
    to->bytes = aligned_alloc(64, bytes + 2 * units * sizeof(float));
    if (!to->bytes) return 0;
    memset(to->bytes, 0, bytes + 2 * units * sizeof(float));
    to->scale = (float *)(to->bytes + bytes);
    to->sum = to->scale + units;
    for (int t = 0; t < tokens; t++)
        for (int64_t c = 0; c < w->columns; c += 32) {
            const int64_t at = t * supers * 16 + c / UNIT;
            int8_t *own = to->bytes + t * supers * 2 * SUPER + c / CHUNK * 2 * CHUNK + c % CHUNK;
            if (!quantize_run(x + t * w->columns + c, own, to->scale + at, to->sum + at)) return 0;
        }
    return 1;
}

/* ---- products ---- */

/* Σ code · v of each four columns. */
static ALWAYS_INLINE __m512i dots(__m512i codes, const int8_t *bytes) {
    const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_load_si512(bytes));
    return _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), codes, _mm512_load_si512(bytes + CHUNK));
}

/* The scale of the unit that each four of the codes 64·j … belong to. */
static ALWAYS_INLINE __m512 spread(__m512 scale, int j) {
    const __m512i unit = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(_mm512_add_epi32(unit, _mm512_set1_epi32(4 * j)), scale);
}

/* For each type: a row with `tokens` tokens from `first` on, 256 columns at a time, of which the last may be fewer. */
#define PRODUCT(NUMBER, NAME, WEIGHTS, BYTES, OFFSET)                                                                  \
    static ALWAYS_INLINE void super_##NAME(const uint8_t *b, int count, int chunks, const Inputs *x, int64_t s,        \
                                           int first, int tokens, __m512 *total) {                                     \
        const Scales own = scales_##NAME(b, count);                                                                    \
        __m512 by[TOGETHER];                                                                                           \
        _Pragma("GCC unroll 4") for (int t = 0; t < tokens; t++) {                                                     \
            const int64_t at = ((first + t) * x->supers + s) * 16;                                                     \
            by[t] = _mm512_mul_ps(own.scale, _mm512_loadu_ps(x->scale + at));                                          \
            total[t] = _mm512_fnmadd_ps(own.shift, _mm512_loadu_ps(x->sum + at), total[t]);                            \
        }                                                                                                              \
        _Pragma("GCC unroll 4") for (int j = 0; j < chunks; j++) {                                                     \
            const __m512i codes = codes_##NAME(b, j, 2 * j + 1 < count);                                               \
            _Pragma("GCC unroll 4") for (int t = 0; t < tokens; t++) {                                                 \
                const __m512i dot = dots(codes, x->bytes + (((first + t) * x->supers + s) * 4 + j) * 2 * CHUNK);       \
                total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), spread(by[t], j), total[t]);                       \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    static ALWAYS_INLINE void tokens_##NAME(const uint8_t *b, int64_t columns, const Inputs *x, int first, int tokens, \
                                            float *sums) {                                                             \
        const int bytes = SUPER / WEIGHTS * BYTES;                                                                     \
        const int64_t whole = columns / SUPER;                                                                         \
        __m512 total[TOGETHER];                                                                                        \
        _Pragma("GCC unroll 4") for (int t = 0; t < tokens; t++) total[t] = _mm512_setzero_ps();                       \
        for (int64_t s = 0; s < whole; s++, b += bytes) {                                                              \
            for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char *)b + AHEAD + i, _MM_HINT_T0);                \
            super_##NAME(b, 8, 4, x, s, first, tokens, total);                                                         \
        }                                                                                                              \
        const int left = (int)(columns % SUPER / 32);                                                                  \
        if (WEIGHTS == 32 && left) super_##NAME(b, left, (left + 1) / 2, x, whole, first, tokens, total);              \
        _Pragma("GCC unroll 4") for (int t = 0; t < tokens; t++) sums[first + t] = _mm512_reduce_add_ps(total[t]);     \
    }                                                                                                                  \
    static void row_##NAME(const uint8_t *b, int64_t columns, const Inputs *x, float *sums) {                          \
        int t = 0;                                                                                                     \
        for (; t + TOGETHER <= x->tokens; t += TOGETHER) tokens_##NAME(b, columns, x, t, TOGETHER, sums);              \
        for (; t < x->tokens; t++) tokens_##NAME(b, columns, x, t, 1, sums);                                           \
    }
TYPES(PRODUCT)
#undef PRODUCT

/* sums[t] = Σ_c weight[row, c] · x[t, c]. */
static void integer_products(const Weight *w, int64_t row, const Inputs *x, float *sums) {
    const uint8_t *b = w->blocks + row * w->stride;
#define CASE(NUMBER, NAME, WEIGHTS, BYTES, OFFSET)                                                                     \
    case NUMBER: row_##NAME(b, w->columns, x, sums); break;
    switch (w->kind) { TYPES(CASE) }
#undef CASE
}

#else

typedef struct {
    int8_t *bytes;
} Inputs;

static int goes_by_integers(int type) {
    (void)type;
    return 0;
}

static int read_inputs(const Weight *w, const float *x, int tokens, Inputs *to) {
    (void)w, (void)x, (void)tokens;
    to->bytes = NULL;
    return 0;
}

static void integer_products(const Weight *w, int64_t row, const Inputs *x, float *sums) {
    (void)w, (void)row, (void)x, (void)sums;
}

#endif

#endif
