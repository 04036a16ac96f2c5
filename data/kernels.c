/* kernels.c: what a CPU does faster in C than by PyTorch's operators.

   data/native.py compiles this file for the CPU at hand and calls it through ctypes. Where there is
   no compiler nothing is lost but time: PyTorch then does the same work.


   1. A product with quantized weights

   A layer computes y = x W^T + bias. Here x is (m, k): m tokens of k numbers. W is (n, k): one row
   of k weights for each of n outputs. To make one token, a CPU reads all of W from memory, and that
   takes most of the time. So W is stored in fewer bits: a weight is a small integer times a scale.

       w = q * scale       int8: q from -127 to 127, one scale for each row
                           int4: q from   -8 to   7, one scale for each 32, 64 or 128 neighbours

   A CPU multiplies integers by integers fastest. So the activations x are rounded too, just before
   the product, to 8 bits, with one scale for each group of 32 neighbours (llama.cpp does the same
   and calls the format Q8_0). One scale for a whole token would be simpler, but it costs quality: a
   few channels are a thousand times as large as the rest, and beside them the rest would be rounded
   to 0. A large channel in a group of 32 harms only its 31 neighbours. One output is then

       y = sum over groups of   scale of w * scale of x * (sum over 32 of  q of w * q of x)
                                \_____ two floats _____/   \____ exact, in integers ______/

   2. A group of 32 int4 weights: two in a byte, the even one in the low nibble, stored as q + 8

           byte         0           1           2                15
                   +-----+-----+-----+-----+-----+-----+     +-----+-----+
       high | low  | w1  | w0  | w3  | w2  | w5  | w4  | ... | w31 | w30 |
                   +-----+-----+-----+-----+-----+-----+     +-----+-----+

       byte & 15       w0  w2  w4 ... w30      These two lines are all the unpacking there is. So
       byte >> 4       w1  w3  w5 ... w31      x0 x2 ... x30 | x1 x3 ... x31 is the order of x, too.

   3. Two shapes of the product

   gemv, for few tokens: W is read as it lies in memory, and reading it is the limit.
   gemm, for 8 tokens or more: each thread unpacks PANEL rows of W into a panel and multiplies all
   tokens by it. Unpacking is then paid once, and arithmetic is the limit. The rows of a panel are
   interleaved by four bytes, so that one instruction multiplies LANES rows by the same four of x:

       panel   row 0         row 1               row 15        row 0         row 1
             | w0 w1 w2 w3 | w0 w1 w2 w3 | ... | w0 w1 w2 w3 | w4 w5 w6 w7 | w4 w5 w6 w7 | ...
         x   | x0 x1 x2 x3 | x0 x1 x2 x3 | ... | x0 x1 x2 x3 | x4 x5 x6 x7 | x4 x5 x6 x7 | ...

   For int4 the four are even ones or odd ones (picture 2). For int8 on a CPU that multiplies no
   bytes, PAIRS, they are two int16.

   An instruction for bytes takes one factor without a sign. A nibble q + 8 has none, and q ^ 0x80 =
   q + 128 has none. That makes a sum too large by 8 or 128 times the sum of x, and so the sum begins
   with minus that (`starts`): integers, so nothing is lost.

       CPU                         LANES   a product of bytes                     has been
       AVX2                          8     int4: maddubs; int8 panels: PAIRS      measured
       AVX2 with AVX-VNNI            8     vpdpbusd                               tested only
       AVX-512, with VNNI or not    16     vpdpbusd, or as AVX2                   tested only
       ARM with dotprod              8     sdot: both factors have signs          tested only
       any other                     8     int16 products                         measured on x86

   "Tested only": the same integers come out of the same lines on another CPU (-DLANES, -DBYTES), and
   the instruction compiles. How fast such a CPU is has not yet been measured.

   4. The threads that decode a token: one team, from ids to logits. For one token, to call an
   operator of PyTorch takes longer than its work, and so does waking threads for it. || is a
   barrier: there each thread waits for the last one. What all of them need whole, such as a norm,
   each thread makes alone.

             norm of  | own rows  || own heads:  || own heads: || own rows || norm of | own rows of
             all of x | of q,k,v  || rope, cache || attention  || of o     || all     | gate and up
   thread 0  ======== | ====      || =====       || =====      || ====     || ======= | =====
   thread 1  ======== |     ====  ||      =====  ||      ===== ||     ==== || ======= |      =====

             || SwiGLU of all | own rows of down || the next block
                                                 || after the last: norm | own rows of the head

   How many threads there are changes no bit of any result: each number is made by one thread alone,
   and where a sum is divided (the gradient of a weight) it is always divided into PARTS parts.


   Contents

       Vectors                  LANES numbers at a time: load, store, sum, exp
       Quantized numbers        struct layer, struct quantized, place_of, half_to_float
       Products of integers     dot_pairs, dot_bytes, dot_int8, dot_int4, quantize_row
       Few tokens               gemv_quantized, gemv_float, gemv
       Many tokens              struct panel, pack_panel, gemm_panel, gemm
       Layers                   linear*, gather
       Between the products     rms_norm*, rope_head, to_heads*, swiglu*
       Decoding                 apply_layer, rope_and_cache, attention_head, decode*
       Training                 the backward passes*, cross_entropy*

   A star marks what Python calls. In a product, m, n and k are the sizes of x (m, k), W (n, k) and
   y (m, n); `token` is a row of x, `row` a row of W. Arrays are float32 and contiguous unless a
   comment says otherwise. Vectors are GNU C's, which gcc and clang compile for any CPU; a few
   functions have a faster form for x86 or ARM. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
#pragma GCC diagnostic ignored "-Wunknown-pragmas"          /* "omp ...": then there is one thread */
#endif
#ifdef __clang__
#pragma clang diagnostic ignored "-Wunknown-attributes"     /* noclone */
#endif
#pragma GCC diagnostic ignored "-Wpsabi"      /* how functions pass vectors: all of ours are inlined */

/* LANES: numbers in a vector. Where a register holds fewer, the compiler makes two instructions of
   one. X86(name): Intel's function for a vector of LANES numbers, if there is one. */
#ifndef LANES
#if defined __AVX512F__ && defined __AVX512BW__ && defined __AVX512VL__
#define LANES 16
#else
#define LANES 8
#endif
#endif
#if LANES == 16 && defined __AVX512BW__
#define X86(name) _mm512_##name
typedef __m512i x86;
typedef __m256i x86_half;
#elif LANES == 8 && defined __AVX2__
#define X86(name) _mm256_##name
typedef __m256i x86;
typedef __m128i x86_half;
#endif

/* BYTES: whether one instruction adds four products of bytes to an int32. PAIRS: whether, without
   it, products of int16 are fast. FLIP: on x86 that instruction takes one factor without a sign;
   w ^ 0x80 is w + 128, from 0 to 255. A test sets LANES, BYTES and FLIP to have the path of another
   CPU here, with slower instructions but the same integers. */
#if defined X86 && defined __AVX512VNNI__ && defined __AVX512VL__
#define DOT_BYTES X86(dpbusd_epi32)
#elif defined X86 && LANES == 8 && defined __AVXVNNI__
#define DOT_BYTES _mm256_dpbusd_avx_epi32
#endif
#ifndef BYTES
#if defined DOT_BYTES || defined __ARM_FEATURE_DOTPROD
#define BYTES 1
#else
#define BYTES 0
#endif
#endif
#if defined X86 && !BYTES
#define PAIRS 1
#else
#define PAIRS 0
#endif
#ifndef FLIP
#if BYTES && !defined __ARM_FEATURE_DOTPROD
#define FLIP 0x80
#else
#define FLIP 0
#endif
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum {
    GROUP = 32,                 /* activations that share a scale */
    FOUR = 4,                   /* rows of the weight that gemv multiplies together */
    AT_ONCE = LANES / 4,        /* groups of int4 weights in a vector of bytes */
    PANEL = 2 * LANES,          /* rows of the weight in a panel */
    TILE = 6,                   /* tokens that gemm multiplies together */
    PARTS = 32,                 /* of all rows; each sums its own gradient of a weight */
    WORTH_THREADS = 100000,     /* fewer steps than that are done before other threads wake up */
    AHEAD = 8192,               /* bytes: how far before their use gemv asks for weights */
    SHORT = 512,                /* columns: rows of so many are multiplied by FOUR for one token, too */
    IGNORE = -100,              /* a target that is not learned */
};


