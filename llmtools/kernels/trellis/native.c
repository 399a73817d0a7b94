/* Trellis codes: the Viterbi search for the nearest sequence, rows from codes, and products while decoding. Formulas and
 * layout are in __init__.py; results equal those of reference.py bit for bit and do not depend on the number of threads:
 * no sum is reordered, and no multiplication fused with an addition.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../native.h"

enum { TILE = 16, STEPS = TILE * TILE };

#define FOR_EACH_WIDTH(bits, ...)                                                                                  \
    do {                                                                                                           \
        if ((bits) == 1) { enum { K = 1 }; __VA_ARGS__; }                                                          \
        else if ((bits) == 2) { enum { K = 2 }; __VA_ARGS__; }                                                     \
        else if ((bits) == 3) { enum { K = 3 }; __VA_ARGS__; }                                                     \
        else { enum { K = 4 }; __VA_ARGS__; }                                                                      \
    } while (0)

#define FOR_EACH_WIDER(bits, ...)                                                                                  \
    do {                                                                                                           \
        if ((bits) == 5) { enum { K = 5 }; __VA_ARGS__; }                                                          \
        else if ((bits) == 6) { enum { K = 6 }; __VA_ARGS__; }                                                     \
        else if ((bits) == 7) { enum { K = 7 }; __VA_ARGS__; }                                                     \
        else { enum { K = 8 }; __VA_ARGS__; }                                                                      \
    } while (0)

/* ---- encoding: Viterbi over 2^L states ----
 *
 * A state's predecessors differ in the k bits that were shifted out, so states come in families of 2^k that share the
 * least predecessor: the minimum runs over 2^k contiguous parts of the array of costs. Of the best predecessor its k
 * highest bits are noted, in k planes of a bit a family: k · 2^(L − k) bits a step. */

typedef struct {
    int64_t states, families; /* 2^L, 2^(L − k) */
    const float *values;      /* [v, states] */
    float *cost, *next;       /* [states] */
    uint16_t *back;           /* [steps, ⌈families / 16⌉, k] */
} Search;

/* WIDE families at a time: their least costs so far and where those come from; `lesser` takes the first of equals. Four
 * functions know the processor. */
#if defined(__AVX512F__)

enum { WIDE = 16 };
typedef struct {
    __m512 cost;
    __m512i from;
} Least;

static ALWAYS_INLINE Least member(const float *restrict cost, int j) {
    return (Least){_mm512_loadu_ps(cost), _mm512_set1_epi32(j)};
}

static ALWAYS_INLINE Least lesser(Least one, Least later) {
    const __mmask16 less = _mm512_cmp_ps_mask(later.cost, one.cost, _CMP_LT_OQ);
    return (Least){_mm512_min_ps(later.cost, one.cost), _mm512_mask_mov_epi32(one.from, less, later.from)};
}

static ALWAYS_INLINE uint32_t plane(const Least *least, int bit) {
    return _mm512_test_epi32_mask(least->from, _mm512_set1_epi32(1 << bit));
}

static ALWAYS_INLINE __m512 squared(float x, const float *restrict values) {
    const __m512 off = _mm512_sub_ps(_mm512_set1_ps(x), _mm512_loadu_ps(values));
    return _mm512_mul_ps(off, off);
}

/* The e-th WIDE states of these families, 2^k each: next = least + Σ (x − value)². */
static ALWAYS_INLINE void extend(const Least *least, const float *restrict x, const float *restrict values,
                                 int64_t states, float *restrict next, int e, const int k, const int v) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i family = _mm512_srli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(WIDE * e)), (unsigned)k);
    const __m512 from = k < 4 ? _mm512_permutexvar_ps(family, least->cost)
                              : _mm512_set1_ps(((const float *)&least->cost)[WIDE * e >> k]); /* all of one family */
    __m512 square = squared(x[0], values);
    if (v == 2) square = _mm512_add_ps(square, squared(x[1], values + states));
    _mm512_storeu_ps(next, _mm512_add_ps(from, square));
}

#elif defined(__AVX2__)

enum { WIDE = 8 };
typedef struct {
    __m256 cost;
    __m256i from;
} Least;

static ALWAYS_INLINE Least member(const float *restrict cost, int j) {
    return (Least){_mm256_loadu_ps(cost), _mm256_set1_epi32(j)};
}

static ALWAYS_INLINE Least lesser(Least one, Least later) {
    const __m256i less = _mm256_castps_si256(_mm256_cmp_ps(later.cost, one.cost, _CMP_LT_OQ));
    return (Least){_mm256_min_ps(later.cost, one.cost), _mm256_blendv_epi8(one.from, later.from, less)};
}

static ALWAYS_INLINE uint32_t plane(const Least *least, int bit) {
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_slli_epi32(least->from, 31 - bit)));
}

static ALWAYS_INLINE __m256 squared(float x, const float *restrict values) {
    const __m256 off = _mm256_sub_ps(_mm256_set1_ps(x), _mm256_loadu_ps(values));
    return _mm256_mul_ps(off, off);
}

