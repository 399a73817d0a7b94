/* y = x Wᵀ while decoding (GEMV) by the processor's products of bytes (AVX-512 VNNI), whose sums are exact integers.
 *
 * For activations of half precision. Those of a group are quantized to 16 bits (native.h), and v, what is stored of one,
 * is two signed bytes. Codes are bytes as they are; levels of a codebook become integers of 16 bits, too, a byte and a
 * fraction. With c a code
 *
 *     Σ weight · x = Σ over groups of scale · x_scale · (Σ c · v − zero · Σ v)
 *
 * and Σ c · v of 64 columns takes a load, two or three instructions to unpack the codes, and one for each byte of v. One
 * token with 5632 × 2048 weights takes 0.5 to 0.65 ms (`benchmarks.run multiply`, one core of a Sapphire Rapids).
 */
#ifndef LLMTOOLS_GROUPED_INTEGER_H
#define LLMTOOLS_GROUPED_INTEGER_H

#include <stdlib.h>

#include "decode.h"

enum { BLOCK = 64, TOGETHER = 4, AHEAD = 2048 }; /* columns; tokens; bytes that are fetched before they are used */

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

enum { LONGEST = 512 }; /* group: in a longer one too many activations would be measured by one outlier */

static int goes_by_integers(const Weight *w, int type) {
    const int64_t group = w->group < w->columns ? w->group : w->columns;
    return type != FLOAT32 && group <= LONGEST && (w->group % 32 == 0 || w->group >= w->columns);
}

typedef struct {
    int tokens;
    int64_t blocks, groups; /* groups: rounded up to whole registers */
    int8_t *bytes;          /* [tokens, blocks, 2, BLOCK]: high bytes, low bytes; columns lie as `sixty_four` has codes */
    float *scale, *sum;     /* [tokens, groups]: of the activations; Σ v times that */
} Inputs;

/* Where code i of 64 lies after `sixty_four`, as a list of codes by place. */
static __m512i order_of_codes(int bits) {
    uint8_t code[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        const int place = bits == 4 ? i % 2 * 32 + i / 2 : bits == 2 ? i % 4 * 16 + i / 4 : i;
        code[place] = (uint8_t)i;
    }
    return _mm512_loadu_si512(code);
}

/* A group of n activations, from column `first` on, as bytes, with their scale and Σ v times that; whether all are finite. */
static int quantize_group(const float *x, int64_t n, int64_t first, int8_t *bytes, float *scale, float *sum) {
    int16_t quantized[LONGEST + 16];
    if (!quantize_activations(x, n, quantized, scale)) return 0;
    for (int64_t c = n; c % 16; c++) quantized[c] = 0;
    int32_t total = 0;
    for (int64_t c = 0; c < n; c++) total += quantized[c];
    for (int64_t c = 0; c < n; c += 16) {
        const __m256i v = _mm256_loadu_si256((const __m256i *)(quantized + c));
        const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
        int8_t *at = bytes + (first + c) / BLOCK * 2 * BLOCK + (first + c) % BLOCK;
        _mm_storeu_si128((__m128i *)at, _mm256_cvtepi16_epi8(_mm256_srai_epi16(_mm256_sub_epi16(v, low), 8)));
        _mm_storeu_si128((__m128i *)(at + BLOCK), _mm256_cvtepi16_epi8(low));
    }
    *sum = (float)total * *scale;
    return 1;
}

/* x [tokens, columns]. Returns whether it could be done; `bytes` is to be freed either way. */
static int read_inputs(const Weight *w, const float *x, int tokens, Inputs *to) {
    const int64_t columns = w->columns, groups = (columns + w->group - 1) / w->group;
    *to = (Inputs){tokens, (columns + BLOCK - 1) / BLOCK, (groups + 15) / 16 * 16, NULL, NULL, NULL};
    const size_t bytes = (size_t)(tokens * to->blocks * 2 * BLOCK), scales = (size_t)(tokens * to->groups);
    const size_t all = (bytes + 2 * scales * sizeof(float) + BLOCK - 1) / BLOCK * BLOCK;
    to->bytes = aligned_alloc(BLOCK, all);
    if (!to->bytes) return 0;
    memset(to->bytes, 0, all);
    to->scale = (float *)(to->bytes + bytes);
    to->sum = to->scale + scales;
    const __m512i order = order_of_codes(w->bits);
    for (int t = 0; t < tokens; t++) {
        int8_t *own = to->bytes + t * to->blocks * 2 * BLOCK;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t c = g * w->group, n = columns - c < w->group ? columns - c : w->group;
            const int64_t at = t * to->groups + g;
            if (!quantize_group(x + t * columns + c, n, c, own, to->scale + at, to->sum + at)) return 0;
        }
        for (int64_t i = 0; i < 2 * to->blocks; i++, own += BLOCK)
            _mm512_storeu_si512(own, _mm512_permutexvar_epi8(order, _mm512_loadu_si512(own)));
    }
    return 1;
}

