/* y = x Wᵀ for few tokens, each packed weight read once:   y[t, r] = Σ_c x[t, c] · weight[r, c],   summed in float32.
 *
 * Four rows at a time, a chunk of columns is decoded into the first-level cache and multiplied with every token, four
 * tokens at a time, so that each load of a weight or an activation serves four products. With AVX-512, up to four tokens
 * are multiplied without that detour, straight from the registers: 2.9 to 3.7 instead of 4.5 to 5 ns for 32 weights.
 *
 * Weights are float32, not rounded to the type of x: AVX-512's bfloat16 products were slower than twice as many of
 * float32 (16 tokens, 5632 × 2048, one busy core of a Sapphire Rapids: 6.9 against 5.3 ms). Sums run in a fixed order,
 * whatever the number of threads.
 */
#ifndef LLMTOOLS_GROUPED_MULTIPLY_H
#define LLMTOOLS_GROUPED_MULTIPLY_H

#include <stdlib.h>

#include "decode.h"

enum { ROWS = 4, TOKENS = 4, CHUNK = 2048, MOST_TOKENS = 64 }; /* four rows of a chunk are 32 KB */

#if defined(__AVX512F__)
typedef __m512 Lanes;
#define add_product(sum, a, b) _mm512_fmadd_ps(a, b, sum)
#elif defined(__AVX2__) && defined(__FMA__)
typedef __m256 Lanes;
#define add_product(sum, a, b) _mm256_fmadd_ps(a, b, sum)
#elif defined(__aarch64__) && defined(__ARM_NEON)
typedef float32x4_t Lanes;
#define add_product(sum, a, b) vfmaq_f32(sum, a, b)
#else
typedef float Lanes __attribute__((vector_size(16)));
#define add_product(sum, a, b) ((sum) + (a) * (b))
#endif

enum { WIDE = sizeof(Lanes) / 4 };

static ALWAYS_INLINE Lanes load_lanes(const float *p, int64_t left) {
    float some[WIDE] = {0};
    Lanes lanes;
    memcpy(&lanes, left < WIDE ? memcpy(some, p, (size_t)left * 4) : p, sizeof lanes);
    return lanes;
}

static ALWAYS_INLINE float total(Lanes lanes) {
    float some[WIDE];
    memcpy(some, &lanes, sizeof lanes);
    for (int width = WIDE / 2; width; width /= 2)
        for (int i = 0; i < width; i++) some[i] += some[i + width];
    return some[0];
}

/* sums[r][t] += Σ_c w[r, c] · x[t, c] over n columns; rows of w are CHUNK apart and zero up to a whole register. */
static ALWAYS_INLINE void products(const float *w, const float *x, int64_t stride, int64_t n, int tokens,
                                   Lanes sums[ROWS][TOKENS]) {
    for (int64_t c = 0; c < n; c += WIDE) {
        Lanes a[ROWS], b[TOKENS];
        for (int r = 0; r < ROWS; r++) a[r] = load_lanes(w + r * CHUNK + c, WIDE);
        for (int t = 0; t < tokens; t++) b[t] = load_lanes(x + t * stride + c, n - c);
        for (int r = 0; r < ROWS; r++)
            for (int t = 0; t < tokens; t++) sums[r][t] = add_product(sums[r][t], a[r], b[t]);
    }
}

/* One chunk of ROWS rows with all tokens. */
static ALWAYS_INLINE void all_products(const float *w, const float *x, int64_t stride, int64_t n, int tokens,
                                       Lanes (*sums)[ROWS][TOKENS]) {
#define PRODUCTS(COUNT)                                                                                                \
    {                                                                                                                  \
        Lanes held[ROWS][TOKENS]; /* in registers */                                                                   \
        memcpy(held, sums[t / TOKENS], sizeof held);                                                                   \
        products(w, x + t * stride, stride, n, COUNT, held);                                                           \
        memcpy(sums[t / TOKENS], held, sizeof held);                                                                   \
    }
    for (int t = 0; t < tokens; t += TOKENS) {
        switch (tokens - t) {
        case 1: PRODUCTS(1) break;
        case 2: PRODUCTS(2) break;
        case 3: PRODUCTS(3) break;
        default: PRODUCTS(4)
        }
    }
#undef PRODUCTS
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)

