/* Products with many tokens:   y = x Wᵀ   or   y = g W,   the weight decoded to float32 a block at a time.
 *
 * The scheme is Goto's (doi:10.1145/1356052.1356053), with the weight as the operand whose elements are broadcast, so that
 * decoded rows need no further order: y comes in blocks of WIDTH outputs or less; for each, DEPTH summands at a time, the weights
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

enum { PANEL = 2 * WIDE, WIDTH = 192, DEPTH = 128, STEP = 32, EARLY = 8, UNIT = 24 }; /* of HIGH, and of 8, where codes start bytes */

static ALWAYS_INLINE Lanes read_lanes(const float *from) {
    Lanes lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

/* sums [HIGH, PANEL] += Σ_k w[r, k] · x[k, t]; x [n, PANEL]. */
static ALWAYS_INLINE void add_tile(const float *w, int64_t across, int64_t down, const float *x, int64_t n, float *sums) {
    Lanes left[HIGH], right[HIGH]; /* in registers; from 0: the shorter a chain of sums, the less is lost by rounding */
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
        left[r] += read_lanes(sums + r * PANEL);
        right[r] += read_lanes(sums + r * PANEL + WIDE);
        memcpy(sums + r * PANEL, &left[r], sizeof left[r]);
        memcpy(sums + r * PANEL + WIDE, &right[r], sizeof right[r]);
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

/* sums [count, PANEL] of outputs from `first` on to y [tokens, all] of `type`. */
static void write_outputs(const float *restrict sums, int64_t tokens, int64_t first, int64_t count, int64_t all, int type,
                          void *y) {
    for (int64_t t = 0; t < tokens; t++) {
        float values[WIDTH];
        for (int64_t r = 0; r < count; r++) values[r] = sums[r * PANEL + t];
        write_values(values, count, type, y, t * all + first);
    }
}

/* Outputs [first, first + count) of all tokens, count ≤ WIDTH; x as panels; room for WIDTH · DEPTH in block; sums
 * [panel, WIDTH, PANEL]. */
static void multiply_block(const Weight *w, int64_t rows, int by_weight, int64_t first, int64_t count, const float *x,
                           int64_t stride, int64_t chain, float *block, float *sums) {
    const int64_t summands = by_weight ? rows : w->columns;
    memset(sums, 0, (size_t)(WIDTH * stride) * sizeof *sums);
    memset(block, 0, (size_t)(WIDTH * DEPTH) * sizeof *block);
    for (int64_t k = 0; k < summands; k += DEPTH) {
        const int64_t n = summands - k < DEPTH ? summands - k : DEPTH;
        if (by_weight)
            for (int64_t i = 0; i < n; i++) {
                float row[WIDTH] = {0};
                for (int64_t line = 0; line < WIDTH / 8 * w->bits; line += 64) /* a row to come, or beyond the last */
                    __builtin_prefetch(w->codes + (k + i + EARLY) * w->code_stride + first / 8 * w->bits + line);
                decode(w, k + i, first, first + count, FLOAT32, row);
                for (int64_t r = 0; r < WIDTH; r += HIGH)
                    memcpy(block + r * DEPTH + i * HIGH, row + r, HIGH * sizeof *row);
            }
        else
            for (int64_t r = 0; r < count; r++) decode(w, first + r, k, k + n, FLOAT32, block + r * DEPTH);
        for (int64_t t = 0; t < stride; t += PANEL) {
            const float *panel = x + t * summands + k * PANEL;
            float *own = sums + t * WIDTH;
            for (int64_t r = 0; r < count; r += HIGH)
                for (int64_t i = 0; i < n; i += chain) {
                    const int64_t some = n - i < chain ? n - i : chain;
                    const float *weights = block + r * DEPTH + i * (by_weight ? HIGH : 1), *inputs = panel + i * PANEL;
                    if (by_weight) add_tile(weights, 1, HIGH, inputs, some, own + r * PANEL);
                    else add_tile(weights, DEPTH, 1, inputs, some, own + r * PANEL);
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
    const int64_t share = (outputs + threads - 1) / threads, times = (share + WIDTH - 1) / WIDTH; /* of a thread */
    const int64_t width = ((share + times - 1) / times + UNIT - 1) / UNIT * UNIT, blocks = (outputs + width - 1) / width;
    const int64_t chain = type == FLOAT32 ? DEPTH / 2 : DEPTH; /* half precision loses more when y is rounded */
    const size_t own = (size_t)(WIDTH * (DEPTH + stride));
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
            for (int64_t b = blocks * part / threads; b < blocks * (part + 1) / threads; b++) {
                const int64_t first = b * width, count = outputs - first < width ? outputs - first : width;
                multiply_block(w, rows, by_weight, first, count, inputs, stride, chain, block, sums);
                for (int64_t t = 0; t < tokens; t += PANEL)
                    write_outputs(sums + t * WIDTH, tokens - t < PANEL ? tokens - t : PANEL, first, count, outputs, type,
                                  (char *)y + t * outputs * size);
            }
        }
    }
    free(inputs);
    free(scratch);
    return can;
}

#endif
