/* Rotation of rows: y = after · Q (before · x), for Q = scale · (M₁ ⊗ … ⊗ S) along the diagonal, S Sylvester's matrix.
 *
 * A row is converted to float32, padded, transformed and rounded once, all in cache. S of order 2^t is a product of t
 * stages, each a sum and a difference at a stride of 1, 2, 4 …; stages commute. The first four mix sixteen neighbours, by
 * shuffles. The others run along contiguous floats, two at a time, so that a row passes through the first-level cache half
 * as often, and so do the products with the small matrices M. Additions happen in a fixed order: a row's result depends
 * neither on the number of threads nor on other rows.
 */
#include <stdint.h>

#include "../native.h"

#if defined(__FMA__) || defined(__aarch64__)
#define add_product(sum, a, b) __builtin_fmaf(a, b, sum) /* a is 1 or −1, the product exact */
#else
#define add_product(sum, a, b) ((sum) + (a) * (b))
#endif

enum { TOGETHER = 4 };

static void four_neighbours(float *restrict x, int64_t n) {
    for (int64_t i = 0; i < n; i += 4) {
        const float a = x[i] + x[i + 1], b = x[i] - x[i + 1];
        const float c = x[i + 2] + x[i + 3], d = x[i + 2] - x[i + 3];
        x[i] = a + c;
        x[i + 1] = b + d;
        x[i + 2] = a - c;
        x[i + 3] = b - d;
    }
}

static inline void two_stages(float *restrict p, float *restrict q, float *restrict r, float *restrict s, int64_t stride) {
    for (int64_t j = 0; j < stride; j++) {
        const float a = p[j] + q[j], b = p[j] - q[j];
        const float c = r[j] + s[j], d = r[j] - s[j];
        p[j] = a + c;
        q[j] = b + d;
        r[j] = a - c;
        s[j] = b - d;
    }
}

/* The stages of strides 1, 2, 4 and 8. A sum or a difference is ±1 times one number, which is exact, and the other. */
static void neighbours(float *restrict x, int64_t n) {
#if defined(__AVX512F__)
    const __m512 one = _mm512_set4_ps(-1, 1, -1, 1), two = _mm512_set4_ps(-1, -1, 1, 1), plus = _mm512_set1_ps(1);
    const __m512 four = _mm512_mask_sub_ps(plus, 0xf0f0, _mm512_setzero_ps(), plus);
    const __m512 eight = _mm512_mask_sub_ps(plus, 0xff00, _mm512_setzero_ps(), plus);
    for (int64_t i = 0; i < n; i += LANES) {
        __m512 v = _mm512_loadu_ps(x + i);
        v = _mm512_fmadd_ps(v, one, _mm512_permute_ps(v, 0xb1));
        v = _mm512_fmadd_ps(v, two, _mm512_permute_ps(v, 0x4e));
        v = _mm512_fmadd_ps(v, four, _mm512_shuffle_f32x4(v, v, 0xb1));
        _mm512_storeu_ps(x + i, _mm512_fmadd_ps(v, eight, _mm512_shuffle_f32x4(v, v, 0x4e)));
    }
#elif defined(__AVX2__) && defined(__FMA__)
    const __m256 one = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), two = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const __m256 four = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    for (int64_t i = 0; i < n; i += LANES) {
        __m256 v[2];
        for (int h = 0; h < 2; h++) {
            v[h] = _mm256_loadu_ps(x + i + 8 * h);
            v[h] = _mm256_fmadd_ps(v[h], one, _mm256_permute_ps(v[h], 0xb1));
            v[h] = _mm256_fmadd_ps(v[h], two, _mm256_permute_ps(v[h], 0x4e));
            v[h] = _mm256_fmadd_ps(v[h], four, _mm256_permute2f128_ps(v[h], v[h], 0x01));
        }
        _mm256_storeu_ps(x + i, _mm256_add_ps(v[0], v[1]));
        _mm256_storeu_ps(x + i + 8, _mm256_sub_ps(v[0], v[1]));
    }
#else
    four_neighbours(x, n);
    for (int64_t i = 0; i < n; i += LANES) /* a constant stride: no inner loop */
        two_stages(x + i, x + i + 4, x + i + 8, x + i + 12, 4);
#endif
}