static ALWAYS_INLINE void extend(const Least *least, const float *restrict x, const float *restrict values,
                                 int64_t states, float *restrict next, int e, const int k, const int v) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i family = _mm256_srli_epi32(_mm256_add_epi32(lane, _mm256_set1_epi32(WIDE * e)), k);
    const __m256 from = k < 3 ? _mm256_permutevar8x32_ps(least->cost, family)
                              : _mm256_set1_ps(((const float *)&least->cost)[WIDE * e >> k]); /* all of one family */
    __m256 square = squared(x[0], values);
    if (v == 2) square = _mm256_add_ps(square, squared(x[1], values + states));
    _mm256_storeu_ps(next, _mm256_add_ps(from, square));
}

#else

enum { WIDE = 16 };
typedef struct {
    float cost[WIDE];
    int32_t from[WIDE];
} Least;

static ALWAYS_INLINE Least member(const float *restrict cost, int j) {
    Least least;
    for (int l = 0; l < WIDE; l++) {
        least.cost[l] = cost[l];
        least.from[l] = j;
    }
    return least;
}

static ALWAYS_INLINE Least lesser(Least one, Least later) {
    for (int l = 0; l < WIDE; l++) {
        const int less = later.cost[l] < one.cost[l];
        one.cost[l] = less ? later.cost[l] : one.cost[l];
        one.from[l] = less ? later.from[l] : one.from[l];
    }
    return one;
}

static ALWAYS_INLINE uint32_t plane(const Least *least, int bit) {
    uint32_t bits = 0;
    for (int l = 0; l < WIDE; l++) bits |= (uint32_t)(least->from[l] >> bit & 1) << l;
    return bits;
}

static ALWAYS_INLINE void extend(const Least *least, const float *restrict x, const float *restrict values,
                                 int64_t states, float *restrict next, int e, const int k, const int v) {
    for (int l = 0; l < WIDE; l++) {
        const float off = x[0] - values[l], second = v == 2 ? x[1] - values[states + l] : 0;
        const float square = v == 2 ? off * off + second * second : off * off;
        next[l] = least->cost[(WIDE * e + l) >> k] + square;
    }
}

#endif

#if defined(__AVX2__)
#define UNROLLED(times) UNROLLED_(GCC unroll times)
#define UNROLLED_(words) _Pragma(#words)
#else
#define UNROLLED(times) /* lanes are a loop there, and the compiler would take minutes */
#endif

/* The squared distance of the weights x [v] from what a state is worth. */
static ALWAYS_INLINE float distance(const Search *restrict s, const float *restrict x, int64_t state, const int v) {
    const float off = x[0] - s->values[state], second = v == 2 ? x[1] - s->values[s->states + state] : 0;
    return v == 2 ? off * off + second * second : off * off;
}

enum { CHAIN = 8 }; /* members compared one after the other: longer chains would wait for each comparison */

/* The least of a chain of members from j on. */
static ALWAYS_INLINE Least first_of(const float *restrict cost, int64_t families, int j, const int k) {
    const int end = j + (1 << k < CHAIN ? 1 << k : CHAIN);
    Least least = member(cost + j * families, j);
    UNROLLED(8)
    for (int i = j + 1; i < end; i++) least = lesser(least, member(cost + i * families, i));
    return least;
}

/* One step for fewer than LANES families, weight after weight. */
static ALWAYS_INLINE void step_of_few(const Search *restrict s, const float *restrict x, uint16_t *restrict back,
                                      const int k, const int v) {
    const int members = 1 << k;
    for (int b = 0; b < k; b++) back[b] = 0;
    for (int64_t q = 0; q < s->families; q++) {
        int from = 0;
        for (int j = 1; j < members; j++)
            if (s->cost[q + j * s->families] < s->cost[q + from * s->families]) from = j;
        for (int b = 0; b < k; b++) back[b] |= (uint16_t)((from >> b & 1) << q);
        const float least = s->cost[q + from * s->families];
        for (int64_t i = q * members; i < (q + 1) * members; i++) s->next[i] = least + distance(s, x, i, v);
    }
}

/* One step for the weights x [v]: `cost` of the states before becomes `next`. */
static ALWAYS_INLINE void step(const Search *restrict s, const float *restrict x, uint16_t *restrict back, const int k,
                               const int v) {
    const int members = 1 << k;
    if (v == 2 && s->families < LANES) return step_of_few(s, x, back, k, v);
    for (int64_t q = 0; q < s->families; q += LANES) {
        uint32_t planes[8] = {0};
        for (int at = 0; at < LANES; at += WIDE) {
            const float *cost = s->cost + q + at;
            Least least = first_of(cost, s->families, 0, k);
            for (int j = CHAIN; j < members; j += CHAIN) least = lesser(least, first_of(cost, s->families, j, k));
            for (int b = 0; b < k; b++) planes[b] |= plane(&least, b) << at;
            UNROLLED(16)
            for (int e = 0; e < members; e++) {
                const int64_t first = (q + at) * members + WIDE * e;
                extend(&least, x, s->values + first, s->states, s->next + first, e, k, v);
            }
        }
        for (int b = 0; b < k; b++) back[q / LANES * k + b] = (uint16_t)planes[b];
    }
}

