// What the kernels beside this compute with: vectors of fp32, and rows of bf16 or fp32 made such.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define BF16_PRODUCTS  // the processor multiplies pairs of bf16 and sums them in fp32
#endif
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t bf16;

#ifdef __AVX512F__
#include <immintrin.h>

static inline vec most_of(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }  // b where either is NaN
#else
static inline vec most_of(vec a, vec b) {
    ivec larger = a > b;
    return (vec)((larger & (ivec)a) | (~larger & (ivec)b));
}
#endif

typedef float half_vec __attribute__((vector_size(2 * LANES), aligned(4), may_alias));

static inline float sum_of(vec v) {
    half_vec *halves = (half_vec *)&v, both = halves[0] + halves[1];
    float sums[4] = {0};
    for (int l = 0; l < LANES / 2; l++) sums[l % 4] += both[l];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

static inline float largest_of(vec v) {
    half_vec *halves = (half_vec *)&v;
    float most[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    for (int l = 0; l < LANES / 2; l++) {
        float here = halves[0][l] > halves[1][l] ? halves[0][l] : halves[1][l];
        most[l % 4] = here > most[l % 4] ? here : most[l % 4];
    }
    float left = most[0] > most[1] ? most[0] : most[1], right = most[2] > most[3] ? most[2] : most[3];
    return left > right ? left : right;
}

#define LOG2E 1.44269504f

static inline vec whole(vec u) {  // the nearest
#ifdef __AVX512F__
    return (vec)_mm512_roundscale_ps((__m512)u, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return u + 12582912.0f - 12582912.0f;
#endif
}

static inline vec raised(vec r, vec n) {  // 2 to the n + r, n whole and at least -126, r from -.5 to .5, within 1e-7 of it; NaN stays NaN
    vec y = ((((1.326472720e-3f * r + 9.671512640e-3f) * r + 5.550733743e-2f) * r + 2.402224209e-1f) * r + 6.931469776e-1f) * r + 1.0f;
#ifdef __AVX512F__
    return (vec)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    ivec number = y == y;
    return (vec)((number & ((ivec)y + ((ivec)(n + 12582912.0f) << 23))) | (~number & (ivec)y));
#endif
}

static inline vec power_of_two(vec u) {  // of u <= 0, as exact as u is
    u = most_of((vec){} - 126.0f, u);
    vec n = whole(u);
    return raised(u - n, n);
}

static inline vec exponential(vec x) {  // of x <= 0, to 3 ulp however large
    x = most_of((vec){} - 87.0f, x);
    vec n = whole(x * LOG2E);
    return raised((x - n * 0.693359375f + n * 2.12194440e-4f) * LOG2E, n);
}

static inline void widen(const void *rows, int is_bf16, int64_t at, int64_t n, float *to) {
    if (!is_bf16) {
        memcpy(to, (const float *)rows + at, n * sizeof(float));
        return;
    }
    const bf16 *from = (const bf16 *)rows + at;
    uint32_t *bits = (uint32_t *)to;
    for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)from[i] << 16;
}

static inline void narrow(const float *from, int is_bf16, void *rows, int64_t at, int64_t n) {
    if (!is_bf16) {
        memcpy((float *)rows + at, from, n * sizeof(float));
        return;
    }
    bf16 *to = (bf16 *)rows + at;
#ifdef BF16_PRODUCTS
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 some = n - i < 16 ? (__mmask16)((1u << (n - i)) - 1) : 0xffff;
        _mm256_mask_storeu_epi16(to + i, some, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, from + i)));
    }
    return;
#endif
    const uint32_t *bits = (const uint32_t *)from;
    for (int64_t i = 0; i < n; i++) {  // to nearest, ties to even; NaN stays NaN
        uint32_t u = bits[i], even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        to[i] = (u & 0x7fffffffu) > 0x7f800000u ? (bf16)((u >> 16) | 0x40u) : (bf16)even;
    }
}
