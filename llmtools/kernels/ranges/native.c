/* The range of a uniform grid in which a group of weights is stored with the least error, among shares of one range:
 *
 *     argmin_k Σ_j cost(|ŵ_j − w_j|),   ŵ = s_k · (q − z_k),   q = round(clamp(w / s_k + z_k, 0, top))
 *
 * with cost(e) = importance_j · e², or e^2.4 where no importance is given; scale s_k and zero point z_k are those of
 * [low · share_k, high · share_k], rounded as they are stored. Of equal ones the first is taken.
 *
 * LANES ranges at a time are in registers, and the group's weights pass by. Costs only grow on the way, so ranges are
 * given up once each of them has cost as much as the best before. e^2.4 = (e · e^(−1/5))³, and e^(−1/5) comes from the
 * bits of e and two steps of a third-order iteration: no logarithm, no division. Every sum has a fixed order.
 */
#include <math.h>

#include "../native.h"

enum { SOME = 4 }; /* weights at a time, whose chains of operations overlap */

static ALWAYS_INLINE float within(float x, float least, float most) {
    const float low = x > least ? x : least;
    return low < most ? low : most;
}

/* e^2.4 for e ≥ 0, to about 1e-6 of it. */
static ALWAYS_INLINE float power(float e) {
    const float fifth = 0.2f * (float)(int32_t)bits_of(e); /* the bits of a float are its logarithm, about */
    float w = float_of((uint32_t)(1277920000 - (int32_t)fifth));
    for (int i = 0; i < 2; i++) {
        const float w2 = w * w, h = 1.0f - e * w2 * w2 * w;
        w += w * h * (0.2f + 0.12f * h);
    }
    const float root = e * w;
    return root * root * root;
}

static ALWAYS_INLINE void add_costs(const float *w, const float *importance, int count, const float *restrict scale,
                                    const float *restrict inverse, const float *restrict zero, float top,
                                    float *restrict sum) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < count; j++) {
            const float code = rintf(within(w[j] * inverse[i] + zero[i], 0, top));
            const float error = fabsf(scale[i] * (code - zero[i]) - w[j]);
            sum[i] += importance ? error * error * importance[j] : power(error);
        }
}

typedef struct {
    int type; /* of scales, and of zero points if these are no whole numbers */
    int symmetric, whole_zeros;
    float top, least, most; /* the largest code; the scales that the type holds */
} Kind;                     /* `_Kind` of __init__.py */

static ALWAYS_INLINE void store(float *restrict x, int type) {
    if (type == FLOAT16)
        for (int i = 0; i < LANES; i++) x[i] = from_float16(to_float16(x[i]));
    else if (type == BFLOAT16)
        for (int i = 0; i < LANES; i++) x[i] = from_bfloat16(to_bfloat16(x[i]));
}

/* As `Affine._params`, in the same operations. */
static ALWAYS_INLINE void parameters(float low, float high, const float *restrict share, Kind kind,
                                     float *restrict scale, float *restrict zero) {
    for (int i = 0; i < LANES; i++) {
        const float size = high * share[i] - low * share[i];
        scale[i] = within((size > 0 ? size : 2.0f) / kind.top, kind.least, kind.most);
    }
    store(scale, kind.type);
    for (int i = 0; i < LANES; i++) zero[i] = -(low * share[i]) / scale[i];
    if (!kind.whole_zeros) store(zero, kind.type);
    else
        for (int i = 0; i < LANES; i++) zero[i] = within(rintf(zero[i]), 0, kind.top);
    if (kind.symmetric)
        for (int i = 0; i < LANES; i++) zero[i] = (kind.top + 1) / 2;
}

static ALWAYS_INLINE int64_t best_of(const float *w, const float *importance, int64_t columns, float low, float high,
                                     const float *shares, int64_t count, Kind kind) {
    float least = INFINITY;
    int64_t best = 0;
    for (int64_t k = 0; k < count; k += LANES) {
        float scale[LANES], zero[LANES], inverse[LANES], sum[LANES] = {0}, lowest = 0;
        parameters(low, high, shares + k, kind, scale, zero);
        for (int i = 0; i < LANES; i++) inverse[i] = 1.0f / scale[i];
        int64_t j = 0;
        for (; j + SOME <= columns && (lowest < least || !j); j += SOME) {
            add_costs(w + j, importance ? importance + j : NULL, SOME, scale, inverse, zero, kind.top, sum);
            if (j % (4 * SOME) == 0) {
                lowest = sum[0];
                for (int i = 1; i < LANES; i++) lowest = sum[i] < lowest ? sum[i] : lowest;
            }
        }
        if (lowest >= least) continue;
        for (; j < columns; j++)
            add_costs(w + j, importance ? importance + j : NULL, 1, scale, inverse, zero, kind.top, sum);
        for (int i = 0; i < LANES; i++)
            if (sum[i] < least) {
                least = sum[i];
                best = k + i;
            }
    }
    return best;
}

/* w [groups, columns]; importance [columns] or NULL; low and high [groups]; shares [count], a multiple of LANES
 * -> best [groups]. */
void best_shares(const float *w, const float *importance, int64_t groups, int64_t columns, const float *low,
                 const float *high, const float *shares, int64_t count, const Kind *kind, int64_t *best, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < groups; n++) {
        const float *group = w + n * columns;
        best[n] = importance ? best_of(group, importance, columns, low[n], high[n], shares, count, *kind)
                             : best_of(group, NULL, columns, low[n], high[n], shares, count, *kind);
    }
}