/* =================================================================================================
   Vectors: LANES numbers at a time */

typedef int8_t  bytes  __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(4 * LANES)));
typedef int32_t ints   __attribute__((vector_size(4 * LANES)));
typedef float   floats __attribute__((vector_size(4 * LANES)));
typedef int16_t halves __attribute__((vector_size(2 * LANES)));
typedef float   quad   __attribute__((vector_size(4 * FOUR)));

/* memcpy is how C reads a vector from any address: it becomes one instruction. */
INLINE floats load(const float *x) {
    floats v;
    memcpy(&v, x, sizeof v);
    return v;
}

INLINE void store(float *y, floats v) {
    memcpy(y, &v, sizeof v);
}

INLINE void prefetch(const void *x, int64_t ahead) {
    __builtin_prefetch((const char *)x + ahead);
}

INLINE ints load_ints(const void *x) {
    ints v;
    memcpy(&v, x, sizeof v);
    return v;
}

/* The first n of 4 * LANES bytes, n a multiple of 16, and zeros in place of the others; all where n
   is larger. */
INLINE bytes load_bytes(const void *x, int64_t n) {
#if LANES == 16 && defined __AVX512BW__
    return (bytes)_mm512_maskz_loadu_epi8(n >= 64 ? ~0ULL : (1ULL << n) - 1, x);
#else
#ifdef X86
    if (n == 16) return (bytes)_mm256_zextsi128_si256(_mm_loadu_si128(x));
#endif
    bytes v = {0};
    if (n >= 4 * LANES) memcpy(&v, x, sizeof v);
    else for (int64_t i = 0; i < n; i += 16) memcpy((char *)&v + i, (const char *)x + i, 16);
    return v;
#endif
}

/* One number in all lanes. It is "- 0" and not "+ 0", which would make 0 of -0. */
INLINE floats broadcast(float x) {
    return x - (floats){0};
}

INLINE ints broadcast_int(int32_t x) {
    return x - (ints){0};
}

/* 0, 1, 2 ... */
INLINE ints lane_numbers(void) {
    ints v;
    UNROLL for (int i = 0; i < LANES; i++) v[i] = i;
    return v;
}

/* v[index[0]], v[index[1]] ... */
INLINE floats lookup(floats v, ints index) {
#if defined X86 && LANES == 16
    return _mm512_permutexvar_ps((__m512i)index, v);
#elif defined X86
    return _mm256_permutevar8x32_ps(v, (__m256i)index);
#else
    floats y;
    UNROLL for (int i = 0; i < LANES; i++) y[i] = v[index[i]];
    return y;
#endif
}

/* The first n of LANES numbers, and `rest` in place of the others; all where n is larger. */
INLINE floats load_first(const float *x, int64_t n, float rest) {
    floats v = broadcast(rest);
    if (n >= LANES) memcpy(&v, x, sizeof v);
    else memcpy(&v, x, 4 * n);
    return v;
}

INLINE void store_first(float *y, int64_t n, floats v) {
    if (n >= LANES) memcpy(y, &v, sizeof v);
    else memcpy(y, &v, 4 * n);
}

/* In each lane: mask ? yes : no. To compare vectors makes such a mask: -1 or 0. */
INLINE ints choose(ints mask, ints yes, ints no) {
    return (yes & mask) | (no & ~mask);
}

/* The sum of all lanes, always in the same order. */
INLINE float sum_of(floats v) {
#if LANES == 16
    UNROLL for (int i = 0; i < 8; i++) v[i] += v[i + 8];
#endif
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

/* sum_of each of FOUR vectors, added in the same order, with fewer instructions. */
INLINE quad sums_of(const floats *v) {
#ifdef X86
    __m128 half[FOUR];
    UNROLL for (int c = 0; c < FOUR; c++) {
#if LANES == 16
        __m256 eight = _mm512_castps512_ps256(v[c]) + (__m256)_mm512_extracti64x4_epi64((__m512i)v[c], 1);
#else
        __m256 eight = v[c];
#endif
        half[c] = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
    }
    return _mm_hadd_ps(_mm_hadd_ps(half[0], half[1]), _mm_hadd_ps(half[2], half[3]));
#else
    return (quad){sum_of(v[0]), sum_of(v[1]), sum_of(v[2]), sum_of(v[3])};
#endif
}

/* a * b + sum, rounded once where the CPU can do that. For most sums in this file gcc chooses it by
   itself. In gemv_quantized its choice, and with it the last bits of the result, changed with the
   lines around the sum: there it is written out. */
INLINE floats multiply_add(floats a, floats b, floats sum) {
#if defined X86 && defined __FMA__
    return X86(fmadd_ps)(a, b, sum);
#else
    return a * b + sum;
#endif
}

/* A float in [-2^22, 2^22] plus 1.5 * 2^23 has no bits left behind the point: it is rounded to the
   nearest integer, and that is in its last bits. Minus ROUNDER it is this integer as a float; its
   bits minus ROUNDER_BITS are this integer as an int. */
#define ROUNDER 0x1.8p23f
#define ROUNDER_BITS 0x4b400000

/* e^x = 2^whole * e^part with |part| <= ln(2) / 2: there the sixth Taylor polynomial is exact
   enough. whole * ln(2) is subtracted in two pieces; the first is exact, as that piece of ln(2) has
   few bits. */
INLINE floats exp_of(floats x) {
    x = (floats)choose(x > 88, (ints)broadcast(88), (ints)x);                /* larger would be infinite */
    floats near = x * 0x1.715476p0f + ROUNDER;                                           /* x / ln(2) */
    floats whole = near - ROUNDER;
    floats part = x - whole * 0x1.62e4p-1f - whole * 0x1.7f7d1cp-20f;
    floats sum = part * (1 / 720.f) + 1 / 120.f;
    sum = ((((sum * part + 1 / 24.f) * part + 1 / 6.f) * part + 0.5f) * part + 1) * part + 1;
    ints power = ((ints)near - ROUNDER_BITS + 127) << 23;                  /* the bits of the float 2^whole */
    return (floats)((ints)(sum * (floats)power) & ~(x <= -87));            /* smaller: 0. NaN stays NaN */
}


/* =================================================================================================
   Quantized numbers */

/* A layer, y = x W^T + bias: eight fields of 8 bytes, which data/native.py fills in this order. */
struct layer {
    const void *weights;        /* (n, k): int8, two int4 in a byte (picture 2), or float */
    const uint16_t *scales;     /* float16: int8 (n), int4 (n, k / group); not read for float */
    const float *bias;          /* (n), or NULL */
    int64_t n;                  /* outputs: rows of W */
    int64_t k;                  /* inputs: columns of W */
    int64_t group;              /* weights that share a scale: k for int8, 32, 64 or 128 for int4 */
    int64_t bits;               /* of a weight: 8, 4, or 32 for float */
    const struct layer *first;  /* low rank: the thin layer that x goes through before; or NULL */
};

/* How the 32 values of a group lie in memory. */
enum order {
    IN_ORDER,                   /* int8, for int8 weights */
    EVEN_FIRST,                 /* int8, for int4 weights: the even ones of AT_ONCE groups, then the odd ones */
    AS_PAIRS,                   /* int16, in order, for panels of int8 weights (PAIRS) */
};

/* Activations, rounded: x = values * scale. */
struct quantized {
    enum order order;
    int64_t groups;             /* of 32 in a token; filled up to a multiple of LANES: with zeros, for rows */
    char *values;               /* (m, groups, 32): int8 or int16, see enum order */
    float *scales;              /* (m, groups) */
    int32_t *starts;            /* what sums begin with (picture 3). Panels: (m, groups). Rows: a vector
                                   for each 4 * LANES bytes of weights, (m, groups * bits) */
};

/* The order in which rows, or panels, want x. */
INLINE enum order order_for(int64_t bits, int panels) {
    if (bits == 4) return EVEN_FIRST;
    return panels && PAIRS ? AS_PAIRS : IN_ORDER;
}

/* Where half 0 or 1 of group g lies (the even or odd ones with EVEN_FIRST), in bytes behind the
   first value of the token. */
INLINE int64_t place_of(enum order order, int64_t g, int64_t half) {
    if (order == AS_PAIRS) return 64 * g + 32 * half;
    if (order == IN_ORDER) return 32 * g + 16 * half;
    return g / AT_ONCE * AT_ONCE * 32 + half * AT_ONCE * 16 + g % AT_ONCE * 16;
}

/* Groups of a token, filled up to a multiple of LANES. */
INLINE int64_t padded_groups(int64_t k) {
    return (k + GROUP * LANES - 1) / (GROUP * LANES) * LANES;
}

/* Bytes for m tokens of k numbers, rounded; divide_room lays them out. */
static int64_t room_for(int64_t m, int64_t k) {
    return m * padded_groups(k) * (64 + 4 + 32);
}

static struct quantized divide_room(char *memory, int64_t m, int64_t k, enum order order) {
    int64_t all = m * padded_groups(k);
    return (struct quantized){
        .order = order,
        .groups = padded_groups(k),
        .values = memory,                                  /* 32 bytes for each group, or 64 */
        .scales = (float *)(memory + 64 * all),            /* 4 bytes */
        .starts = (int32_t *)(memory + 68 * all),          /* 4 bytes, or 4 * bits */
    };
}

/* Any float16 is a float32 with fewer bits. Shifted into place, its exponent is 112 too small. */
INLINE float half_to_float(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13 | (uint32_t)(half & 0x8000) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x * 0x1p112f;
}

/* FOUR of them. */
INLINE quad halves_to_floats(const uint16_t *half) {
#if defined X86 && defined __F16C__
    return _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)half));
