/* Rows of weights stored as small codes in groups:   weight = (level[code] − zero) · scale,   rounded once.
 *
 * Codes are a little-endian bit stream along each row (kernels/bits); scale and zero belong to a group of consecutive
 * columns. For a uniform grid level[k] = k; for a codebook zero = 0 and the levels are its table. A group has at most 16
 * values, so they are computed and rounded once, and each code then costs a look-up. With AVX-512 a look-up takes 32
 * codes at once: bytes are brought under their lanes, shifted, and index a register that holds the table. AVX2 and NEON
 * look up the two bytes of a 16-bit result, 32 and 16 codes at once, and NEON the four of a float; otherwise the compiler
 * does what it can. Codes of 8 bits are computed one by one.
 *
 * Work goes in runs of 32 codes, which are 4·bits bytes; they start at multiples of 8 columns, where codes start bytes.
 * Runs at the edge of a group are computed whole and stored in part, so a group may have any size.
 */
#ifndef LLMTOOLS_GROUPED_DECODE_H
#define LLMTOOLS_GROUPED_DECODE_H

#include <math.h>

#include "../native.h"

enum { RUN = 32, GROUPS = 64 }; /* codes in a run; groups whose scales and zeros are read at a time */

typedef struct {
    const uint8_t *codes; /* [rows, code_bytes], rows code_stride bytes apart */
    int64_t code_stride, code_bytes;
    const void *scales; /* [rows, groups] of scale_type, rows scale_stride elements apart */
    int64_t scale_stride;
    int scale_type;
    const uint8_t *zeros; /* [rows, zero_bytes], a bit stream along the groups, or NULL: `zero` for all */
    int64_t zero_stride, zero_bytes;
    float zero;
    int bits;
    int64_t group, columns;
    const float *table;  /* a codebook of 2^bits levels, or NULL: level[k] = k */
    float levels[16];    /* `prepare` fills these: the level of code k at k, k + 2^bits, … */
    float normal;        /* |scale| from here up makes no value but zero denormal */
} Weight;                /* `_Weight` of __init__.py */

/* What is computed from the rest once a call. Repeated levels save clearing the bits above a code. */
static void prepare(Weight *w) {
    float least = w->table ? INFINITY : 1; /* of |level − zero|; zeros of uniform grids are whole numbers */
    for (int k = 0; k < 16 && w->bits <= 4; k++) {
        const int code = k & ((1 << w->bits) - 1);
        const float level = w->table ? w->table[code] : (float)code, size = fabsf(level);
        w->levels[k] = level;
        least = size > 0 && size < least ? size : least;
    }
    w->normal = 0x1p-125f / least;
}

/* ---- a run of codes: p points to its 4·bits bytes, of which `left` may be read; the rest count as zero ---- */

static ALWAYS_INLINE void unpack(const uint8_t *p, int64_t left, int bits, uint8_t *restrict codes) {
    uint8_t whole[4 * 8] = {0};
    if (left < 4 * bits) {
        memcpy(whole, p, (size_t)left);
        p = whole;
    }
    if (bits == 8) {
        memcpy(codes, p, RUN);
    } else if (bits == 4) {
        for (int i = 0; i < 16; i++) {
            codes[2 * i] = p[i] & 15;
            codes[2 * i + 1] = p[i] >> 4;
        }
    } else if (bits == 2) {
        for (int i = 0; i < 8; i++)
            for (int k = 0; k < 4; k++) codes[4 * i + k] = (p[i] >> 2 * k) & 3;
    } else {
        for (int i = 0; i < 4; i++) {
            const uint32_t eight = p[3 * i] | (uint32_t)p[3 * i + 1] << 8 | (uint32_t)p[3 * i + 2] << 16;
            for (int k = 0; k < 8; k++) codes[8 * i + k] = (eight >> 3 * k) & 7;
        }
    }
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)

