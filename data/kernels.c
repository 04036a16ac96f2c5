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
   gemm, for 8 tokens or more: each thread unpacks 16 rows of W into a panel of int16 and multiplies
   all tokens by it. Unpacking is then paid once, and arithmetic is the limit. The 16 rows of a panel
   are interleaved by pairs, so that one instruction multiplies 8 rows by one pair of x:

       panel   row 0   row 1         row 15   row 0   row 1         row 15
             | w0 w1 | w0 w1 | ... | w0 w1  | w2 w3 | w2 w3 | ... | w2 w3  | w4 w5 ...
         x   | x0 x1 | x0 x1 | ... | x0 x1  | x2 x3 | x2 x3 | ... | x2 x3  | x4 x5 ...

   4. The threads that decode a token: one team for all blocks. For one token, to call an operator
   of PyTorch takes longer than its work, and so does waking threads for it. || is a barrier: there
   each thread waits for the last one. What all of them need whole, such as a norm, each thread
   makes alone.

             norm of  | own rows  || own heads:  || own heads: || own rows || norm of | own rows of
             all of x | of q,k,v  || rope, cache || attention  || of o     || all     | gate and up
   thread 0  ======== | ====      || =====       || =====      || ====     || ======= | =====
   thread 1  ======== |     ====  ||      =====  ||      ===== ||     ==== || ======= |      =====

             || SwiGLU of all | own rows of down || the next block

   How many threads there are changes no bit of any result: each number is made by one thread alone,
   and where a sum is divided (the gradient of a weight) it is always divided into PARTS parts.


   Contents

       Vectors                  numbers 8 at a time: load, store, sum, exp
       Quantized numbers        struct layer, struct quantized, half_to_float, quantize_row
       Products of integers     dot_pairs, dot_int8, dot_int4
       Few tokens               gemv_quantized, gemv_float, gemv
       Many tokens              struct panel, pack_panel, gemm_panel
       Layers                   linear*, gather*
       Between the products     rms_norm*, rope_head, to_heads*, swiglu*
       Decoding                 apply_layer, rope_and_cache, attention_head, decode_blocks*
       Training                 the backward passes*, cross_entropy*

   A star marks what Python calls. In a product, m, n and k are the sizes of x (m, k), W (n, k) and
   y (m, n); `token` is a row of x, `row` a row of W. Arrays are float32 and contiguous unless a
   comment says otherwise. Vectors are GNU C's, which gcc and clang compile for any CPU; widen_int8,
   dot_pairs and dot_int4 have a faster form for x86. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
#pragma GCC diagnostic ignored "-Wunknown-pragmas"          /* "omp ...": then there is one thread */
#endif
#ifndef __AVX__
#pragma GCC diagnostic ignored "-Wpsabi"      /* how functions pass vectors: all of ours are inlined */
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum {
    GROUP = 32,                 /* activations that share a scale */
    FOUR = 4,                   /* rows of the weight that gemv multiplies together */
    PANEL = 16,                 /* rows of the weight in a panel */
    TILE = 6,                   /* tokens that gemm multiplies together */
    PARTS = 32,                 /* of all rows; each sums its own gradient of a weight */
    WORTH_THREADS = 100000,     /* fewer steps than that are done before other threads wake up */
    IGNORE = -100,              /* a target that is not learned */
};


/* =================================================================================================
   Vectors: numbers 8 at a time */

typedef int8_t  int8x16  __attribute__((vector_size(16)));
typedef int16_t int16x8  __attribute__((vector_size(16)));
typedef int16_t int16x16 __attribute__((vector_size(32)));
typedef int32_t int32x8  __attribute__((vector_size(32)));
typedef float   float8   __attribute__((vector_size(32)));

/* memcpy is how C reads a vector from any address: it becomes one instruction. */
INLINE float8 load(const float *x) {
    float8 v;
    memcpy(&v, x, 32);
    return v;
}

INLINE void store(float *y, float8 v) {
    memcpy(y, &v, 32);
}