#else
    return (quad){half_to_float(half[0]), half_to_float(half[1]), half_to_float(half[2]), half_to_float(half[3])};
#endif
}

/* The scale of weights 32 * g ... 32 * g + 31 of a row. */
INLINE float scale_of(const struct layer *layer, int64_t row, int64_t g) {
    int64_t in_row = layer->k / layer->group;
    return half_to_float(layer->scales[row * in_row + (layer->bits == 8 ? 0 : g * GROUP / layer->group)]);
}

/* The same for int4 and LANES groups of 32, from g on; behind the end of a row, any finite numbers. */
INLINE floats scales_from(const struct layer *layer, int64_t row, int64_t g) {
    const int64_t shift = layer->group / 64;                   /* log2 of group / 32 */
    const int64_t in_row = layer->k / layer->group, at = row * in_row + (g >> shift), left = layer->n * in_row - at;
    halves v = {0};
    floats scales;
    if (left >= LANES) memcpy(&v, layer->scales + at, sizeof v);
    else for (int64_t i = 0; i < left; i++) v[i] = layer->scales[at + i];
#if defined X86 && (LANES == 16 || defined __F16C__)
    scales = X86(cvtph_ps)((x86_half)v);
#else
    ints bits = __builtin_convertvector(v, ints);
    scales = (floats)((bits & 0x7fff) << 13 | (bits & 0x8000) << 16) * 0x1p112f;
#endif
    return shift ? lookup(scales, lane_numbers() >> (int32_t)shift) : scales;
}


/* =================================================================================================
   Products of integers: the place for another instruction set */

/* An int16 in all places. */
INLINE shorts broadcast_short(int16_t x) {
    return x - (shorts){0};
}

/* sum[i] + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] */
INLINE ints dot_pairs(ints sum, shorts a, shorts b) {
#ifdef X86
    return sum + (ints)X86(madd_epi16)((x86)a, (x86)b);
#else
    ints pair_a = (ints)a, pair_b = (ints)b;                                 /* each holds two int16 */
    return sum + ((pair_a << 16) >> 16) * ((pair_b << 16) >> 16) + (pair_a >> 16) * (pair_b >> 16);
#endif
}

/* a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] of bytes, as int16: the caller knows that they fit. */
INLINE shorts multiply_bytes(bytes a, bytes b) {
    return ((shorts)a << 8 >> 8) * ((shorts)b << 8 >> 8) + ((shorts)a >> 8) * ((shorts)b >> 8);
}

/* The same, where a is from 0 to 15. */
INLINE shorts multiply_nibbles(bytes a, bytes b) {
#ifdef X86
    return (shorts)X86(maddubs_epi16)((x86)a, (x86)b);                       /* it takes a without a sign */
#else
    return multiply_bytes(a, b);
#endif
}

/* sum[i] + a[4 i] * b[4 i] + ... + a[4 i + 3] * b[4 i + 3]; with FLIP, a has no sign */
INLINE ints dot_bytes(ints sum, bytes a, bytes b) {
#ifdef DOT_BYTES
    return (ints)DOT_BYTES((x86)sum, (x86)a, (x86)b);
#elif defined __ARM_FEATURE_DOTPROD
    int32x4_t to[LANES / 4];
    int8x16_t from[LANES / 4], by[LANES / 4];
    memcpy(to, &sum, sizeof to), memcpy(from, &a, sizeof from), memcpy(by, &b, sizeof by);
    UNROLL for (int i = 0; i < LANES / 4; i++) to[i] = vdotq_s32(to[i], from[i], by[i]);
    memcpy(&sum, to, sizeof to);
    return sum;
#else
    if (!FLIP) return dot_pairs(sum, multiply_bytes(a, b), broadcast_short(1));
    sum = dot_pairs(sum, multiply_nibbles(a & 15, b), broadcast_short(1));        /* a = nibble + 16 * nibble */
    return dot_pairs(sum, multiply_nibbles((a >> 4) & 15, b), broadcast_short(16));
#endif
}

/* 4 * LANES bytes of a row of int8 weights times as many values of x. */
INLINE ints dot_int8(ints start, bytes w, bytes x) {
#if PAIRS && LANES == 8                                /* the sign of w moves to x: 2 * 128 * 127 fits int16 */
    shorts pairs = (shorts)X86(maddubs_epi16)(X86(abs_epi8)((x86)w), X86(sign_epi8)((x86)x, (x86)w));
    return dot_pairs(start, pairs, broadcast_short(1));
#else
    return dot_bytes(start, w ^ (int8_t)FLIP, x);
#endif
}

/* 4 * LANES bytes of a row of int4 weights times the values of x for their low and high nibbles. */
INLINE ints dot_int4(ints start, bytes w, bytes low, bytes high) {
    bytes even = w & 15, odd = (bytes)((shorts)w >> 4) & 15;
    if (BYTES) return dot_bytes(dot_bytes(start, even, low), odd, high);
    return dot_pairs(start, multiply_nibbles(even, low) + multiply_nibbles(odd, high), broadcast_short(1));
}

/* 4 * LANES bytes of a row times the values of x that belong to them. */
INLINE ints dot_step(ints start, bytes w, const char *x, int bits) {
    bytes low, high;
    memcpy(&low, x, sizeof low);
    if (bits == 8) return dot_int8(start, w, low);
    memcpy(&high, x + sizeof low, sizeof high);
    return dot_int4(start, w, low, high);
}

/* Rounds a token x (k), for rows or panels of weights: in each group of 32 the largest |x| becomes
   127 or -127. */
