/* The functions that __init__.py calls. */
#include "multiply.h"

/* out [rows, columns] of `type`, contiguous. */
void dequantize(const Weight *given, int64_t rows, int type, void *out, int threads) {
    Weight w = *given;
    prepare(&w);
    decode_rows(&w, rows, type, out, threads);
}

/* x [tokens, columns], y [tokens, rows] of `type`; contiguous; any number of tokens. Returns 0 where memory ran out. */
int multiply(const Weight *given, int64_t rows, const void *x, int64_t tokens, int type, void *y, int threads) {
    Weight w = *given;
    prepare(&w);
    const int64_t some = tokens < MOST_TOKENS ? tokens : MOST_TOKENS, size = type == FLOAT32 ? 4 : 2;
    float *floats = type == FLOAT32 ? NULL : malloc((size_t)(some * w.columns) * sizeof *floats);
    if (type != FLOAT32 && !floats) return 0;
    for (int64_t t = 0; t < tokens; t += MOST_TOKENS) {
        const int count = (int)(tokens - t < MOST_TOKENS ? tokens - t : MOST_TOKENS);
        const void *from = (const char *)x + t * w.columns * size;
        if (type != FLOAT32) widen(from, count * w.columns, type, floats);
        multiply_rows(&w, rows, floats ? floats : from, count, type, (char *)y + t * rows * size, threads);
    }
    free(floats);
    return 1;
}
