// y[row] += scale-free LoRA of the row's own adapter, for all rows of a batch and all slices of one projection, in one call.
//
// Rows come grouped by adapter as indices, so nothing is gathered and no run is too short to be worth a call: a chunk of a
// group is shrunk and expanded by one thread while its inputs are in the cache. Sums are fp32 whatever the dtype.
// Without -fopenmp it is correct on one thread.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t bf16;

// One projection. A is (slots, rank, slices, in): element (s, j, i, k) at a + s*a_slot + j*a_rank + i*a_slice + k.
// B of slice i is (slots, max_rank, out_i), so that its rows run along the output.
typedef struct {
    const void *a;
    int64_t a_slot, a_rank, a_slice, in;
    const void *const *b;
    const int64_t *outs, *offsets;
    const int32_t *ranks;
    int64_t slices, max_rank;
    int32_t is_bf16;
} Projection;

static inline float widen(bf16 v) {
    uint32_t u = (uint32_t)v << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline bf16 narrow(float f) {  // to nearest, ties to even; NaN stays NaN
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (bf16)((u >> 16) | 0x40u);
    return (bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static void widen_all(float *to, const bf16 *from, int64_t n) {
    for (int64_t k = 0; k < n; k++) to[k] = widen(from[k]);
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
        const float *b = (const float *)p->b[i] + slot * p->max_rank * p->outs[i];
        for (int64_t r = 0; r < count; r++) to[r] = y + (int64_t)rows[r] * ldy + p->offsets[i];
        if (p->a)
            shrink(from, count, (const float *)p->a + slot * p->a_slot + i * p->a_slice, p->a_rank, p->in, h, rank);
        else
            for (int64_t r = 0; r < count; r++) memcpy(h + r * rank, from[r], rank * sizeof(float));
        expand(to, count, h, rank, b, p->outs[i]);
    }
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
        const bf16 *b = (const bf16 *)p->b[i] + slot * p->max_rank * out;
        if (p->a) {
            const bf16 *a = (const bf16 *)p->a + slot * p->a_slot + i * p->a_slice;
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
    if (p->is_bf16) size += most * in + (in > out ? in : out) * rank + most * out;
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