static void quantize_row(const float *x, int64_t k, int bits, int panels, struct quantized to, int64_t token) {
    char *values = to.values + token * to.groups * (to.order == AS_PAIRS ? 64 : 32);
    float *scales = to.scales + token * to.groups;
    int32_t *starts = to.starts + token * to.groups * (panels ? 1 : bits);
    int64_t g = 0, used = (k + GROUP - 1) / GROUP;
    for (; g < used; g++) {
        floats v[GROUP / LANES] = {0};
        int64_t left = k - GROUP * g;
        if (left >= GROUP) memcpy(v, x + GROUP * g, 128);
        else memcpy(v, x + GROUP * g, 4 * left);

        ints top = {0}, sum = {0};
        UNROLL for (int j = 0; j < GROUP / LANES; j++) {   /* without their signs, floats are ordered as their bits */
            ints size = (ints)v[j] & 0x7fffffff;
            top = choose(size > top, size, top);
        }
        int32_t largest_bits = 0;
        UNROLL for (int i = 0; i < LANES; i++) largest_bits = top[i] > largest_bits ? top[i] : largest_bits;
        float largest;
        memcpy(&largest, &largest_bits, 4);
        scales[g] = largest / 127;

        int16_t q[GROUP];
        UNROLL for (int j = 0; j < GROUP / LANES; j++) {
            ints near = (ints)(v[j] * (largest > 0 ? 127 / largest : 0) + ROUNDER) - ROUNDER_BITS;
            halves narrow = __builtin_convertvector(near, halves);
            memcpy(q + LANES * j, &narrow, sizeof narrow);
            sum += near;
        }
        if (panels) {
            int32_t total = 0;
            UNROLL for (int i = 0; i < LANES; i++) total += sum[i];
            starts[g] = -total * (bits == 4 ? 8 : FLIP);
        }
        int8_t *low = (int8_t *)values + place_of(to.order, g, 0), *high = (int8_t *)values + place_of(to.order, g, 1);
        if (to.order == AS_PAIRS) {
            memcpy(low, q, sizeof q);
        } else if (to.order == IN_ORDER) {
            for (int i = 0; i < GROUP; i++) low[i] = q[i];
        } else for (int i = 0; i < GROUP / 2; i++) {
            low[i] = q[2 * i];
            high[i] = q[2 * i + 1];
        }
    }
    if (panels) return;
    for (; g < to.groups; g++) {
        memset(values + place_of(to.order, g, 0), 0, 16);
        memset(values + place_of(to.order, g, 1), 0, 16);
        scales[g] = 0;
    }
    bytes zeros = (bytes)broadcast_int(bits == 4 ? 0x88888888 : 0);       /* weights of 0, as they are stored */
    for (int64_t i = 0; i < used * bits; i += LANES) {
        ints start = -dot_step((ints){0}, zeros, values + i * 32 / bits, bits);
        memcpy(starts + i, &start, sizeof start);
    }
}


/* =================================================================================================
   Few tokens: rows of the weight as they lie in memory (generation: reading them is the limit).
   `height` (1 or FOUR) and `bits` are constants in each call, and each is compiled for its own */

/* y[row], or with a height of FOUR y[row] ... y[row + 3]: the sums of all lanes, scaled, with what
   is added. */
INLINE void finish_rows(const struct layer *layer, int64_t row, int height, int bits, const floats *sum, quad rest,
                        float *y, int add) {
    if (height < FOUR) {
        y[row] = sum_of(sum[0]) * (bits == 8 ? scale_of(layer, row, 0) : 1) + rest[0]
                 + (layer->bias ? layer->bias[row] : 0) + (add ? y[row] : 0);
        return;
    }
    quad total = sums_of(sum), more = {0}, old = {0};
    if (bits == 8) total *= halves_to_floats(layer->scales + row);
    if (layer->bias) memcpy(&more, layer->bias + row, sizeof more);
    if (add) memcpy(&old, y + row, sizeof old);
    total = total + rest + more + old;
    memcpy(y + row, &total, sizeof total);
}

/* sum + scale * (a vector of bytes of a row times the values of x that belong to them) */
INLINE floats add_step(bytes w, ints start, const char *x, floats scale, int bits, floats sum) {
    return multiply_add(__builtin_convertvector(dot_step(start, w, x, bits), floats), scale, sum);
}

/* y (n): a quantized token times `height` rows of int8 or int4 weights, from `row` on. Weights are
   prefetched in the order of memory, whatever the order of use: measured on a CPU with AVX2, rows
   from memory take 1.06 to 1.47 times as long without. */
INLINE void gemv_quantized(const struct layer *layer, struct quantized x, int64_t token, int64_t row, int height,
                           int bits, float *y, int add) {
    const int64_t length = layer->k * bits / 8, step = 4 * LANES;            /* of a row, in bytes */
    const int64_t ends = bits == 8 && LANES == 8 ? length : length / step * step;     /* behind it, a part of a step */
    const char *w = (const char *)layer->weights + row * length;
    const char *values = x.values + token * x.groups * GROUP;
    const float *scales = x.scales + token * x.groups;
    const int32_t *starts = x.starts + token * x.groups * bits;
    floats sum[FOUR] = {0}, scale[FOUR];               /* int4: scale of w * scale of x for LANES groups */
    for (int64_t g = 0; g * GROUP < layer->k; g += LANES) {
        const int64_t from = g * 4 * bits, to = from + LANES * 4 * bits;
        floats x_scales = load(scales + g);
        if (bits == 4) UNROLL for (int c = 0; c < height; c++) {
            prefetch(layer->scales + ((row + c) * layer->k + g * GROUP) / layer->group, AHEAD / 8);
            scale[c] = scales_from(layer, row + c, g) * x_scales;
        }
        ints index = lane_numbers() >> (bits == 4 ? 2 : 3);
        for (int64_t at = from; at < to && at < length; at += step, index += LANES / bits) {
            const char *its_x = values + at * 8 / bits;
            ints start = bits == 8 && !FLIP ? (ints){0} : load_ints(starts + at / 4);
            floats one = LANES == 8 ? broadcast(scales[at / GROUP]) : lookup(x_scales, index);      /* int8 */
            if (at < ends) UNROLL for (int c = 0; c < height; c++) {
                if (step * c % 64 == 0) prefetch(w + height * at + step * c, AHEAD);
                bytes v = load_bytes(w + c * length + at, step);
                sum[c] = add_step(v, start, its_x, bits == 4 ? lookup(scale[c], index) : one, bits, sum[c]);
            } else UNROLL for (int c = 0; c < height; c++) {
                bytes v = load_bytes(w + c * length + at, length - at);
                sum[c] = add_step(v, start, its_x, bits == 4 ? lookup(scale[c], index) : one, bits, sum[c]);
            }
        }
    }
    finish_rows(layer, row, height, bits, sum, (quad){0}, y, add);
}

/* y (n): a token x (k) times `height` rows of float weights. Two sums for each row, so that one
   addition need not wait for the last. */
INLINE void gemv_float(const struct layer *layer, const float *x, int64_t row, int height, float *y, int add) {
    floats even[FOUR] = {0}, odd[FOUR] = {0}, v;
    quad rest = {0};
    const float *w = (const float *)layer->weights + row * layer->k;
    int64_t i = 0;
    for (; i + 2 * LANES <= layer->k; i += 2 * LANES) {
        v = load(x + i);
        UNROLL for (int c = 0; c < height * LANES / 8; c++) prefetch(w + height * i + 16 * c, AHEAD);
        UNROLL for (int c = 0; c < height; c++) even[c] += load(w + c * layer->k + i) * v;
        v = load(x + i + LANES);
        UNROLL for (int c = 0; c < height; c++) odd[c] += load(w + c * layer->k + i + LANES) * v;
    }
    for (; i < layer->k; i++)
        for (int c = 0; c < height; c++) rest[c] += w[c * layer->k + i] * x[i];
    UNROLL for (int c = 0; c < height; c++) even[c] += odd[c];
    finish_rows(layer, row, height, 32, even, rest, y, add);
}

INLINE void gemv_rows(const struct layer *layer, const float *x, struct quantized rounded, int64_t m, int64_t row,
                      int height, float *y, int add) {
    for (int64_t token = 0; token < m; token++) {
        float *to = y + token * layer->n;
        if (layer->bits == 32) gemv_float(layer, x + token * layer->k, row, height, to, add);
        else if (layer->bits == 8) gemv_quantized(layer, rounded, token, row, height, 8, to, add);
        else gemv_quantized(layer, rounded, token, row, height, 4, to, add);
    }
}

/* y (m, n) = x W^T + bias, or with `add` y += that, for rows `row` ... `end` - 1 of W. `rounded` is
   x for a quantized layer. Four rows of W at a time: several tokens share them while they are in
   the cache, and what int4 reads of x serves all four. For one token, long rows are read fastest
   from memory in one stream, row after row; short rows are mostly ends, and four share one. noclone:
   gcc would compile it twice, for each `add`, in 2 more seconds. */
