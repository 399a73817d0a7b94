/* Weights in ggml's blocks: rows decoded, and products with few tokens, each block decoded once.
 *
 * A product adds in float32, in lanes: sums of 16 columns apart, added at the end. For activations of half precision it
 * goes by products of bytes where the processor has them (integer.h).
 */
#include <stdlib.h>

#include "integer.h"

static void store(const float *restrict from, int64_t n, int type, void *restrict out) {
    uint16_t *half = out;
    if (type == BFLOAT16)
        for (int64_t i = 0; i < n; i++) half[i] = to_bfloat16(from[i]);
    else
        for (int64_t i = 0; i < n; i++) half[i] = to_float16(from[i]);
}

#if DECODES

/* A row, rounded to `type`; scratch is not used. */
static void decode_row(const Weight *w, int64_t row, int type, void *out, float *scratch) {
    const uint8_t *b = w->blocks + row * w->stride;
    (void)scratch;
#define DECODE(NUMBER, NAME, WEIGHTS, BYTES, OFFSET)                                                                   \
    case NUMBER: decode_##NAME(b, w->columns, type, out); break;
    switch (w->kind) { TYPES(DECODE) }
#undef DECODE
}

#else

/* A row, rounded to `type`; scratch [columns] is for types other than float32. */
static void decode_row(const Weight *w, int64_t row, int type, void *out, float *scratch) {
    const uint8_t *b = w->blocks + row * w->stride;
    float *values = type == FLOAT32 ? out : scratch;
#define DECODE(NUMBER, NAME, WEIGHTS, BYTES, OFFSET)                                                                   \
    case NUMBER:                                                                                                       \
        for (int64_t i = 0; i < w->columns; i += WEIGHTS, b += BYTES) NAME(b, values + i);                             \
        break;
    switch (w->kind) { TYPES(DECODE) }
#undef DECODE
    if (type != FLOAT32) store(values, w->columns, type, out);
}

#endif

static void load(const void *restrict from, int64_t n, int type, float *restrict out) {
    const uint16_t *half = from;
    if (type == FLOAT32) memcpy(out, from, (size_t)n * 4);
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < n; i++) out[i] = from_bfloat16(half[i]);
    else
        for (int64_t i = 0; i < n; i++) out[i] = from_float16(half[i]);
}

/* out [rows, columns] of `type`. Returns 0 where there is no memory. */
int dequantize(const Weight *w, int64_t rows, int type, void *out, int threads) {
    const int64_t n = w->columns;
    float *scratch = type == FLOAT32 ? NULL : malloc((size_t)(threads * n) * 4);
    if (type != FLOAT32 && !scratch) return 0;
    const int64_t size = type == FLOAT32 ? 4 : 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; part++)
        for (int64_t row = rows * part / threads; row < rows * (part + 1) / threads; row++)
            decode_row(w, row, type, (char *)out + row * n * size, scratch ? scratch + part * n : NULL);
    free(scratch);
    return 1;
}

static ALWAYS_INLINE float dot(const float *restrict a, const float *restrict b, int64_t n) {
    float sums[LANES] = {0};
    for (int64_t i = 0; i < n; i += LANES) /* n is a multiple of 32 */
        for (int k = 0; k < LANES; k++) sums[k] += a[i + k] * b[i + k];
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++) sums[k] += sums[k + half];
    return sums[0];
}

/* Whether the products could be formed by integers: there was memory, and all of x [tokens, columns] is finite. */
static int multiply_integers(const Weight *w, int64_t rows, const float *x, int64_t tokens, float *sums, int threads) {
    for (int64_t t = 0; t < tokens; t += SOME_TOKENS) {
        const int count = (int)(tokens - t < SOME_TOKENS ? tokens - t : SOME_TOKENS);
        Inputs inputs = {0};
        const int can = read_inputs(w, x + t * w->columns, count, &inputs);
        if (can) {
#pragma omp parallel for num_threads(threads) schedule(static)
            for (int64_t row = 0; row < rows; row++) {
                float own[SOME_TOKENS];
                integer_products(w, row, &inputs, own);
                for (int k = 0; k < count; k++) sums[(t + k) * rows + row] = own[k];
            }
        }
        free(inputs.bytes);
        if (!can) return 0;
    }
    return 1;
}

/* x [tokens, columns] -> y [tokens, rows], both of `type`. Returns 0 where there is no memory. */
int multiply(const Weight *w, int64_t rows, const void *x, int64_t tokens, int type, void *y, int threads) {
    const int64_t n = w->columns;
    float *inputs = malloc((size_t)((tokens + threads) * n + tokens * rows) * 4);
    if (!inputs) return 0;
    float *row_of = inputs + tokens * n, *sums = row_of + threads * n;
    load(x, tokens * n, type, inputs);
    const int done = goes_by_integers(type) && multiply_integers(w, rows, inputs, tokens, sums, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; part++)
        for (int64_t row = rows * part / threads; !done && row < rows * (part + 1) / threads; row++) {
            decode_row(w, row, FLOAT32, row_of + part * n, NULL);
            for (int64_t t = 0; t < tokens; t++) sums[t * rows + row] = dot(inputs + t * n, row_of + part * n, n);
        }
    if (type == FLOAT32) memcpy(y, sums, (size_t)(tokens * rows) * 4);
    else store(sums, tokens * rows, type, y);
    free(inputs);
    return 1;
}

/* g [tokens, rows] -> y [tokens, columns], both of `type`: one thread's rows are added before those of the next. */
int multiply_transposed(const Weight *w, int64_t rows, const void *g, int64_t tokens, int type, void *y, int threads) {
    enum { PARTS = 8 }; /* fixed, so that the sums do not depend on the number of threads */
    const int64_t n = w->columns;
    float *given = malloc((size_t)(tokens * rows + PARTS * (tokens + 1) * n) * 4);
    if (!given) return 0;
    float *row_of = given + tokens * rows, *sums = row_of + PARTS * n;
    load(g, tokens * rows, type, given);
    memset(sums, 0, (size_t)(PARTS * tokens * n) * 4);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < PARTS; part++)
        for (int64_t row = rows * part / PARTS; row < rows * (part + 1) / PARTS; row++) {
            float *restrict values = row_of + part * n;
            decode_row(w, row, FLOAT32, values, NULL);
            for (int64_t t = 0; t < tokens; t++) {
                const float factor = given[t * rows + row];
                float *restrict to = sums + (part * tokens + t) * n;
                for (int64_t i = 0; i < n; i++) to[i] += factor * values[i];
            }
        }
    for (int part = 1; part < PARTS; part++)
        for (int64_t i = 0; i < tokens * n; i++) sums[i] += sums[part * tokens * n + i];
    if (type == FLOAT32) memcpy(y, sums, (size_t)(tokens * n) * 4);
    else store(sums, tokens * n, type, y);
    free(given);
    return 1;
}
