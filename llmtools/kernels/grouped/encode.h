/* Codes of values on the grid of their groups, packed: the inverse of decode.h, for weights whose scales are kept. */
#ifndef LLMTOOLS_GROUPED_ENCODE_H
#define LLMTOOLS_GROUPED_ENCODE_H

#include <math.h>
#include <stdlib.h>

#include "../native.h"

/* One group on a uniform grid: round(v / scale) + zero, or round(v / scale + zero) where zeros are no whole numbers. */
static ALWAYS_INLINE void uniform_codes(const float *restrict values, int64_t n, float scale, float zero, float top,
                                        int shifted, uint8_t *restrict codes) {
    const float before = shifted ? zero : 0, after = shifted ? 0 : zero;
    for (int64_t i = 0; i < n; i++) {
        float code = rintf(values[i] / scale + before) + after;
        code = code > 0 ? code : 0; /* NaN as well */
        code = code < top ? code : top;
        codes[i] = (uint8_t)(int32_t)code;
    }
}

/* One group of a codebook: the number of midpoints below the value, of `count`. */
static ALWAYS_INLINE void codebook_codes(const float *restrict values, int64_t n, float inverse,
                                         const float *restrict midpoints, int count, uint8_t *restrict codes) {
    for (int64_t i = 0; i < n; i++) {
        const float value = values[i] * inverse;
        int32_t code = 0;
        for (int k = 0; k < count; k++) code += value > midpoints[k];
        codes[i] = (uint8_t)code;
    }
}

/* Codes to a stream of so many bytes; there are codes, perhaps zeros, for all of them and eight more. */
static ALWAYS_INLINE void pack_codes(const uint8_t *restrict codes, int bits, uint8_t *restrict out, int64_t bytes) {
    if (bits == 8) {
        memcpy(out, codes, (size_t)bytes);
    } else if (bits == 4) {
        for (int64_t i = 0; i < bytes; i++) out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
    } else if (bits == 2) {
        for (int64_t i = 0; i < bytes; i++)
            out[i] = (uint8_t)(codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6);
    } else {
        for (int64_t i = 0; 3 * i < bytes; i++) {
            uint32_t eight = 0;
            for (int k = 0; k < 8; k++) eight |= (uint32_t)codes[8 * i + k] << 3 * k;
            for (int k = 0; k < 3 && 3 * i + k < bytes; k++) out[3 * i + k] = (uint8_t)(eight >> 8 * k);
        }
    }
}

/* values float32 [rows, columns] -> out [rows, words] 32-bit words, of 2, 3, 4 or 8 bits. scales, zeros float32 [rows,
 * groups] of `group` columns; midpoints: those of a codebook's 2^bits levels, or NULL. Returns 0 where memory ran out. */
int encode(const float *restrict values, int64_t rows, int64_t columns, const float *restrict scales,
           const float *restrict zeros, int64_t group, const float *restrict midpoints, int bits, int shifted,
           uint8_t *restrict out, int64_t words, int threads) {
    const int64_t groups = (columns + group - 1) / group, bytes = 4 * words;
    const float top = (float)((1 << bits) - 1);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        uint8_t *codes = calloc((size_t)(bytes * 8 / bits + 16), 1);
        if (!codes) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            if (!codes) continue;
            for (int64_t g = 0; g < groups; g++) {
                const int64_t first = g * group, n = columns - first < group ? columns - first : group;
                const float *own = values + row * columns + first;
                const float scale = scales[row * groups + g];
                if (midpoints && bits == 4) /* a constant count is unrolled */
                    codebook_codes(own, n, scale == 0 ? 0 : 1 / scale, midpoints, 15, codes + first);
                else if (midpoints)
                    codebook_codes(own, n, scale == 0 ? 0 : 1 / scale, midpoints, (1 << bits) - 1, codes + first);
                else
                    uniform_codes(own, n, scale, zeros[row * groups + g], top, shifted, codes + first);
            }
            pack_codes(codes, bits, out + bytes * row, bytes);
        }
        free(codes);
    }
    return !failed;
}
#endif
