/* Columns rounded one after the other to a uniform grid, each after the errors of those before it, row by row:
 *
 *     x_j = target_j + Σ_{i<j} e_i M_ij,   ŵ_j = s · (q_j − z),   q_j = clamp(round(x_j / s) + z, 0, top),   e_j = w_j − ŵ_j
 *
 * LANES rows are done together, each in its own lane: their targets lie in the first-level cache by columns, and what a
 * column's error does to those after it is one product and one sum a lane. Rows do not depend on one another, and every
 * sum has a fixed order.
 */
#include <math.h>

#include "../native.h"

enum { COLUMNS = 128 }; /* the most: `_CHUNK` of rounding.py */

static ALWAYS_INLINE float within(float x, float least, float most) {
    const float low = x > least ? x : least;
    return low < most ? low : most;
}

static void sweep(const float *restrict target, int64_t rows, int64_t columns, float *restrict error, int64_t distance,
                  const float *restrict update, int64_t update_distance, const float *restrict scale,
                  const float *restrict zero, float top, int whole_zeros, float *restrict codes) {
    float x[COLUMNS][LANES], s[LANES], z[LANES], e[LANES], q[LANES];
    for (int l = 0; l < LANES; l++) { /* lanes beyond the rows repeat the last one */
        const int64_t row = l < rows ? l : rows - 1;
        s[l] = scale[row];
        z[l] = zero[row];
        for (int64_t j = 0; j < columns; j++) x[j][l] = target[row * columns + j];
    }
    for (int64_t j = 0; j < columns; j++) {
        float w[LANES];
        for (int l = 0; l < LANES; l++) w[l] = error[(l < rows ? l : rows - 1) * distance + j];
        for (int l = 0; l < LANES; l++) {
            const float code = whole_zeros ? rintf(x[j][l] / s[l]) + z[l] : rintf(x[j][l] / s[l] + z[l]);
            q[l] = within(code, 0, top);
            e[l] = w[l] - s[l] * (q[l] - z[l]);
        }
        for (int l = 0; l < rows; l++) {
            error[l * distance + j] = e[l];
            codes[l * columns + j] = q[l];
        }
        const float *restrict m = update + j * update_distance;
        for (int64_t k = j + 1; k < columns; k++)
            for (int l = 0; l < LANES; l++) x[k][l] += e[l] * m[k];
    }
}

/* target, codes [rows, columns] and scale, zero [rows], contiguous; error [rows, columns], which is W and becomes W − Ŵ,
 * and update [columns, columns] with so many floats from row to row. columns ≤ COLUMNS. */
void sweep_columns(const float *target, int64_t rows, int64_t columns, float *error, int64_t distance, const float *update,
                   int64_t update_distance, const float *scale, const float *zero, float top, int whole_zeros, float *codes,
                   int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row += LANES)
        sweep(target + row * columns, rows - row < LANES ? rows - row : LANES, columns, error + row * distance, distance,
              update, update_distance, scale + row, zero + row, top, whole_zeros, codes + row * columns);
}