static void last_stage(float *restrict p, float *restrict q, int64_t stride) {
    for (int64_t j = 0; j < stride; j++) {
        const float a = p[j], b = q[j];
        p[j] = a + b;
        q[j] = a - b;
    }
}

/* x ← S x for each run of n = 2^t of the `size` floats. */
static void walsh(float *restrict x, int64_t size, int64_t n) {
    int64_t stride = 1;
    if (n >= LANES) {
        neighbours(x, size);
        stride = LANES;
    } else if (n >= 4) {
        four_neighbours(x, size);
        stride = 4;
    }
    for (; 4 * stride <= n; stride *= 4)
        for (int64_t i = 0; i < size; i += 4 * stride)
            two_stages(x + i, x + i + stride, x + i + 2 * stride, x + i + 3 * stride, stride);
    if (2 * stride == n)
        for (int64_t i = 0; i < size; i += n) last_stage(x + i, x + i + stride, stride);
}

/* y [order, trailing] = M x, for `turned` = Mᵀ; TOGETHER rows of y at a time, a run of LANES in registers. */
static void mix(const float *restrict x, float *restrict y, const float *restrict turned, int64_t order, int64_t trailing) {
    for (int64_t j = 0; j < trailing; j += LANES)
        for (int64_t k = 0; k < order; k += TOGETHER) {
            float sum[TOGETHER][LANES] = {{0}};
            for (int64_t i = 0; i < order; i++)
                for (int r = 0; r < TOGETHER; r++)
                    for (int l = 0; l < LANES; l++)
                        sum[r][l] = add_product(sum[r][l], turned[i * order + k + r], x[i * trailing + j + l]);
            for (int r = 0; r < TOGETHER; r++) memcpy(y + (k + r) * trailing + j, sum[r], sizeof sum[r]);
        }
}

static void multiply(float *restrict x, const float *restrict by, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] *= by[i];
}

static void read_values(const void *restrict x, int type, int64_t at, int64_t count, float *restrict values) {
    if (type == FLOAT32)
        memcpy(values, (const float *)x + at, (size_t)count * sizeof(float));
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) values[i] = from_bfloat16(((const uint16_t *)x)[at + i]);
    else {
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) halves_to_floats((const uint16_t *)x + at + i, values + i);
        for (; i < count; i++) values[i] = from_float16(((const uint16_t *)x)[at + i]);
    }
}

/* x [rows, given] of `type` -> y [rows, length] of `type`: given, length ≤ size, in blocks that are transformed apart.
 * before [given] and after [length]: of types of their own, or NULL. turned: the matrices M, the leading one first, each
 * transposed, float32 [order, order], one after the other; their `orders` are multiples of TOGETHER, and `run`, that of S,
 * is one of LANES where there are any. scratch: float32 [given + length + 2 · threads · size]. */
void hadamard_rotate(const void *restrict x, int64_t rows, int64_t given, int64_t length, int type,
                     const void *restrict before, int before_type, const void *restrict after, int after_type,
                     const float *restrict turned, const int64_t *restrict orders, int64_t factors, int64_t run,
                     int64_t block, int64_t size, float scale, float *restrict scratch, void *restrict y, int threads) {
    float *left = scratch, *right = left + given, *values = right + length;
    if (before) read_values(before, before_type, 0, given, left);
    if (after) read_values(after, after_type, 0, length, right);
    for (int64_t i = 0; i < length; i++) right[i] = after ? scale * right[i] : scale;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t thread = 0; thread < threads; thread++)
        for (int64_t row = rows * thread / threads; row < rows * (thread + 1) / threads; row++) {
            float *now = values + 2 * size * thread, *next = now + size;
            read_values(x, type, row * given, given, now);
            if (before) multiply(now, left, given);
            memset(now + given, 0, (size_t)(size - given) * sizeof(float));
            walsh(now, size, run);
            const float *matrix = turned;
            int64_t part = block;
            for (int64_t f = 0; f < factors; f++) {
                for (int64_t i = 0; i < size; i += part) mix(now + i, next + i, matrix, orders[f], part / orders[f]);
                matrix += orders[f] * orders[f];
                part /= orders[f];
                float *swap = now;
                now = next;
                next = swap;
            }
            multiply(now, right, length);
            write_values(now, length, type, y, row * length);
        }
}
