/* Nearest vectors of the lattice codebooks, and vectors from codes. The tables come from tables.py; threads take runs of
 * vectors, and results do not depend on their number. Codes equal those of reference.py bit for bit: no sum is reordered,
 * and every product is either exact or stored before it is added, so that a fused multiply-add would change nothing.
 */
#include <math.h>
#include <stdint.h>

#include "../native.h"

enum { VECTORS = 32, ROWS = 256, DIM = 8, CHUNK = 64 };

/* ---- encoding: VECTORS vectors at a time, one a lane, against one row after the other ---- */

typedef struct {
    float score[VECTORS];
    int32_t row[VECTORS];
    float y[DIM][VECTORS]; /* x − shift */
} Best;

/* For y = x − shift, the rows with the largest 2⟨A, |y|⟩ − |A|² − (4·min A_i|y_i| where one sign must be wrong).
 * twice holds 2A ∈ {1, 3, 5}: the products are made once, and the loop over rows only picks, adds and takes minima. */
static void best_rows(float x[DIM][VECTORS], float shift, const int8_t *restrict twice, Best *restrict best) {
    float term[DIM][3][VECTORS]; /* 1, 3 and 5 times |y_i| */
    int32_t negatives[VECTORS] = {0};
    for (int i = 0; i < DIM; i++)
        for (int l = 0; l < VECTORS; l++) {
            const float y = x[i][l] - shift, size = fabsf(y);
            best->y[i][l] = y;
            negatives[l] ^= y < 0;
            term[i][0][l] = size;
            term[i][1][l] = 3 * size;
            term[i][2][l] = 5 * size;
        }
    for (int l = 0; l < VECTORS; l++) {
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
        for (int l = 0; l < VECTORS; l++) {
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

/* Copies up to VECTORS vectors to one a lane; missing ones are zero. */
static void load(const float *restrict vectors, int64_t count, float x[DIM][VECTORS]) {
    for (int l = 0; l < VECTORS; l++)
        for (int i = 0; i < DIM; i++) x[i][l] = l < count ? vectors[DIM * l + i] : 0;
}

/* vectors float32 [n, 8] -> codes int16 [n]; twice int8 [256, 8] is e8p_magnitudes(). */
void lattice_encode_e8p(const float *restrict vectors, int64_t n, const int8_t *restrict twice, int16_t *restrict codes,
                        int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t v = 0; v < n; v += VECTORS) {
        const int64_t count = n - v < VECTORS ? n - v : VECTORS;
        float x[DIM][VECTORS];
        Best plus, minus;
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

/* The rows with the largest 2⟨c, x⟩ − |c|². Twice an entry is 0 or a power of two: the products are exact. */
static void nearest_rows(float x[DIM][VECTORS], const int8_t *restrict table, int32_t row[VECTORS]) {
    float best[VECTORS];
    for (int l = 0; l < VECTORS; l++) {
        best[l] = -INFINITY;
        row[l] = 0;
    }
    for (int r = 0; r < ROWS; r++) {
        float c[DIM], norm = 0;
        for (int i = 0; i < DIM; i++) {
            c[i] = 0.5f * (float)table[DIM * r + i];
            norm += 0.25f * c[i] * c[i];
        }
        for (int l = 0; l < VECTORS; l++) {
            float score = c[0] * x[0][l];
            for (int i = 1; i < DIM; i++) score += c[i] * x[i][l];
            score -= norm;
            const int better = score > best[l];
            best[l] = better ? score : best[l];
            row[l] = better ? r : row[l];
        }
    }
}

/* vectors float32 [n, 8] -> codes uint8 [n]; table int8 [256, 8] is e81b_table(). */
void lattice_encode_e81b(const float *restrict vectors, int64_t n, const int8_t *restrict table,
                         uint8_t *restrict codes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t v = 0; v < n; v += VECTORS) {
        const int64_t count = n - v < VECTORS ? n - v : VECTORS;
        float x[DIM][VECTORS];
        int32_t row[VECTORS];
        load(vectors + DIM * v, count, x);
        nearest_rows(x, table, row);
        for (int l = 0; l < count; l++) codes[v + l] = (uint8_t)row[l];
    }
}

/* ---- decoding: CHUNK codes at a time to bytes, then the bytes to floats ---- */

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__GFNI__)

/* Eight codes at a time: the magnitudes are gathered, and an instruction that multiplies bytes by a matrix of bits makes
 * of a code's signs the eight elements' (element i has the bit SIGN_BITS[i] of s, and bit 0 minds the parity), and their
 * parity. */
static int64_t vectors_of(const int16_t *restrict codes, int64_t count, const int8_t *restrict magnitudes,
                          const int8_t *restrict flips, const int8_t *restrict offsets, int8_t *restrict bytes) {
    (void)flips, (void)offsets;
    const __m128i signs = _mm_set1_epi64x((int64_t)0xfe10022004400880), parity = _mm_set1_epi8(-1);
    const __m512i none = _mm512_setzero_si512(), one = _mm512_set1_epi8(1);
    int64_t v = 0;
    for (; v + 8 <= count; v += 8) {
        const __m128i code = _mm_loadu_si128((const __m128i *)(codes + v)), s = _mm_cvtepi16_epi8(code);
        const __m256i row = _mm256_cvtepu16_epi32(_mm_srli_epi16(code, 8));
        const __m512i size = _mm512_i32gather_epi64(row, magnitudes, DIM);
        const int64_t negative = _mm_cvtsi128_si64(_mm_gf2p8affine_epi64_epi8(s, signs, 0));
        const __m512i odd = _mm512_cvtepi8_epi64(_mm_gf2p8affine_epi64_epi8(s, parity, 0)); /* bytes of 0 or −1 */
        const __m512i shift = _mm512_add_epi8(one, _mm512_add_epi8(odd, odd));
        const __m512i value = _mm512_mask_sub_epi8(size, (__mmask64)negative, none, size);
        _mm512_storeu_si512(bytes + DIM * v, _mm512_add_epi8(value, shift));
    }
    return v;
}

static int64_t eight_rows(const uint8_t *restrict codes, int64_t count, const int8_t *restrict table,
                          int8_t *restrict bytes) {
    int64_t v = 0;
    for (; v + 8 <= count; v += 8) {
        const __m256i row = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + v)));
        _mm512_storeu_si512(bytes + DIM * v, _mm512_i32gather_epi64(row, table, DIM));
    }
    return v;
}

