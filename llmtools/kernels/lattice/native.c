/* Nearest vectors of the lattice codebooks, and vectors from codes. The tables come from tables.py. Every function works
 * on the vectors [begin, end), so that threads can share a matrix; results do not depend on the split. Codes equal those of
 * reference.py bit for bit: no sum is reordered, and every product is either exact or stored before it is added, so that
 * a fused multiply-add changes nothing (-ffast-math would).
 */
#include <math.h>
#include <stdint.h>

enum { LANES = 32, ROWS = 256, DIM = 8, CHUNK = 64 };

/* ---- encoding: LANES vectors at a time, one a lane, against one row after the other ---- */

typedef struct {
    float score[LANES];
    int32_t row[LANES];
    float y[DIM][LANES]; /* x − shift */
} Best;

/* For y = x − shift, the rows with the largest 2⟨A, |y|⟩ − |A|² − (4·min A_i|y_i| where one sign must be wrong).
 * twice holds 2A ∈ {1, 3, 5}: the products are made once, and the loop over rows only picks, adds and takes minima. */
static void best_rows(float x[DIM][LANES], float shift, const int8_t *restrict twice, Best *restrict best) {
    float term[DIM][3][LANES]; /* 1, 3 and 5 times |y_i| */
    int32_t negatives[LANES] = {0};
    for (int i = 0; i < DIM; i++)
        for (int l = 0; l < LANES; l++) {
            const float y = x[i][l] - shift, size = fabsf(y);
            best->y[i][l] = y;
            negatives[l] ^= y < 0;
            term[i][0][l] = size;
            term[i][1][l] = 3 * size;
            term[i][2][l] = 5 * size;
        }
    for (int l = 0; l < LANES; l++) {
        best->score[l] = -INFINITY;
        best->row[l] = 0;
    }
    for (int r = 0; r < ROWS; r++) {
        const int8_t *a = twice + DIM * r;
        const float *t0 = term[0][a[0] >> 1], *t1 = term[1][a[1] >> 1], *t2 = term[2][a[2] >> 1];
        const float *t3 = term[3][a[3] >> 1], *t4 = term[4][a[4] >> 1], *t5 = term[5][a[5] >> 1];
        const float *t6 = term[6][a[6] >> 1], *t7 = term[7][a[7] >> 1];
        int sum = 0, squares = 0;
        for (int i = 0; i < DIM; i++) {
            sum += a[i];
            squares += a[i] * a[i];
        }
        const float norm = 0.25f * (float)squares;
        const int32_t odd = sum >> 1 & 1;
        for (int l = 0; l < LANES; l++) {
            const float total = ((((((t0[l] + t1[l]) + t2[l]) + t3[l]) + t4[l]) + t5[l]) + t6[l]) + t7[l];
            float least = t0[l] < t1[l] ? t0[l] : t1[l];
            least = least < t2[l] ? least : t2[l];
            least = least < t3[l] ? least : t3[l];
            least = least < t4[l] ? least : t4[l];
            least = least < t5[l] ? least : t5[l];
            least = least < t6[l] ? least : t6[l];
            least = least < t7[l] ? least : t7[l];
            const float score = (total - norm) - (negatives[l] != odd ? 2 * least : 0);
            const int better = score > best->score[l];
            best->score[l] = better ? score : best->score[l];
            best->row[l] = better ? r : best->row[l];
        }
    }
}

/* The sixteen bits for one lane: its row, and signs that suit the row's parity. */
static int32_t code_of(const Best *best, int lane, int odd_shift, const int8_t *restrict twice) {
    static const int sign_bit[DIM] = {0, 4, 1, 5, 2, 6, 3, 7};
    const int8_t *a = twice + DIM * best->row[lane];
    int sum = 0, negatives = 0, wrong = 0, signs = 0;
    float least = INFINITY;
    for (int i = 0; i < DIM; i++) {
        const float y = best->y[i][lane], term = (float)a[i] * fabsf(y);
        sum += a[i];
        if (y < 0) {
            negatives ^= 1;
            signs ^= 1 << sign_bit[i];
        }
        if (term < least) {
            least = term;
            wrong = i;
        }
    }
    const int odd = sum >> 1 & 1;
    if (negatives != odd) signs ^= 1 << sign_bit[wrong];
    if (odd) signs ^= 1 << sign_bit[7];
    return best->row[lane] << 8 | (signs ^ odd_shift);
}

/* Copies up to LANES vectors to one a lane; missing ones are zero. */
static void load(const float *restrict vectors, int64_t count, float x[DIM][LANES]) {
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < DIM; i++) x[i][l] = l < count ? vectors[DIM * l + i] : 0;
}

/* vectors float32 [end, 8] -> codes int16 [end]; twice int8 [256, 8] is e8p_magnitudes(). */
void lattice_encode_e8p(const float *restrict vectors, int64_t begin, int64_t end, const int8_t *restrict twice,
                        int16_t *restrict codes) {
    float x[DIM][LANES];
    Best plus, minus;
    for (int64_t v = begin; v < end; v += LANES) {
        const int64_t count = end - v < LANES ? end - v : LANES;
        load(vectors + DIM * v, count, x);
        best_rows(x, 0.25f, twice, &plus);
        best_rows(x, -0.25f, twice, &minus);
        for (int l = 0; l < count; l++) {
            float total = x[0][l];
            for (int i = 1; i < DIM; i++) total += x[i][l];
            const int keep = plus.score[l] + total >= minus.score[l];
            codes[v + l] = (int16_t)(keep ? code_of(&plus, l, 0, twice) : code_of(&minus, l, 1, twice));
        }
    }
}