__attribute__((noinline, noclone))
static void gemv(const struct layer *layer, const float *x, struct quantized rounded, int64_t m, int64_t row,
                 int64_t end, float *y, int add) {
    int64_t by_four = m > 1 || layer->bits == 4 || layer->k <= SHORT ? row + (end - row) / FOUR * FOUR : row;
    for (; row < by_four; row += FOUR) gemv_rows(layer, x, rounded, m, row, FOUR, y, add);
    for (; row < end; row++) gemv_rows(layer, x, rounded, m, row, 1, y, add);
}


/* =================================================================================================
   Many tokens: PANEL rows of the weight at a time, unpacked (picture 3) */

struct panel {
    char *weights;              /* (k / 4, PANEL, 4) bytes, or with PAIRS and int8 (k / 2, PANEL, 2) int16 */
    float *scales;              /* (k / 32, PANEL) */
};

/* PANEL rows of W, from `row` on. Behind the end of a row: any numbers, as x has zeros there; behind
   the last row: that row again. */
static void pack_panel(const struct layer *layer, enum order order, int64_t row, struct panel panel) {
    const int64_t length = layer->k * layer->bits / 8, groups = (layer->k + GROUP - 1) / GROUP;
    for (int64_t c = 0; c < PANEL; c++) {
        int64_t from = row + c < layer->n ? row + c : layer->n - 1;
        const char *w = (const char *)layer->weights + from * length;
        char *to = panel.weights + 4 * c;
        for (int64_t at = 0; at < length; at += 4) {                         /* four bytes of W */
            uint32_t four = 0;
            if (at + 4 <= length) memcpy(&four, w + at, 4);
            else memcpy(&four, w + at, length - at);
            if (order == EVEN_FIRST) {                               /* 4 steps of even ones, then 4 of odd ones */
                uint32_t even = four & 0x0f0f0f0f, odd = four >> 4 & 0x0f0f0f0f;
                memcpy(to + (at / 16 * 8 + at % 16 / 4) * 4 * PANEL, &even, 4);
                memcpy(to + (at / 16 * 8 + at % 16 / 4 + 4) * 4 * PANEL, &odd, 4);
            } else if (order == IN_ORDER) {
                four ^= FLIP * 0x01010101U;
                memcpy(to + at * PANEL, &four, 4);
            } else {
                int8_t q[4];
                memcpy(q, &four, 4);
                memcpy(to + 2 * at * PANEL, (int16_t[2]){q[0], q[1]}, 4);
                memcpy(to + (2 * at + 4) * PANEL, (int16_t[2]){q[2], q[3]}, 4);
            }
        }
        for (int64_t g = 0; g < groups; g++) panel.scales[g * PANEL + c] = scale_of(layer, from, g);
    }
}

/* Four bytes of x times those of LANES rows. The sums are int32, or int16 until the group ends. */
INLINE ints panel_step(ints sum, ints w, ints x, int bits) {
    if (bits == 8 && PAIRS) return dot_pairs(sum, (shorts)w, (shorts)x);
    if (bits == 8 || BYTES) return dot_bytes(sum, (bytes)w, (bytes)x);
    return (ints)((shorts)sum + multiply_nibbles((bytes)w, (bytes)x));
}

/* `height` (1, 2 or TILE) tokens times a panel: each weight that is loaded serves all of them. Six
   need 12 vectors of sums, two of weights and one of x, and a CPU with AVX2 has 16 registers. */
INLINE void gemm_panel(const struct layer *layer, struct quantized x, int64_t token, struct panel panel, int64_t row,
                       int height, int bits, float *y) {
    const enum order order = order_for(bits, 1);
    const int steps = order == AS_PAIRS ? 8 : 4;       /* in half a group */
    const int64_t length = x.groups * 8 * steps;
    const char *values = x.values + token * length;
    const float *scales = x.scales + token * x.groups;
    const int32_t *starts = x.starts + token * x.groups;
    const int in_shorts = bits == 4 && !BYTES;         /* sums of a group fit int16: 32 * 15 * 127 / 2 */
    floats out[TILE][2] = {0};
    for (int64_t g = 0; g * GROUP < layer->k; g++) {
        ints sum[TILE][2];
        UNROLL for (int h = 0; h < height; h++)
            sum[h][0] = sum[h][1] = broadcast_int(in_shorts || (bits == 8 && !FLIP) ? 0 : starts[h * x.groups + g]);
        _Pragma("GCC unroll 1")                        /* unrolled too, it would only be longer */
        for (int half = 0; half < 2; half++) {
            const char *four = values + place_of(order, g, half);
            const char *w = panel.weights + (2 * g + half) * steps * 4 * PANEL;
            _Pragma("GCC unroll 1")
            for (int i = 0; i < steps; i++, w += 4 * PANEL, four += 4) {
                ints w_low = load_ints(w), w_high = load_ints(w + 4 * LANES);
                UNROLL for (int h = 0; h < height; h++) {
                    int32_t v;
                    memcpy(&v, four + h * length, 4);
                    sum[h][0] = panel_step(sum[h][0], w_low, broadcast_int(v), bits);
                    sum[h][1] = panel_step(sum[h][1], w_high, broadcast_int(v), bits);
                }
            }
        }
        UNROLL for (int h = 0; h < height; h++) UNROLL for (int j = 0; j < 2; j++) {
            ints all = sum[h][j];
            if (in_shorts)
                all = dot_pairs(broadcast_int(starts[h * x.groups + g]), (shorts)all, broadcast_short(1));
            floats scale = load(panel.scales + g * PANEL + LANES * j) * scales[h * x.groups + g];
            out[h][j] += __builtin_convertvector(all, floats) * scale;
        }
    }
    UNROLL for (int h = 0; h < height; h++) UNROLL for (int j = 0; j < 2; j++) {
        int64_t at = row + LANES * j, left = layer->n - at;
        if (left <= 0) continue;
        floats bias = layer->bias ? load_first(layer->bias + at, left, 0) : (floats){0};
        store_first(y + (token + h) * layer->n + at, left, out[h][j] + bias);
    }
}


/* m tokens times a panel. */
INLINE void gemm(const struct layer *layer, struct quantized x, int64_t m, struct panel panel, int64_t row, int bits,
                 float *y) {
    int64_t token = 0;
    for (; token + TILE <= m; token += TILE) gemm_panel(layer, x, token, panel, row, TILE, bits, y);
    for (; token + 2 <= m; token += 2) gemm_panel(layer, x, token, panel, row, 2, bits, y);
    for (; token < m; token++) gemm_panel(layer, x, token, panel, row, 1, bits, y);
}


/* =================================================================================================
   Layers */

/* y (m, n) = x (m, k) W^T + bias, without layer->first. Returns 1 if there is no memory. */
int linear(const struct layer *layer, const float *x, int64_t m, float *y) {
    const int64_t n = layer->n, k = layer->k, groups = padded_groups(k);
    if (!m) return 0;
    int quantized = layer->bits < 32, failed = 0;
    int panels = quantized && (m >= 8 || k % GROUP);       /* gemv would read behind the end of an odd row */
    enum order order = order_for(layer->bits, panels);
    char *memory = malloc(quantized ? room_for(m, k) : 1);
    if (!memory) return 1;
    struct quantized rounded = divide_room(memory, m, k, order);
    #pragma omp parallel if (m * n * k > WORTH_THREADS)
    {
        #pragma omp for
        for (int64_t token = 0; token < (quantized ? m : 0); token++)
            quantize_row(x + token * k, k, layer->bits, panels, rounded, token);

        char *buffer = panels ? aligned_alloc(64, groups * PANEL * (64 + 4)) : NULL;
        struct panel panel = {0};
        if (buffer) {
            panel = (struct panel){buffer, (float *)(buffer + groups * PANEL * 64)};
        } else if (panels) {
            #pragma omp atomic write
            failed = 1;
        }
        #pragma omp for
        for (int64_t row = 0; row < n; row += PANEL) {
            int64_t end = row + PANEL < n ? row + PANEL : n;
            if (!panels) gemv(layer, x, rounded, m, row, end, y, 0);
            if (!buffer) continue;
            pack_panel(layer, order, row, panel);
            if (layer->bits == 8) gemm(layer, rounded, m, panel, row, 8, y);
            else gemm(layer, rounded, m, panel, row, 4, y);
        }
        free(buffer);
    }
    free(memory);
    return failed;
}