/* How codes come out of 16 bytes, once these are in each quarter of a register: a shuffle brings the byte in which a code
 * begins, and the next, under its lane, and a shift drops the bits below it. Higher bits stay. `half` is for 32 lanes of
 * 16 bits, `full` for the first and the last 16 codes in lanes of 32. */
typedef struct {
    __m512i half, half_shift, full[2], full_shift[2];
} Unpacking;

typedef __m512i Table; /* 32 halves or 16 floats */

/* As constants: computed in a loop they took longer than a row. X takes the number of a code. */
#define EIGHT(X, B, i) X(B, i), X(B, i + 1), X(B, i + 2), X(B, i + 3), X(B, i + 4), X(B, i + 5), X(B, i + 6), X(B, i + 7)
#define HALF(X, B, i) {EIGHT(X, B, i), EIGHT(X, B, i + 8)}
#define WHOLE(X, B) {EIGHT(X, B, 0), EIGHT(X, B, 8), EIGHT(X, B, 16), EIGHT(X, B, 24)}
#define BYTE(B, i) ((i) * (B) / 8)
#define NEXT(B, i) ((BYTE(B, i) + 1) & 15)
#define BYTES(B, i) (uint32_t)(BYTE(B, i) | NEXT(B, i) << 8)
#define SHIFT(B, i) ((i) * (B) % 8)
#define UNPACKING(B)                                                                                                   \
    {                                                                                                                  \
        WHOLE(BYTES, B), WHOLE(SHIFT, B), {HALF(BYTES, B, 0), HALF(BYTES, B, 16)}, {                                   \
            HALF(SHIFT, B, 0), HALF(SHIFT, B, 16)                                                                      \
        }                                                                                                              \
    }

static const struct {
    uint16_t half[32], half_shift[32];
    uint32_t full[2][16], full_shift[2][16];
} unpackings[] = {UNPACKING(2), UNPACKING(3), UNPACKING(4)};

static ALWAYS_INLINE Unpacking unpacking(int bits) {
    const int at = bits == 8 ? 0 : bits - 2; /* 8 bits need none */
    return (Unpacking){_mm512_loadu_si512(unpackings[at].half),
                       _mm512_loadu_si512(unpackings[at].half_shift),
                       {_mm512_loadu_si512(unpackings[at].full[0]), _mm512_loadu_si512(unpackings[at].full[1])},
                       {_mm512_loadu_si512(unpackings[at].full_shift[0]),
                        _mm512_loadu_si512(unpackings[at].full_shift[1])}};
}

static ALWAYS_INLINE __m512i read_run(const uint8_t *p, int64_t left) {
    return _mm512_broadcast_i32x4(left >= 16 ? _mm_loadu_si128((const __m128i *)p)
                                             : _mm_maskz_loadu_epi8((__mmask16)((1u << left) - 1), p));
}

static ALWAYS_INLINE __m512i half_lanes(__m512i run, const Unpacking *how) {
    return _mm512_srlv_epi16(_mm512_shuffle_epi8(run, how->half), how->half_shift);
}

static ALWAYS_INLINE __m512i full_lanes(__m512i run, const Unpacking *how, int which) {
    return _mm512_srlv_epi32(_mm512_shuffle_epi8(run, how->full[which]), how->full_shift[which]);
}

static ALWAYS_INLINE void unpack_floats(const uint8_t *p, int64_t left, int bits, const Unpacking *how,
                                        float *restrict codes) {
    if (bits == 8) {
        uint8_t bytes[RUN];
        unpack(p, left, bits, bytes);
        for (int i = 0; i < RUN; i++) codes[i] = (float)bytes[i];
        return;
    }
    const __m512i run = read_run(p, left), most = _mm512_set1_epi32((1 << bits) - 1);
    for (int i = 0; i < 2; i++)
        _mm512_storeu_ps(codes + 16 * i, _mm512_cvtepi32_ps(_mm512_and_si512(full_lanes(run, how, i), most)));
}