/* vectors float32 [end, 8] -> codes uint8 [end]; table int8 [256, 8] is e81b_table(). Entries are powers of two: exact. */
void lattice_encode_e81b(const float *restrict vectors, int64_t begin, int64_t end, const int8_t *restrict table,
                         uint8_t *restrict codes) {
    float x[DIM][LANES], best[LANES];
    int32_t row[LANES];
    for (int64_t v = begin; v < end; v += LANES) {
        const int64_t count = end - v < LANES ? end - v : LANES;
        load(vectors + DIM * v, count, x);
        for (int l = 0; l < LANES; l++) {
            best[l] = -INFINITY;
            row[l] = 0;
        }
        for (int r = 0; r < ROWS; r++) {
            float c[DIM], norm = 0;
            for (int i = 0; i < DIM; i++) {
                c[i] = 0.5f * (float)table[DIM * r + i];
                norm += 0.25f * c[i] * c[i];
            }
            for (int l = 0; l < LANES; l++) {
                float score = c[0] * x[0][l];
                for (int i = 1; i < DIM; i++) score += c[i] * x[i][l];
                score -= norm;
                const int better = score > best[l];
                best[l] = better ? score : best[l];
                row[l] = better ? r : row[l];
            }
        }
        for (int l = 0; l < count; l++) codes[v + l] = (uint8_t)row[l];
    }
}

/* ---- decoding: CHUNK codes at a time to bytes, then the bytes to floats ---- */

/* Vectors in quarters, as in tables.py: (magnitudes[a] ^ flips[s]) + offsets[s]. */
static void e8p_bytes(const int16_t *restrict codes, int64_t count, const int8_t *restrict magnitudes,
                      const int8_t *restrict flips, const int8_t *restrict offsets, int8_t *restrict bytes) {
    for (int64_t v = 0; v < count; v++) {
        const uint16_t code = (uint16_t)codes[v];
        const int8_t *a = magnitudes + DIM * (code >> 8), *f = flips + DIM * (code & 255), *o = offsets + DIM * (code & 255);
        for (int i = 0; i < DIM; i++) bytes[DIM * v + i] = (int8_t)((a[i] ^ f[i]) + o[i]);
    }
}

static void e81b_bytes(const uint8_t *restrict codes, int64_t count, const int8_t *restrict table, int8_t *restrict bytes) {
    for (int64_t v = 0; v < count; v++)
        for (int i = 0; i < DIM; i++) bytes[DIM * v + i] = table[DIM * codes[v] + i];
}

typedef union {
    float f;
    uint32_t u;
} Bits;

/* Both conversions round to nearest, ties to even. Values here are finite and at most 2·2.75 + 2 in size: nothing overflows. */
static inline uint16_t to_bfloat16(float value) {
    const Bits x = {value};
    return (uint16_t)((x.u + 0x7FFF + (x.u >> 16 & 1)) >> 16);
}

/* By hand, since compilers do not vectorise _Float16. Below 2^-14 halves are multiples of 2^-24, and so is the float 0.5 + size. */
static inline uint16_t to_float16(float value) {
    const Bits x = {value}, size = {fabsf(value)}, moved = {size.f + 0.5f}, half = {0.5f};
    const uint32_t normal = (size.u - (112u << 23) + 0xFFF + (size.u >> 13 & 1)) >> 13;
    const uint32_t small = moved.u - half.u;
    return (uint16_t)((size.f < 0x1p-14f ? small : normal) | (x.u >> 16 & 0x8000));
}

/* codes int16 [end]; fine: NULL, or codes of the residual: uint8 [end] with table e81b_table(), or int16 [end] with table
 * NULL. magnitudes, flips, offsets: int8 [256, 8] each, e8p_parts(). out [end, 8]: q1/4 + (q2/4)/residual_scale, formed in
 * float32 and rounded once. */
#define DEFINE_DECODE(NAME, TYPE, CONVERT)                                                                             \
    void NAME(const int16_t *restrict codes, const void *restrict fine, float residual_scale, int64_t begin, int64_t end,\
              const int8_t *restrict magnitudes, const int8_t *restrict flips, const int8_t *restrict offsets,         \
              const int8_t *restrict table, TYPE *restrict out) {                                                      \
        int8_t coarse[DIM * CHUNK], rest[DIM * CHUNK];                                                                 \
        for (int64_t v = begin; v < end; v += CHUNK) {                                                                 \
            const int64_t count = end - v < CHUNK ? end - v : CHUNK;                                                   \
            TYPE *restrict to = out + DIM * v;                                                                         \
            e8p_bytes(codes + v, count, magnitudes, flips, offsets, coarse);                                           \
            if (!fine) {                                                                                               \
                for (int64_t i = 0; i < DIM * count; i++) to[i] = CONVERT(0.25f * (float)coarse[i]);                   \
                continue;                                                                                              \
            }                                                                                                          \
            if (table)                                                                                                 \
                e81b_bytes((const uint8_t *)fine + v, count, table, rest);                                             \
            else                                                                                                       \
                e8p_bytes((const int16_t *)fine + v, count, magnitudes, flips, offsets, rest);                         \
            for (int64_t i = 0; i < DIM * count; i++)                                                                  \
                to[i] = CONVERT(0.25f * (float)coarse[i] + 0.25f * (float)rest[i] / residual_scale);                   \
        }                                                                                                              \
    }

DEFINE_DECODE(lattice_decode_float32, float, (float))
DEFINE_DECODE(lattice_decode_bfloat16, uint16_t, to_bfloat16)
DEFINE_DECODE(lattice_decode_float16, uint16_t, to_float16)
