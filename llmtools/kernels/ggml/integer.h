/* y = x Wᵀ for few tokens by the processor's products of bytes (AVX-512 VNNI), whose sums are exact integers.
 *
 * For activations of half precision. Those of 32 columns are quantized to 16 bits (native.h), and v, what is stored of
 * one, is two signed bytes. All types are  weight = scale · code − shift,  with codes of 0 to 255, and with scales and
 * shifts for 16 columns or a multiple; a negative offset of codes, and that of the levels of IQ4, is in the shift. So
 *
 *     Σ weight · x = Σ over 16 columns of (scale · x_scale · Σ code · v − shift · x_scale · Σ v)
 *
 * Work goes 256 columns at a time, a block of the K-types or eight of the others: 16 scales and 16 shifts, a register
 * each, and four times 64 codes, which come out of the bytes in the order of the columns.
 */
#ifndef LLMTOOLS_GGML_INTEGER_H
#define LLMTOOLS_GGML_INTEGER_H

#include <stdlib.h>

#include "decode.h"

typedef struct {
    const uint8_t *blocks; /* [rows, ·], rows `stride` bytes apart */
    int64_t stride, columns;
    int kind; /* number of the type in files */
} Weight;     /* `_Weight` of native.py */

enum { SOME_TOKENS = 64 }; /* whose activations are integers at a time */

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

enum { SUPER = 256, CHUNK = 64, UNIT = 16, TOGETHER = 4, AHEAD = 2048 };
/* columns at a time; codes in a register; columns with one scale; tokens; bytes that are fetched before they are used */

typedef struct {
    int tokens;
    int64_t supers;    /* columns / SUPER, rounded up; zeros are added */
    int8_t *bytes;     /* [tokens, supers, 4, 2, CHUNK]: high bytes, low bytes */
    float *scale, *sum; /* [tokens, supers, 16]: of the activations of a unit; Σ v times that */
} Inputs;

typedef struct {
    __m512 scale, shift; /* of 16 units */
} Scales;

/* ---- scales: of 256 columns from block b on; `count` of the eight blocks are there, where blocks have 32 weights ---- */

/* Eight numbers, each for two units. */
static ALWAYS_INLINE __m512 twice(__m256 eight) {
    const __m512i pairs = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(pairs, _mm512_castps256_ps512(eight));
}

/* The float16 numbers at byte `at` of `count` blocks, `bytes` apart. */
static ALWAYS_INLINE __m512 halves(const uint8_t *b, int bytes, int at, int count) {
    uint16_t h[8] = {0};
    for (int i = 0; i < count; i++) memcpy(h + i, b + i * bytes + at, 2);
    return twice(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)h)));
}

static ALWAYS_INLINE __m512 units(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }

static ALWAYS_INLINE Scales offset(__m512 scale, float by) {
    return (Scales){scale, _mm512_mul_ps(scale, _mm512_set1_ps(by))};
}

static ALWAYS_INLINE Scales scales_q4_0(const uint8_t *b, int count) { return offset(halves(b, 18, 0, count), 8); }

static ALWAYS_INLINE Scales scales_q4_1(const uint8_t *b, int count) {
    const __m512 least = halves(b, 20, 2, count);
    return (Scales){halves(b, 20, 0, count), _mm512_sub_ps(_mm512_setzero_ps(), least)};
}

static ALWAYS_INLINE Scales scales_q8_0(const uint8_t *b, int count) { return offset(halves(b, 34, 0, count), 128); }

static ALWAYS_INLINE Scales scales_iq4_nl(const uint8_t *b, int count) { return offset(halves(b, 18, 0, count), 128); }

static ALWAYS_INLINE Scales scales_q2_k(const uint8_t *b, int count) {
    const __m128i both = _mm_loadu_si128((const __m128i *)b), low = _mm_set1_epi8(15);
    (void)count;
    return (Scales){_mm512_mul_ps(_mm512_set1_ps(half_at(b + 80)), units(_mm_and_si128(both, low))),
                    _mm512_mul_ps(_mm512_set1_ps(half_at(b + 82)), units(_mm_and_si128(_mm_srli_epi16(both, 4), low)))};
}

static ALWAYS_INLINE Scales scales_q3_k(const uint8_t *b, int count) {
    uint64_t low, fours = 0x0f0f0f0f0f0f0f0f;
    uint32_t high, twos = 0x03030303;
    (void)count;
    memcpy(&low, b + 96, 8);
    memcpy(&high, b + 104, 4);
    const uint64_t first = (high & twos) | (uint64_t)(high >> 2 & twos) << 32;
    const uint64_t last = (high >> 4 & twos) | (uint64_t)(high >> 6 & twos) << 32;
    const __m128i six = _mm_set_epi64x((int64_t)((low >> 4 & fours) | last << 4), (int64_t)((low & fours) | first << 4));
    const __m512 scale = _mm512_sub_ps(units(six), _mm512_set1_ps(32));
    return offset(_mm512_mul_ps(_mm512_set1_ps(half_at(b + 108)), scale), 4);
}

