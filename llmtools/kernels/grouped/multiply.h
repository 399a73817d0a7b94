/* Products while decoding (GEMV), each packed weight read once:
 *     y = x Wᵀ    y[t, r] = Σ_c x[t, c] · weight[r, c]
 *     y = g W     y[t, c] = Σ_r g[t, r] · weight[r, c]        the gradient of the first
 *
 * The first by products of bytes where the processor has them (integer.h). Elsewhere four rows at a time, a chunk of
 * columns is decoded into the first-level cache and multiplied with every token, four tokens at a time, so that each load
 * of a weight or an activation serves four products. Weights are float32 there, not rounded to the type of x.
 *
 * The second goes through the columns a strip at a time, whose sums and whose weights of four rows stay in that cache.
 *
 * Sums run in a fixed order, whatever the number of threads.
 */
#ifndef LLMTOOLS_GROUPED_MULTIPLY_H
#define LLMTOOLS_GROUPED_MULTIPLY_H

#include "integer.h"

enum { ROWS = 4, TOKENS = 4, CHUNK = 2048, STRIP = 512, MOST_TOKENS = 64 }; /* four rows of a chunk are 32 KB */

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

static void widen(const uint16_t *x, int64_t n, int type, float *y) {
    if (type == BFLOAT16)
        for (int64_t i = 0; i < n; i++) y[i] = from_bfloat16(x[i]);
    else
        for (int64_t i = 0; i < n; i++) y[i] = from_float16(x[i]);
}

static void write(void *y, int64_t at, int type, float sum) {
    if (type == FLOAT32) ((float *)y)[at] = sum;
    else ((uint16_t *)y)[at] = type == FLOAT16 ? to_float16(sum) : to_bfloat16(sum);
}

/* By decoding to float32. */
static void multiply_floats(const Weight *w, int64_t rows, const float *x, int tokens, int type, void *y,
                            int threads) {
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

/* Whether it could be done: there was memory for the integers, and all of x is finite. */
static int multiply_integers(const Weight *w, int64_t rows, const float *x, int tokens, int type, void *y,
                             int threads) {
    Inputs inputs = {0};
    const int can = goes_by_integers(w, type) && read_inputs(w, x, tokens, &inputs);
    const Levels levels = quantize_levels(w);
    if (can) {
#pragma omp parallel num_threads(threads)
        {
            Scratch own = {0};
            float sums[MOST_TOKENS];
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++) {
                integer_products(w, row, &inputs, &levels, &own, sums);
                for (int t = 0; t < tokens; t++) write(y, t * rows + row, type, sums[t]);
            }
        }
    }
    free(inputs.bytes);
    return can;
}

/* x [tokens, columns], y [tokens, rows] of `type`, contiguous. */
static void multiply_rows(const Weight *w, int64_t rows, const float *x, int tokens, int type, void *y, int threads) {
    if (!multiply_integers(w, rows, x, tokens, type, y, threads)) multiply_floats(w, rows, x, tokens, type, y, threads);
}

/* sums [n] += the products of four weights, STRIP apart, with the gradients of their rows. */
static ALWAYS_INLINE void add_rows(const float *weights, const float *g, int64_t n, float *sums) {
    const Lanes none = {0}, a = none + g[0], b = none + g[1], c = none + g[2], d = none + g[3];
    for (int64_t i = 0; i < n; i += WIDE) {
        Lanes sum = load_lanes(sums + i, WIDE);
        sum = add_product(sum, a, load_lanes(weights + i, WIDE));
        sum = add_product(sum, b, load_lanes(weights + STRIP + i, WIDE));
        sum = add_product(sum, c, load_lanes(weights + 2 * STRIP + i, WIDE));
        sum = add_product(sum, d, load_lanes(weights + 3 * STRIP + i, WIDE));
        memcpy(sums + i, &sum, sizeof sum);
    }
}

/* g [tokens, rows] float32, y [tokens, columns] of `type`, contiguous. */
static void multiply_columns(const Weight *w, int64_t rows, const float *g, int tokens, int type, void *y,
                             int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t begin = 0; begin < w->columns; begin += STRIP) {
        const int64_t n = w->columns - begin < STRIP ? w->columns - begin : STRIP;
        float weights[ROWS * STRIP] = {0}, sums[MOST_TOKENS * STRIP];
        memset(sums, 0, (size_t)tokens * STRIP * sizeof sums[0]);
        for (int64_t row = 0; row < rows; row += ROWS) {
            const int64_t count = rows - row < ROWS ? rows - row : ROWS;
            for (int64_t r = 0; r < count; r++) decode(w, row + r, begin, begin + n, FLOAT32, weights + r * STRIP);
            if (count < ROWS) memset(weights + count * STRIP, 0, (size_t)(ROWS - count) * STRIP * sizeof weights[0]);
            for (int t = 0; t < tokens; t++) {
                float own[ROWS] = {0};
                memcpy(own, g + t * rows + row, (size_t)count * sizeof own[0]);
                add_rows(weights, own, n, sums + t * STRIP);
            }
        }
        for (int t = 0; t < tokens; t++)
            for (int64_t c = 0; c < n; c++) write(y, t * w->columns + begin + c, type, sums[t * STRIP + c]);
    }
}

#endif
