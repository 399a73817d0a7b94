/* total += xᵀ x in the upper triangle, for x [t, n] bfloat16 and total [n, n] float32.
 *
 * The instruction multiplies pairs: of two tokens, in one 32-bit word per feature, and adds both products to a float. So
 * x is first rearranged, TOKENS tokens at a time, into panels of WIDE features: panel[pair][feature]. A tile of the
 * result, ROWS × WIDE, stays in registers while all pairs of two panels pass by. A tile belongs to one thread and sums in
 * a fixed order: the result does not depend on the number of threads.
 */
#include "../native.h"

#include <stdlib.h>

enum { ROWS = 8, VECTORS = 3, WIDE = VECTORS * LANES, TOKENS = 256, PAIRS = TOKENS / 2 };

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

int gram_is_there(void) { return 1; }

static void arrange(const uint16_t *restrict x, int64_t tokens, int64_t n, int64_t first, uint32_t *restrict panel) {
    const int64_t wide = n - first < WIDE ? n - first : WIDE;
    for (int64_t p = 0; p < (tokens + 1) / 2; p++) {
        const uint16_t *a = x + 2 * p * n + first, *b = a + n;
        uint32_t *to = panel + p * WIDE;
        const int both = 2 * p + 1 < tokens;
        for (int64_t j = 0; j < wide; j++) to[j] = a[j] | (both ? (uint32_t)b[j] << 16 : 0);
        for (int64_t j = wide; j < WIDE; j++) to[j] = 0;
    }
}

/* total [ROWS, WIDE] at a distance of n += the products of the features from `row` on in one panel with all of another;
 * rows, columns: how many of them there are. */
static void tile(const uint32_t *restrict rows_of, int row, const uint32_t *restrict columns_of, int64_t pairs,
                 float *restrict total, int64_t n, int64_t rows, int64_t columns) {
    __m512 sums[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECTORS; v++) sums[i][v] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh along[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            along[v] = (__m512bh)_mm512_loadu_si512(columns_of + p * WIDE + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const __m512bh one = (__m512bh)_mm512_set1_epi32((int)rows_of[p * WIDE + row + i]);
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], one, along[v]);
        }
    }
    for (int64_t i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS && v * LANES < columns; v++) {
            const int64_t left = columns - v * LANES;
            const __mmask16 mask = (__mmask16)(left < LANES ? (1u << left) - 1 : 0xffff);
            float *to = total + i * n + v * LANES;
            _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sums[i][v]));
        }
}

/* Returns 0, with nothing added, where memory lacks. */
int add_gram(float *total, const uint16_t *x, int64_t tokens, int64_t n, int threads) {
    const int64_t panels = (n + WIDE - 1) / WIDE;
    uint32_t *arranged = malloc((size_t)panels * PAIRS * WIDE * sizeof(uint32_t));
    if (!arranged) return 0;
    for (int64_t start = 0; start < tokens; start += TOKENS) {
        const int64_t count = tokens - start < TOKENS ? tokens - start : TOKENS, pairs = (count + 1) / 2;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t k = 0; k < panels; k++)
                arrange(x + start * n, count, n, k * WIDE, arranged + k * PAIRS * WIDE);
#pragma omp for schedule(dynamic)
            for (int64_t k = panels - 1; k >= 0; k--) { /* a column of tiles, the longest first */
                const uint32_t *columns_of = arranged + k * PAIRS * WIDE;
                for (int64_t row = 0; row < (k + 1) * WIDE && row < n; row += ROWS)
                    tile(arranged + row / WIDE * PAIRS * WIDE, (int)(row % WIDE), columns_of, pairs,
                         total + row * n + k * WIDE, n, n - row < ROWS ? n - row : ROWS,
                         n - k * WIDE < WIDE ? n - k * WIDE : WIDE);
            }
        }
    }
    free(arranged);
    return 1;
}

#else

int gram_is_there(void) { return 0; }

int add_gram(float *total, const uint16_t *x, int64_t tokens, int64_t n, int threads) {
    (void)total, (void)x, (void)tokens, (void)n, (void)threads;
    return 0;
}

#endif
