// GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415, the exact one) and its slope in one pass: both need the same exponential.
//
// The error function is formula 7.1.26 of Abramowitz and Stegun, to 1.5e-7; of negative numbers its complement is taken, so that
// small results are no difference of large ones. Without -fopenmp it is correct on one thread.
#include "lanes.h"

#define COUNT (16 * LANES)  // numbers at a time

static inline vec inverse(vec x) {  // 1 / x of x >= 1
#ifdef __AVX512F__
    vec near = (vec)_mm512_rcp14_ps((__m512)x);
    return near * (2.0f - x * near);
#else
    return 1.0f / x;
#endif
}

static inline void one(vec x, vec *made, vec *slope) {
    ivec negative = (ivec)x >> 31;
    vec t = inverse(1.0f + 0.23164189f * (vec)((ivec)x & INT32_MAX)), e = power_of_two(x * (x * (-0.5f * LOG2E)));
    vec tail = ((((0.5307027145f * t - 0.7265760135f) * t + 0.7107068705f) * t - 0.142248368f) * t + 0.127414796f) * (t * e);
    vec share = (vec)((negative & (ivec)tail) | (~negative & (ivec)(1.0f - tail)));  // of the normal distribution below x
    *made = x * share;
    *slope = share + x * (e * 0.39894228f);
}

// What nothing reads before the backward pass is written past the cache, where that can be.
static inline void put_away(const float *from, int is_bf16, void *rows, int64_t at, int64_t n) {
#ifdef BF16_PRODUCTS
    bf16 *to = (bf16 *)rows + at;
    if (is_bf16 && n == COUNT && (uintptr_t)to % 64 == 0) {
        for (int i = 0; i < COUNT; i += 32)
            _mm512_stream_si512((void *)(to + i), (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i)));
        return;
    }
#endif
    narrow(from, is_bf16, rows, at, n);
}

// x (n), fp32 or bf16 -> made (n) and, where asked for, slope (n), the derivative. Every number by itself.
void gelu(const void *x, void *made, void *slope, int64_t n, int32_t is_bf16, int32_t threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t first = 0; first < n; first += COUNT) {
            int64_t count = n - first < COUNT ? n - first : COUNT;
            float from[COUNT] = {0}, to[COUNT], slopes[COUNT];
            widen(x, is_bf16, first, count, from);
            for (int64_t i = 0; i < count; i += LANES) one(*(vec *)(from + i), (vec *)(to + i), (vec *)(slopes + i));
            narrow(to, is_bf16, made, first, count);
            if (slope) put_away(slopes, is_bf16, slope, first, count);
        }
#ifdef BF16_PRODUCTS
        _mm_sfence();
#endif
    }
}
