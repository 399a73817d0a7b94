/* ggml's blocks with AVX-512, 256 columns at a time: a block of the K-types, or eight of the others.
 *
 * All types are  weight = scale · code − shift,  with codes of 0 to 255, and with scales and shifts for 16 columns, a
 * unit, or for a multiple: so 16 scales and 16 shifts, a register each, and four times 64 codes, in the order of the
 * columns. Where codes have an offset (also the levels of IQ4, which are signed), the shift is the scaled offset.
 *
 * Rows are decoded by the operations of reference.py in their order: scale · (code − offset), or scale · code − shift.
 */
#ifndef LLMTOOLS_GGML_CODES_H
#define LLMTOOLS_GGML_CODES_H

#include "decode.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

enum { SUPER = 256, CHUNK = 64, UNIT = 16 }; /* columns at a time; codes in a register; columns with one scale */

typedef struct {
    __m512 scale, shift; /* of 16 units */
} Scales;

/* ---- scales: of 256 columns from block b on; of blocks of 32 weights `count` are there, at most eight ---- */

/* Eight numbers, each for two units. */
static ALWAYS_INLINE __m512 twice(__m256 eight) {
    const __m512i pairs = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(pairs, _mm512_castps256_ps512(eight));
}

/* The float16 numbers at byte `at` of `count` blocks, `bytes` apart. */
static ALWAYS_INLINE __m512 halves(const uint8_t *b, int bytes, int at, int count) {
    uint16_t h[8] = {0};
    for (int i = 0; i < 8 && i < count; i++) memcpy(h + i, b + i * bytes + at, 2);
    return twice(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)h)));
}

static ALWAYS_INLINE __m512 units(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }

static ALWAYS_INLINE Scales offset(__m512 scale, float by) {
    return (Scales){scale, _mm512_mul_ps(scale, _mm512_set1_ps(by))};
}

static ALWAYS_INLINE Scales scales_q4_0(const uint8_t *b, int count) { return offset(halves(b, 18, 0, count), 8); }

static ALWAYS_INLINE Scales minimum(const uint8_t *b, int bytes, int count) {
    const __m512 least = halves(b, bytes, 2, count);
    return (Scales){halves(b, bytes, 0, count), _mm512_xor_ps(least, _mm512_set1_ps(-0.0f))}; /* so that 0 becomes −0 */
}

static ALWAYS_INLINE Scales scales_q4_1(const uint8_t *b, int count) { return minimum(b, 20, count); }

static ALWAYS_INLINE Scales scales_q5_0(const uint8_t *b, int count) { return offset(halves(b, 22, 0, count), 16); }

static ALWAYS_INLINE Scales scales_q5_1(const uint8_t *b, int count) { return minimum(b, 24, count); }

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
    const uint64_t left = (low & fours) | first << 4, right = (low >> 4 & fours) | last << 4;
    const __m128i six = _mm_set_epi64x((int64_t)right, (int64_t)left);
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
    uint16_t tops;
    uint32_t lows;
    memcpy(&tops, b + 2, 2);
    memcpy(&lows, b + 4, 4);
    const __m256i twos = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14), fours = _mm256_slli_epi32(twos, 1);
    const __m256i low = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int)lows), fours), _mm256_set1_epi32(15));
    const __m256i top = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(tops), twos), _mm256_set1_epi32(3));
    const __m256i six = _mm256_or_si256(low, _mm256_slli_epi32(top, 4));
    const __m256 scale = _mm256_cvtepi32_ps(_mm256_sub_epi32(six, _mm256_set1_epi32(32)));
    (void)count;
    return offset(_mm512_mul_ps(_mm512_set1_ps(half_at(b)), twice(scale)), 128);
}

/* ---- codes: those of columns 64·j to 64·j + 63; of blocks of 32 weights, `second`: block 2·j + 1 is there ---- */

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

/* Those of blocks 2·j and 2·j + 1, of `bytes` bytes, whose nibbles begin at byte `at`; of the first alone without second. */
static ALWAYS_INLINE __m512i runs_at(const uint8_t *b, int bytes, int at, int j, int second) {
    const uint8_t *p = b + 2 * bytes * j + at;
    return two_runs(p, second ? p + bytes : p);
}

static ALWAYS_INLINE __m512i codes_q4_0(const uint8_t *b, int j, int second) { return runs_at(b, 18, 2, j, second); }

static ALWAYS_INLINE __m512i codes_q4_1(const uint8_t *b, int j, int second) { return runs_at(b, 20, 4, j, second); }

/* As runs_at, of codes of 5 bits: their top ones are 4 bytes from byte `at` on, before the nibbles. */
static ALWAYS_INLINE __m512i fives_at(const uint8_t *b, int bytes, int at, int j, int second) {
    const uint8_t *p = b + 2 * bytes * j + at;
    uint32_t first, last;
    memcpy(&first, p, 4);
    memcpy(&last, second ? p + bytes : p, 4);
    const __m512i low = runs_at(b, bytes, at + 4, j, second);
    return _mm512_mask_add_epi8(low, first | (uint64_t)last << 32, low, _mm512_set1_epi8(16));
}

static ALWAYS_INLINE __m512i codes_q5_0(const uint8_t *b, int j, int second) { return fives_at(b, 22, 2, j, second); }

static ALWAYS_INLINE __m512i codes_q5_1(const uint8_t *b, int j, int second) { return fives_at(b, 24, 4, j, second); }

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