static ALWAYS_INLINE Table make_table(const Weight *w, float scale, float zero, int type) {
    const __m512 level = _mm512_loadu_ps(w->levels);
    const __m512 value = _mm512_mul_ps(_mm512_sub_ps(level, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    if (type == FLOAT32) return _mm512_castps_si512(value);
    if (type == FLOAT16) return _mm512_broadcast_i64x4(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#ifdef __AVX512BF16__ /* rounds to nearest even, but takes denormals for zero */
    if (fabsf(scale) >= w->normal) return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(value));
#endif
    const __m512i u = _mm512_castps_si512(value), one = _mm512_set1_epi32(1), most = _mm512_set1_epi32(0x7fff);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), one);
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, most)), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i half = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(half));
}

/* Writes lanes [from, to) of the run to out[from … to). */
static ALWAYS_INLINE void look_up(const uint8_t *p, int64_t left, int bits, const Unpacking *how, Table table, int type,
                                  void *out, int from, int to) {
    (void)bits;
    const __m512i run = read_run(p, left);
    const uint32_t lanes = (uint32_t)((1ull << to) - (1ull << from));
    if (type == FLOAT32) {
        const __m512i first = _mm512_permutexvar_epi32(full_lanes(run, how, 0), table);
        const __m512i second = _mm512_permutexvar_epi32(full_lanes(run, how, 1), table);
        if (to - from == RUN) {
            _mm512_storeu_si512(out, first);
            _mm512_storeu_si512((float *)out + 16, second);
        } else {
            _mm512_mask_storeu_epi32(out, (__mmask16)lanes, first);
            _mm512_mask_storeu_epi32((float *)out + 16, (__mmask16)(lanes >> 16), second);
        }
    } else {
        const __m512i found = _mm512_permutexvar_epi16(half_lanes(run, how), table);
        if (to - from == RUN) _mm512_storeu_si512(out, found);
        else _mm512_mask_storeu_epi16(out, lanes, found);
    }
}

#else

typedef struct {
    int bits;
} Unpacking;

typedef struct { /* either is used */
    uint16_t half[16];
#if defined(__AVX2__)
    __m256 low, high; /* in registers */
#else
    float full[16];
#endif
} Table;

static ALWAYS_INLINE Unpacking unpacking(int bits) { return (Unpacking){bits}; }

#if defined(__AVX2__)

/* Codes i … i + 7 of a run in the lowest bits of lanes, with the codes after them above; four bytes may be read at each. */
static ALWAYS_INLINE __m256i eight_lanes(const uint8_t *p, int bits, int i) {
    uint32_t eight;
    memcpy(&eight, p + i / 8 * bits, sizeof eight);
    const __m256i shift = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
    return _mm256_srlv_epi32(_mm256_set1_epi32((int)eight), shift);
}

/* Where the bytes of a run may be read by fours: there, or in `whole`. */
static ALWAYS_INLINE const uint8_t *readable(const uint8_t *p, int64_t left, int bits, uint8_t whole[RUN / 2 + 4]) {
    const int64_t bytes = RUN / 8 * bits;
    if (left >= bytes + 4) return p;
    return memcpy(memset(whole, 0, RUN / 2 + 4), p, (size_t)(left < bytes ? left : bytes));
}

#endif

static ALWAYS_INLINE void unpack_floats(const uint8_t *p, int64_t left, int bits, const Unpacking *how,
                                        float *restrict codes) {
    (void)how;
#if defined(__AVX2__)
    if (bits <= 4) {
        uint8_t whole[RUN / 2 + 4];
        p = readable(p, left, bits, whole);
        const __m256i most = _mm256_set1_epi32((1 << bits) - 1);
        for (int i = 0; i < RUN; i += 8)
            _mm256_storeu_ps(codes + i, _mm256_cvtepi32_ps(_mm256_and_si256(eight_lanes(p, bits, i), most)));
        return;
    }
#endif
    uint8_t bytes[RUN];
    unpack(p, left, bits, bytes);
    for (int i = 0; i < RUN; i++) codes[i] = (float)bytes[i];
}