/* y (m, k): rows ids (m) of an embedding table, as floats. Returns 1 if there is no such row. */
static int gather(const struct layer *table, const int64_t *ids, int64_t m, float *y) {
    const int64_t k = table->k;
    for (int64_t r = 0; r < m; r++) {
        if (ids[r] < 0 || ids[r] >= table->n) return 1;
        const uint8_t *w = (const uint8_t *)table->weights + ids[r] * k * table->bits / 8;
        if (table->bits == 32) memcpy(y + r * k, w, k * sizeof(float));
        else for (int64_t i = 0; i < k; i++) {
            int q = table->bits == 8 ? (int8_t)w[i] : (w[i / 2] >> i % 2 * 4 & 15) - 8;
            y[r * k + i] = q * scale_of(table, ids[r], i / GROUP);
        }
    }
    return 0;
}


/* =================================================================================================
   Between the products. By six operators of PyTorch, norms took a third of a small model's token */

/* y (n) = x / rms(x) * weight; y may be x */
static void normalize(const float *x, const float *weight, float eps, int64_t n, float *y) {
    floats squares = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        floats v = load(x + i);
        squares += v * v;
    }
    float sum = sum_of(squares);
    for (; i < n; i++) sum += x[i] * x[i];
    float scale = 1 / sqrtf(sum / n + eps);
    for (i = 0; i < n; i += LANES) {
        floats v = load_first(x + i, n - i, 0), w = load_first(weight + i, n - i, 0);
        store_first(y + i, n - i, v * scale * w);
    }
}

/* x, y (m, n) */
void rms_norm(const float *x, const float *weight, float eps, int64_t m, int64_t n, float *y) {
    #pragma omp parallel for if (m * n > WORTH_THREADS)
    for (int64_t r = 0; r < m; r++) normalize(x + r * n, weight, eps, n, y + r * n);
}

/* One head x (D) of q or k, in place: normalized if there is a weight (D), then rotary positions:
   channels i and i + R are turned as a point (a, b) by the angle i of their position, for i < R;
   with 2 R < D the rest stays. */
static void rope_head(float *x, const float *weight, float eps, int64_t D, const float *cosines, const float *sines,
                      int64_t R) {
    if (weight) normalize(x, weight, eps, D, x);
    for (int64_t i = 0; i < R; i++) {
        float a = x[i], b = x[i + R];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + R] = b * cosines[i] + a * sines[i];
    }
}

/* The sizes of to_heads, as Python's array of integers. */
struct head_sizes {
    int64_t B;                  /* texts */
    int64_t T;                  /* positions */
    int64_t H;                  /* heads */
    int64_t D;                  /* channels of a head */
    int64_t R;                  /* pairs of channels that turn */
    int64_t rotary_B;           /* 1: all texts have the same positions; B: each its own */
};

/* All heads of q or k, x (B, T, H, D), as attention wants them: y (B, H, T, D); cosines, sines
   (rotary_B, T, R) */
void to_heads(const float *x, const float *weight, float eps, const float *cosines, const float *sines,
              const struct head_sizes *sizes, float *y) {
    const int64_t B = sizes->B, T = sizes->T, H = sizes->H, D = sizes->D, R = sizes->R;
    const int64_t turns = sizes->rotary_B * T;             /* rows of cosines and sines */
    #pragma omp parallel for if (B * T * H * D > WORTH_THREADS)
    for (int64_t r = 0; r < B * T; r++) {
        const float *cosine = cosines + r % turns * R, *sine = sines + r % turns * R;
        int64_t b = r / T, t = r % T;
        for (int64_t h = 0; h < H; h++) {
            float *to = y + ((b * H + h) * T + t) * D;
            memcpy(to, x + (r * H + h) * D, D * sizeof(float));
            rope_head(to, weight, eps, D, cosine, sine, R);
        }
    }
}

/* silu(gate) * up of LANES numbers, or of the first n */
INLINE floats swiglu_of(const float *gate, const float *up, int64_t n) {
    floats g = load_first(gate, n, 0);
    return g / (1 + exp_of(-g)) * load_first(up, n, 0);
}

/* gate, up, y (n) */
void swiglu(const float *gate, const float *up, int64_t n, float *y) {
    #pragma omp parallel for if (n > WORTH_THREADS)
    for (int64_t i = 0; i < n; i += LANES) store_first(y + i, n - i, swiglu_of(gate + i, up + i, n - i));
}


/* =================================================================================================
   Decoding: a few new tokens, from ids to logits, by one team of threads (picture 4) */

/* A block of the transformer, as Python's table has it. */
struct block {
    const float *attention_norm;    /* (C) */
    const float *q_norm;            /* (D), or NULL */
    const float *k_norm;            /* (D), or NULL */
    const float *mlp_norm;          /* (C) */
    const struct layer *q;          /* (H D, C) */
    const struct layer *k;          /* (K D, C) */
    const struct layer *v;          /* (K D, C) */
    const struct layer *o;          /* (C, H D) */
    const struct layer *gate;       /* (I, C) */
    const struct layer *up;         /* (I, C) */
    const struct layer *down;       /* (C, I) */
    float *keys;                    /* the cache: (batch, K, capacity, D) */
    float *values;                  /* (batch, K, capacity, D) */
    int64_t window;                 /* the last positions that a token sees, itself included; 0: all */
};

/* A model and what is new, as Python's array of integers. m = batch * T tokens are new. */
struct model {
    int64_t T;                      /* new positions of each text */
    int64_t start;                  /* the first of them: so many are in the cache */
    int64_t last;                   /* the last of them whose logits are wanted */
    int64_t batch;                  /* texts */
    int64_t capacity;               /* positions that the cache has room for */
    const struct layer *embedding;  /* (V, C) */
    const struct layer *head;       /* (V, C) */
    const float *norm;              /* (C): the last one */
    const float *frequencies;       /* (R): a position turns pair i by position * frequency i */
    const struct block *blocks;
    int64_t count;                  /* of blocks */
    int64_t C;                      /* hidden size */
    int64_t H;                      /* heads of q */
    int64_t K;                      /* heads of k and v; H / K heads of q share one */
    int64_t D;                      /* channels of a head */
    int64_t I;                      /* channels inside the MLP */
    int64_t R;                      /* pairs of channels that turn */
    int64_t widest;                 /* largest n or k of a layer, but for V, rounded up to a multiple of 32 */
};

/* What all threads read and write: each thread its own rows or heads. */
struct team {
    struct model sizes;
    float eps;
    float *x;                   /* (m, C): the residual stream */
    float *q;                   /* (m, H, D): then what attention makes of it */
    float *k;                   /* (m, K, D) */
    float *v;                   /* (m, K, D) */
    float *gate;                /* (m, I) */
    float *up;                  /* (m, I) */
    float *low_rank;            /* (2, m, widest): between the two factors of a low-rank layer */
    float *cosines;             /* (T, R) */
    float *sines;               /* (T, R) */
};

/* What a thread has for itself. */
struct worker {
    int64_t id;                 /* 0 ... threads - 1 */
    int64_t threads;
    int64_t m;                  /* new tokens */
    float *x;                   /* (m, widest): what it has normalized, or SwiGLU */
    float *scores;              /* (capacity + LANES): of attention */
    char *room;                 /* room_for(m, widest) */
    struct quantized rounded;   /* a layer's input, rounded; the next layer often has the same */
    const float *rounded_from;  /* that input; NULL: it has changed */
    int64_t rounded_bits;       /* of the weights that it was rounded for */
    int64_t low_rank_half;      /* 0 or 1: of team->low_rank, the one used last */
};