/* As `sixes` of decode.h. */
static ALWAYS_INLINE Scales scales_q4_k(const uint8_t *b, int count) {
    uint32_t first, second, third;
    (void)count;
    memcpy(&first, b + 4, 4);
    memcpy(&second, b + 8, 4);
    memcpy(&third, b + 12, 4);
    const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x03030303;
    const uint64_t scale = (first & six) | (uint64_t)((third & four) | (first >> 6 & two) << 4) << 32;
    const uint64_t least = (second & six) | (uint64_t)((third >> 4 & four) | (second >> 6 & two) << 4) << 32;
    const __m128i s = _mm_cvtsi64_si128((int64_t)scale), m = _mm_cvtsi64_si128((int64_t)least);
    return (Scales){_mm512_mul_ps(_mm512_set1_ps(half_at(b)), units(_mm_unpacklo_epi8(s, s))),
                    _mm512_mul_ps(_mm512_set1_ps(half_at(b + 2)), units(_mm_unpacklo_epi8(m, m)))};
}

static ALWAYS_INLINE Scales scales_q5_k(const uint8_t *b, int count) { return scales_q4_k(b, count); }

static ALWAYS_INLINE Scales scales_q6_k(const uint8_t *b, int count) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)(b + 192));
    const __m512 scale = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    (void)count;
    return offset(_mm512_mul_ps(_mm512_set1_ps(half_at(b + 208)), scale), 32);
}

static ALWAYS_INLINE Scales scales_iq4_xs(const uint8_t *b, int count) {
    const int tops = b[2] | b[3] << 8;
    float scale[8];
    (void)count;
    for (int g = 0; g < 8; g++)
        scale[g] = (float)((((b[4 + g / 2] >> 4 * (g % 2)) & 15) | ((tops >> 2 * g) & 3) << 4) - 32);
    return offset(_mm512_mul_ps(_mm512_set1_ps(half_at(b)), twice(_mm256_loadu_ps(scale))), 128);
}

/* ---- codes: those of columns 64·j to 64·j + 63; `second`: block 2·j + 1 is there, where blocks have 32 weights ---- */

static ALWAYS_INLINE __m512i quarters(int64_t a, int64_t b, int64_t c, int64_t d) {
    return _mm512_setr_epi64(a, a, b, b, c, c, d, d);
}

static ALWAYS_INLINE __m512i both_halves(const uint8_t *p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
}

/* Numbers of 16 bits of which each has the value i. */
static ALWAYS_INLINE int64_t each(int64_t i) { return i * 0x0001000100010001; }

/* Nibbles of the 16 bytes at p, low ones before high ones, then those at q. */
static ALWAYS_INLINE __m512i two_runs(const uint8_t *p, const uint8_t *q) {
    const __m512i run = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)), 0xff00,
                                                    _mm_loadu_si128((const __m128i *)q));
    return _mm512_and_si512(_mm512_srlv_epi16(run, quarters(0, each(4), 0, each(4))), _mm512_set1_epi8(15));
}

/* Fields of `bits` bits of the 32 bytes at p: those from bit `at` on, then those above them. */
static ALWAYS_INLINE __m512i two_planes(const uint8_t *p, int bits, int at) {
    const __m512i shift = quarters(each(at), each(at), each(at + bits), each(at + bits));
    return _mm512_and_si512(_mm512_srlv_epi16(both_halves(p), shift), _mm512_set1_epi8((char)((1 << bits) - 1)));
}

/* codes + `more` where the bits 2·j and 2·j + 1 of the 32 bytes at p are set, for the first and the last 32 codes. */
static ALWAYS_INLINE __m512i with_tops(__m512i codes, const uint8_t *p, int j, int more) {
    const int64_t ones = 0x0101010101010101;
    const __m512i bits = quarters(ones << 2 * j, ones << 2 * j, ones << (2 * j + 1), ones << (2 * j + 1));
    const __mmask64 set = _mm512_test_epi8_mask(both_halves(p), bits);
    return _mm512_mask_add_epi8(codes, set, codes, _mm512_set1_epi8((char)more));
}

static ALWAYS_INLINE __m512i iq4_codes(__m512i codes) {
    const __m128i levels = _mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, (char)129, (char)141, (char)153, (char)166,
                                         (char)181, (char)197, (char)217, (char)241); /* iq4_levels + 128 */
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(levels), codes);
}