/* ---- rows ---- */

/* 16 weights, rounded to float16 or bfloat16. The instruction for bfloat16 takes denormals for zero; there are none, since
 * scales are float16 and no weight but zero is below 2^-24. */
static ALWAYS_INLINE __m256i rounded(__m512 value, int type) {
    if (type == FLOAT16) return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(value);
#else
    const __m512i u = _mm512_castps_si512(value), most = _mm512_set1_epi32(0x7fff);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, most)), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(half, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}

/* The weights of 16 codes, as float32. */
static ALWAYS_INLINE __m512 weights(__m512 code, float scale, float shift, int offset) {
    const __m512 by = _mm512_set1_ps(scale);
    return offset < 0 ? _mm512_sub_ps(_mm512_mul_ps(by, code), _mm512_set1_ps(shift))
                      : _mm512_mul_ps(by, _mm512_sub_ps(code, _mm512_set1_ps((float)offset)));
}

/* `columns` weights of a chunk of 64 codes below 16, of which each 32 have one scale: the 16 values are formed once, and
 * looked up. */
static ALWAYS_INLINE void look_up(__m512i codes, const float *scale, const float *shift, int offset, int columns,
                                  int type, void *out, int64_t at) {
    const __m512 all = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m256i parts[] = {_mm512_castsi512_si256(codes), _mm512_extracti64x4_epi64(codes, 1)};
#pragma GCC unroll 2
    for (int h = 0; h < columns / 32; h++, at += 32) {
        const __m512 values = weights(all, scale[2 * h], shift[2 * h], offset);
        if (type == FLOAT32) {
            const __m512i first = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(parts[h]));
            const __m512i second = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(parts[h], 1));
            _mm512_storeu_ps((float *)out + at, _mm512_permutexvar_ps(first, values));
            _mm512_storeu_ps((float *)out + at + UNIT, _mm512_permutexvar_ps(second, values));
        } else {
            const __m512i table = _mm512_broadcast_i64x4(rounded(values, type));
            _mm512_storeu_si512((uint16_t *)out + at, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(parts[h]), table));
        }
    }
}

/* `columns` weights of a chunk of 64 codes. */
static ALWAYS_INLINE void compute(__m512i codes, const float *scale, const float *shift, int offset, int columns,
                                    int type, void *out, int64_t at) {
    const __m128i parts[] = {_mm512_castsi512_si128(codes), _mm512_extracti32x4_epi32(codes, 1),
                             _mm512_extracti32x4_epi32(codes, 2), _mm512_extracti32x4_epi32(codes, 3)};
#pragma GCC unroll 4
    for (int u = 0; u < columns / UNIT; u++) {
        const __m512 values = weights(units(parts[u]), scale[u], shift[u], offset);
        if (type == FLOAT32) _mm512_storeu_ps((float *)out + at + UNIT * u, values);
        else _mm256_storeu_si256((__m256i *)((uint16_t *)out + at + UNIT * u), rounded(values, type));
    }
}

/* For each type: a row. */
#define ROW(NUMBER, NAME, WEIGHTS, BYTES, OFFSET)                                                                      \
    static ALWAYS_INLINE void part_##NAME(const uint8_t *b, int count, int type, void *out, int64_t at) {              \
        const Scales own = scales_##NAME(b, count);                                                                    \
        float scale[UNIT], shift[UNIT];                                                                                \
        _mm512_storeu_ps(scale, own.scale);                                                                            \
        _mm512_storeu_ps(shift, own.shift);                                                                            \
        _Pragma("GCC unroll 4") for (int j = 0; j < (count + 1) / 2; j++) {                                            \
            const int second = 2 * j + 1 < count;                                                                      \
            const __m512i codes = codes_##NAME(b, j, second);                                                          \
            const int columns = second ? CHUNK : CHUNK / 2;                                                            \
            const int64_t to = at + CHUNK * j;                                                                         \
            if (NUMBER == 2 || NUMBER == 3 || NUMBER == 12) /* Q4_0, Q4_1, Q4_K */                                     \
                look_up(codes, scale + 4 * j, shift + 4 * j, OFFSET, columns, type, out, to);                          \
            else compute(codes, scale + 4 * j, shift + 4 * j, OFFSET, columns, type, out, to);                         \
        }                                                                                                              \
    }                                                                                                                  \
    static ALWAYS_INLINE void whole_##NAME(const uint8_t *b, int64_t columns, int type, void *out) {                   \
        int64_t at = 0;                                                                                                \
        for (; at + SUPER <= columns; at += SUPER, b += SUPER / WEIGHTS * BYTES) part_##NAME(b, 8, type, out, at);     \
        if (WEIGHTS == 32 && at < columns) part_##NAME(b, (int)(columns - at) / 32, type, out, at);                    \
    }                                                                                                                  \
    static void decode_##NAME(const uint8_t *b, int64_t columns, int type, void *out) {                                \
        if (type == FLOAT32) whole_##NAME(b, columns, FLOAT32, out);                                                   \
        else if (type == BFLOAT16) whole_##NAME(b, columns, BFLOAT16, out);                                            \
        else whole_##NAME(b, columns, FLOAT16, out);                                                                   \
    }
TYPES(ROW)
#undef ROW

#define DECODES 1

#else

#define DECODES 0

#endif

#endif