/* This thread's rows of y (m, n) = x (m, k) W^T + bias, or with `add` y += that. */
static void apply_layer(const struct layer *layer, const float *x, float *y, int add, const struct team *team,
                        struct worker *me) {
    if (layer->first) {
        me->low_rank_half ^= 1;                            /* a slow thread may still read the other half */
        float *inner = team->low_rank + me->low_rank_half * me->m * team->sizes.widest;
        apply_layer(layer->first, x, inner, 0, team, me);
        #pragma omp barrier
        me->rounded_from = NULL;
        x = inner;
    }
    if (layer->bits < 32 && (me->rounded_from != x || me->rounded_bits != layer->bits)) {
        me->rounded = divide_room(me->room, me->m, layer->k, order_for(layer->bits, 0));
        for (int64_t token = 0; token < me->m; token++)
            quantize_row(x + token * layer->k, layer->k, layer->bits, 0, me->rounded, token);
        me->rounded_from = x;
        me->rounded_bits = layer->bits;
    }
    int64_t fours = (layer->n + FOUR - 1) / FOUR;
    int64_t row = fours * me->id / me->threads * FOUR;
    int64_t end = fours * (me->id + 1) / me->threads * FOUR;
    gemv(layer, x, me->rounded, me->m, row, end < layer->n ? end : layer->n, y, add);
}

/* me->x (m, C) = norm of x: all of it, by each thread. */
static void normalize_all(const float *weight, const struct team *team, struct worker *me) {
    const int64_t C = team->sizes.C;
    for (int64_t r = 0; r < me->m; r++) normalize(team->x + r * C, weight, team->eps, C, me->x + r * C);
    me->rounded_from = NULL;
}

/* This thread's heads of q and k are normalized and turned; those of k and v go into the cache. */
static void rope_and_cache(const struct block *block, const struct team *team, const struct worker *me) {
    const struct model s = team->sizes;
    for (int64_t i = me->id; i < me->m * (s.H + s.K); i += me->threads) {
        int64_t r = i / (s.H + s.K), h = i % (s.H + s.K);                  /* token r; H heads of q, then K of k */
        int64_t text = r / s.T, t = r % s.T;
        int is_q = h < s.H;
        float *head = is_q ? team->q + (r * s.H + h) * s.D : team->k + (r * s.K + h - s.H) * s.D;
        rope_head(head, is_q ? block->q_norm : block->k_norm, team->eps, s.D, team->cosines + t * s.R,
                  team->sines + t * s.R, s.R);
        if (is_q) continue;
        h -= s.H;
        int64_t place = ((text * s.K + h) * s.capacity + s.start + t) * s.D;
        memcpy(block->keys + place, head, s.D * sizeof(float));
        memcpy(block->values + place, team->v + (r * s.K + h) * s.D, s.D * sizeof(float));
    }
}

/* q (D) = softmax(q keys^T / sqrt(D)) values, with keys, values (count, D). scores (count + LANES) */
static void attention_head(float *q, const float *keys, const float *values, int64_t count, int64_t D, float *scores) {
    struct layer layer = {.weights = keys, .k = D, .bits = 32};            /* q keys^T is a product with floats */
    int64_t p = 0, i = 0;
    for (; p + FOUR <= count; p += FOUR) gemv_float(&layer, q, p, FOUR, scores, 0);
    for (; p < count; p++) gemv_float(&layer, q, p, 1, scores, 0);

    float most = -INFINITY, scale = 1 / sqrtf(D), sum = 0;
    for (p = 0; p < count; p++) most = scores[p] > most ? scores[p] : most;
    for (p = 0; p < count; p += LANES) {                                   /* behind the end too: nobody reads that */
        floats v = exp_of((load(scores + p) - most) * scale);
        store(scores + p, v);
        for (int64_t j = 0; j < LANES && p + j < count; j++) sum += v[j];
    }
    for (; i + LANES <= D; i += LANES) {
        floats y = {0};
        for (p = 0; p < count; p++) y += load(values + p * D + i) * scores[p];
        store(q + i, y / sum);
    }
    for (; i < D; i++) {
        float y = 0;
        for (p = 0; p < count; p++) y += values[p * D + i] * scores[p];
        q[i] = y / sum;
    }
}

/* This thread's heads of q become what they attend to. */
static void attend(const struct block *block, const struct team *team, const struct worker *me) {
    const struct model s = team->sizes;
    for (int64_t i = me->id; i < me->m * s.H; i += me->threads) {
        int64_t r = i / s.H, h = i % s.H;
        int64_t text = r / s.T, shared = h / (s.H / s.K);                  /* the head of k and v */
        int64_t end = s.start + r % s.T + 1;                               /* a token sees itself and those before */
        int64_t from = block->window && end > block->window ? end - block->window : 0;
        int64_t place = ((text * s.K + shared) * s.capacity + from) * s.D;
        attention_head(team->q + i * s.D, block->keys + place, block->values + place, end - from, s.D, me->scores);
    }
}

/* One thread's part of a block. Behind a barrier it may read what other threads wrote before it. */
static void decode_block(const struct block *block, const struct team *team, struct worker *me) {
    normalize_all(block->attention_norm, team, me);
    apply_layer(block->q, me->x, team->q, 0, team, me);
    apply_layer(block->k, me->x, team->k, 0, team, me);
    apply_layer(block->v, me->x, team->v, 0, team, me);
    #pragma omp barrier
    rope_and_cache(block, team, me);
    #pragma omp barrier
    attend(block, team, me);
    #pragma omp barrier
    me->rounded_from = NULL;
    apply_layer(block->o, team->q, team->x, 1, team, me);
    #pragma omp barrier
    normalize_all(block->mlp_norm, team, me);
    apply_layer(block->gate, me->x, team->gate, 0, team, me);
    apply_layer(block->up, me->x, team->up, 0, team, me);
    #pragma omp barrier
    const int64_t n = me->m * team->sizes.I;
    for (int64_t i = 0; i < n; i += LANES)
        store_first(me->x + i, n - i, swiglu_of(team->gate + i, team->up + i, n - i));
    me->rounded_from = NULL;
    apply_layer(block->down, me->x, team->x, 1, team, me);
    #pragma omp barrier
}

/* This thread's part of the logits (batch * last, V): the head of the last norm of x. */
static void apply_head(float *logits, const struct team *team, struct worker *me) {
    const struct model s = team->sizes;
    me->m = s.batch * s.last;
    for (int64_t r = 0; r < me->m; r++) {
        int64_t token = r / s.last * s.T + s.T - s.last + r % s.last;
        normalize(team->x + token * s.C, s.norm, team->eps, s.C, me->x + r * s.C);
    }
    me->rounded_from = NULL;
    apply_layer(s.head, me->x, logits, 0, team, me);
}

/* logits (batch, last, V) of ids (batch, T), the tokens at positions start ... start + T - 1; their
   keys and values go into the cache. rotary_scale: of cosines and sines. Returns 1 if there is no
   memory, 2 if an id is none of V. */
int decode(const struct model *model, float rotary_scale, float eps, const int64_t *ids, float *logits) {
    const struct model s = *model;
    const int64_t m = s.batch * s.T;
    const int64_t shared = m * (s.C + s.H * s.D + 2 * s.K * s.D + 2 * s.I + 2 * s.widest) + 2 * s.T * s.R;
    const int64_t private = m * s.widest + s.capacity + LANES + room_for(m, s.widest) / sizeof(float) + 64;
    int most_threads = 1;
#ifdef _OPENMP
    most_threads = omp_get_max_threads();
#endif
    float *memory = malloc((shared + most_threads * private) * sizeof(float));
    if (!memory) return 1;

    struct team team = {.sizes = s, .eps = eps, .x = memory};
    team.q = team.x + m * s.C;
    team.k = team.q + m * s.H * s.D;
    team.v = team.k + m * s.K * s.D;
    team.gate = team.v + m * s.K * s.D;
    team.up = team.gate + m * s.I;
    team.low_rank = team.up + m * s.I;
    team.cosines = team.low_rank + 2 * m * s.widest;
    team.sines = team.cosines + s.T * s.R;
    if (gather(s.embedding, ids, m, team.x)) {
        free(memory);
        return 2;
    }
    for (int64_t i = 0; i < s.T * s.R; i++) {
        float angle = (s.start + i / s.R) * s.frequencies[i % s.R];
        team.cosines[i] = cosf(angle) * rotary_scale;
        team.sines[i] = sinf(angle) * rotary_scale;
    }
    #pragma omp parallel
    {
        struct worker me = {.threads = 1, .m = m};
#ifdef _OPENMP
        me.id = omp_get_thread_num();
        me.threads = omp_get_num_threads();
#endif
        me.x = memory + shared + me.id * private;
        me.scores = me.x + m * s.widest;
        me.room = (char *)(me.scores + s.capacity + LANES);
        for (int64_t i = 0; i < s.count; i++) decode_block(&s.blocks[i], &team, &me);
        apply_head(logits, &team, &me);
    }
    free(memory);
    return 0;
}