/* The states of the best path for x [length, v] from x[first] on around the circle: path [length]. With `joint` not
 * negative the ends are held: the upper L − k bits of the first state and the lower ones of the last are those. */
static ALWAYS_INLINE void walk(Search *restrict s, const float *restrict x, int first, int length, int64_t joint,
                               int32_t *restrict path, const int k, const int v) {
    const int64_t families = s->families, planes = (families + LANES - 1) / LANES * k;
    for (int64_t i = 0; i < s->states; i++)
        s->cost[i] = joint >= 0 && i >> k != joint ? INFINITY : distance(s, x + first * v, i, v);
    for (int t = 1; t < length; t++) {
        step(s, x + (first + t) % length * v, s->back + t * planes, k, v);
        float *swap = s->cost;
        s->cost = s->next;
        s->next = swap;
    }
    const int64_t start = joint >= 0 ? joint : 0, stride = joint >= 0 ? families : 1;
    int64_t state = start;
    for (int64_t i = start; i < s->states; i += stride)
        if (s->cost[i] < s->cost[state]) state = i;
    for (int t = length - 1;; t--) {
        path[t] = (int32_t)state;
        if (t == 0) break;
        const int64_t family = state >> k;
        const uint16_t *noted = s->back + t * planes + family / LANES * k;
        int64_t from = 0;
        for (int b = 0; b < k; b++) from |= (int64_t)(noted[b] >> (family % LANES) & 1) << b;
        state = family | from * families;
    }
}

/* x [length, v] -> symbols [length] of k bits. A free walk that begins half way round says what bits a good path has at the
 * joint; the second walk is held to them (arXiv:2406.11235, algorithm 4). */
static ALWAYS_INLINE void encode_tile(Search *restrict s, const float *restrict x, int length, int state_bits,
                                      uint8_t *restrict symbols, const int k, const int v) {
    int32_t path[STEPS];
    walk(s, x, length / 2, length, -1, path, k, v);
    walk(s, x, 0, length, path[length / 2] >> k, path, k, v);
    for (int t = 0; t < length; t++) symbols[t] = (uint8_t)(path[t] >> (state_bits - k));
}

/* Of one step, k bits for v weights at once. */
static void encode_steps(Search *restrict s, const float *restrict x, int length, int state_bits, uint8_t *restrict symbols,
                         int k, int v) {
    if (v == 1 && k <= 4) FOR_EACH_WIDTH(k, encode_tile(s, x, length, state_bits, symbols, K, 1));
    else if (v == 1) FOR_EACH_WIDER(k, encode_tile(s, x, length, state_bits, symbols, K, 1));
    else FOR_EACH_WIDTH(k / 2, encode_tile(s, x, length / 2, state_bits, symbols, 2 * K, 2));
}

/* values float32 [rows, 16 · blocks] -> trellis int16 [rows, blocks · k]; table float32 [v, 2^L], what each state is worth,
 * v weights. Of one weight there are at least LANES families. Returns 0 where memory lacks. */
int trellis_encode(const float *restrict values, int64_t rows, int64_t blocks, const float *restrict table, int v, int bits,
                   int state_bits, uint16_t *restrict trellis, int threads) {
    const int64_t strips = (rows + TILE - 1) / TILE, states = (int64_t)1 << state_bits;
    const int64_t families = states >> bits * v, planes = (families + LANES - 1) / LANES * bits * v;
    int complete = 1;
#pragma omp parallel num_threads(threads)
    {
        float *costs = malloc((size_t)(2 * states) * sizeof(float));
        uint16_t *back = malloc((size_t)(STEPS / v * planes) * sizeof(uint16_t));
        if (!costs || !back) {
#pragma omp atomic write
            complete = 0;
        }
#pragma omp for schedule(dynamic)
        for (int64_t tile = 0; tile < strips * blocks; tile++) {
            if (!costs || !back) continue;
            const int64_t top = tile / blocks * TILE, block = tile % blocks;
            const int height = (int)(rows - top < TILE ? rows - top : TILE);
            float x[STEPS];
            uint8_t symbols[STEPS];
            Search search = {states, families, table, costs, costs + states, back};
            for (int r = 0; r < height; r++)
                memcpy(x + r * TILE, values + ((top + r) * blocks + block) * TILE, TILE * sizeof(float));
            encode_steps(&search, x, height * TILE, state_bits, symbols, bits * v, v);
            for (int r = 0; r < height; r++) {
                uint16_t *words = trellis + ((top + r) * blocks + block) * bits;
                uint32_t string = 0; /* the first bit highest */
                for (int c = 0, held = 0; c < TILE / v; c++) {
                    string = string << bits * v | symbols[r * (TILE / v) + c];
                    held += bits * v;
                    if (held < 16) continue;
                    held -= 16;
                    *words++ = (uint16_t)(string >> held);
                }
            }
        }
        free(costs);
        free(back);
    }
    return complete;
}

