// y[row] += scale-free LoRA of the row's own adapter, for all rows of a batch and all slices of one projection, in one call.
//
// Rows come grouped by adapter as indices, so nothing is gathered and no run is too short to be worth a call: a chunk of a
// group is shrunk and expanded by one thread while its inputs are in the cache. Sums are fp32 whatever the dtype.
// Without -fopenmp it is correct on one thread.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define BF16_PRODUCTS  // the processor multiplies pairs of bf16 and sums them in fp32
#endif

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t bf16;

// One projection. A of a slot is (rank, slices, in): element (j, i, k) at a[slot] + j*a_rank + i*a_slice + k; no A: inputs are shrunk
// already. B of slice i and a slot is (rank, out_i), so that its rows run along the output, at b[i*slots + slot].
typedef struct {
    const void *const *a;
    int64_t a_rank, a_slice, in;
    const void *const *b;
    const int64_t *outs, *offsets;
    const int32_t *ranks;
    int64_t slices, slots;
    int32_t is_bf16;
} Projection;

static inline bf16 narrow(float f) {  // to nearest, ties to even; NaN stays NaN
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (bf16)((u >> 16) | 0x40u);
    return (bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float sum8(v8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// h[row][column] = x[row] . a[column], 3 rows by 4 columns at a time: 12 accumulators fit the 16 registers of AVX2.
#define SHRINK_TILE(ROWS, COLUMNS)                                                                                          \
    static inline void shrink_##ROWS##_##COLUMNS(const float *const *x, const float *a, int64_t step, int64_t in, float *h, \
                                                 int64_t width) {                                                          \
        v8 sum[ROWS][COLUMNS] = {{{0}}};                                                                                    \
        int64_t k = 0;                                                                                                      \
        for (; k + 8 <= in; k += 8)                                                                                         \
            _Pragma("GCC unroll 4") for (int c = 0; c < COLUMNS; c++) {                                                     \
                v8 w = *(const v8 *)(a + c * step + k);                                                                     \
                _Pragma("GCC unroll 3") for (int r = 0; r < ROWS; r++) sum[r][c] += *(const v8 *)(x[r] + k) * w;            \
            }                                                                                                               \
        _Pragma("GCC unroll 3") for (int r = 0; r < ROWS; r++)                                                              \
            _Pragma("GCC unroll 4") for (int c = 0; c < COLUMNS; c++) {                                                     \
                float total = sum8(sum[r][c]);                                                                              \
                for (int64_t t = k; t < in; t++) total += x[r][t] * a[c * step + t];                                        \
                h[r * width + c] = total;                                                                                   \
            }                                                                                                               \
    }
SHRINK_TILE(3, 4)
SHRINK_TILE(1, 4)
SHRINK_TILE(3, 1)
SHRINK_TILE(1, 1)

static void shrink(const float *const *x, int64_t rows, const float *a, int64_t step, int64_t in, float *h, int64_t rank) {
    int64_t c = 0;
    for (; c + 4 <= rank; c += 4) {
        int64_t r = 0;
        for (; r + 3 <= rows; r += 3) shrink_3_4(x + r, a + c * step, step, in, h + r * rank + c, rank);
        for (; r < rows; r++) shrink_1_4(x + r, a + c * step, step, in, h + r * rank + c, rank);
    }
    for (; c < rank; c++) {
        int64_t r = 0;
        for (; r + 3 <= rows; r += 3) shrink_3_1(x + r, a + c * step, step, in, h + r * rank + c, rank);
        for (; r < rows; r++) shrink_1_1(x + r, a + c * step, step, in, h + r * rank + c, rank);
    }
}

// y[row][o] += sum over j of h[row][j] * b[j][o], 6 rows by 16 outputs at a time.
#define EXPAND_TILE(ROWS)                                                                                               \
    static inline void expand_##ROWS(float *const *y, const float *h, int64_t rank, const float *b, int64_t out) {     \
        int64_t o = 0;                                                                                                  \
        for (; o + 16 <= out; o += 16) {                                                                                \
            v8 low[ROWS], high[ROWS];                                                                                   \
            _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) {                                                    \
                low[r] = *(const v8 *)(y[r] + o);                                                                       \
                high[r] = *(const v8 *)(y[r] + o + 8);                                                                  \
            }                                                                                                           \
            for (int64_t j = 0; j < rank; j++) {                                                                        \
                v8 left = *(const v8 *)(b + j * out + o), right = *(const v8 *)(b + j * out + o + 8);                   \
                _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) {                                                \
                    float f = h[r * rank + j];                                                                          \
                    low[r] += f * left;                                                                                 \
                    high[r] += f * right;                                                                               \
                }                                                                                                       \
            }                                                                                                           \
            _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) {                                                    \
                *(v8 *)(y[r] + o) = low[r];                                                                             \
                *(v8 *)(y[r] + o + 8) = high[r];                                                                        \
            }                                                                                                           \
        }                                                                                                               \
        for (; o < out; o++)                                                                                            \
            for (int r = 0; r < ROWS; r++) {                                                                            \
                float total = y[r][o];                                                                                  \
                for (int64_t j = 0; j < rank; j++) total += h[r * rank + j] * b[j * out + o];                           \
                y[r][o] = total;                                                                                        \
            }                                                                                                           \
    }