static ALWAYS_INLINE __m512i codes_q4_0(const uint8_t *b, int j, int second) {
    const uint8_t *p = b + 36 * j + 2;
    return two_runs(p, second ? p + 18 : p);
}

static ALWAYS_INLINE __m512i codes_q4_1(const uint8_t *b, int j, int second) {
    const uint8_t *p = b + 40 * j + 4;
    return two_runs(p, second ? p + 20 : p);
}

static ALWAYS_INLINE __m512i codes_q8_0(const uint8_t *b, int j, int second) {
    const uint8_t *p = b + 68 * j + 2;
    const __m256i low = _mm256_loadu_si256((const __m256i *)p);
    const __m256i high = _mm256_loadu_si256((const __m256i *)(second ? p + 34 : p));
    return _mm512_xor_si512(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), _mm512_set1_epi8((char)128));
}

static ALWAYS_INLINE __m512i codes_iq4_nl(const uint8_t *b, int j, int second) {
    return iq4_codes(codes_q4_0(b, j, second));
}

static ALWAYS_INLINE __m512i codes_q2_k(const uint8_t *b, int j, int second) {
    (void)second;
    return two_planes(b + 16 + 32 * (j / 2), 2, 4 * (j % 2));
}

static ALWAYS_INLINE __m512i codes_q3_k(const uint8_t *b, int j, int second) {
    (void)second;
    return with_tops(two_planes(b + 32 + 32 * (j / 2), 2, 4 * (j % 2)), b, j, 4);
}

static ALWAYS_INLINE __m512i codes_q4_k(const uint8_t *b, int j, int second) {
    (void)second;
    return two_planes(b + 16 + 32 * j, 4, 0);
}

static ALWAYS_INLINE __m512i codes_q5_k(const uint8_t *b, int j, int second) {
    (void)second;
    return with_tops(two_planes(b + 48 + 32 * j, 4, 0), b + 16, j, 16);
}

static ALWAYS_INLINE __m512i codes_q6_k(const uint8_t *b, int j, int second) {
    const __m512i low = _mm512_srli_epi16(_mm512_loadu_si512(b + 64 * (j / 2)), 4 * (j % 2));
    const __m512i high = two_planes(b + 128 + 32 * (j / 2), 2, 4 * (j % 2));
    (void)second;
    return _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi8(15)), _mm512_slli_epi16(high, 4));
}

static ALWAYS_INLINE __m512i codes_iq4_xs(const uint8_t *b, int j, int second) {
    (void)second;
    return iq4_codes(two_runs(b + 8 + 32 * j, b + 24 + 32 * j));
}

/* ---- activations ---- */

static int goes_by_integers(int type) { return type != FLOAT32; }

/* 32 activations as bytes; whether all are finite. */
static int quantize_run(const float *x, int8_t *bytes, float *scale, float *sum) {
    int16_t quantized[32];
    if (!quantize_activations(x, 32, quantized, scale)) return 0;
    scale[1] = scale[0];
    for (int u = 0; u < 2; u++) {
        int32_t total = 0;
        for (int i = 0; i < UNIT; i++) total += quantized[UNIT * u + i];
        sum[u] = (float)total * *scale;
        const __m256i v = _mm256_loadu_si256((const __m256i *)(quantized + UNIT * u));
        const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
        const __m256i high = _mm256_srai_epi16(_mm256_sub_epi16(v, low), 8);
        _mm_storeu_si128((__m128i *)(bytes + UNIT * u), _mm256_cvtepi16_epi8(high));
        _mm_storeu_si128((__m128i *)(bytes + CHUNK + UNIT * u), _mm256_cvtepi16_epi8(low));
    }
    return 1;
}

/* x [tokens, columns]. Returns whether it could be done; `bytes` is to be freed either way. */
static int read_inputs(const Weight *w, const float *x, int tokens, Inputs *to) {
    const int64_t supers = (w->columns + SUPER - 1) / SUPER;
    *to = (Inputs){tokens, supers, NULL, NULL, NULL};
    const size_t bytes = (size_t)(tokens * supers * 2 * SUPER), units = (size_t)(tokens * supers * 16);
    to->bytes = aligned_alloc(64, bytes + 2 * units * sizeof(float));
    if (!to->bytes) return 0;
    memset(to->bytes, 0, bytes + 2 * units * sizeof(float));
    to->scale = (float *)(to->bytes + bytes);
    to->sum = to->scale + units;
    for (int t = 0; t < tokens; t++)
        for (int64_t c = 0; c < w->columns; c += 32) {
            const int64_t at = t * supers * 16 + c / UNIT;
            int8_t *own = to->bytes + t * supers * 2 * SUPER + c / CHUNK * 2 * CHUNK + c % CHUNK;
            if (!quantize_run(x + t * w->columns + c, own, to->scale + at, to->sum + at)) return 0;
        }
    return 1;
}

