/* Products with many tokens:   y = x Wᵀ   or   y = g W,   the weight decoded to float32 a block at a time.
 *
 * The scheme is Goto's (doi:10.1145/1356052.1356053), with the weight as the operand whose elements are broadcast, so that
 * decoded rows need no further order: y comes in blocks of WIDTH outputs; for each, DEPTH summands at a time, the weights
 * are decoded into the second-level cache, and every panel of PANEL tokens is multiplied with them, HIGH outputs at a time,
 * whose sums stay in registers. The activations are brought to panels once a call: [panel, summand, PANEL] float32. Each
 * weight is decoded once, whatever the number of tokens, and rounded to no narrower type.
 *
 * Sums run in a fixed order, whatever the number of threads.
 */
#ifndef LLMTOOLS_GROUPED_TILES_H
#define LLMTOOLS_GROUPED_TILES_H

#include "multiply.h"

#if defined(__AVX512F__)
enum { HIGH = 12 }; /* times two registers of sums; 96 is a multiple of each */
#define broadcast(value) _mm512_set1_ps(value)
#elif defined(__AVX2__) && defined(__FMA__)
enum { HIGH = 6 };
#define broadcast(value) _mm256_set1_ps(value)
#else
enum { HIGH = 8 };
#define broadcast(value) ((value) - (Lanes){0})
#endif

enum { PANEL = 2 * WIDE, WIDTH = 192, DEPTH = 256, STEP = 32, EARLY = 8 };

static ALWAYS_INLINE Lanes read_lanes(const float *from) {
    Lanes lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

/* sums [HIGH, PANEL], rows `stride` apart, += Σ_k w[r, k] · x[k, t]; x [n, PANEL]. */
static ALWAYS_INLINE void add_tile(const float *w, int64_t across, int64_t down, const float *x, int64_t n, float *sums,
                                   int64_t stride) {
    Lanes left[HIGH], right[HIGH]; /* in registers; from 0, so that rounding errors grow with DEPTH, not with all summands */
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; r++) left[r] = right[r] = (Lanes){0};
    for (int64_t k = 0; k < n; k++, x += PANEL, w += down) {
        const Lanes a = read_lanes(x), b = read_lanes(x + WIDE);
#pragma GCC unroll 12
        for (int r = 0; r < HIGH; r++) {
            const Lanes weight = broadcast(w[r * across]);
            left[r] = add_product(left[r], weight, a);
            right[r] = add_product(right[r], weight, b);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; r++) {
        left[r] += read_lanes(sums + r * stride);
        right[r] += read_lanes(sums + r * stride + WIDE);
        memcpy(sums + r * stride, &left[r], sizeof left[r]);
        memcpy(sums + r * stride + WIDE, &right[r], sizeof right[r]);
    }
}

/* x [tokens, n] of `type` to panel[n, PANEL] float32; tokens that there are not are 0. */
static void fill_panel(const void *x, int64_t tokens, int64_t n, int type, float *restrict panel) {
    for (int64_t k = 0; k < n; k += STEP) {
        const int64_t some = n - k < STEP ? n - k : STEP;
        for (int64_t t = 0; t < PANEL; t++) {
            float values[STEP] = {0};
            if (t < tokens && type == FLOAT32) memcpy(values, (const float *)x + t * n + k, (size_t)some * sizeof *values);
            else if (t < tokens) widen((const uint16_t *)x + t * n + k, some, type, values);
            for (int64_t i = 0; i < some; i++) panel[(k + i) * PANEL + t] = values[i];
        }
    }
}

/* sums [WIDTH, stride] of outputs from `first` on to y [tokens, all] of `type`. */
static void write_outputs(const float *restrict sums, int64_t stride, int64_t tokens, int64_t first, int64_t all, int type,
                          void *y) {
    const int64_t count = all - first < WIDTH ? all - first : WIDTH;
    for (int64_t t = 0; t < tokens; t++) {
        float values[WIDTH];
        for (int64_t r = 0; r < count; r++) values[r] = sums[r * stride + t];
        write_values(values, count, type, y, t * all + first);
    }
}

/* Outputs [first, first + WIDTH) of all tokens; x as panels; block: room for WIDTH · DEPTH, sums: for WIDTH · stride. */
static void multiply_block(const Weight *w, int64_t rows, int by_weight, int64_t first, const float *x, int64_t stride,
                           float *block, float *sums) {
    const int64_t outputs = by_weight ? w->columns : rows, summands = by_weight ? rows : w->columns;
    const int64_t count = outputs - first < WIDTH ? outputs - first : WIDTH;
    memset(sums, 0, (size_t)(WIDTH * stride) * sizeof *sums);
    memset(block, 0, (size_t)(WIDTH * DEPTH) * sizeof *block);
    for (int64_t k = 0; k < summands; k += DEPTH) {
        const int64_t n = summands - k < DEPTH ? summands - k : DEPTH;
        if (by_weight)
            for (int64_t i = 0; i < n; i++) {
                float row[WIDTH] = {0};
                for (int64_t line = 0; line < WIDTH / 8 * w->bits; line += 64) /* of a row to come; the addresses may end */
                    __builtin_prefetch(w->codes + (k + i + EARLY) * w->code_stride + first / 8 * w->bits + line);
                decode(w, k + i, first, first + count, FLOAT32, row);
                for (int64_t r = 0; r < WIDTH; r += HIGH)
                    memcpy(block + r * DEPTH + i * HIGH, row + r, HIGH * sizeof *row);
            }
        else
            for (int64_t r = 0; r < count; r++) decode(w, first + r, k, k + n, FLOAT32, block + r * DEPTH);
        for (int64_t t = 0; t < stride; t += PANEL) {
            const float *panel = x + t * summands + k * PANEL;
            for (int64_t r = 0; r < count; r += HIGH) {
                if (by_weight) add_tile(block + r * DEPTH, 1, HIGH, panel, n, sums + r * stride + t, stride);
                else add_tile(block + r * DEPTH, DEPTH, 1, panel, n, sums + r * stride + t, stride);
            }
        }
    }
}

/* Room for so many floats, from the start of a cache line on; NULL where memory ran out. */
static float *lines(size_t floats) { return aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64); }

/* As `multiply_any` of native.c. Returns 0 where memory ran out. */
static int multiply_tiles(const Weight *w, int64_t rows, const void *x, int64_t tokens, int type, void *y, int threads,
                          int by_weight) {
    const int64_t outputs = by_weight ? w->columns : rows, summands = by_weight ? rows : w->columns;
    const int64_t panels = (tokens + PANEL - 1) / PANEL, stride = panels * PANEL, size = type == FLOAT32 ? 4 : 2;
    const size_t own = (size_t)(WIDTH * DEPTH + WIDTH * stride);
    float *inputs = lines((size_t)(stride * summands)), *scratch = lines((size_t)threads * own);
    const int can = inputs && scratch;
    if (can) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t p = 0; p < panels; p++)
            fill_panel((const char *)x + p * PANEL * summands * size, tokens - p * PANEL, summands, type,
                       inputs + p * PANEL * summands);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t part = 0; part < threads; part++) {
            float *block = scratch + (size_t)part * own, *sums = block + WIDTH * DEPTH;
            const int64_t blocks = (outputs + WIDTH - 1) / WIDTH;
            for (int64_t b = blocks * part / threads; b < blocks * (part + 1) / threads; b++) {
                multiply_block(w, rows, by_weight, b * WIDTH, inputs, stride, block, sums);
                write_outputs(sums, stride, tokens, b * WIDTH, outputs, type, y);
            }
        }
    }
    free(inputs);
    free(scratch);
    return can;
}

#endif