#elif defined(__AVX2__)

static ALWAYS_INLINE __m128i two_rows(const int8_t *restrict table, uint64_t a, uint64_t b) {
    const __m128i first = _mm_loadl_epi64((const __m128i *)(table + DIM * (a & 255)));
    return _mm_unpacklo_epi64(first, _mm_loadl_epi64((const __m128i *)(table + DIM * (b & 255))));
}

static ALWAYS_INLINE __m256i four_rows(const int8_t *restrict table, uint64_t codes) { /* by each code's low byte */
    const __m256i low = _mm256_castsi128_si256(two_rows(table, codes, codes >> 16));
    return _mm256_inserti128_si256(low, two_rows(table, codes >> 32, codes >> 48), 1);
}

/* Four codes at a time, their rows loaded one by one: gathering takes longer. */
static int64_t vectors_of(const int16_t *restrict codes, int64_t count, const int8_t *restrict magnitudes,
                          const int8_t *restrict flips, const int8_t *restrict offsets, int8_t *restrict bytes) {
    int64_t v = 0;
    for (; v + 4 <= count; v += 4) {
        uint64_t four;
        memcpy(&four, codes + v, sizeof four);
        const __m256i size = _mm256_xor_si256(four_rows(magnitudes, four >> 8), four_rows(flips, four));
        _mm256_storeu_si256((__m256i *)(bytes + DIM * v), _mm256_add_epi8(size, four_rows(offsets, four)));
    }
    return v;
}

static int64_t eight_rows(const uint8_t *restrict codes, int64_t count, const int8_t *restrict table,
                          int8_t *restrict bytes) {
    (void)codes, (void)count, (void)table, (void)bytes;
    return 0;
}

#else

static int64_t vectors_of(const int16_t *restrict codes, int64_t count, const int8_t *restrict magnitudes,
                          const int8_t *restrict flips, const int8_t *restrict offsets, int8_t *restrict bytes) {
    (void)codes, (void)count, (void)magnitudes, (void)flips, (void)offsets, (void)bytes;
    return 0;
}

static int64_t eight_rows(const uint8_t *restrict codes, int64_t count, const int8_t *restrict table,
                          int8_t *restrict bytes) {
    (void)codes, (void)count, (void)table, (void)bytes;
    return 0;
}

#endif

/* Vectors in quarters, as in tables.py: (magnitudes[a] ^ flips[s]) + offsets[s]. */
static void e8p_bytes(const int16_t *restrict codes, int64_t count, const int8_t *restrict magnitudes,
                      const int8_t *restrict flips, const int8_t *restrict offsets, int8_t *restrict bytes) {
    for (int64_t v = vectors_of(codes, count, magnitudes, flips, offsets, bytes); v < count; v++) {
        const uint16_t code = (uint16_t)codes[v];
        const int8_t *a = magnitudes + DIM * (code >> 8);
        const int8_t *f = flips + DIM * (code & 255), *o = offsets + DIM * (code & 255);
        for (int i = 0; i < DIM; i++) bytes[DIM * v + i] = (int8_t)((a[i] ^ f[i]) + o[i]);
    }
}