EXPAND_TILE(6)
EXPAND_TILE(4)
EXPAND_TILE(2)
EXPAND_TILE(1)

static void expand(float *const *y, int64_t rows, const float *h, int64_t rank, const float *b, int64_t out) {
    int64_t r = 0;
    for (; r + 6 <= rows; r += 6) expand_6(y + r, h + r * rank, rank, b, out);
    if (r + 4 <= rows) { expand_4(y + r, h + r * rank, rank, b, out); r += 4; }
    if (r + 2 <= rows) { expand_2(y + r, h + r * rank, rank, b, out); r += 2; }
    if (r < rows) expand_1(y + r, h + r * rank, rank, b, out);
}

static void chunk_fp32(const Projection *p, const float *x, int64_t ldx, float *y, int64_t ldy, const int32_t *rows, int64_t count,
                       int64_t slot, float *h) {
    const float *from[count];
    float *to[count];
    int64_t rank = p->ranks[slot];
    for (int64_t r = 0; r < count; r++) from[r] = x + (int64_t)rows[r] * ldx;
    for (int64_t i = 0; i < p->slices; i++) {
        const float *b = (const float *)p->b[i * p->slots + slot];
        for (int64_t r = 0; r < count; r++) to[r] = y + (int64_t)rows[r] * ldy + p->offsets[i];
        if (p->a)
            shrink(from, count, (const float *)p->a[slot] + i * p->a_slice, p->a_rank, p->in, h, rank);
        else
            for (int64_t r = 0; r < count; r++) memcpy(h + r * rank, from[r], rank * sizeof(float));
        expand(to, count, h, rank, b, p->outs[i]);
    }
}

#ifdef BF16_PRODUCTS
static inline __m512bh pairs(__m512i v) { return (__m512bh)v; }

static inline __m128 sums_of_4(const __m512 *v) {
    __m256 half[4];
    _Pragma("GCC unroll 4") for (int c = 0; c < 4; c++)
        half[c] = _mm256_add_ps(_mm512_castps512_ps256(v[c]), _mm512_extractf32x8_ps(v[c], 1));
    __m256 sum = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
}

// `left` elements, 32 at most. Masked stores are slow, so all but the last of a row go without: `left` is a constant there.
static inline __m512i some(const bf16 *from, int64_t left) {
    return left >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(((__mmask32)1 << left) - 1, from);
}

static inline void keep(bf16 *to, __m512i v, int64_t left) {
    if (left >= 32) _mm512_storeu_si512(to, v);
    else _mm512_mask_storeu_epi16(to, ((__mmask32)1 << left) - 1, v);
}

// h[row][column] = x[row] . a[column] for 4 columns, of which `columns` are asked for.
static inline __attribute__((always_inline)) void shrink_tile(int rows, const bf16 *const *x, const bf16 *a, int64_t step, int64_t in,
                                                              float *h, int64_t width, int64_t columns) {
    __m512 sum[6][4];
    const bf16 *column[4];
    _Pragma("GCC unroll 4") for (int c = 0; c < 4; c++) {
        column[c] = a + (c < columns ? c : 0) * step;
        _Pragma("GCC unroll 6") for (int r = 0; r < rows; r++) sum[r][c] = _mm512_setzero_ps();
    }
    int64_t k = 0;
#define STEP(LEFT)                                                                                                           \
    {                                                                                                                        \
        __m512i w[4];                                                                                                        \
        _Pragma("GCC unroll 4") for (int c = 0; c < 4; c++) {                                                                \
            w[c] = some(column[c] + k, LEFT);                                                                                \
            __builtin_prefetch(column[c] + 4 * step + k);                                                                    \
        }                                                                                                                    \
        _Pragma("GCC unroll 6") for (int r = 0; r < rows; r++) {                                                             \
            __m512i v = some(x[r] + k, LEFT);                                                                                \
            _Pragma("GCC unroll 4") for (int c = 0; c < 4; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], pairs(v), pairs(w[c])); \
        }                                                                                                                    \
    }
    for (; k + 32 <= in; k += 32) STEP(32)
    if (k < in) STEP(in - k)