static int goes_straight(const Weight *w, int tokens) {
    return tokens <= TOKENS && w->bits < 8 && w->group % RUN == 0 && w->columns % 16 == 0;
}

/* Half a run, 16 codes, in lanes of 32 bits, the bits above a code not cleared. The load itself spreads the bytes over the
 * lanes, which leaves the ports of the shuffles free. At 4 bits the codes then come in the order 0, 8, 1, 9, … 7, 15, and
 * so must the activations: `in_order_of_lanes`. */
static ALWAYS_INLINE __m512i half_run(const uint8_t *p, int bits) {
    static const uint32_t twos[16] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    static const uint32_t threes[16] = {0, 3, 6, 9, 12, 15, 18, 21, 8, 11, 14, 17, 20, 23, 26, 29};
    static const uint32_t fours[16] = {0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28};
    int32_t four, more;
    int64_t eight;
    if (bits == 4) {
        memcpy(&eight, p, 8);
        return _mm512_srlv_epi32(_mm512_set1_epi64(eight), _mm512_loadu_si512(fours));
    }
    memcpy(&four, p, 4);
    if (bits == 2) return _mm512_srlv_epi32(_mm512_set1_epi32(four), _mm512_loadu_si512(twos));
    memcpy(&more, p + 2, 4); /* codes 8 to 15 begin in byte 3 and end in byte 5 */
    const __m512i spread = _mm512_mask_set1_epi32(_mm512_set1_epi32(four), 0xff00, more);
    return _mm512_srlv_epi32(spread, _mm512_loadu_si512(threes));
}

static void in_order_of_lanes(const float *x, int64_t n, float *y) {
    for (int64_t block = 0; block < n; block += 16)
        for (int i = 0; i < 16; i++) y[block + i] = x[block + 8 * (i & 1) + i / 2];
}

/* sums[t] = Σ_c weight[row, c] · x[t, c]. */
static ALWAYS_INLINE void straight(const Weight *w, int64_t row, const float *x, int bits, int tokens, float *sums) {
    const uint8_t *codes = w->codes + row * w->code_stride;
    const int64_t columns = w->columns, groups = (columns + w->group - 1) / w->group;
    const Unpacking how = unpacking(bits);
    float scale[GROUPS], zero[GROUPS];
    Lanes first[TOKENS], second[TOKENS];
    for (int t = 0; t < tokens; t++) first[t] = second[t] = _mm512_setzero_ps();
    for (int64_t some = 0; some < groups; some += GROUPS) {
        const int64_t n = groups - some < GROUPS ? groups - some : GROUPS;
        read_scales(w, row, some, n, scale);
        read_zeros(w, bits, row, some, n, &how, zero);
        for (int64_t g = 0; g < n; g++) {
            const Table table = make_table(w, scale[g], zero[g], FLOAT32);
            int64_t c = (some + g) * w->group, end = c + w->group;
            end = end < columns ? end : columns;
            for (; c + RUN <= end; c += RUN) {
                const uint8_t *p = codes + c / 8 * bits;
                const __m512i low = half_run(p, bits), high = half_run(p + 2 * bits, bits);
                const __m512 a = _mm512_castsi512_ps(_mm512_permutexvar_epi32(low, table));
                const __m512 b = _mm512_castsi512_ps(_mm512_permutexvar_epi32(high, table));
                for (int t = 0; t < tokens; t++) {
                    first[t] = _mm512_fmadd_ps(a, _mm512_loadu_ps(x + t * columns + c), first[t]);
                    second[t] = _mm512_fmadd_ps(b, _mm512_loadu_ps(x + t * columns + c + 16), second[t]);
                }
            }
            if (c < end) { /* the row ends with half a run */
                const __m512i codes_left = half_run(codes + c / 8 * bits, bits);
                const __m512 a = _mm512_castsi512_ps(_mm512_permutexvar_epi32(codes_left, table));
                for (int t = 0; t < tokens; t++)
                    first[t] = _mm512_fmadd_ps(a, _mm512_loadu_ps(x + t * columns + c), first[t]);
            }
        }
    }
    for (int t = 0; t < tokens; t++) sums[t] = _mm512_reduce_add_ps(_mm512_add_ps(first[t], second[t]));
}

