// Attention over packed rows of bf16 where the processor multiplies pairs of them and sums in fp32 (AVX512-BF16). Part of attention.c.
//
// Scores lie turned, a row for a key and a lane for a query: a key's row is an operand as it stands in memory, and the softmax goes down
// the rows without a sum across lanes. A pair is two numbers beside each other on the axis that a product sums over.
#include <immintrin.h>

#define QUERIES 32  // at a time, or 16 where that is enough
typedef uint32_t pair __attribute__((aligned(2), may_alias));

static inline __m512i both_halves(__m512 low, __m512 high) {  // fp32 -> pairs of bf16
    __m512i lows = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low)), highs = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
    return _mm512_or_si512(lows, _mm512_slli_epi32(highs, 16));
}

// c (m, n) = or += a (m, 2k) b (2k, n): pair (i, l) of a at a + i * row + l * step, pair (l, j) of b at b + l * ldb + j.
#define PAIRS_TILE(ROWS, VECS)                                                                                                     \
    static inline __attribute__((always_inline)) void pairs_##ROWS##_##VECS(const pair *a, int64_t row, int64_t step, const pair *b, \
                                                                            int64_t ldb, int64_t k, float *c, int64_t ldc, int add) { \
        __m512 sums[ROWS][VECS];                                                                                                   \
        _Pragma("GCC unroll 16") for (int i = 0; i < ROWS; i++)                                                                    \
            _Pragma("GCC unroll 2") for (int v = 0; v < VECS; v++)                                                                 \
                sums[i][v] = add ? _mm512_loadu_ps(c + i * ldc + 16 * v) : _mm512_setzero_ps();                                    \
        for (int64_t l = 0; l < k; l++) {                                                                                          \
            __m512bh parts[VECS];                                                                                                  \
            _Pragma("GCC unroll 2") for (int v = 0; v < VECS; v++)                                                                 \
                parts[v] = (__m512bh)_mm512_loadu_si512(b + l * ldb + 16 * v);                                                     \
            _Pragma("GCC unroll 16") for (int i = 0; i < ROWS; i++) {                                                              \
                __m512bh one = (__m512bh)_mm512_set1_epi32((int)a[i * row + l * step]);                                            \
                _Pragma("GCC unroll 2") for (int v = 0; v < VECS; v++) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], one, parts[v]);   \
            }                                                                                                                      \
        }                                                                                                                          \
        _Pragma("GCC unroll 16") for (int i = 0; i < ROWS; i++)                                                                    \
            _Pragma("GCC unroll 2") for (int v = 0; v < VECS; v++) _mm512_storeu_ps(c + i * ldc + 16 * v, sums[i][v]);             \
    }
PAIRS_TILE(8, 2)
PAIRS_TILE(4, 2)
PAIRS_TILE(1, 2)
PAIRS_TILE(16, 1)
PAIRS_TILE(4, 1)
PAIRS_TILE(1, 1)

static inline __attribute__((always_inline)) void pairs(const pair *a, int64_t row, int64_t step, const pair *b, int64_t ldb, int64_t m,
                                                        int64_t k, int64_t n, float *c, int64_t ldc, int add) {
    int64_t j = 0;
    for (; j + 32 <= n; j += 32) {
        int64_t i = 0;
        for (; i + 8 <= m; i += 8) pairs_8_2(a + i * row, row, step, b + j, ldb, k, c + i * ldc + j, ldc, add);
        for (; i + 4 <= m; i += 4) pairs_4_2(a + i * row, row, step, b + j, ldb, k, c + i * ldc + j, ldc, add);
        for (; i < m; i++) pairs_1_2(a + i * row, row, step, b + j, ldb, k, c + i * ldc + j, ldc, add);
    }
    for (; j < n; j += 16) {
        int64_t i = 0;
        for (; i + 16 <= m; i += 16) pairs_16_1(a + i * row, row, step, b + j, ldb, k, c + i * ldc + j, ldc, add);
        for (; i + 4 <= m; i += 4) pairs_4_1(a + i * row, row, step, b + j, ldb, k, c + i * ldc + j, ldc, add);
        for (; i < m; i++) pairs_1_1(a + i * row, row, step, b + j, ldb, k, c + i * ldc + j, ldc, add);
    }
}