static ALWAYS_INLINE Table make_table(const Weight *w, float scale, float zero, int type) {
    Table table;
#if defined(__AVX2__)
    if (type == FLOAT32) {
        const __m256 from = _mm256_set1_ps(zero), by = _mm256_set1_ps(scale);
        table.low = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(w->levels), from), by);
        table.high = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(w->levels + 8), from), by);
        return table;
    }
#endif
    for (int k = 0; k < 16; k++) {
        const float value = (w->levels[k] - zero) * scale;
#if !defined(__AVX2__)
        if (type == FLOAT32) table.full[k] = value;
        else
#endif
            table.half[k] = type == FLOAT16 ? to_float16(value) : to_bfloat16(value);
    }
    return table;
}

#if defined(__AVX2__)

static ALWAYS_INLINE void look_up_halves(const uint8_t *codes, const uint16_t *table, uint16_t *out) {
    const __m128i apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m128i a = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)table), apart);
    const __m128i b = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(table + 8)), apart);
    const __m256i low = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(a, b)); /* the low bytes of the 16 values */
    const __m256i high = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(a, b));
    const __m256i code = _mm256_loadu_si256((const __m256i *)codes);
    const __m256i l = _mm256_shuffle_epi8(low, code), h = _mm256_shuffle_epi8(high, code);
    const __m256i even = _mm256_unpacklo_epi8(l, h), odd = _mm256_unpackhi_epi8(l, h); /* quarters 0, 2 and 1, 3 */
    _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256((__m256i *)(out + 16), _mm256_permute2x128_si256(even, odd, 0x31));
}

#elif defined(__aarch64__) && defined(__ARM_NEON)

static ALWAYS_INLINE void look_up_halves(const uint8_t *codes, const uint16_t *table, uint16_t *out) {
    const uint8x16x2_t bytes = vld2q_u8((const uint8_t *)table); /* low and high bytes of the 16 values */
    for (int i = 0; i < RUN; i += 16) {
        const uint8x16_t code = vld1q_u8(codes + i);
        const uint8x16x2_t found = {{vqtbl1q_u8(bytes.val[0], code), vqtbl1q_u8(bytes.val[1], code)}};
        vst2q_u8((uint8_t *)(out + i), found);
    }
}

#else

static ALWAYS_INLINE void look_up_halves(const uint8_t *codes, const uint16_t *table, uint16_t *out) {
    for (int i = 0; i < RUN; i++) out[i] = table[codes[i]];
}

#endif

#if defined(__AVX2__)

/* A permutation minds the lowest three bits of a lane alone, and each half of the table is a register; bit 3, brought to
 * the sign, chooses between what the two have. */