INLINE int16x16 load_int16(const int16_t *x) {
    int16x16 v;
    memcpy(&v, x, 32);
    return v;
}

/* One number 8 times. It is "- 0" and not "+ 0", which would make 0 of -0. */
INLINE float8 broadcast(float x) {
    return x - (float8){0};
}

INLINE int32x8 broadcast_int32(int32_t x) {
    return x - (int32x8){0};
}

/* The first n of 8 numbers, and `rest` in place of the others; all 8 where n is larger. */
INLINE float8 load_first(const float *x, int64_t n, float rest) {
    float8 v = broadcast(rest);
    if (n >= 8) memcpy(&v, x, 32);
    else memcpy(&v, x, 4 * n);
    return v;
}

INLINE void store_first(float *y, int64_t n, float8 v) {
    if (n >= 8) memcpy(y, &v, 32);
    else memcpy(y, &v, 4 * n);
}

/* For each of 8 numbers: mask ? yes : no. To compare vectors makes such a mask: -1 or 0. */
INLINE int32x8 choose(int32x8 mask, int32x8 yes, int32x8 no) {
    return (yes & mask) | (no & ~mask);
}

/* The sum of 8 numbers, always in the same order. */
INLINE float sum_of(float8 v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

/* a * b + sum, rounded once where the CPU can do that. For most sums in this file gcc chooses it by
   itself. In gemv_quantized its choice, and with it the last bits of the result, changed with the
   lines around the sum: there it is written out. */
INLINE float8 multiply_add(float8 a, float8 b, float8 sum) {
#if defined __AVX2__ && defined __FMA__
    return (float8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
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
INLINE float8 exp8(float8 x) {
    x = (float8)choose(x > 88, (int32x8)broadcast(88), (int32x8)x);          /* larger would be infinite */
    float8 near = x * 0x1.715476p0f + ROUNDER;                                           /* x / ln(2) */
    float8 whole = near - ROUNDER;
    float8 part = x - whole * 0x1.62e4p-1f - whole * 0x1.7f7d1cp-20f;
    float8 sum = part * (1 / 720.f) + 1 / 120.f;
    sum = ((((sum * part + 1 / 24.f) * part + 1 / 6.f) * part + 0.5f) * part + 1) * part + 1;
    int32x8 power = ((int32x8)near - ROUNDER_BITS + 127) << 23;            /* the bits of the float 2^whole */
    return (float8)((int32x8)(sum * (float8)power) & ~(x <= -87));         /* smaller: 0. NaN stays NaN */
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

/* Activations, rounded: x = values * scale. */
struct quantized {
    void *values;               /* (m, groups, 32): int8 or int16, see enum order */
    float *scales;              /* (m, groups) */
    float *sums;                /* (m, groups): scale * sum of the values, for dot_int4 */
    int64_t groups;             /* of 32 in a token; the last one is filled up with zeros */
};

/* How quantize_row leaves the 32 values of a group. */
enum order {
    IN_ORDER,                   /* int8, for rows of int8 weights */
    EVEN_FIRST,                 /* int8, even ones first, for rows of int4 weights (picture 2) */
    FOR_PANEL,                  /* int16, in order, for panels */
};

/* Any float16 is a float32 with fewer bits. Shifted into place, its exponent is 112 too small. */
INLINE float half_to_float(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13 | (uint32_t)(half & 0x8000) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x * 0x1p112f;
}

/* The scale of weights 32 * g ... 32 * g + 31 of a row. */
INLINE float scale_of(const struct layer *layer, int64_t row, int64_t g) {
    int64_t in_row = layer->k / layer->group;
    return half_to_float(layer->scales[row * in_row + (layer->bits == 8 ? 0 : g * GROUP / layer->group)]);
}

/* The same for int4 and 8 groups of 32, from g on; behind the end of a row, any numbers. */
INLINE float8 scales_of_8(const struct layer *layer, int64_t row, int64_t g) {
    int16x8 halves;
    int64_t in_row = layer->k / layer->group, at = row * in_row + g;
    if (layer->group == GROUP && at + 8 <= layer->n * in_row) memcpy(&halves, layer->scales + at, 16);
    else for (int64_t i = 0; i < 8; i++) {
        int64_t index = (g + i) * GROUP < layer->k ? (g + i) * GROUP / layer->group : 0;
        halves[i] = layer->scales[row * in_row + index];
    }
    int32x8 bits = __builtin_convertvector(halves, int32x8);
    return (float8)((bits & 0x7fff) << 13 | (bits & 0x8000) << 16) * 0x1p112f;
}

/* Rounds a token x (k): in each group of 32 the largest |x| becomes 127 or -127. */
static void quantize_row(const float *x, int64_t k, enum order order, struct quantized to, int64_t token) {
    for (int64_t g = 0; g < to.groups; g++) {
        float8 v[4] = {0};
        int64_t left = k - GROUP * g;
        if (left >= GROUP) memcpy(v, x + GROUP * g, 128);
        else memcpy(v, x + GROUP * g, 4 * left);

        int32x8 top = {0};
        for (int j = 0; j < 4; j++) {                 /* without their signs, floats are ordered as their bits are */
            int32x8 bits = (int32x8)v[j] & 0x7fffffff;
            top = choose(bits > top, bits, top);
        }
        int32_t largest_bits = 0;
        for (int i = 0; i < 8; i++) largest_bits = top[i] > largest_bits ? top[i] : largest_bits;
        float largest;
        memcpy(&largest, &largest_bits, 4);
        float scale = largest / 127;

        int16_t q[GROUP];
        float8 sum = {0};
        for (int j = 0; j < 4; j++) {
            int32x8 near = (int32x8)(v[j] * (largest > 0 ? 127 / largest : 0) + ROUNDER) - ROUNDER_BITS;
            int16x8 narrow = __builtin_convertvector(near, int16x8);
            memcpy(q + 8 * j, &narrow, 16);
            sum += __builtin_convertvector(near, float8);
        }
        int64_t at = token * to.groups + g;
        to.scales[at] = scale;
        to.sums[at] = scale * sum_of(sum);
        int8_t *bytes = (int8_t *)to.values + at * GROUP;
        if (order == FOR_PANEL) {
            memcpy((int16_t *)to.values + at * GROUP, q, sizeof q);
        } else if (order == IN_ORDER) {
            for (int i = 0; i < GROUP; i++) bytes[i] = q[i];
        } else for (int i = 0; i < GROUP / 2; i++) {
            bytes[i] = q[2 * i];
            bytes[GROUP / 2 + i] = q[2 * i + 1];
        }
    }
}


/* =================================================================================================
   Products of integers. Each function returns 8 partial sums */

/* 16 signed bytes as int16. */
INLINE int16x16 widen_int8(const void *bytes) {
    int8x16 v;
    memcpy(&v, bytes, 16);
#ifdef __AVX2__
    return (int16x16)_mm256_cvtepi8_epi16((__m128i)v);       /* one instruction; gcc makes four of the line below */
#else
    return __builtin_convertvector(v, int16x16);
#endif
}

/* sum[i] + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] */
INLINE int32x8 dot_pairs(int32x8 sum, int16x16 a, int16x16 b) {
#if defined __AVX512VNNI__ && defined __AVX512VL__
    return (int32x8)_mm256_dpwssd_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined __AVX2__
    return sum + (int32x8)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    int32x8 pair_a = (int32x8)a, pair_b = (int32x8)b;                /* each holds two int16 */
    return sum + ((pair_a << 16) >> 16) * ((pair_b << 16) >> 16) + (pair_a >> 16) * (pair_b >> 16);
#endif
}

/* A group: 32 int8 weights, and 32 activations in two vectors. */
INLINE int32x8 dot_int8(const uint8_t *weights, int16x16 x_low, int16x16 x_high) {
    return dot_pairs(dot_pairs((int32x8){0}, widen_int8(weights), x_low), widen_int8(weights + 16), x_high);
}

/* A group: 32 int4 weights in 16 bytes, and 32 activations, the even ones first. The weights are
   left as they are stored, q + 8 from 0 to 15, because the fast instruction takes one factor
   without a sign. So this is too large by 8 * (sum of x), which gemv_quantized subtracts. */
INLINE int32x8 dot_int4(const uint8_t *weights, const int8_t *x) {
#ifdef __AVX2__
    __m128i bytes = _mm_loadu_si128((const __m128i *)weights);
    __m256i both = _mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes);
    __m256i nibbles = _mm256_and_si256(both, _mm256_set1_epi8(15));
    __m256i pairs = _mm256_maddubs_epi16(nibbles, _mm256_loadu_si256((const __m256i *)x));
    return (int32x8)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));                  /* neighbours added, as int32 */
#else
    int16x16 bytes = widen_int8(weights);
    int32x8 even = dot_pairs((int32x8){0}, bytes & 15, widen_int8(x));
    return dot_pairs(even, (bytes >> 4) & 15, widen_int8(x + 16));
#endif
}


/* =================================================================================================
   Few tokens: rows of the weight as they lie in memory (generation: reading them is the limit).
   `height` (1 or FOUR) and `bits` are constants in each call, and each is compiled for its own */

/* y (n): a quantized token times `height` rows of int8 or int4 weights, from `row` on. */
INLINE void gemv_quantized(const struct layer *layer, struct quantized x, int64_t token, int64_t row, int height,
                           int bits, float *y, int add) {
    float8 sum[FOUR] = {0};
    float8 eights[FOUR] = {0};                         /* what dot_int4 has too much, negative */
    const int8_t *values = (const int8_t *)x.values + token * x.groups * GROUP;
    const float *scales = x.scales + token * x.groups;
    const float *sums = x.sums + token * x.groups;
    for (int64_t g = 0; g < x.groups; g += 8) {
        int64_t count = x.groups - g < 8 ? x.groups - g : 8;
        float scale[FOUR][8];                          /* int4: scale of w * scale of x for 8 groups */
        if (bits == 4) {
            int32x8 exists = (int32x8){0, 1, 2, 3, 4, 5, 6, 7} < (int32_t)count;
            float8 x_sums = (float8)((int32x8)load(sums + g) & exists);
            float8 x_scales = load(scales + g);
            UNROLL for (int c = 0; c < height; c++) {
                float8 w_scales = scales_of_8(layer, row + c, g);
                store(scale[c], w_scales * x_scales);
                eights[c] = multiply_add(-8 * w_scales, x_sums, eights[c]);
            }
        }
        for (int64_t i = 0; i < count; i++) {
            const int8_t *x_group = values + (g + i) * GROUP;
            int16x16 x_low = widen_int8(x_group), x_high = widen_int8(x_group + 16);
            UNROLL for (int c = 0; c < height; c++) {
                const uint8_t *w = (const uint8_t *)layer->weights + (row + c) * layer->k * bits / 8
                                   + (g + i) * 4 * bits;
                __builtin_prefetch(w + height * layer->k * bits / 8);             /* the same place of the next rows */
                int32x8 products = bits == 4 ? dot_int4(w, x_group) : dot_int8(w, x_low, x_high);
                sum[c] += __builtin_convertvector(products, float8) * (bits == 4 ? scale[c][i] : scales[g + i]);
            }
        }
    }
    UNROLL for (int c = 0; c < height; c++)
        y[row + c] = sum_of(sum[c]) * (bits == 8 ? scale_of(layer, row + c, 0) : 1) + sum_of(eights[c])
                     + (layer->bias ? layer->bias[row + c] : 0) + (add ? y[row + c] : 0);
}

/* y (n): a token x (k) times `height` rows of float weights. Two sums for each row, so that one
   addition need not wait for the last. */
INLINE void gemv_float(const struct layer *layer, const float *x, int64_t row, int height, float *y, int add) {
    float8 even[FOUR] = {0}, odd[FOUR] = {0}, v;
    float rest[FOUR] = {0};
    const float *w = (const float *)layer->weights + row * layer->k;
    int64_t i = 0;
    for (; i + 16 <= layer->k; i += 16) {
        v = load(x + i);
        UNROLL for (int c = 0; c < height; c++) even[c] += load(w + c * layer->k + i) * v;
        v = load(x + i + 8);
        UNROLL for (int c = 0; c < height; c++) odd[c] += load(w + c * layer->k + i + 8) * v;
    }
    for (; i < layer->k; i++)
        for (int c = 0; c < height; c++) rest[c] += w[c * layer->k + i] * x[i];
    for (int c = 0; c < height; c++)
        y[row + c] = sum_of(even[c] + odd[c]) + rest[c]
                     + (layer->bias ? layer->bias[row + c] : 0) + (add ? y[row + c] : 0);
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
   the cache, and what int4 reads of x serves all four. For one token memory is read fastest in one
   stream: row after row. */
static void gemv(const struct layer *layer, const float *x, struct quantized rounded, int64_t m, int64_t row,
                 int64_t end, float *y, int add) {
    int64_t by_four = m > 1 || layer->bits == 4 ? row + (end - row) / FOUR * FOUR : row;
    for (; row < by_four; row += FOUR) gemv_rows(layer, x, rounded, m, row, FOUR, y, add);
    for (; row < end; row++) gemv_rows(layer, x, rounded, m, row, 1, y, add);
}


/* =================================================================================================
   Many tokens: 16 rows of the weight at a time, unpacked (picture 3) */

struct panel {
    int16_t *weights;           /* (k / 2, 16, 2): pairs of neighbours, of row after row */
    float *scales;              /* (k / 32, 16) */
};

/* 16 rows of W, from `row` on. Behind the end of a row: zeros; behind the last row: that row again. */
static void pack_panel(const struct layer *layer, int64_t groups, int64_t row, struct panel panel) {
    for (int64_t c = 0; c < PANEL; c++) {
        int64_t from = row + c < layer->n ? row + c : layer->n - 1;
        const uint8_t *w = (const uint8_t *)layer->weights + from * layer->k * layer->bits / 8;
        for (int64_t i = 0; i < groups * GROUP / 2; i++) {
            int8_t even = 2 * i >= layer->k ? 0 : layer->bits == 4 ? (w[i] & 15) - 8 : (int8_t)w[2 * i];
            int8_t odd = 2 * i + 1 >= layer->k ? 0 : layer->bits == 4 ? (w[i] >> 4) - 8 : (int8_t)w[2 * i + 1];
            int16_t pair[2] = {even, odd};
            memcpy(panel.weights + (i * PANEL + c) * 2, pair, 4);
        }
        for (int64_t g = 0; g < groups; g++) panel.scales[g * PANEL + c] = scale_of(layer, from, g);
    }
}

/* `height` (1 or TILE) tokens times a panel: each weight that is loaded serves all of them. Six
   need 12 vectors of sums, two of weights and one of x, and a CPU with AVX2 has 16 registers. */
INLINE void gemm_panel(const struct layer *layer, struct quantized x, int64_t token, struct panel panel, int64_t row,
                       int height, float *y) {
    const int16_t *values = (const int16_t *)x.values;
    float8 out[TILE][2] = {0};
    for (int64_t g = 0; g < x.groups; g++) {
        int32x8 sum[TILE][2] = {0};
        _Pragma("GCC unroll 1")                        /* unrolled too, it would only be longer */
        for (int i = 0; i < GROUP / 2; i++) {
            const int16_t *w = panel.weights + (g * GROUP / 2 + i) * PANEL * 2;
            int16x16 w_low = load_int16(w), w_high = load_int16(w + 16);
            UNROLL for (int h = 0; h < height; h++) {
                int32_t pair;                          /* two values of x, moved as one integer */
                memcpy(&pair, values + ((token + h) * x.groups + g) * GROUP + 2 * i, 4);
                sum[h][0] = dot_pairs(sum[h][0], w_low, (int16x16)broadcast_int32(pair));
                sum[h][1] = dot_pairs(sum[h][1], w_high, (int16x16)broadcast_int32(pair));
            }
        }
        UNROLL for (int h = 0; h < height; h++) UNROLL for (int j = 0; j < 2; j++) {
            float8 scale = load(panel.scales + g * PANEL + 8 * j) * x.scales[(token + h) * x.groups + g];
            out[h][j] += __builtin_convertvector(sum[h][j], float8) * scale;
        }
    }
    for (int h = 0; h < height; h++)
        for (int c = 0; c < PANEL && row + c < layer->n; c++)
            y[(token + h) * layer->n + row + c] = out[h][c / 8][c % 8] + (layer->bias ? layer->bias[row + c] : 0);
}


/* =================================================================================================
   Layers */

/* y (m, n) = x (m, k) W^T + bias, without layer->first. Returns 1 if there is no memory. */
int linear(const struct layer *layer, const float *x, int64_t m, float *y) {
    const int64_t n = layer->n, k = layer->k, groups = (k + GROUP - 1) / GROUP;
    if (!m) return 0;
    int quantized = layer->bits < 32, failed = 0;
    int panels = quantized && (m >= 8 || k % GROUP);       /* gemv would read behind the end of an odd row */
    enum order order = panels ? FOR_PANEL : layer->bits == 8 ? IN_ORDER : EVEN_FIRST;
    char *memory = aligned_alloc(64, (m * groups * 72 + 128) / 64 * 64);     /* more: scales are read 8 at a time */
    if (!memory) return 1;
    struct quantized rounded = {
        .values = memory,                                  /* 64 bytes for each group */
        .scales = (float *)(memory + m * groups * 64),     /* 4 bytes */
        .sums = (float *)(memory + m * groups * 68),       /* 4 bytes */
        .groups = groups,
    };
    #pragma omp parallel if (m * n * k > WORTH_THREADS)
    {
        #pragma omp for
        for (int64_t token = 0; token < (quantized ? m : 0); token++)
            quantize_row(x + token * k, k, order, rounded, token);

        char *buffer = panels ? aligned_alloc(64, groups * 1088) : NULL;     /* 16 rows of 32 int16, and 16 scales */
        struct panel panel = {0};
        if (buffer) {
            panel = (struct panel){(int16_t *)buffer, (float *)(buffer + groups * 1024)};
        } else if (panels) {
            #pragma omp atomic write
            failed = 1;
        }
        #pragma omp for
        for (int64_t row = 0; row < n; row += PANEL) {
            int64_t token = 0, end = row + PANEL < n ? row + PANEL : n;
            if (!panels) gemv(layer, x, rounded, m, row, end, y, 0);
            if (!buffer) continue;
            pack_panel(layer, groups, row, panel);
            for (; token + TILE <= m; token += TILE) gemm_panel(layer, rounded, token, panel, row, TILE, y);
            for (; token < m; token++) gemm_panel(layer, rounded, token, panel, row, 1, y);
        }
        free(buffer);
    }
    free(memory);
    return failed;
}

/* y (m, k): rows ids (m) of a quantized table, as floats. Returns 1 if there is no such row. */
int gather(const struct layer *table, const int64_t *ids, int64_t m, float *y) {
    const int64_t k = table->k;
    for (int64_t r = 0; r < m; r++)
        if (ids[r] < 0 || ids[r] >= table->n) return 1;
    for (int64_t r = 0; r < m; r++) {
        const uint8_t *w = (const uint8_t *)table->weights + ids[r] * k * table->bits / 8;
        for (int64_t i = 0; i < k; i++) {
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
    float8 squares = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        float8 v = load(x + i);
        squares += v * v;
    }
    float sum = sum_of(squares);
    for (; i < n; i++) sum += x[i] * x[i];
    float scale = 1 / sqrtf(sum / n + eps);
    for (i = 0; i < n; i += 8) {
        float8 v = load_first(x + i, n - i, 0), w = load_first(weight + i, n - i, 0);
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

/* silu(gate) * up of 8 numbers, or of the first n */
INLINE float8 swiglu8(const float *gate, const float *up, int64_t n) {
    float8 g = load_first(gate, n, 0);
    return g / (1 + exp8(-g)) * load_first(up, n, 0);
}

/* gate, up, y (n) */
void swiglu(const float *gate, const float *up, int64_t n, float *y) {
    #pragma omp parallel for if (n > WORTH_THREADS)
    for (int64_t i = 0; i < n; i += 8) store_first(y + i, n - i, swiglu8(gate + i, up + i, n - i));
}


/* =================================================================================================
   Decoding: all blocks for a few new tokens, by one team of threads (picture 4) */

/* The sizes of decode_blocks, as Python's array of integers. m = batch * T tokens are new. */
struct decode_sizes {
    int64_t blocks;
    int64_t batch;              /* texts */
    int64_t T;                  /* new positions of each text */
    int64_t start;              /* the first of them: so many are in the cache */
    int64_t capacity;           /* positions that the cache has room for */
    int64_t C;                  /* hidden size */
    int64_t H;                  /* heads of q */
    int64_t K;                  /* heads of k and v; H / K heads of q share one */
    int64_t D;                  /* channels of a head */
    int64_t I;                  /* channels inside the MLP */
    int64_t R;                  /* pairs of channels that turn */
    int64_t widest;             /* largest n or k of any layer, rounded up to a multiple of 32 */
};

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

/* What all threads read and write: each thread its own rows or heads. */
struct team {
    struct decode_sizes sizes;
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
    float *scores;              /* (capacity + 8): of attention */
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
        enum order order = layer->bits == 8 ? IN_ORDER : EVEN_FIRST;
        me->rounded.groups = layer->k / GROUP;
        for (int64_t token = 0; token < me->m; token++)
            quantize_row(x + token * layer->k, layer->k, order, me->rounded, token);
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
    const struct decode_sizes s = team->sizes;
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

/* q (D) = softmax(q keys^T / sqrt(D)) values, with keys, values (count, D). scores (count + 7) */
static void attention_head(float *q, const float *keys, const float *values, int64_t count, int64_t D, float *scores) {
    struct layer layer = {.weights = keys, .k = D, .bits = 32};            /* q keys^T is a product with floats */
    int64_t p = 0, i = 0;
    for (; p + FOUR <= count; p += FOUR) gemv_float(&layer, q, p, FOUR, scores, 0);
    for (; p < count; p++) gemv_float(&layer, q, p, 1, scores, 0);

    float most = -INFINITY, scale = 1 / sqrtf(D), sum = 0;
    for (p = 0; p < count; p++) most = scores[p] > most ? scores[p] : most;
    for (p = 0; p < count; p += 8) {                                       /* behind the end too: nobody reads that */
        float8 v = exp8((load(scores + p) - most) * scale);
        store(scores + p, v);
        for (int64_t j = 0; j < 8 && p + j < count; j++) sum += v[j];
    }
    for (; i + 8 <= D; i += 8) {
        float8 y = {0};
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
    const struct decode_sizes s = team->sizes;
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
    for (int64_t i = 0; i < n; i += 8)
        store_first(me->x + i, n - i, swiglu8(team->gate + i, team->up + i, n - i));
    me->rounded_from = NULL;
    apply_layer(block->down, me->x, team->x, 1, team, me);
    #pragma omp barrier
}

/* x (batch, T, C), the embedded tokens at positions start ... start + T - 1, becomes the normalized
   hidden states; their keys and values go into the cache. frequencies (R): a position turns pair i
   by position * frequency i; rotary_scale: of cosines and sines; norm (C): the last one. Returns 1
   if there is no memory. */
int decode_blocks(const struct block *blocks, const struct decode_sizes *sizes, const float *frequencies,
                  float rotary_scale, const float *norm, float eps, float *x) {
    const struct decode_sizes s = *sizes;
    const int64_t m = s.batch * s.T;
    const int64_t shared = m * (s.H * s.D + 2 * s.K * s.D + 2 * s.I + 2 * s.widest) + 2 * s.T * s.R;
    const int64_t private = m * (s.widest + s.widest / 4 + s.widest / 16) + s.capacity + 64;
    int most_threads = 1;
#ifdef _OPENMP
    most_threads = omp_get_max_threads();
#endif
    float *memory = malloc((shared + most_threads * private) * sizeof(float));
    if (!memory) return 1;

    struct team team = {.sizes = s, .eps = eps, .x = x, .q = memory};
    team.k = team.q + m * s.H * s.D;
    team.v = team.k + m * s.K * s.D;
    team.gate = team.v + m * s.K * s.D;
    team.up = team.gate + m * s.I;
    team.low_rank = team.up + m * s.I;
    team.cosines = team.low_rank + 2 * m * s.widest;
    team.sines = team.cosines + s.T * s.R;
    for (int64_t i = 0; i < s.T * s.R; i++) {
        float angle = (s.start + i / s.R) * frequencies[i % s.R];
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
        me.rounded.values = me.scores + s.capacity + 8;
        me.rounded.scales = me.scores + s.capacity + 8 + m * s.widest / 4;       /* a value is 1/4 of a float */
        me.rounded.sums = me.rounded.scales + m * s.widest / GROUP;
        for (int64_t i = 0; i < s.blocks; i++) decode_block(&blocks[i], &team, &me);
    }
    for (int64_t r = 0; r < m; r++) normalize(x + r * s.C, norm, eps, s.C, x + r * s.C);
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
    float8 squares = {0}, products = {0};
    for (int64_t i = 0; i < n; i += 8) {
        float8 v = load_first(x + i, n - i, 0);
        squares += v * v;
        products += v * load_first(grad + i, n - i, 0) * load_first(weight + i, n - i, 0);
    }
    float scale = 1 / sqrtf(sum_of(squares) / n + eps);
    float along = sum_of(products) * scale * scale / n;
    for (int64_t i = 0; i < n; i += 8) {
        float8 v = load_first(x + i, n - i, 0), g = load_first(grad + i, n - i, 0);
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
    for (int64_t i = 0; i < n; i += 8) {
        float8 g = load_first(gate + i, n - i, 0), y = load_first(grad + i, n - i, 0);
        float8 s = 1 / (1 + exp8(-g));
        store_first(grad_gate + i, n - i, y * load_first(up + i, n - i, 0) * s * (1 + g * (1 - s)));
        store_first(grad_up + i, n - i, y * g * s);
    }
}

/* x = e^(x - most), 8 numbers or the first n; returns them, and zeros for the others */
INLINE float8 exp_in_place(float *x, int64_t n, float most) {
    float8 p = exp8(load_first(x, n, -INFINITY) - most);
    store_first(x, n, p);
    return p;
}

/* -log p of a target, p = softmax(x). x (V), still in the cache, becomes the gradient p - one-hot. */
static float cross_entropy_row(float *x, int64_t target, int64_t V) {
    float most = -INFINITY;
    float8 top[4], sum = {0};
    int64_t i = 0;
    for (int j = 0; j < 4; j++) top[j] = broadcast(most);
    for (; i + 32 <= V; i += 32) UNROLL for (int j = 0; j < 4; j++) {
        float8 v = load(x + i + 8 * j);
        top[j] = (float8)choose(v > top[j], (int32x8)v, (int32x8)top[j]);
    }
    for (; i < V; i++) most = fmaxf(most, x[i]);
    for (int j = 0; j < 32; j++) most = fmaxf(most, top[j / 8][j % 8]);

    float right = x[target];
    for (i = 0; i + 8 <= V; i += 8) sum += exp_in_place(x + i, 8, most);
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