/* ---- products ---- */

/* Σ code · v of each four columns. */
static ALWAYS_INLINE __m512i dots(__m512i codes, const int8_t *bytes) {
    const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_load_si512(bytes));
    return _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), codes, _mm512_load_si512(bytes + CHUNK));
}

/* The scale of the unit that each four of the codes 64·j … belong to. */
static ALWAYS_INLINE __m512 spread(__m512 scale, int j) {
    const __m512i unit = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(_mm512_add_epi32(unit, _mm512_set1_epi32(4 * j)), scale);
}

/* For each type: a row with `tokens` tokens from `first` on, 256 columns at a time, of which the last may be fewer. */
#define PRODUCT(NUMBER, NAME, WEIGHTS, BYTES)                                                                          \
    static ALWAYS_INLINE void super_##NAME(const uint8_t *b, int count, int chunks, const Inputs *x, int64_t s,        \
                                           int first, int tokens, __m512 *total) {                                     \
        const Scales own = scales_##NAME(b, count);                                                                    \
        __m512 by[TOGETHER];                                                                                           \
        _Pragma("GCC unroll 4") for (int t = 0; t < tokens; t++) {                                                     \
            const int64_t at = ((first + t) * x->supers + s) * 16;                                                     \
            by[t] = _mm512_mul_ps(own.scale, _mm512_loadu_ps(x->scale + at));                                          \
            total[t] = _mm512_fnmadd_ps(own.shift, _mm512_loadu_ps(x->sum + at), total[t]);                            \
        }                                                                                                              \
        _Pragma("GCC unroll 4") for (int j = 0; j < chunks; j++) {                                                     \
            const __m512i codes = codes_##NAME(b, j, 2 * j + 1 < count);                                               \
            _Pragma("GCC unroll 4") for (int t = 0; t < tokens; t++) {                                                 \
                const __m512i dot = dots(codes, x->bytes + (((first + t) * x->supers + s) * 4 + j) * 2 * CHUNK);       \
                total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), spread(by[t], j), total[t]);                       \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    static ALWAYS_INLINE void tokens_##NAME(const uint8_t *b, int64_t columns, const Inputs *x, int first, int tokens, \
                                            float *sums) {                                                             \
        const int bytes = SUPER / WEIGHTS * BYTES;                                                                     \
        const int64_t whole = columns / SUPER;                                                                         \
        __m512 total[TOGETHER];                                                                                        \
        _Pragma("GCC unroll 4") for (int t = 0; t < tokens; t++) total[t] = _mm512_setzero_ps();                       \
        for (int64_t s = 0; s < whole; s++, b += bytes) {                                                              \
            for (int ahead = 0; ahead < bytes; ahead += 64) _mm_prefetch((const char *)b + AHEAD + ahead, _MM_HINT_T0); \
            super_##NAME(b, 8, 4, x, s, first, tokens, total);                                                         \
        }                                                                                                              \
        const int left = (int)(columns % SUPER / 32);                                                                  \
        if (WEIGHTS == 32 && left) super_##NAME(b, left, (left + 1) / 2, x, whole, first, tokens, total);              \
        _Pragma("GCC unroll 4") for (int t = 0; t < tokens; t++) sums[first + t] = _mm512_reduce_add_ps(total[t]);     \
    }                                                                                                                  \
    static void row_##NAME(const uint8_t *b, int64_t columns, const Inputs *x, float *sums) {                          \
        int t = 0;                                                                                                     \
        for (; t + TOGETHER <= x->tokens; t += TOGETHER) tokens_##NAME(b, columns, x, t, TOGETHER, sums);              \
        for (; t < x->tokens; t++) tokens_##NAME(b, columns, x, t, 1, sums);                                           \
    }
TYPES(PRODUCT)
#undef PRODUCT

/* sums[t] = Σ_c weight[row, c] · x[t, c]. */
static void integer_products(const Weight *w, int64_t row, const Inputs *x, float *sums) {
    const uint8_t *b = w->blocks + row * w->stride;
#define CASE(NUMBER, NAME, WEIGHTS, BYTES)                                                                             \
    case NUMBER: row_##NAME(b, w->columns, x, sums); break;
    switch (w->kind) { TYPES(CASE) }
#undef CASE
}

#else

typedef struct {
    int8_t *bytes;
} Inputs;

static int goes_by_integers(int type) {
    (void)type;
    return 0;
}

static int read_inputs(const Weight *w, const float *x, int tokens, Inputs *to) {
    (void)w, (void)x, (void)tokens;
    to->bytes = NULL;
    return 0;
}

static void integer_products(const Weight *w, int64_t row, const Inputs *x, float *sums) {
    (void)w, (void)row, (void)x, (void)sums;
}

#endif

#endif