/* The levels of a codebook as (main + fraction / 256 − 128) · size. */
typedef struct {
    __m512i main, fraction;
    float size;
} Levels;

static Levels quantize_levels(const Weight *w) {
    uint8_t main[16], fraction[16];
    float most = 0;
    for (int k = 0; k < 16; k++) most = fmaxf(most, fabsf(w->levels[k]));
    for (int k = 0; k < 16; k++) {
        const int u = 32768 + (int)lrintf(most > 0 ? w->levels[k] / most * 32767 : 0);
        main[k] = (uint8_t)(u >> 8);
        fraction[k] = (uint8_t)u;
    }
    return (Levels){_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)main)),
                    _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)fraction)), most * 256 / 32767};
}

/* 64 codes, a byte each, of which `left` bytes of the stream may be read. */
static ALWAYS_INLINE __m512i sixty_four(const uint8_t *p, int64_t left, int bits) {
    uint8_t whole[BLOCK];
    if (left < (bits == 3 ? 32 : 8 * bits)) p = memcpy(memset(whole, 0, sizeof whole), p, (size_t)left);
    const __m512i most = _mm512_set1_epi8((char)((1 << bits) - 1));
    if (bits == 8) return _mm512_loadu_si512(p);
    if (bits == 4) {
        const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
        const __m512i run = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
        return _mm512_and_si512(_mm512_srlv_epi16(run, shift), most);
    }
    if (bits == 2) {
        const int64_t two = 0x0002000200020002;
        const __m512i shift = _mm512_setr_epi64(0, 0, two, two, 2 * two, 2 * two, 3 * two, 3 * two);
        const __m512i run = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p));
        return _mm512_and_si512(_mm512_srlv_epi16(run, shift), most);
    }
#define THREE(i) i, i + 1, i + 2, 0, 0, 0, 0, 0 /* the bytes of eight codes */
    static const uint8_t bytes[] = {THREE(0), THREE(3), THREE(6), THREE(9), THREE(12), THREE(15), THREE(18), THREE(21)};
#undef THREE
    const __m512i run = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p));
    const __m512i eights = _mm512_permutexvar_epi8(_mm512_loadu_si512(bytes), run);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x15120f0c09060300), eights), most);
}

/* Σ code · v of each four columns; what a fraction has to do with low bytes is below the last place. */
static ALWAYS_INLINE __m512i dots(__m512i codes, __m512i fraction, const int8_t *bytes, int fractions) {
    const __m512i high = _mm512_loadu_si512(bytes), low = _mm512_loadu_si512(bytes + BLOCK);
    __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, high);
    dot = _mm512_dpbusd_epi32(_mm512_slli_epi32(dot, 8), codes, low);
    return fractions ? _mm512_dpbusd_epi32(dot, fraction, high) : dot;
}

/* Of GROUPS groups of a row. Zero at first, and beyond the last group finite. */
typedef struct {
    float scale[GROUPS], zero[GROUPS], size[TOGETHER][GROUPS + 1];
} Scratch;

