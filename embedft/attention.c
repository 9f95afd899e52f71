// Attention over packed rows, forward and backward: texts of any length after each other, all heads side by side, no mask.
//
// A text's head is one piece of work: its keys and values are widened to fp32 once and stay in the cache, queries come in blocks.
// Sums are fp32 whatever the dtype. A piece's result depends on nothing else, so threads change no bit.
// Without -fopenmp it is correct on one thread.
#include "lanes.h"

#define BLOCK 24  // queries at a time

// What both passes share. Text i is `lengths[i]` rows from row `starts[i]` on; rows are heads * size wide, those of qkv three times that.
// `size` is a multiple of 2 * LANES.
typedef struct {
    const int64_t *starts, *lengths;
    int64_t texts, longest, heads, size;
    int32_t is_bf16, threads;
} Texts;

#ifdef BF16_PRODUCTS
#include "attention_pairs.h"
#endif

static inline int64_t padded(int64_t n) { return (n + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

// c (m, n) = or += a (m, k) b (k, n); element (i, l) of a at a + i * row + l * step. n is a multiple of 2 * LANES.
#define PRODUCT_TILE(ROWS)                                                                                                      \
    static inline __attribute__((always_inline)) void product_##ROWS(const float *a, int64_t row, int64_t step, const float *b,  \
                                                                     int64_t ldb, int64_t k, float *c, int64_t ldc, int add) {   \
        vec left[ROWS], right[ROWS];                                                                                            \
        _Pragma("GCC unroll 6") for (int i = 0; i < ROWS; i++) {                                                                \
            left[i] = add ? *(vec *)(c + i * ldc) : (vec){};                                                                    \
            right[i] = add ? *(vec *)(c + i * ldc + LANES) : (vec){};                                                           \
        }                                                                                                                       \
        for (int64_t l = 0; l < k; l++) {                                                                                       \
            vec low = *(const vec *)(b + l * ldb), high = *(const vec *)(b + l * ldb + LANES);                                  \
            _Pragma("GCC unroll 6") for (int i = 0; i < ROWS; i++) {                                                            \
                float f = a[i * row + l * step];                                                                                \
                left[i] += f * low;                                                                                             \
                right[i] += f * high;                                                                                           \
            }                                                                                                                   \
        }                                                                                                                       \
        _Pragma("GCC unroll 6") for (int i = 0; i < ROWS; i++) {                                                                \
            *(vec *)(c + i * ldc) = left[i];                                                                                    \
            *(vec *)(c + i * ldc + LANES) = right[i];                                                                           \
        }                                                                                                                       \
    }
PRODUCT_TILE(6)
PRODUCT_TILE(3)
PRODUCT_TILE(1)

static void product(const float *a, int64_t row, int64_t step, const float *b, int64_t ldb, int64_t m, int64_t k, int64_t n, float *c,
                    int64_t ldc, int add) {
    for (int64_t j = 0; j < n; j += 2 * LANES) {
        int64_t i = 0;
        for (; i + 6 <= m; i += 6) product_6(a + i * row, row, step, b + j, ldb, k, c + i * ldc + j, ldc, add);
        for (; i + 3 <= m; i += 3) product_3(a + i * row, row, step, b + j, ldb, k, c + i * ldc + j, ldc, add);
        for (; i < m; i++) product_1(a + i * row, row, step, b + j, ldb, k, c + i * ldc + j, ldc, add);
    }
}

// One text's one head of a column block of `rows`: (length, size) as it lies, and turned to (size, wide) with zeros after `length`.
static void plain(const void *rows, int is_bf16, int64_t start, int64_t stride, int64_t column, int64_t length, int64_t size, float *to) {
    for (int64_t i = 0; i < length; i++) {
        int64_t at = (start + i) * stride + column;
        __builtin_prefetch((const char *)rows + (at + size) * (is_bf16 ? 2 : 4));  // the next head's
        widen(rows, is_bf16, at, size, to + i * size);
    }
}

static void turned(const float *from, int64_t length, int64_t size, int64_t wide, float *to) {
    for (int64_t k = 0; k < size; k++) {
        float *row = to + k * wide;
        for (int64_t j = 0; j < length; j++) row[j] = from[j * size + k];
        for (int64_t j = length; j < wide; j++) row[j] = 0;
    }
}

static int64_t room(const Texts *t) {  // floats of one thread's scratch
#ifdef BF16_PRODUCTS
    if (t->is_bf16) return pairs_room(t);
#endif
    int64_t wide = padded(t->longest);
    return 6 * wide * t->size + 2 * BLOCK * wide + 4 * BLOCK * t->size;
}

static void forward_one(const Texts *t, int64_t text, int64_t head, const void *qkv, void *out, float *sums, float *scratch) {
#ifdef BF16_PRODUCTS
    if (t->is_bf16) return forward_pairs(t, text, head, qkv, out, sums, scratch);
#endif
    int64_t length = t->lengths[text], start = t->starts[text], size = t->size, width = t->heads * size, wide = padded(length);
    float *values = scratch, *keys = values + wide * size, *turn = keys + wide * size;
    float *scores = turn + wide * size, *queries = scores + BLOCK * wide, *made = queries + BLOCK * size;
    float scale = 1.0f / sqrtf((float)size), totals[BLOCK], beyond[2 * LANES];
    for (int64_t l = 0; l < 2 * LANES; l++) beyond[l] = wide - 2 * LANES + l < length ? 0 : -INFINITY;
    plain(qkv, t->is_bf16, start, 3 * width, width + head * size, length, size, keys);
    turned(keys, length, size, wide, turn);
    plain(qkv, t->is_bf16, start, 3 * width, 2 * width + head * size, length, size, values);
    for (int64_t first = 0; first < length; first += BLOCK) {
        int64_t count = length - first < BLOCK ? length - first : BLOCK;
        plain(qkv, t->is_bf16, start + first, 3 * width, head * size, count, size, queries);
        for (int64_t i = 0; i < count * size; i++) queries[i] *= scale;
        product(queries, size, 1, turn, wide, count, size, wide, scores, wide, 0);
        for (int64_t i = 0; i < count; i++) {
            float *row = scores + i * wide;
            for (int64_t l = 0; l < 2 * LANES; l += LANES) *(vec *)(row + wide - 2 * LANES + l) += *(vec *)(beyond + l);
            vec top = *(vec *)row, sum = {};
            for (int64_t j = LANES; j < wide; j += LANES) top = most_of(*(vec *)(row + j), top);
            float most = largest_of(top);
            for (int64_t j = 0; j < wide; j += LANES) sum += *(vec *)(row + j) = exponential(*(vec *)(row + j) - most);
            totals[i] = sum_of(sum);
            sums[(start + first + i) * t->heads + head] = most + logf(totals[i]);
        }
        product(scores, wide, 1, values, size, count, length, size, made, size, 0);
        for (int64_t i = 0; i < count; i++) {
            for (int64_t k = 0; k < size; k += LANES) *(vec *)(made + i * size + k) /= totals[i];
            narrow(made + i * size, t->is_bf16, out, (start + first + i) * width + head * size, size);
        }
    }
}

static void backward_one(const Texts *t, int64_t text, int64_t head, const void *grad, const void *qkv, const void *out,
                         const float *sums, void *dqkv, float *scratch) {
#ifdef BF16_PRODUCTS
    if (t->is_bf16) return backward_pairs(t, text, head, grad, qkv, out, sums, dqkv, scratch);
#endif
    int64_t length = t->lengths[text], start = t->starts[text], size = t->size, width = t->heads * size, wide = padded(length);
    float *keys = scratch, *values = keys + wide * size, *turned_keys = values + wide * size, *turned_values = turned_keys + wide * size;
    float *dkeys = turned_values + wide * size, *dvalues = dkeys + wide * size;
    float *scores = dvalues + wide * size, *dscores = scores + BLOCK * wide;
    float *queries = dscores + BLOCK * wide, *grads = queries + BLOCK * size, *made = grads + BLOCK * size, *dqueries = made + BLOCK * size;
    float scale = 1.0f / sqrtf((float)size);
    plain(qkv, t->is_bf16, start, 3 * width, width + head * size, length, size, keys);
    plain(qkv, t->is_bf16, start, 3 * width, 2 * width + head * size, length, size, values);
    turned(keys, length, size, wide, turned_keys);
    turned(values, length, size, wide, turned_values);
    memset(dkeys, 0, 2 * wide * size * sizeof(float));
    for (int64_t first = 0; first < length; first += BLOCK) {
        int64_t count = length - first < BLOCK ? length - first : BLOCK;
        plain(qkv, t->is_bf16, start + first, 3 * width, head * size, count, size, queries);
        plain(grad, t->is_bf16, start + first, width, head * size, count, size, grads);
        plain(out, t->is_bf16, start + first, width, head * size, count, size, made);
        for (int64_t i = 0; i < count * size; i++) queries[i] *= scale;
        product(queries, size, 1, turned_keys, wide, count, size, wide, scores, wide, 0);
        product(grads, size, 1, turned_values, wide, count, size, wide, dscores, wide, 0);
        for (int64_t i = 0; i < count; i++) {
            float *row = scores + i * wide, *drow = dscores + i * wide, total = sums[(start + first + i) * t->heads + head];
            vec products = {};
            for (int64_t k = 0; k < size; k += LANES) products += *(vec *)(grads + i * size + k) * *(vec *)(made + i * size + k);
            float both = sum_of(products);
            for (int64_t j = 0; j < wide; j += LANES) {
                vec p = exponential(*(vec *)(row + j) - total);
                *(vec *)(row + j) = p;
                *(vec *)(drow + j) = p * (*(vec *)(drow + j) - both);
            }
        }
        product(scores, 1, wide, grads, size, length, count, size, dvalues, size, 1);
        product(dscores, 1, wide, queries, size, length, count, size, dkeys, size, 1);
        product(dscores, wide, 1, keys, size, count, length, size, dqueries, size, 0);
        for (int64_t i = 0; i < count * size; i++) dqueries[i] *= scale;
        for (int64_t i = 0; i < count; i++)
            narrow(dqueries + i * size, t->is_bf16, dqkv, (start + first + i) * 3 * width + head * size, size);
    }
    for (int64_t i = 0; i < length; i++) {
        narrow(dkeys + i * size, t->is_bf16, dqkv, (start + i) * 3 * width + width + head * size, size);
        narrow(dvalues + i * size, t->is_bf16, dqkv, (start + i) * 3 * width + 2 * width + head * size, size);
    }
}

// Without `grad`: qkv (T, 3 * width) -> out (T, width) and sums (T, heads), the logarithm of every query's sum of exponentials.
// With it (T, width), and what was got and made then: dqkv (T, 3 * width). 1: no memory, else 0.
int attention(const Texts *t, const void *qkv, void *out, float *sums, const void *grad, void *dqkv) {
    int64_t pieces = t->texts * t->heads, together = pieces / (8 * t->threads);  // a text's heads lie in the same lines of the cache
    int failed = 0;
    if (together > t->heads) together = t->heads;
    if (together < 1) together = 1;
#pragma omp parallel num_threads(t->threads)
    {
        float *scratch = aligned_alloc(64, (room(t) * sizeof(float) + 63) / 64 * 64);
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, together)
        for (int64_t piece = 0; piece < pieces; piece++) {
            int64_t text = t->texts - 1 - piece / t->heads, head = piece % t->heads;  // the longest are begun first
            if (scratch && grad) backward_one(t, text, head, grad, qkv, out, sums, dqkv, scratch);
            else if (scratch) forward_one(t, text, head, qkv, out, sums, scratch);
        }
        free(scratch);
    }
    return failed;
}
