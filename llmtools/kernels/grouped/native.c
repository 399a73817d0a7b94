/* The functions that __init__.py calls. */
#include "encode.h"
#include "tiles.h"

/* out [rows, columns] of `type`, contiguous. Returns 1. */
int dequantize(const Weight *given, int64_t rows, int type, void *out, int threads) {
    Weight w = *given;
    prepare(&w);
    decode_rows(&w, rows, type, out, threads);
    return 1;
}

/* By the weight's transpose, x [tokens, columns] to y [tokens, rows], or by the weight, x [tokens, rows] to
 * y [tokens, columns]; of `type`, contiguous; any number of tokens: from about 16 on tiles were faster with AVX2, byte
 * products are at an end at twice as many. Returns 0 where memory ran out. */
static int multiply_any(const Weight *given, int64_t rows, const void *x, int64_t tokens, int type, void *y, int threads,
                        int by_weight) {
    Weight w = *given;
    prepare(&w);
    if (tokens > (!by_weight && goes_by_integers(&w, type) ? 32 : 16))
        return multiply_tiles(&w, rows, x, tokens, type, y, threads, by_weight);
    const int64_t in = by_weight ? rows : w.columns, out = by_weight ? w.columns : rows, size = type == FLOAT32 ? 4 : 2;
    const int64_t some = tokens < MOST_TOKENS ? tokens : MOST_TOKENS;
    float *floats = type == FLOAT32 ? NULL : malloc((size_t)(some * in) * sizeof *floats);
    if (type != FLOAT32 && !floats) return 0;
    for (int64_t t = 0; t < tokens; t += MOST_TOKENS) {
        const int count = (int)(tokens - t < MOST_TOKENS ? tokens - t : MOST_TOKENS);
        const void *from = (const char *)x + t * in * size;
        void *to = (char *)y + t * out * size;
        if (type != FLOAT32) widen(from, count * in, type, floats);
        if (by_weight) multiply_columns(&w, rows, floats ? floats : from, count, type, to, threads);
        else multiply_rows(&w, rows, floats ? floats : from, count, type, to, threads);
    }
    free(floats);
    return 1;
}

int multiply(const Weight *w, int64_t rows, const void *x, int64_t tokens, int type, void *y, int threads) {
    return multiply_any(w, rows, x, tokens, type, y, threads, 0);
}

int multiply_transposed(const Weight *w, int64_t rows, const void *g, int64_t tokens, int type, void *y, int threads) {
    return multiply_any(w, rows, g, tokens, type, y, threads, 1);
}