enum { BLOCKS = 16, COLUMNS = BLOCKS * TILE }; /* of a row, decoded at a time */

/* ---- decoding: sixteen weights of a row at a time ----
 *
 * Row by row, their states lie in k words of the row and one of the row after. In the other orders they lie in 2k words
 * that the row shares with the one eight above or below, and the word after those. */

enum { MAD = 0, INST = 1, MCG = 2, MUL1 = 3, HYB = 4 }; /* CODES of tables.py */
enum { BY_ROWS = 0, EXL3 = 1, FRAGMENTS = 2 };          /* ORDERS */
enum { PAIRS = 512 };

typedef struct {
    const uint16_t *trellis; /* [rows, blocks · k] */
    const float *table;      /* [PAIRS, 2], of HYB */
    int64_t rows, blocks;
    int bits, state_bits, code, order;
} Weight;

enum { KEPT = ~0x7e001fff, FLIPPED = 0x3f6c0000 }; /* of a half of 3inst, as bits of a float32 */

/* mul1's two numbers of half precision: its product and sum are exact in float32, and then rounded to half precision,
 * which of multiples of 2^-18 below 16 leaves those with eleven bits. */
static const float BYTE = 0x1.bb8p-8f, BYTES = -0x1.4c4p3f;

#if defined(__AVX512BW__)

/* The states of sixteen weights: weight e has the L bits from bit k · e of the words on, the highest first; or of eight
 * pairs, in the lower lanes. Each lane gets the two words that they lie in. */
static ALWAYS_INLINE __m512i states_of(const uint16_t *restrict own, uint16_t next, int state_bits, const int k,
                                       const int v) {
    uint16_t place[2 * TILE];
    int32_t shift[TILE];
    uint64_t words = 0;
    for (int e = 0; e < TILE; e++) {
        const int bit = k * (e * v % TILE);
        place[2 * e] = (uint16_t)(bit / 16 + 1);
        place[2 * e + 1] = (uint16_t)(bit / 16);
        shift[e] = 32 - bit % 16;
    }
    for (int i = 0; i < k; i++) words |= (uint64_t)own[i] << 16 * i;
    const __m128i all = k == 4 ? _mm_set_epi64x(next, (int64_t)words)
                               : _mm_cvtsi64_si128((int64_t)(words | (uint64_t)next << (16 * k & 63)));
    const __m512i window = _mm512_permutexvar_epi16(_mm512_loadu_si512(place), _mm512_broadcast_i32x4(all));
    const __m512i right = _mm512_sub_epi32(_mm512_loadu_si512(shift), _mm512_set1_epi32(state_bits));
    return _mm512_and_si512(_mm512_srlv_epi32(window, right), _mm512_set1_epi32((1 << state_bits) - 1));
}

static ALWAYS_INLINE __m512i linear(__m512i states, uint32_t factor, uint32_t offset) {
    const __m512i product = _mm512_mullo_epi32(states, _mm512_set1_epi32((int)factor));
    return _mm512_add_epi32(product, _mm512_set1_epi32((int)offset));
}

static ALWAYS_INLINE __m512i sum_of_bytes(__m512i y) {
    return _mm512_madd_epi16(_mm512_maddubs_epi16(y, _mm512_set1_epi8(1)), _mm512_set1_epi16(1));
}

/* To the eleven bits of half precision, ties to even. */
static ALWAYS_INLINE __m512 to_half(__m512 x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 13), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0xfff)), odd);
    return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(~0x1fff)));
}

/* The sum of two numbers of half precision, in that precision. Of each the code leaves a sign and twelve bits, which are
 * moved to where float32 has them; the exponent's others are one constant together with the exclusive or. All are
 * multiples of 2^-13 between 1/8 and 2, so that rounding their sum to eleven bits is all there is to it. */
static ALWAYS_INLINE __m512 sum_of_halves(__m512i y) {
    const __m512i kept = _mm512_set1_epi32(KEPT), flipped = _mm512_set1_epi32(FLIPPED);
    const __m512i upper = _mm512_srai_epi32(y, 3), lower = _mm512_srai_epi32(_mm512_slli_epi32(y, 16), 3);
    const __m512i high = _mm512_ternarylogic_epi32(upper, kept, flipped, 0x6a); /* (a & b) ^ c */
    const __m512i low = _mm512_ternarylogic_epi32(lower, kept, flipped, 0x6a);
    return to_half(_mm512_add_ps(_mm512_castsi512_ps(high), _mm512_castsi512_ps(low)));
}