// (count, size) rows -> (size / 2, lanes) pairs, 0 after `count`.
static void turned_pairs(const bf16 *rows, int64_t stride, int64_t count, int64_t size, int64_t lanes, pair *to) {
    for (int64_t k = 0; k < size / 2; k += 16)
        for (int64_t first = 0; first < lanes; first += 16) {
            __m512i from[16], half[16], quarter[16];
            for (int64_t i = 0; i < 16; i++)
                from[i] = first + i < count ? _mm512_loadu_si512(rows + (first + i) * stride + 2 * k) : _mm512_setzero_si512();
#pragma GCC unroll 8
            for (int i = 0; i < 16; i += 2) {
                half[i] = _mm512_unpacklo_epi32(from[i], from[i + 1]);
                half[i + 1] = _mm512_unpackhi_epi32(from[i], from[i + 1]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
                for (int part = 0; part < 2; part++) {
                    quarter[i + 2 * part] = _mm512_unpacklo_epi64(half[i + part], half[i + 2 + part]);
                    quarter[i + 2 * part + 1] = _mm512_unpackhi_epi64(half[i + part], half[i + 2 + part]);
                }
            pair *at = to + k * lanes + first;
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __m512i a = _mm512_shuffle_i32x4(quarter[i], quarter[4 + i], 0x44), b = _mm512_shuffle_i32x4(quarter[i], quarter[4 + i], 0xee);
                __m512i c = _mm512_shuffle_i32x4(quarter[8 + i], quarter[12 + i], 0x44);
                __m512i d = _mm512_shuffle_i32x4(quarter[8 + i], quarter[12 + i], 0xee);
                _mm512_storeu_si512(at + i * lanes, _mm512_shuffle_i32x4(a, c, 0x88));
                _mm512_storeu_si512(at + (4 + i) * lanes, _mm512_shuffle_i32x4(a, c, 0xdd));
                _mm512_storeu_si512(at + (8 + i) * lanes, _mm512_shuffle_i32x4(b, d, 0x88));
                _mm512_storeu_si512(at + (12 + i) * lanes, _mm512_shuffle_i32x4(b, d, 0xdd));
            }
        }
}

// (count, size) rows -> (count / 2, size) pairs of a row and the next, 0 after `count`.
static void row_pairs(const bf16 *rows, int64_t stride, int64_t count, int64_t size, pair *to) {
    for (int64_t i = 0; i < count; i += 2, to += size, rows += 2 * stride)
        for (int64_t k = 0; k < size; k += 16) {
            __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(rows + k))), high = _mm512_setzero_si512();
            if (i + 1 < count) high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(rows + stride + k))), 16);
            _mm512_storeu_si512(to + k, _mm512_or_si512(low, high));
        }
}

// The next head's rows, which lie beside this one's: no processor guesses steps of a whole row.
static inline void soon(const bf16 *rows, int64_t stride, int64_t count, int64_t size) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < size; k += 32) __builtin_prefetch(rows + i * stride + size + k);
}