static ALWAYS_INLINE void look_up_floats(const uint8_t *p, int64_t left, int bits, const Table *table, float *out) {
    uint8_t whole[RUN / 2 + 4];
    p = readable(p, left, bits, whole);
    for (int i = 0; i < RUN; i += 8) {
        const __m256i code = eight_lanes(p, bits, i);
        __m256 found = _mm256_permutevar8x32_ps(table->low, code);
        if (bits == 4) {
            const __m256 other = _mm256_permutevar8x32_ps(table->high, code);
            found = _mm256_blendv_ps(found, other, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
        }
        _mm256_storeu_ps(out + i, found);
    }
}

#else

static ALWAYS_INLINE void look_up_floats(const uint8_t *p, int64_t left, int bits, const Table *table, float *out) {
    uint8_t codes[RUN];
    unpack(p, left, bits, codes);
#if defined(__aarch64__) && defined(__ARM_NEON)
    const uint8x16x4_t bytes = vld4q_u8((const uint8_t *)table->full); /* the first to the fourth bytes of the 16 values */
    for (int i = 0; i < RUN; i += 16) {
        const uint8x16_t code = vld1q_u8(codes + i);
        const uint8x16x4_t found = {{vqtbl1q_u8(bytes.val[0], code), vqtbl1q_u8(bytes.val[1], code),
                                     vqtbl1q_u8(bytes.val[2], code), vqtbl1q_u8(bytes.val[3], code)}};
        vst4q_u8((uint8_t *)(out + i), found);
    }
#else
    for (int i = 0; i < RUN; i++) out[i] = table->full[codes[i]];
#endif
}

#endif

static ALWAYS_INLINE void look_up(const uint8_t *p, int64_t left, int bits, const Unpacking *how, Table table, int type,
                                  void *out, int from, int to) {
    (void)how;
    uint8_t codes[RUN];
    float aside[RUN];
    void *found = to - from == RUN ? out : aside;
    if (type == FLOAT32) {
        look_up_floats(p, left, bits, &table, found);
    } else {
        unpack(p, left, bits, codes);
        look_up_halves(codes, table.half, found);
    }
    if (found == aside) {
        const int size = type == FLOAT32 ? 4 : 2;
        memcpy((char *)out + from * size, (char *)aside + from * size, (size_t)((to - from) * size));
    }
}

#endif

/* 8 bits: no table. */
static ALWAYS_INLINE void compute(const uint8_t *restrict p, float scale, float zero, int type, void *restrict out,
                                  int from, int to) {
    for (int i = from; i < to; i++) {
        const float value = ((float)p[i] - zero) * scale;
        if (type == FLOAT32) ((float *)out)[i] = value;
        else ((uint16_t *)out)[i] = type == FLOAT16 ? to_float16(value) : to_bfloat16(value);
    }
}

/* ---- scales and zeros of the n groups from `first`, a multiple of 8; n ≤ GROUPS, and there is room for GROUPS ---- */

static ALWAYS_INLINE void read_scales(const Weight *w, int64_t row, int64_t first, int64_t n, float *restrict scale) {
    const int64_t at = row * w->scale_stride + first;
    if (w->scale_type == FLOAT32) {
        memcpy(scale, (const float *)w->scales + at, (size_t)n * 4);
        return;
    }
    const uint16_t *half = (const uint16_t *)w->scales + at;
    for (int64_t i = 0; i < n; i += LANES) {
#if defined(__AVX512BW__) && defined(__AVX512VL__) /* a copy of so many bytes would be half of a short row's time */
        const __mmask16 there = n - i < LANES ? (__mmask16)((1u << (n - i)) - 1) : 0xffff;
        const __m256i some = _mm256_maskz_loadu_epi16(there, half + i);
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16);
        _mm512_storeu_ps(scale + i, w->scale_type == BFLOAT16 ? _mm512_castsi512_ps(high) : _mm512_cvtph_ps(some));
#else
        uint16_t some[LANES] = {0};
        const uint16_t *from = n - i < LANES ? memcpy(some, half + i, (size_t)(n - i) * 2) : half + i;
        if (w->scale_type == BFLOAT16)
            for (int k = 0; k < LANES; k++) scale[i + k] = from_bfloat16(from[k]);
        else
            halves_to_floats(from, scale + i);
#endif
    }
}

static ALWAYS_INLINE void read_zeros(const Weight *w, int bits, int64_t row, int64_t first, int64_t n,
                                     const Unpacking *how, float *restrict zero) {
    if (!w->zeros) {
        for (int64_t i = 0; i < n; i++) zero[i] = w->zero;
        return;
    }
    for (int64_t i = 0; i < n; i += RUN) {
        const int64_t byte = (first + i) / 8 * bits;
        unpack_floats(w->zeros + row * w->zero_stride + byte, w->zero_bytes - byte, bits, how, zero + i);
    }
}

/* ---- columns [begin, end) of a row, begin a multiple of 8 ---- */