/* The pairs of the eight states in the lower lanes. */
static ALWAYS_INLINE __m512 pairs_of(__m512i states, const float *restrict table) {
    const __m512i h = _mm512_add_epi32(_mm512_mullo_epi32(states, states), states);
    const __m512i entry = _mm512_and_si512(_mm512_srli_epi32(h, 6), _mm512_set1_epi32(PAIRS - 1));
    const __m512i negative = _mm512_and_si512(_mm512_slli_epi32(h, 16), _mm512_set1_epi32((int)0x80000000));
    const __m512d pairs = _mm512_i32gather_pd(_mm512_castsi512_si256(entry), (const double *)table, 8);
    const __m512i first = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(negative)); /* the lower half of its pair */
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castpd_si512(pairs), first));
}

static ALWAYS_INLINE __m512 values_of(__m512i states, const float *restrict table, const int code) {
    if (code == HYB) return pairs_of(states, table);
    if (code == INST) return sum_of_halves(linear(states, 89226354u, 64248484u));
    if (code == MCG) return sum_of_halves(linear(states, 0xcbac1fedu, 0));
    if (code == MAD) {
        const __m512i sum = sum_of_bytes(linear(states, 34038481u, 76625530u));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(510))),
                             _mm512_set1_ps(1 / 147.800537109375f));
    }
    const __m512i sum = _mm512_add_epi32(sum_of_bytes(linear(states, 0x83dcd12du, 0)), _mm512_set1_epi32(1024));
    return to_half(_mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(BYTE), _mm512_set1_ps(BYTES)));
}

static ALWAYS_INLINE void sixteen(const uint16_t *restrict own, uint16_t next, int state_bits,
                                  const float *restrict table, float *restrict out, const int code, const int k) {
    _mm512_storeu_ps(out, values_of(states_of(own, next, state_bits, k, code == HYB ? 2 : 1), table, code));
}

#else

/* The same in plain C. */
static ALWAYS_INLINE uint32_t sum_of_bytes(uint32_t y) {
    const uint32_t pairs = (y & 0x00ff00ff) + (y >> 8 & 0x00ff00ff);
    return (pairs & 0xffff) + (pairs >> 16);
}

static ALWAYS_INLINE float to_half(float x) {
    const uint32_t u = bits_of(x);
    return float_of((u + 0xfff + (u >> 13 & 1)) & ~0x1fffu);
}

static ALWAYS_INLINE float sum_of_halves(uint32_t y) {
    const uint32_t high = ((uint32_t)((int32_t)y >> 3) & (uint32_t)KEPT) ^ FLIPPED;
    const uint32_t low = ((uint32_t)((int32_t)(y << 16) >> 3) & (uint32_t)KEPT) ^ FLIPPED;
    return to_half(float_of(high) + float_of(low));
}

static ALWAYS_INLINE float value_of(uint32_t state, const int code) {
    if (code == INST) return sum_of_halves(89226354u * state + 64248484u);
    if (code == MCG) return sum_of_halves(0xcbac1fedu * state);
    if (code == MAD) return (float)((int32_t)sum_of_bytes(34038481u * state + 76625530u) - 510) * (1 / 147.800537109375f);
    return to_half((float)(1024 + sum_of_bytes(0x83dcd12du * state)) * BYTE + BYTES);
}

/* What sixteen weights are that have these states, of HYB in pairs of one state. */
static ALWAYS_INLINE void values_of(const uint32_t *restrict states, const float *restrict table, float *restrict out,
                                    const int code) {
    if (code != HYB)
        for (int e = 0; e < TILE; e++) out[e] = value_of(states[e], code);
    else
        for (int e = 0; e < TILE; e += 2) {
            const uint32_t h = states[e] * (states[e] + 1), entry = h >> 6 & (PAIRS - 1);
            out[e] = float_of(bits_of(table[2 * entry]) ^ (h << 16 & 0x80000000u));
            out[e + 1] = table[2 * entry + 1];
        }
}

static ALWAYS_INLINE void sixteen(const uint16_t *restrict own, uint16_t next, int state_bits,
                                  const float *restrict table, float *restrict out, const int code, const int k) {
    const uint32_t mask = (1u << state_bits) - 1;
    uint32_t states[TILE], windows[4];
    for (int i = 0; i < k; i++) windows[i] = (uint32_t)own[i] << 16 | (i + 1 < k ? own[i + 1] : next);
    for (int e = 0; e < TILE; e++) states[e] = windows[k * e / 16] >> (32 - state_bits - k * e % 16) & mask;
    values_of(states, table, out, code);
}

#endif

/* Blocks `first` to `last` of a row, sixteen weights each -> out; row by row, k up to 4. */
static ALWAYS_INLINE void decode(const Weight *restrict w, int64_t row, int64_t first, int64_t last, float *restrict out,
                                 const int code, const int k) {
    const int64_t after = row % TILE == TILE - 1 || row == w->rows - 1 ? row - row % TILE : row + 1;
    const uint16_t *own = w->trellis + row * w->blocks * k, *next = w->trellis + after * w->blocks * k;
    for (int64_t b = first; b < last; b++)
        sixteen(own + b * k, next[b * k], w->state_bits, w->table, out + (b - first) * TILE, code, k);
}