/* =================================================================================================
   Training: what lies between the products, backward, and the loss, in one pass each. By PyTorch's
   operators, each a pass over the memory, this (forward and backward) was a fifth of a small
   model's step; here it is a twentieth */

/* From `grad`, the gradient of y in normalize, to that of x; what it adds to that of the weight is
   added to grad_weight. All (n); grad_x may be grad.
       y = x s w, s = 1 / rms(x):    dx = s (grad w - x s^2 mean(grad w x))    dw = grad x s */
static void normalize_backward(const float *x, const float *weight, float eps, const float *grad, int64_t n,
                               float *grad_x, float *grad_weight) {
    floats squares = {0}, products = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        floats v = load_first(x + i, n - i, 0);
        squares += v * v;
        products += v * load_first(grad + i, n - i, 0) * load_first(weight + i, n - i, 0);
    }
    float scale = 1 / sqrtf(sum_of(squares) / n + eps);
    float along = sum_of(products) * scale * scale / n;
    for (int64_t i = 0; i < n; i += LANES) {
        floats v = load_first(x + i, n - i, 0), g = load_first(grad + i, n - i, 0);
        store_first(grad_weight + i, n - i, load_first(grad_weight + i, n - i, 0) + g * v * scale);
        store_first(grad_x + i, n - i, (g * load_first(weight + i, n - i, 0) - v * along) * scale);
    }
}

/* x, grad, grad_x (m, n); weight_sums (PARTS, n) zeros: their sum is the gradient of the weight.
   Each part of the rows has its own, so that the number of threads changes no bit. */
void rms_norm_backward(const float *x, const float *weight, float eps, int64_t m, int64_t n, const float *grad,
                       float *grad_x, float *weight_sums) {
    #pragma omp parallel for if (m * n > WORTH_THREADS)
    for (int64_t part = 0; part < PARTS; part++)
        for (int64_t r = m * part / PARTS; r < m * (part + 1) / PARTS; r++)
            normalize_backward(x + r * n, weight, eps, grad + r * n, n, grad_x + r * n, weight_sums + part * n);
}

/* The sizes of to_heads_backward: those of to_heads, and how grad (B, H, T, D) lies in memory. */
struct head_strides {
    struct head_sizes sizes;
    int64_t stride_B;           /* floats from a text to the next */
    int64_t stride_H;           /* from a head to the next */
    int64_t stride_T;           /* from a position to the next; from a channel to the next it is 1 */
};

/* rope_head backward: from `grad`, the gradient of its result, to that of its input x. grad is
   turned back, by the opposite angle, and then goes back through the norm, if any. All (D).
   restrict: grad_x overlaps nothing else here. gcc need not test that for each head. */
static void rope_head_backward(const float *x, const float *weight, float eps, int64_t D, const float *cosines,
                               const float *sines, int64_t R, const float *grad, float *restrict grad_x,
                               float *weight_sum) {
    for (int64_t i = 0; i < R; i++) grad_x[i] = grad[i] * cosines[i] + grad[i + R] * sines[i];
    for (int64_t i = 0; i < R; i++) grad_x[i + R] = grad[i + R] * cosines[i] - grad[i] * sines[i];
    memcpy(grad_x + 2 * R, grad + 2 * R, (D - 2 * R) * sizeof(float));
    if (weight) normalize_backward(x, weight, eps, grad_x, D, grad_x, weight_sum);
}

/* x, grad_x (B, T, H, D); grad is that of y in to_heads; weight_sums (PARTS, D) zeros. */
void to_heads_backward(const float *x, const float *weight, float eps, const float *cosines, const float *sines,
                       const struct head_strides *strides, const float *grad, float *grad_x, float *weight_sums) {
    const struct head_sizes *s = &strides->sizes;
    const int64_t T = s->T, H = s->H, D = s->D, R = s->R, m = s->B * T, turns = s->rotary_B * T;
    const int64_t stride_B = strides->stride_B, stride_H = strides->stride_H, stride_T = strides->stride_T;
    #pragma omp parallel for if (m * H * D > WORTH_THREADS)
    for (int64_t part = 0; part < PARTS; part++)
        for (int64_t r = m * part / PARTS; r < m * (part + 1) / PARTS; r++) {
            const float *grads = grad + r / T * stride_B + r % T * stride_T;
            const float *cosine = cosines + r % turns * R, *sine = sines + r % turns * R;
            for (int64_t h = 0; h < H; h++) {
                int64_t head = (r * H + h) * D;
                rope_head_backward(x + head, weight, eps, D, cosine, sine, R, grads + h * stride_H, grad_x + head,
                                   weight_sums + part * D);
            }
        }
}

/* gate, up, grad (of y), grad_gate, grad_up (n)
       s = 1 / (1 + e^-gate), y = gate s up:
       dgate = grad up s (1 + gate (1 - s)), dup = grad gate s */
void swiglu_backward(const float *gate, const float *up, int64_t n, const float *grad, float *grad_gate,
                     float *grad_up) {
    #pragma omp parallel for if (n > WORTH_THREADS)
    for (int64_t i = 0; i < n; i += LANES) {
        floats g = load_first(gate + i, n - i, 0), y = load_first(grad + i, n - i, 0);
        floats s = 1 / (1 + exp_of(-g));
        store_first(grad_gate + i, n - i, y * load_first(up + i, n - i, 0) * s * (1 + g * (1 - s)));
        store_first(grad_up + i, n - i, y * g * s);
    }
}

/* x = e^(x - most), LANES numbers or the first n; returns them, and zeros for the others */
INLINE floats exp_in_place(float *x, int64_t n, float most) {
    floats p = exp_of(load_first(x, n, -INFINITY) - most);
    store_first(x, n, p);
    return p;
}

/* -log p of a target, p = softmax(x). x (V), still in the cache, becomes the gradient p - one-hot. */
static float cross_entropy_row(float *x, int64_t target, int64_t V) {
    float most = -INFINITY;
    floats top[4], sum = {0};
    int64_t i = 0;
    for (int j = 0; j < 4; j++) top[j] = broadcast(most);
    for (; i + 4 * LANES <= V; i += 4 * LANES) UNROLL for (int j = 0; j < 4; j++) {
        floats v = load(x + i + LANES * j);
        top[j] = (floats)choose(v > top[j], (ints)v, (ints)top[j]);
    }
    for (; i < V; i++) most = fmaxf(most, x[i]);
    for (int j = 0; j < 4 * LANES; j++) most = fmaxf(most, top[j / LANES][j % LANES]);

    float right = x[target];
    for (i = 0; i + LANES <= V; i += LANES) sum += exp_in_place(x + i, LANES, most);
    if (i < V) sum += exp_in_place(x + i, V - i, most);
    float all = sum_of(sum), scale = 1 / all;
    for (i = 0; i < V; i++) x[i] *= scale;
    x[target] -= 1;
    return logf(all) + most - right;
}

/* losses (m) of logits (m, V), which become their gradients; both are 0 where the target (m) is
   IGNORE. Returns 1 if a target is no id. */
int cross_entropy(float *logits, const int64_t *targets, int64_t m, int64_t V, float *losses) {
    for (int64_t r = 0; r < m; r++)
        if (targets[r] != IGNORE && (targets[r] < 0 || targets[r] >= V)) return 1;
    #pragma omp parallel for if (m * V > WORTH_THREADS)
    for (int64_t r = 0; r < m; r++) {
        float *x = logits + r * V;
        if (targets[r] == IGNORE) {
            memset(x, 0, V * sizeof(float));
            losses[r] = 0;
        } else {
            losses[r] = cross_entropy_row(x, targets[r], V);
        }
    }
    return 0;
}