#undef STEP
    _Pragma("GCC unroll 6") for (int r = 0; r < rows; r++)
        _mm_mask_storeu_ps(h + r * width, (__mmask8)((1 << columns) - 1), sums_of_4(sum[r]));
}

static void shrink_pairs(const bf16 *const *x, int64_t rows, const bf16 *a, int64_t step, int64_t in, float *h, int64_t rank) {
    for (int64_t c = 0; c < rank; c += 4) {
        int64_t r = 0, columns = rank - c < 4 ? rank - c : 4;
        for (; r + 6 <= rows; r += 6) shrink_tile(6, x + r, a + c * step, step, in, h + r * rank + c, rank, columns);
        for (; r + 4 <= rows; r += 4) shrink_tile(4, x + r, a + c * step, step, in, h + r * rank + c, rank, columns);
        for (; r < rows; r++) shrink_tile(1, x + r, a + c * step, step, in, h + r * rank + c, rank, columns);
    }
}

// y[row][o …] += sum over j of h[row][j] * b[j][o …] for up to 32 outputs. Two rows of b are interleaved by 16 bits within each lane
// of 128, which orders the outputs as interleaving y with zeros does, and as packing undoes. h: (rows, rank / 2) pairs, the last padded.
static inline __attribute__((always_inline)) void expand_tile(int rows, bf16 *const *y, const int32_t *h, int64_t rank, const bf16 *b,
                                                              int64_t out, int64_t o, int64_t left) {
    const __m512i zero = _mm512_setzero_si512();
    int64_t width = (rank + 1) / 2;
    __m512 low[8], high[8];
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {
        __m512i v = some(y[r] + o, left);
        low[r] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, v));
        high[r] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, v));
    }
    for (int64_t j = 0; j < width; j++) {
        __builtin_prefetch(b + 2 * j * out + o + 128);
        __builtin_prefetch(b + (2 * j + 1) * out + o + 128);
        __m512i one = some(b + 2 * j * out + o, left), two = 2 * j + 1 < rank ? some(b + (2 * j + 1) * out + o, left) : zero;
        __m512bh first = pairs(_mm512_unpacklo_epi16(one, two)), second = pairs(_mm512_unpackhi_epi16(one, two));
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {
            __m512bh f = pairs(_mm512_set1_epi32(h[r * width + j]));
            low[r] = _mm512_dpbf16_ps(low[r], f, first);
            high[r] = _mm512_dpbf16_ps(high[r], f, second);
        }
    }
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {
        __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low[r]));
        __m512i second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high[r]));
        keep(y[r] + o, _mm512_packus_epi32(first, second), left);
    }
}

#define EXPAND_PAIRS(ROWS)                                                                                                   \
    static void expand_pairs_##ROWS(bf16 *const *y, const int32_t *h, int64_t rank, const bf16 *b, int64_t out) {            \
        int64_t o = 0;                                                                                                       \
        for (; o + 32 <= out; o += 32) expand_tile(ROWS, y, h, rank, b, out, o, 32);                                         \
        if (o < out) expand_tile(ROWS, y, h, rank, b, out, o, out - o);                                                      \
    }
EXPAND_PAIRS(8)
EXPAND_PAIRS(4)
EXPAND_PAIRS(2)
EXPAND_PAIRS(1)

static void expand_pairs(bf16 *const *y, int64_t rows, const int32_t *h, int64_t rank, const bf16 *b, int64_t out) {
    int64_t r = 0, width = (rank + 1) / 2;
    for (; r + 8 <= rows; r += 8) expand_pairs_8(y + r, h + r * width, rank, b, out);
    if (r + 4 <= rows) { expand_pairs_4(y + r, h + r * width, rank, b, out); r += 4; }
    if (r + 2 <= rows) { expand_pairs_2(y + r, h + r * width, rank, b, out); r += 2; }
    if (r < rows) expand_pairs_1(y + r, h + r * width, rank, b, out);
}