static inline void narrowed(const float *from, float factor, int64_t size, bf16 *to) {
    for (int64_t k = 0; k < size; k += 32) {
        __m512 low = _mm512_mul_ps(_mm512_loadu_ps(from + k), _mm512_set1_ps(factor));
        __m512 high = _mm512_mul_ps(_mm512_loadu_ps(from + k + 16), _mm512_set1_ps(factor));
        _mm512_storeu_si512(to + k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

static int64_t pairs_room(const Texts *t) {  // floats of one thread's scratch
    int64_t even = t->longest + t->longest % 2;
    return even * (t->size / 2 + 2 * t->size + 7 * QUERIES / 2) + 3 * QUERIES * t->size;
}

static void forward_pairs(const Texts *t, int64_t text, int64_t head, const bf16 *qkv, bf16 *out, float *sums, float *scratch) {
    int64_t length = t->lengths[text], start = t->starts[text], size = t->size, width = t->heads * size, stride = 3 * width;
    int64_t even = length + length % 2;
    const bf16 *queries = qkv + start * stride + head * size, *keys = queries + width, *values = keys + width;
    pair *value_pairs = (pair *)scratch, *turned_queries = value_pairs + even / 2 * size, *weights = turned_queries + size / 2 * QUERIES;
    float *scores = (float *)(weights + even / 2 * QUERIES), *made = scores + length * QUERIES, totals[QUERIES], tops[QUERIES];
    vec scale = (vec){} + LOG2E / sqrtf((float)size);
    soon(queries, stride, length, size);
    soon(keys, stride, length, size);
    soon(values, stride, length, size);
    row_pairs(values, stride, length, size, value_pairs);
    for (int64_t first = 0; first < length; first += QUERIES) {
        int64_t count = length - first < QUERIES ? length - first : QUERIES, lanes = count > 16 ? 32 : 16;
        turned_pairs(queries + first * stride, stride, count, size, lanes, turned_queries);
        pairs((const pair *)keys, stride / 2, 1, turned_queries, lanes, length, size / 2, lanes, scores, lanes, 0);
        for (int64_t v = 0; v < lanes; v += 16) {
            vec top = *(vec *)(scores + v), sum = {};
            for (int64_t j = 1; j < length; j++) top = most_of(*(vec *)(scores + j * lanes + v), top);
            top *= scale;
            for (int64_t j = 0; j < length; j += 2) {
                vec one = power_of_two(*(vec *)(scores + j * lanes + v) * scale - top), next = {};
                if (j + 1 < length) next = power_of_two(*(vec *)(scores + (j + 1) * lanes + v) * scale - top);
                sum += one + next;
                _mm512_storeu_si512(weights + j / 2 * lanes + v, both_halves((__m512)one, (__m512)next));
            }
            *(vec *)(totals + v) = sum;
            *(vec *)(tops + v) = top;
        }
        pairs(weights, 1, lanes, value_pairs, size, count, even / 2, size, made, size, 0);
        for (int64_t i = 0; i < count; i++) {
            sums[(start + first + i) * t->heads + head] = tops[i] / LOG2E + logf(totals[i]);
            narrowed(made + i * size, 1.0f / totals[i], size, out + (start + first + i) * width + head * size);
        }
    }
}

static void backward_pairs(const Texts *t, int64_t text, int64_t head, const bf16 *grad, const bf16 *qkv, const bf16 *out,
                           const float *sums, bf16 *dqkv, float *scratch) {
    int64_t length = t->lengths[text], start = t->starts[text], size = t->size, width = t->heads * size, stride = 3 * width;
    int64_t even = length + length % 2;
    const bf16 *queries = qkv + start * stride + head * size, *keys = queries + width, *values = keys + width;
    bf16 *dqueries = dqkv + start * stride + head * size;
    pair *key_pairs = (pair *)scratch, *query_pairs = key_pairs + even / 2 * size, *grad_pairs = query_pairs + QUERIES / 2 * size;
    pair *turned_queries = grad_pairs + QUERIES / 2 * size, *turned_grads = turned_queries + size / 2 * QUERIES;
    pair *weights = turned_grads + size / 2 * QUERIES, *dweights = weights + even * QUERIES / 2, *crossed = dweights + even * QUERIES / 2;
    float *scores = (float *)(crossed + even / 2 * QUERIES), *dscores = scores + even * QUERIES;
    float *dkeys = dscores + even * QUERIES, *dvalues = dkeys + even * size, *made = dvalues + even * size;
    float totals[QUERIES], both[QUERIES], factor = 1.0f / sqrtf((float)size);
    vec scale = (vec){} + LOG2E * factor;
    soon(queries, stride, length, size);
    soon(keys, stride, length, size);
    soon(values, stride, length, size);
    soon(grad + start * width + head * size, width, length, size);
    soon(out + start * width + head * size, width, length, size);
    row_pairs(keys, stride, length, size, key_pairs);
    for (int64_t first = 0; first < length; first += QUERIES) {
        int64_t count = length - first < QUERIES ? length - first : QUERIES, lanes = count > 16 ? 32 : 16;
        const bf16 *given = grad + (start + first) * width + head * size, *attended = out + (start + first) * width + head * size;
        turned_pairs(queries + first * stride, stride, count, size, lanes, turned_queries);
        turned_pairs(given, width, count, size, lanes, turned_grads);
        row_pairs(queries + first * stride, stride, count, size, query_pairs);
        row_pairs(given, width, count, size, grad_pairs);
        pairs((const pair *)keys, stride / 2, 1, turned_queries, lanes, length, size / 2, lanes, scores, lanes, 0);
        pairs((const pair *)values, stride / 2, 1, turned_grads, lanes, length, size / 2, lanes, dscores, lanes, 0);
        memset(totals, 0, sizeof totals);  // a lane of no query: its row of the gradient is 0, so nothing comes of it
        memset(both, 0, sizeof both);
        for (int64_t i = 0; i < count; i++) {
            __m512 products = _mm512_setzero_ps();
            for (int64_t k = 0; k < size; k += 32)
                products = _mm512_dpbf16_ps(products, (__m512bh)_mm512_loadu_si512(given + i * width + k),
                                            (__m512bh)_mm512_loadu_si512(attended + i * width + k));
            both[i] = sum_of((vec)products);
            totals[i] = sums[(start + first + i) * t->heads + head] * LOG2E;
        }
        for (int64_t v = 0; v < lanes; v += 16) {
            vec total = *(vec *)(totals + v), product = *(vec *)(both + v);
            for (int64_t j = 0; j < even; j += 2) {
                vec d[2] = {{}, {}};
                for (int64_t odd = 0; odd < 2 && j + odd < length; odd++) {
                    int64_t at = (j + odd) * lanes + v;
                    vec p = power_of_two(*(vec *)(scores + at) * scale - total);
                    d[odd] = p * (*(vec *)(dscores + at) - product);
                    _mm256_storeu_si256((__m256i *)(weights + at / 2), (__m256i)_mm512_cvtneps_pbh((__m512)p));
                    _mm256_storeu_si256((__m256i *)(dweights + at / 2), (__m256i)_mm512_cvtneps_pbh((__m512)d[odd]));
                }
                _mm512_storeu_si512(crossed + j / 2 * lanes + v, both_halves((__m512)d[0], (__m512)d[1]));
            }
        }
        pairs(weights, lanes / 2, 1, grad_pairs, size, length, (count + 1) / 2, size, dvalues, size, first > 0);
        pairs(dweights, lanes / 2, 1, query_pairs, size, length, (count + 1) / 2, size, dkeys, size, first > 0);
        pairs(crossed, 1, lanes, key_pairs, size, count, even / 2, size, made, size, 0);
        for (int64_t i = 0; i < count; i++) narrowed(made + i * size, factor, size, dqueries + (first + i) * stride);
    }
    for (int64_t i = 0; i < length; i++) {
        narrowed(dkeys + i * size, factor, size, dqueries + i * stride + width);
        narrowed(dvalues + i * size, 1, size, dqueries + i * stride + 2 * width);
    }
}
