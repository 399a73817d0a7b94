/* The functions that __init__.py calls. */
#include "multiply.h"

/* out [rows, columns] of `type`, contiguous. */
void dequantize(const Weight *given, int64_t rows, int type, void *out, int threads) {
    Weight w = *given;
    prepare(&w);
    decode_rows(&w, rows, type, out, threads);
}

/* x [tokens, columns] float32, y [tokens, rows] of `type`; contiguous; tokens ≤ MOST_TOKENS. */
void multiply(const Weight *given, int64_t rows, const float *x, int tokens, int type, void *y, int threads) {
    Weight w = *given;
    prepare(&w);
    multiply_rows(&w, rows, x, tokens, type, y, threads);
}