static void straight_row(const Weight *w, int64_t row, const float *x, int tokens, float *sums) {
#define STRAIGHT(BITS)                                                                                                 \
    switch (tokens) {                                                                                                  \
    case 1: straight(w, row, x, BITS, 1, sums); break;                                                                 \
    case 2: straight(w, row, x, BITS, 2, sums); break;                                                                 \
    case 3: straight(w, row, x, BITS, 3, sums); break;                                                                 \
    default: straight(w, row, x, BITS, 4, sums);                                                                       \
    }
    if (w->bits == 2) { STRAIGHT(2) }
    else if (w->bits == 3) { STRAIGHT(3) }
    else { STRAIGHT(4) }
#undef STRAIGHT
}

#else

static int goes_straight(const Weight *w, int tokens) {
    (void)w, (void)tokens;
    return 0;
}

static void in_order_of_lanes(const float *x, int64_t n, float *y) { (void)x, (void)n, (void)y; }

static void straight_row(const Weight *w, int64_t row, const float *x, int tokens, float *sums) {
    (void)w, (void)row, (void)x, (void)tokens, (void)sums;
}

#endif

static void write(void *y, int64_t at, int type, float sum) {
    if (type == FLOAT32) ((float *)y)[at] = sum;
    else ((uint16_t *)y)[at] = type == FLOAT16 ? to_float16(sum) : to_bfloat16(sum);
}

/* x [tokens, columns] float32, y [tokens, rows] of `type`; contiguous. */
static void multiply_rows(const Weight *w, int64_t rows, const float *x, int tokens, int type, void *y, int threads) {
    float *ordered = NULL;
    if (goes_straight(w, tokens) && w->bits == 4) ordered = malloc((size_t)(tokens * w->columns) * sizeof *x);
    if (goes_straight(w, tokens) && (w->bits != 4 || ordered)) {
        if (ordered) in_order_of_lanes(x, tokens * w->columns, ordered);
        const float *inputs = ordered ? ordered : x;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            float sums[TOKENS];
            straight_row(w, row, inputs, tokens, sums);
            for (int t = 0; t < tokens; t++) write(y, t * rows + row, type, sums[t]);
        }
        free(ordered);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row += ROWS) {
        float weights[ROWS * CHUNK];
        Lanes sums[MOST_TOKENS / TOKENS][ROWS][TOKENS];
        const int64_t count = rows - row < ROWS ? rows - row : ROWS;
        memset(sums, 0, (size_t)((tokens + TOKENS - 1) / TOKENS) * sizeof sums[0]);
        memset(weights + count * CHUNK, 0, (size_t)(ROWS - count) * CHUNK * sizeof weights[0]);
        for (int64_t c = 0; c < w->columns; c += CHUNK) {
            const int64_t n = w->columns - c < CHUNK ? w->columns - c : CHUNK;
            for (int64_t r = 0; r < count; r++) {
                decode(w, row + r, c, c + n, FLOAT32, weights + r * CHUNK);
                for (int64_t i = n; i % WIDE; i++) weights[r * CHUNK + i] = 0;
            }
            all_products(weights, x + c, w->columns, n, tokens, sums);
        }
        for (int64_t r = 0; r < count; r++)
            for (int t = 0; t < tokens; t++)
                write(y, t * rows + row + r, type, total(sums[t / TOKENS][r][t % TOKENS]));
    }
}

#endif