/* The columns [from, to) of one group. */
static ALWAYS_INLINE void decode_group(const Weight *w, const uint8_t *codes, float scale, float zero, int64_t from,
                                       int64_t to, const Unpacking *how, char *out, int64_t begin, int bits, int type) {
    const int64_t size = type == FLOAT32 ? 4 : 2;
    const Table table = make_table(w, scale, zero, type); /* unused, hence not made, at 8 bits */
    for (int64_t i = from & ~(int64_t)7; i < to; i += RUN) {
        const int low = from > i ? (int)(from - i) : 0, high = to - i < RUN ? (int)(to - i) : RUN;
        const int64_t byte = i / 8 * bits;
        char *place = out + (i - begin) * size;
        if (bits == 8 && high - low == RUN) compute(codes + byte, scale, zero, type, place, 0, RUN);
        else if (bits == 8) compute(codes + byte, scale, zero, type, place, low, high);
        else look_up(codes + byte, w->code_bytes - byte, bits, how, table, type, place, low, high);
    }
}

static ALWAYS_INLINE void decode_as(const Weight *w, int64_t row, int64_t begin, int64_t end, char *out, int bits,
                                    int type) {
    const uint8_t *codes = w->codes + row * w->code_stride;
    const int64_t size = type == FLOAT32 ? 4 : 2, group = w->group, runs = group / RUN;
    const int64_t groups = (end + group - 1) / group;
    const Unpacking how = unpacking(bits);
    float scale[GROUPS], zero[GROUPS];

    /* Groups before this one are whole, consist of whole runs, and have 16 bytes to read at each. */
    const int64_t room = ((w->code_bytes - 16) / bits * 8 + RUN) / group;
    int64_t simple = end / group < room ? end / group : room;
    if (bits == 8 || group % RUN || begin % group) simple = 0;

    for (int64_t first = begin / group & ~(int64_t)7; first < groups; first += GROUPS) {
        const int64_t n = groups - first < GROUPS ? groups - first : GROUPS;
        int64_t g = begin / group > first ? begin / group - first : 0;
        read_scales(w, row, first, n, scale);
        read_zeros(w, bits, row, first, n, &how, zero);
        if (first + g < simple) {
            const int64_t stop = simple - first < n ? simple - first : n;
            const uint8_t *p = codes + (first + g) * group / 8 * bits;
            char *place = out + ((first + g) * group - begin) * size;
            for (; g < stop; g++) {
                const Table table = make_table(w, scale[g], zero[g], type);
                for (int64_t r = 0; r < runs; r++, p += RUN / 8 * bits, place += RUN * size)
                    look_up(p, 16, bits, &how, table, type, place, 0, RUN);
            }
        }
        for (; g < n; g++) {
            const int64_t from = (first + g) * group, to = from + group;
            decode_group(w, codes, scale[g], zero[g], from > begin ? from : begin, to < end ? to : end, &how, out,
                         begin, bits, type);
        }
    }
}

/* The compiler makes one function of each width and type. */
static void decode(const Weight *w, int64_t row, int64_t begin, int64_t end, int type, void *out) {
#define DECODE(TYPE)                                                                                                   \
    switch (w->bits) {                                                                                                 \
    case 2: decode_as(w, row, begin, end, out, 2, TYPE); break;                                                        \
    case 3: decode_as(w, row, begin, end, out, 3, TYPE); break;                                                        \
    case 4: decode_as(w, row, begin, end, out, 4, TYPE); break;                                                        \
    default: decode_as(w, row, begin, end, out, 8, TYPE);                                                              \
    }
    if (type == BFLOAT16) { DECODE(BFLOAT16) }
    else if (type == FLOAT16) { DECODE(FLOAT16) }
    else { DECODE(FLOAT32) }
#undef DECODE
}

/* out [rows, columns] of `type`, contiguous. */
static void decode_rows(const Weight *w, int64_t rows, int type, void *out, int threads) {
    const int64_t size = type == FLOAT32 ? 4 : 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        decode(w, row, 0, w->columns, type, (char *)out + row * w->columns * size);
}

#endif