/* The same of any width and order: the words are those of one row, or of two that follow each other, and one more. */
static ALWAYS_INLINE void decode_any(const Weight *restrict w, int64_t row, int64_t first, int64_t last,
                                     float *restrict out, const int code) {
    const int k = w->bits, inner = (int)(row % TILE), pairs = w->order != BY_ROWS;
    const int down = w->order == EXL3 ? 4 : 2, right = w->order == EXL3 ? 2 : 4; /* eight places of the tile */
    const int64_t top = row - inner, height = w->rows - top < TILE ? w->rows - top : TILE;
    const int64_t stored = pairs ? inner % 8 * 2 : inner, after = (stored + 1 + pairs) % height;
    const uint16_t *own = w->trellis + (top + stored) * w->blocks * k, *next = w->trellis + (top + after) * w->blocks * k;
    const uint16_t *second = own + w->blocks * k; /* read only where there are pairs */
    int bit[TILE];
    for (int c = 0; c < TILE; c++) bit[c] = k * (pairs ? c % 8 / 2 * 8 + inner / 8 * down + c / 8 * right + c % 2 : c);
#if defined(__AVX512BW__)
    uint16_t place[2 * TILE];
    int32_t shift[TILE];
    for (int e = 0; e < TILE; e++) {
        const int begin = bit[code == HYB ? 2 * e % TILE : e];
        place[2 * e] = (uint16_t)(begin / 16 + 1);
        place[2 * e + 1] = (uint16_t)(begin / 16);
        shift[e] = 32 - w->state_bits - begin % 16;
    }
    const __m512i lanes = _mm512_loadu_si512(place), shifts = _mm512_loadu_si512(shift);
    const __m512i mask = _mm512_set1_epi32((1 << w->state_bits) - 1);
    const __mmask32 of_row = (1u << k) - 1, of_second = pairs ? of_row << k : 0, of_next = 1u << (pairs ? 2 * k : k);
    for (int64_t b = first; b < last; b++) {
        __m512i words = _mm512_maskz_loadu_epi16(of_row, own + b * k);
        words = _mm512_mask_loadu_epi16(words, of_second, second + b * k - k);
        words = _mm512_mask_set1_epi16(words, of_next, (short)next[b * k]);
        const __m512i states = _mm512_srlv_epi32(_mm512_permutexvar_epi16(lanes, words), shifts);
        _mm512_storeu_ps(out + (b - first) * TILE, values_of(_mm512_and_si512(states, mask), w->table, code));
    }
#else
    const uint32_t mask = (1u << w->state_bits) - 1;
    for (int64_t b = first; b < last; b++) {
        uint16_t words[2 * 8 + 1];
        uint32_t states[TILE];
        for (int i = 0; i < k; i++) words[i] = own[b * k + i];
        for (int i = 0; i < k * pairs; i++) words[k + i] = second[b * k + i];
        words[k + k * pairs] = next[b * k];
        for (int e = 0; e < TILE; e++) {
            const uint32_t window = (uint32_t)words[bit[e] / 16] << 16 | words[bit[e] / 16 + 1];
            states[e] = window >> (32 - w->state_bits - bit[e] % 16) & mask;
        }
        values_of(states, w->table, out + (b - first) * TILE, code);
    }
#endif
}

static ALWAYS_INLINE void decode_code(const Weight *restrict w, int64_t row, int64_t first, int64_t last,
                                      float *restrict out, const int code) {
    if (w->order != BY_ROWS || w->bits > 4)
        decode_any(w, row, first, last, out, code);
    else
        FOR_EACH_WIDTH(w->bits, decode(w, row, first, last, out, code, K));
}

/* ---- pairs from a table of half-precision values, which fits the registers' look-ups ----
 *
 * Then states, too, need sixteen bits only, and four blocks are decoded at a time, in two thirds of the time that gathers
 * take. */
#if defined(__AVX512BW__)

/* The first weights of all pairs and the second ones, in half precision [2, PAIRS]; NULL where that would round any. */
static const uint16_t *planes_of(const Weight *restrict w, uint16_t *restrict planes) {
    if (w->code != HYB) return NULL;
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    __mmask16 inexact = 0;
    for (int i = 0; i < PAIRS; i += LANES) {
        const __m512 lower = _mm512_loadu_ps(w->table + 2 * i), upper = _mm512_loadu_ps(w->table + 2 * i + LANES);
        for (int j = 0; j < 2; j++) {
            const __m512 x = _mm512_permutex2var_ps(lower, _mm512_add_epi32(even, _mm512_set1_epi32(j)), upper);
            const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            inexact |= _mm512_cmpneq_epi32_mask(_mm512_castps_si512(_mm512_cvtph_ps(half)), _mm512_castps_si512(x));
            _mm256_storeu_si256((__m256i *)(planes + j * PAIRS + i), half);
        }
    }
    return inexact ? NULL : planes;
}

