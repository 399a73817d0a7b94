/* The Walsh–Hadamard transform of rows, in place: x ← scale · H x for the Sylvester matrix H of order n = 2^t.
 *
 * H is a product of t stages, each a sum and a difference at a stride of 1, 2, 4 … n/2; stages commute. Two stages are
 * done at a time, so that a row passes through the first-level cache t/2 times. The stages of stride 1 and 2 work on
 * four neighbours, which the compiler turns into shuffles; all others run along contiguous floats. Additions happen in a
 * fixed order: the result does not depend on the number of threads.
 */
#include <stdint.h>

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

static void last_stage(float *restrict p, float *restrict q, int64_t stride) {
    for (int64_t j = 0; j < stride; j++) {
        const float a = p[j], b = q[j];
        p[j] = a + b;
        q[j] = a - b;
    }
}

static void walsh(float *restrict x, int64_t n, float scale) {
    int64_t stride = 1;
    if (n >= 4) {
        four_neighbours(x, n);
        stride = 4;
    }
    if (n >= 16) {
        for (int64_t i = 0; i < n; i += 16) /* a constant stride: no inner loop */
            two_stages(x + i, x + i + 4, x + i + 8, x + i + 12, 4);
        stride = 16;
    }
    for (; 4 * stride <= n; stride *= 4)
        for (int64_t i = 0; i < n; i += 4 * stride)
            two_stages(x + i, x + i + stride, x + i + 2 * stride, x + i + 3 * stride, stride);
    if (2 * stride == n) last_stage(x, x + stride, stride);
    for (int64_t i = 0; i < n; i++) x[i] *= scale;
}

/* x: float32 [rows, n], contiguous, changed in place. n is a power of two. */
void hadamard_walsh(float *restrict x, int64_t rows, int64_t n, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) walsh(x + row * n, n, scale);
}