static void e81b_bytes(const uint8_t *restrict codes, int64_t count, const int8_t *restrict table, int8_t *restrict bytes) {
    for (int64_t v = eight_rows(codes, count, table, bytes); v < count; v++)
        for (int i = 0; i < DIM; i++) bytes[DIM * v + i] = table[DIM * codes[v] + i];
}

/* codes int16 [n]; fine: NULL, or codes of the residual: uint8 [n] with table e81b_table(), or int16 [n] with table NULL.
 * magnitudes, flips, offsets: int8 [256, 8] each, e8p_parts(). out [n, 8] of `type`: q1/4 + (q2/4)/residual_scale, formed
 * in float32 and rounded once. */
void lattice_decode(const int16_t *restrict codes, const void *restrict fine, float residual_scale, int64_t n,
                    const int8_t *restrict magnitudes, const int8_t *restrict flips, const int8_t *restrict offsets,
                    const int8_t *restrict table, int type, void *restrict out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t v = 0; v < n; v += CHUNK) {
        const int64_t count = n - v < CHUNK ? n - v : CHUNK;
        int8_t bytes[DIM * CHUNK];
        float own[DIM * CHUNK], *values = type == FLOAT32 ? (float *)out + DIM * v : own;
        e8p_bytes(codes + v, count, magnitudes, flips, offsets, bytes);
        for (int64_t i = 0; i < DIM * count; i++) values[i] = 0.25f * (float)bytes[i];
        if (fine) {
            if (table)
                e81b_bytes((const uint8_t *)fine + v, count, table, bytes);
            else
                e8p_bytes((const int16_t *)fine + v, count, magnitudes, flips, offsets, bytes);
            for (int64_t i = 0; i < DIM * count; i++) values[i] += 0.25f * (float)bytes[i] / residual_scale;
        }
        if (type != FLOAT32) write_values(values, DIM * count, type, out, DIM * v);
    }
}

/* ---- products: y = x Wᵀ while decoding (GEMV), each code read once ----
 *
 * Points of the lattice are small whole numbers of quarters, so only x has to become whole: it is quantized to 16 bits
 * (native.h), each CHUNK of a token with a scale of its own. Sums over a chunk are exact; they are added in float32, in a
 * fixed order. */

enum { WEIGHTS = DIM * CHUNK };

static int32_t dot(const int8_t *restrict weights, const int16_t *restrict quantized, int64_t n) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (int16_t)weights[i] * quantized[i];
    return sum;
}

/* codes, fine [rows, blocks] and the tables as above; x float32 [tokens, 8 blocks] -> y float32 [tokens, rows].
 * `quantized` [tokens, 8 blocks] and `scales` [tokens, ceil(blocks / CHUNK)] are scratch. Returns 0, and leaves y alone,
 * where x is not finite. */
int lattice_multiply(const int16_t *restrict codes, const void *restrict fine, float residual_scale, int64_t rows,
                     int64_t blocks, const int8_t *restrict magnitudes, const int8_t *restrict flips,
                     const int8_t *restrict offsets, const int8_t *restrict table, const float *restrict x,
                     int64_t tokens, int16_t *restrict quantized, float *restrict scales, float *restrict y, int threads) {
    const int64_t chunks = (blocks + CHUNK - 1) / CHUNK, columns = DIM * blocks;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t c = 0; c < chunks; c++) {
            const int64_t at = t * columns + c * WEIGHTS, left = columns - c * WEIGHTS;
            if (!quantize_activations(x + at, left < WEIGHTS ? left : WEIGHTS, quantized + at, scales + t * chunks + c)) return 0;
        }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t t = 0; t < tokens; t++) y[t * rows + row] = 0;
        for (int64_t c = 0; c < chunks; c++) {
            const int64_t at = row * blocks + c * CHUNK, left = blocks - c * CHUNK, count = left < CHUNK ? left : CHUNK;
            int8_t bytes[WEIGHTS], more[WEIGHTS];
            e8p_bytes(codes + at, count, magnitudes, flips, offsets, bytes);
            if (fine && table) e81b_bytes((const uint8_t *)fine + at, count, table, more);
            if (fine && !table) e8p_bytes((const int16_t *)fine + at, count, magnitudes, flips, offsets, more);
            for (int64_t t = 0; t < tokens; t++) {
                const int16_t *own = quantized + t * columns + c * WEIGHTS;
                float sum = (float)dot(bytes, own, DIM * count);
                if (fine) sum += (float)dot(more, own, DIM * count) / residual_scale;
                y[t * rows + row] += 0.25f * scales[t * chunks + c] * sum;
            }
        }
    }
    return 1;
}