/* Of 32 entries, by their lowest nine bits, what a plane has there: 64 are looked up at a time, and one of eight kept. */
static ALWAYS_INLINE __m512i look_up(__m512i entry, const __m512i *restrict plane) {
    __m512i found[8];
    UNROLLED(8)
    for (int i = 0; i < 8; i++) found[i] = _mm512_permutex2var_epi16(plane[2 * i], entry, plane[2 * i + 1]);
    UNROLLED(3)
    for (int bit = 0; bit < 3; bit++) {
        const __mmask32 upper = _mm512_test_epi16_mask(entry, _mm512_set1_epi16((short)(64 << bit)));
        UNROLLED(4)
        for (int i = 0; i < 4 >> bit; i++) found[i] = _mm512_mask_blend_epi16(upper, found[2 * i], found[2 * i + 1]);
    }
    return found[0];
}

/* As `decode_any`. Lane 8j + p has pair p of block j; words of the three rows that a state may reach into are sixteen a row,
 * k a block. Row by row there are two. */
static void decode_pairs(const Weight *restrict w, const uint16_t *restrict planes, int64_t row, int64_t first,
                         int64_t last, float *restrict out) {
    const int k = w->bits, inner = (int)(row % TILE), by_rows = w->order == BY_ROWS;
    const int down = w->order == EXL3 ? 4 : 2, right = w->order == EXL3 ? 2 : 4;
    const int64_t top = row - inner, height = w->rows - top < TILE ? w->rows - top : TILE;
    const int64_t stored = by_rows ? inner : inner % 8 * 2, line = w->blocks * k;
    const uint16_t *rows[3];
    for (int i = 0; i < 3; i++) rows[i] = w->trellis + (top + (stored + i) % height) * line;
    uint16_t begin[2 * TILE], block[2 * TILE];
    for (int e = 0; e < 2 * TILE; e++) {
        const int p = e % 8, place = by_rows ? 2 * p : p % 4 * 8 + p / 4 * right + inner / 8 * down;
        begin[e] = (uint16_t)(k * place);
        block[e] = (uint16_t)(e / 8 * k);
    }
    const __m512i bit = _mm512_loadu_si512(begin), one = _mm512_set1_epi16(1);
    const __m512i word = _mm512_srli_epi16(bit, 4), left = _mm512_and_si512(bit, _mm512_set1_epi16(15));
    const __m512i rest = _mm512_sub_epi16(_mm512_set1_epi16(16), left), gap = _mm512_set1_epi16((short)(16 - k));
    __m512i lanes[2];
    for (int i = 0; i < 2; i++) { /* of the word that a state begins in, and of the next one */
        const __m512i of = i ? _mm512_add_epi16(word, one) : word;
        lanes[i] = _mm512_add_epi16(of, _mm512_loadu_si512(block));
        for (int r = 1; r < 3; r++)
            lanes[i] = _mm512_mask_add_epi16(lanes[i], _mm512_cmpge_epi16_mask(of, _mm512_set1_epi16((short)(r * k))), lanes[i], gap);
    }
    const __m128i unused = _mm_cvtsi32_si128(16 - w->state_bits);
    __m512i h[BLOCKS / 4], found[2][BLOCKS / 4];
    const int groups = (int)(last - first + 3) / 4;
    for (int g = 0; g < groups; g++) {
        const int64_t b = first + 4 * g;
        const int count = last - b < 4 ? (int)(last - b) : 4;
        const __mmask32 own = (__mmask32)((1u << count * k) - 1);
        __m512i words = _mm512_maskz_loadu_epi16(own, rows[0] + b * k), after = _mm512_setzero_si512();
        words = _mm512_inserti64x4(words, _mm512_castsi512_si256(_mm512_maskz_loadu_epi16(own, rows[1] + b * k)), 1);
        if (!by_rows) after = _mm512_maskz_loadu_epi16(own, rows[2] + b * k);
        const __m512i upper = _mm512_permutex2var_epi16(words, lanes[0], after);
        const __m512i lower = _mm512_permutex2var_epi16(words, lanes[1], after);
        const __m512i window = _mm512_or_si512(_mm512_sllv_epi16(upper, left), _mm512_srlv_epi16(lower, rest));
        const __m512i state = _mm512_srl_epi16(window, unused);
        h[g] = _mm512_add_epi16(_mm512_mullo_epi16(state, state), state);
    }
    for (int i = 0; i < 2; i++) { /* a plane fills half of the registers */
        __m512i plane[16];
        UNROLLED(16)
        for (int j = 0; j < 16; j++) plane[j] = _mm512_loadu_si512(planes + i * PAIRS + 32 * j);
        for (int g = 0; g < groups; g++) found[i][g] = look_up(_mm512_srli_epi16(h[g], 6), plane);
    }
    for (int g = 0; g < groups; g++) {
        const __m512i negative = _mm512_and_si512(h[g], _mm512_set1_epi16((short)0x8000));
        const __m512i one_of = _mm512_xor_si512(found[0][g], negative);
        __m128i pairs[2][4]; /* of each block the former and the latter half */
        _mm512_storeu_si512(pairs[0], _mm512_unpacklo_epi16(one_of, found[1][g]));
        _mm512_storeu_si512(pairs[1], _mm512_unpackhi_epi16(one_of, found[1][g]));
        for (int j = 0; j < 4 && first + 4 * g + j < last; j++) {
            const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(pairs[0][j]), pairs[1][j], 1);
            _mm512_storeu_ps(out + (4 * g + j) * TILE, _mm512_cvtph_ps(both));
        }
    }
}

