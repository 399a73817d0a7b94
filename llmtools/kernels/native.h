/* What the C files share: the types that they write, rounding to them as torch does it, and activations as integers.
 *
 * Rounding is to the nearest, ties to even; NaN becomes a quiet NaN. Threads are OpenMP's, where the compiler has it:
 * `#pragma omp parallel for num_threads(threads) schedule(static)`, with `threads` given by the caller.
 */
#ifndef LLMTOOLS_NATIVE_H
#define LLMTOOLS_NATIVE_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

enum type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 }; /* TYPES of build.py */

static inline uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static inline float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* The upper half of a float32, rounded. */
static inline uint16_t to_bfloat16(float x) {
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

static inline float from_bfloat16(uint16_t h) { return float_of((uint32_t)h << 16); }

/* Branch-free, so that loops vectorise: one of three results is chosen at the end. */
static inline uint16_t to_float16(float x) {
    uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    uint32_t normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
    uint32_t tiny = bits_of(float_of(a) + 0.5f) - 0x3f000000; /* below 2^-14: the addition rounds to units of 2^-24 */
    uint32_t huge = a > 0x7f800000 ? 0x7e00 : 0x7c00;
    uint32_t h = a < 0x38800000 ? tiny : normal;
    return (uint16_t)(sign | (a >= 0x477ff000 ? huge : h)); /* 65520 and above round to infinity */
}

static inline float from_float16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, a = h & 0x7fff;
    float normal = float_of((a << 13) + 0x38000000), tiny = (float)a * 0x1p-24f;
    float special = float_of((a << 13) | 0x7f800000);
    float x = a >= 0x7c00 ? special : (a < 0x400 ? tiny : normal);
    return float_of(bits_of(x) | sign);
}

/* values -> the elements of `out`, of `type`, from `at` on. */
static inline void write_values(const float *restrict values, int64_t count, int type, void *restrict out, int64_t at) {
    if (type == FLOAT32)
        memcpy((float *)out + at, values, (size_t)count * sizeof(float));
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[at + i] = to_bfloat16(values[i]);
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[at + i] = to_float16(values[i]);
}

enum { LANES = 16 };

static ALWAYS_INLINE void halves_to_floats(const uint16_t *restrict h, float *restrict x) { /* LANES of them */
#if defined(__AVX512F__)
    _mm512_storeu_ps(x, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)h)));
#elif defined(__F16C__) && defined(__AVX2__)
    for (int i = 0; i < LANES; i += 8) _mm256_storeu_ps(x + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
#else
    for (int i = 0; i < LANES; i++) x[i] = from_float16(h[i]);
#endif
}

/* ---- activations as integers: exact sums of products with small whole numbers, such as codes ---- */

/* The largest of the numbers. As two signed bytes it is less than 127 · 256 + 127, and Σ of 512 products with numbers up
 * to 16 · 8 stays below 2^31. */
static const float GREATEST = 32600;

/* x [n], one group: x ≈ quantized · scale. What is dropped of each is at most 2^-16 of the largest beside it, where half
 * precision has 2^-8 or 2^-11 of the number itself. Returns whether all of x is finite; if not, `quantized` is not written.
 * The bits of |x| compare as integers do, which vectorises, and NaN and infinity are the largest. */
static inline int quantize_activations(const float *restrict x, int64_t n, int16_t *restrict quantized,
                                       float *restrict scale) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t size = bits_of(x[i]) & 0x7fffffff;
        most = size > most ? size : most;
    }
    const float largest = float_of(most), by = largest > 1e-30f ? GREATEST / largest : 0;
    *scale = largest / GREATEST;
    if (most >= 0x7f800000) return 0;
    for (int64_t i = 0; i < n; i++) quantized[i] = (int16_t)(int)rintf(x[i] * by);
    return 1;
}

#endif