/* sums[t] = Σ_c weight[row, c] · x[t, c] for `tokens` tokens from `first` on. */
static ALWAYS_INLINE void integer_row(const Weight *w, int64_t row, const Inputs *x, int first, const Levels *levels,
                                      int bits, int fractions, int tokens, Scratch *own, float *sums) {
    const uint8_t *p = w->codes + row * w->code_stride, *stop = p + w->code_bytes;
    const int64_t columns = w->columns, groups = (columns + w->group - 1) / w->group;
    const int64_t halves = groups == 1 ? 2 * x->blocks : w->group / 32; /* of blocks, in a group */
    const int64_t stride = x->blocks * 2 * BLOCK; /* from token to token */
    const int8_t *bytes = x->bytes + first * stride;
    const float *x_scale = x->scale + first * x->groups, *sum = x->sum + first * x->groups;
    const __mmask16 later = bits == 4 ? 0xf0f0 : bits == 2 ? 0xcccc : 0xff00; /* lanes of a block's second half */
    const Unpacking how = unpacking(bits);
    __m512 total[TOGETHER];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) total[t] = _mm512_setzero_ps();
    for (int64_t some = 0; some < groups; some += GROUPS) {
        const int64_t n = groups - some < GROUPS ? groups - some : GROUPS;
        const int64_t end = some + n == groups ? columns : (some + n) * w->group;
        read_scales(w, row, some, n, own->scale);
        if (!fractions) read_zeros(w, bits, row, some, n, &how, own->zero);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            for (int64_t g = 0; g < n; g += 16) {
                const __m512 zero = fractions ? _mm512_set1_ps(128) : _mm512_loadu_ps(own->zero + g);
                __m512 by = _mm512_loadu_ps(own->scale + g);
                if (fractions) by = _mm512_mul_ps(by, _mm512_set1_ps(levels->size));
                const __m512 shift = _mm512_mul_ps(_mm512_loadu_ps(sum + t * x->groups + some + g), zero);
                total[t] = _mm512_fnmadd_ps(by, shift, total[t]);
                _mm512_storeu_ps(own->size[t] + g, _mm512_mul_ps(by, _mm512_loadu_ps(x_scale + t * x->groups + some + g)));
            }
            own->size[t][n] = 0; /* of a half block that is not there */
        }
        int64_t group = 0, half = 0;
        for (int64_t c = some * w->group; c < end; c += BLOCK, p += 8 * bits, bytes += 2 * BLOCK) {
            _mm_prefetch((const char *)p + AHEAD, _MM_HINT_T0);
            __m512i codes = sixty_four(p, stop - p, bits), fraction = _mm512_setzero_si512();
            if (fractions) {
                fraction = _mm512_shuffle_epi8(levels->fraction, codes);
                codes = _mm512_shuffle_epi8(levels->main, codes);
            }
            const int64_t next = half + 1 < halves ? group : group + 1;
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                const __m512i dot = dots(codes, fraction, bytes + t * stride, fractions);
                __m512 by = _mm512_set1_ps(own->size[t][group]);
                if (next != group) by = _mm512_mask_mov_ps(by, later, _mm512_set1_ps(own->size[t][next]));
                total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), by, total[t]);
            }
            for (half += 2; half >= halves; half -= halves) group++;
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) sums[t] = _mm512_reduce_add_ps(total[t]);
}

/* All tokens of x with one row: sums [tokens]. The compiler makes a function of each width, of one token and of four. */
static void integer_products(const Weight *w, int64_t row, const Inputs *x, const Levels *levels,
                             Scratch *own, float *sums) {
#define PRODUCTS(BITS, FRACTIONS)                                                                                      \
    for (int t = 0; t < x->tokens;) {                                                                                  \
        if (x->tokens - t >= TOGETHER) {                                                                               \
            integer_row(w, row, x, t, levels, BITS, FRACTIONS, TOGETHER, own, sums + t);                               \
            t += TOGETHER;                                                                                             \
        } else {                                                                                                       \
            integer_row(w, row, x, t, levels, BITS, FRACTIONS, 1, own, sums + t);                                      \
            t++;                                                                                                       \
        }                                                                                                              \
    }
#define EITHER(BITS)                                                                                                   \
    if (w->table) PRODUCTS(BITS, 1)                                                                                    \
    else PRODUCTS(BITS, 0)
    switch (w->bits) {
    case 2: EITHER(2) break;
    case 3: EITHER(3) break;
    case 4: EITHER(4) break;
    default: PRODUCTS(8, 0)
    }
#undef EITHER
#undef PRODUCTS
}

#else

typedef struct {
    int8_t *bytes;
} Inputs;

typedef struct {
    int none;
} Levels, Scratch;

static int goes_by_integers(const Weight *w, int type) {
    (void)w, (void)type;
    return 0;
}

static int read_inputs(const Weight *w, const float *x, int tokens, Inputs *to) {
    (void)w, (void)x, (void)tokens;
    to->bytes = NULL;
    return 0;
}

static Levels quantize_levels(const Weight *w) {
    (void)w;
    return (Levels){0};
}

static void integer_products(const Weight *w, int64_t row, const Inputs *x, const Levels *levels,
                             Scratch *own, float *sums) {
    (void)w, (void)row, (void)x, (void)levels, (void)own, (void)sums;
}

#endif

#endif