#else

static const uint16_t *planes_of(const Weight *restrict w, uint16_t *restrict planes) {
    (void)w, (void)planes;
    return NULL;
}

#endif

static void decode_blocks(const Weight *restrict w, const uint16_t *restrict planes, int64_t row, int64_t first,
                          int64_t last, float *restrict out) {
#if defined(__AVX512BW__)
    if (planes) return decode_pairs(w, planes, row, first, last, out);
#else
    (void)planes;
#endif
    if (w->code == MAD) decode_code(w, row, first, last, out, MAD);
    else if (w->code == INST) decode_code(w, row, first, last, out, INST);
    else if (w->code == MCG) decode_code(w, row, first, last, out, MCG);
    else if (w->code == MUL1) decode_code(w, row, first, last, out, MUL1);
    else decode_code(w, row, first, last, out, HYB);
}

static int64_t until(int64_t first, int64_t blocks) { return first + BLOCKS < blocks ? first + BLOCKS : blocks; }

/* Rows start … stop -> out [stop − start, 16 · blocks] of `type`. */
void trellis_decode(const Weight *restrict w, int64_t start, int64_t stop, int type, void *restrict out, int threads) {
    uint16_t table[2 * PAIRS];
    const uint16_t *planes = planes_of(w, table);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = start; row < stop; row++)
        for (int64_t b = 0; b < w->blocks; b += BLOCKS) {
            const int64_t end = until(b, w->blocks);
            float values[COLUMNS];
            decode_blocks(w, planes, row, b, end, values);
            write_values(values, (end - b) * TILE, type, out, ((row - start) * w->blocks + b) * TILE);
        }
}

/* ---- products while decoding (GEMV), each code read once; sums in float32, in a fixed order ---- */

static float dot(const float *restrict a, const float *restrict b, int64_t n) {
    float sums[LANES] = {0}, sum = 0;
    for (int64_t i = 0; i < n; i += LANES)
        for (int l = 0; l < LANES; l++) sums[l] += a[i + l] * b[i + l];
    for (int l = 0; l < LANES; l++) sum += sums[l];
    return sum;
}

/* x float32 [tokens, 16 · blocks] -> y float32 [tokens, rows]. */
void trellis_multiply(const Weight *restrict w, const float *restrict x, int64_t tokens, float *restrict y, int threads) {
    const int64_t columns = w->blocks * TILE;
    uint16_t table[2 * PAIRS];
    const uint16_t *planes = planes_of(w, table);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < w->rows; row++) {
        for (int64_t t = 0; t < tokens; t++) y[t * w->rows + row] = 0;
        for (int64_t b = 0; b < w->blocks; b += BLOCKS) {
            const int64_t end = until(b, w->blocks);
            float values[COLUMNS];
            decode_blocks(w, planes, row, b, end, values);
            for (int64_t t = 0; t < tokens; t++)
                y[t * w->rows + row] += dot(values, x + t * columns + b * TILE, (end - b) * TILE);
        }
    }
}

/* x float32 [tokens, rows] -> y float32 [tokens, 16 · blocks]. Threads share the columns. */
void trellis_multiply_transposed(const Weight *restrict w, const float *restrict x, int64_t tokens, float *restrict y,
                                 int threads) {
    const int64_t columns = w->blocks * TILE;
    uint16_t table[2 * PAIRS];
    const uint16_t *planes = planes_of(w, table);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < w->blocks; b += BLOCKS) {
        const int64_t end = until(b, w->blocks), count = (end - b) * TILE;
        for (int64_t t = 0; t < tokens; t++) memset(y + t * columns + b * TILE, 0, (size_t)count * sizeof(float));
        for (int64_t row = 0; row < w->rows; row++) {
            float values[COLUMNS];
            decode_blocks(w, planes, row, b, end, values);
            for (int64_t t = 0; t < tokens; t++) {
                const float factor = x[t * w->rows + row];
                float *sums = y + t * columns + b * TILE;
                for (int64_t i = 0; i < count; i++) sums[i] += factor * values[i];
            }
        }
    }
}