// `wide` has room for the pairs behind h.
static void chunk_bf16(const Projection *p, const bf16 *x, int64_t ldx, bf16 *y, int64_t ldy, const int32_t *rows, int64_t count,
                       int64_t slot, float *h, float *wide) {
    const bf16 *from[count];
    bf16 *to[count], *narrowed = (bf16 *)wide;
    int64_t rank = p->ranks[slot], even = rank + (rank & 1);
    for (int64_t r = 0; r < count; r++) {
        from[r] = x + (int64_t)rows[r] * ldx;
        narrowed[r * even + even - 1] = 0;
    }
    for (int64_t i = 0; i < p->slices; i++) {
        for (int64_t r = 0; r < count; r++) to[r] = y + (int64_t)rows[r] * ldy + p->offsets[i];
        if (p->a) {
            shrink_pairs(from, count, (const bf16 *)p->a[slot] + i * p->a_slice, p->a_rank, p->in, h, rank);
            for (int64_t r = 0; r < count; r++)
                for (int64_t j = 0; j < rank; j++) narrowed[r * even + j] = narrow(h[r * rank + j]);
        } else
            for (int64_t r = 0; r < count; r++) memcpy(narrowed + r * even, from[r], rank * sizeof(bf16));
        expand_pairs(to, count, (const int32_t *)narrowed, rank, (const bf16 *)p->b[i * p->slots + slot], p->outs[i]);
    }
}
#else
static inline float widen(bf16 v) {
    uint32_t u = (uint32_t)v << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static void widen_all(float *to, const bf16 *from, int64_t n) {
    for (int64_t k = 0; k < n; k++) to[k] = widen(from[k]);
}

static void chunk_bf16(const Projection *p, const bf16 *x, int64_t ldx, bf16 *y, int64_t ldy, const int32_t *rows, int64_t count,
                       int64_t slot, float *h, float *wide) {
    const float *from[count];
    float *to[count];
    int64_t rank = p->ranks[slot], in = p->a ? p->in : rank;
    float *weights = wide + count * in;
    for (int64_t r = 0; r < count; r++) {
        widen_all(wide + r * in, x + (int64_t)rows[r] * ldx, in);
        from[r] = wide + r * in;
    }
    for (int64_t i = 0; i < p->slices; i++) {
        int64_t out = p->outs[i];
        const bf16 *b = (const bf16 *)p->b[i * p->slots + slot];
        if (p->a) {
            const bf16 *a = (const bf16 *)p->a[slot] + i * p->a_slice;
            for (int64_t j = 0; j < rank; j++) widen_all(weights + j * in, a + j * p->a_rank, in);
            shrink(from, count, weights, in, in, h, rank);
        } else
            for (int64_t r = 0; r < count; r++) memcpy(h + r * rank, from[r], rank * sizeof(float));
        widen_all(weights, b, rank * out);
        float *sums = weights + rank * out;
        for (int64_t r = 0; r < count; r++) {
            widen_all(sums + r * out, y + (int64_t)rows[r] * ldy + p->offsets[i], out);
            to[r] = sums + r * out;
        }
        expand(to, count, h, rank, weights, out);
        for (int64_t r = 0; r < count; r++)
            for (int64_t o = 0; o < out; o++) y[(int64_t)rows[r] * ldy + p->offsets[i] + o] = narrow(sums[r * out + o]);
    }
}
#endif

// rows: token indices grouped by adapter; chunks: (slot, first, last + 1) into rows. Returns 0, or 1 when memory ended.
int lora_add(const Projection *p, const void *x, int64_t ldx, void *y, int64_t ldy, const int32_t *rows, const int32_t *chunks,
             int64_t n_chunks) {
    int64_t most = 0, rank = 0, out = 0;
    for (int64_t c = 0; c < n_chunks; c++) {
        const int32_t *chunk = chunks + 3 * c;
        if (chunk[2] - chunk[1] > most) most = chunk[2] - chunk[1];
        if (p->ranks[chunk[0]] > rank) rank = p->ranks[chunk[0]];
    }
    if (rank == 0) return 0;
    for (int64_t i = 0; i < p->slices; i++)
        if (p->outs[i] > out) out = p->outs[i];
    int64_t in = p->a ? p->in : rank, size = most * rank;
    if (p->is_bf16) size += most * (rank + 1) + most * in + (in > out ? in : out) * rank + most * out;
    int failed = 0;
#pragma omp parallel if (n_chunks > 1)
    {
        float *scratch = malloc(size * sizeof(float));
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t c = 0; c < n_chunks; c++) {
            int64_t slot = chunks[3 * c], first = chunks[3 * c + 1], count = chunks[3 * c + 2] - first;
            if (!scratch || p->ranks[slot] == 0) continue;
            if (p->is_bf16)
                chunk_bf16(p, x, ldx, y, ldy, rows + first, count, slot, scratch, scratch + most * rank);
            else
                chunk_fp32(p, x, ldx, y, ldy, rows + first, count, slot, scratch);
        }
        free(scratch);
    }
    return failed;
}
