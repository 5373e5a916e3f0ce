/* Attention of packed sequences, forward and backward, for CPUs with AVX-512.

   A task is one head of one sample: its scores never leave the core's caches. Threads call the same entry point and
   take tasks from a shared counter; each task writes rows of its own, so results do not depend on their number.

   BF16: queries, keys, values and gradients are bf16, else float. PAIRS: products are sums of bf16 pairs, two neighbours
   along the summed axis: one instruction multiplies 16 x 2 bf16 and adds to 16 floats. Else they are of floats. What an
   instruction multiplies in one lane is a unit here. Sums are of floats either way.

   Shapes: m queries, n keys, d values a head; M and N are m and n rounded up. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16 /* floats of a vector */
#define ROWS 8   /* rows of a tile; 8 rows of 3 vectors fill the registers */

#ifdef BF16
typedef uint16_t value;
#else
typedef float value;
#endif

#ifdef PAIRS
#define PER 2 /* values in a unit */
typedef uint32_t unit;
#else
#define PER 1
typedef float unit;
#endif

static long round_up(long x, long multiple) { return (x + multiple - 1) / multiple * multiple; }

static __mmask16 lanes(long count) { return count >= LANES ? 0xFFFF : (1u << count) - 1; }

/* ---- values and units ---- */

#ifdef BF16
static __m512 load(const value *x) {
    const __m256i half = _mm256_loadu_si256((const void *)x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static void store(value *dst, __m512 x) { _mm256_storeu_si256((void *)dst, to_bf16(x)); }
#else
static __m512 load(const value *x) { return _mm512_loadu_ps(x); }

static void store(value *dst, __m512 x) { _mm512_storeu_ps(dst, x); }
#endif

#ifdef PAIRS
/* LANES neighbours of a row. */
static void put(unit *dst, __m512 x) { _mm256_storeu_si256((void *)dst, to_bf16(x)); }

/* LANES columns of PER rows. */
static void put_rows(unit *dst, const __m512 x[PER]) {
    const __m512i low = _mm512_cvtepu16_epi32(to_bf16(x[0])), high = _mm512_cvtepu16_epi32(to_bf16(x[1]));
    _mm512_storeu_si512(dst, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

static inline __m512 multiply_add(unit left, const unit *right, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)left), (__m512bh)_mm512_loadu_si512(right));
}
#else
static void put(unit *dst, __m512 x) { _mm512_storeu_ps(dst, x); }

static void put_rows(unit *dst, const __m512 x[PER]) { _mm512_storeu_ps(dst, x[0]); }

static inline __m512 multiply_add(unit left, const unit *right, __m512 sum) {
    return _mm512_fmadd_ps(_mm512_set1_ps(left), _mm512_loadu_ps(right), sum);
}
#endif

/* ---- layouts ---- */

/* Rows side by side, zero from row m on: the summed axis is d. dst is [M, d / PER]. */
static void copy_rows(const value *x, long row, long m, long M, long d, unit *dst) {
    for (long i = 0; i < M; i++)
        for (long c = 0; c < d; c += LANES)
            put(dst + (i * d + c) / PER, i < m ? load(x + i * row + c) : _mm512_setzero_ps());
}

/* dst[r][c] = rows PER r and after at column c: the summed axis is the rows. dst is [N / PER, d]. */
static void join_rows(const value *x, long row, long n, long N, long d, unit *dst) {
    for (long r = 0; r < N; r += PER)
        for (long c = 0; c < d; c += LANES) {
            __m512 rows[PER];
            for (int e = 0; e < PER; e++) rows[e] = r + e < n ? load(x + (r + e) * row + c) : _mm512_setzero_ps();
            put_rows(dst + r / PER * d + c, rows);
        }
}

/* dst[p][j] = unit p of row j: the summed axis is d. dst is [d / PER, N]. */
static void transpose(const value *x, long row, long n, long N, long d, unit *dst) {
    const __m512i steps = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32((int)row));
    const long words = sizeof(value) * d / 4; /* of 32 bits, in a row */
    for (long j = 0; j < N; j += LANES) {
        const value *first = x + (j < n ? j : 0) * row;
        const __mmask16 valid = lanes(n > j ? n - j : 0);
        for (long w = 0; w < words; w++) {
            const void *at = (const char *)first + 4 * w;
            const __m512i word = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), valid, steps, at, sizeof(value));
#if defined(BF16) && !defined(PAIRS)
            _mm512_storeu_si512(dst + 2 * w * N + j, _mm512_slli_epi32(word, 16));
            _mm512_storeu_si512(dst + (2 * w + 1) * N + j, _mm512_and_si512(word, _mm512_set1_epi32(0xFFFF0000)));
#else
            _mm512_storeu_si512(dst + w * N + j, word);
#endif
        }
    }
}

/* scale * c[i][:] into rows of a result. */
static void store_rows(const float *c, long rows, long d, const float *scale, long scale_step, value *dst, long row) {
    for (long i = 0; i < rows; i++) {
        const __m512 factor = _mm512_set1_ps(scale[i * scale_step]);
        for (long j = 0; j < d; j += LANES) store(dst + i * row + j, _mm512_mul_ps(factor, _mm512_loadu_ps(c + i * d + j)));
    }
}

/* ---- products ---- */

/* c[i][:] = sum over p of a[i * a_row + p * a_step] * b[p][:] for ROWS rows and `vectors` vectors. */
static inline __attribute__((always_inline)) void tile(const unit *a, long a_row, long a_step, const unit *b, long b_row,
                                                       float *c, long c_row, long units, const int vectors) {
    __m512 sum[ROWS][3];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_setzero_ps();
    for (long p = 0; p < units; p++)
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++)
                sum[i][v] = multiply_add(a[i * a_row + p * a_step], b + p * b_row + v * LANES, sum[i][v]);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(c + i * c_row + v * LANES, sum[i][v]);
}

/* ROWS rows of a product; `columns` is a multiple of LANES. */
static void product(const unit *a, long a_row, long a_step, const unit *b, float *c, long columns, long units, long row) {
    for (long j = 0; j < columns;) {
        const long left = (columns - j) / LANES;
        const int vectors = left == 4 || left == 2 ? 2 : left == 1 ? 1 : 3;
        if (vectors == 3) tile(a, a_row, a_step, b + j, row, c + j, row, units, 3);
        if (vectors == 2) tile(a, a_row, a_step, b + j, row, c + j, row, units, 2);
        if (vectors == 1) tile(a, a_row, a_step, b + j, row, c + j, row, units, 1);
        j += vectors * LANES;
    }
}

/* 2 ** x, x <= 0, to 3e-6 relative in bf16 and 2e-7 in float: Taylor's polynomial on [-1/2, 1/2]. */
static inline __m512 power_of_2(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126), x); /* in this order a NaN stays one */
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#ifdef BF16
    __m512 y = _mm512_set1_ps(1.33335581e-3f);
#else
    __m512 y = _mm512_set1_ps(1.52527338e-5f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.54035304e-4f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.33335581e-3f));
#endif
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(9.61812911e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.55041087e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.40226507e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.93147181e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, _mm512_sub_ps(x, r));
}

/* ---- one head of one sample ---- */

typedef struct {
    char *memory;
    size_t size, used;
} Scratch;

static void *take(Scratch *s, size_t values) { /* of 4 bytes */
    void *block = s->memory + s->used;
    s->used += round_up(4 * values, 64);
    return block;
}

/* Room for `blocks` blocks of `values` values of 4 bytes in all. */
static int reserve(Scratch *s, size_t values, size_t blocks) {
    s->used = 0;
    if (4 * values + 64 * blocks <= s->size) return 1;
    free(s->memory);
    s->size = round_up(4 * values + 64 * blocks, 64);
    s->memory = aligned_alloc(64, s->size);
    return s->memory != NULL;
}

typedef struct {
    const value *q, *k, *v;
    long q_row, k_row, v_row; /* from row to row, in values */
    long m, n, d;
} Head;

typedef struct {
    value *q, *k, *v;
    long q_row, k_row, v_row;
} Gradients;

static int forward_head(Head h, value *out, long out_row, float *lse, Scratch *scratch) {
    const long m = h.m, n = h.n, d = h.d, M = round_up(m, ROWS), N = round_up(n, LANES);
    if (!reserve(scratch, (M * d + ROWS * N + 2 * N * d) / PER + ROWS * N + ROWS * d, 6)) return 0;
    unit *q = take(scratch, M * d / PER), *p = take(scratch, ROWS * N / PER);
    unit *k = take(scratch, N * d / PER), *v = take(scratch, N * d / PER);
    float *s = take(scratch, ROWS * N), *o = take(scratch, ROWS * d);
    const float scale = 1.44269504f / sqrtf((float)d);
    copy_rows(h.q, h.q_row, m, M, d, q);
    transpose(h.k, h.k_row, n, N, d, k);
    join_rows(h.v, h.v_row, n, N, d, v);
    for (long i = 0; i < m; i += ROWS) {
        float inverse[ROWS];
        product(q + i * d / PER, d / PER, 1, k, s, N, d / PER, N);
        for (long r = 0; r < ROWS; r++) {
            float *row = s + r * N;
            __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
            for (long j = 0; j < n; j += LANES) top = _mm512_mask_max_ps(top, lanes(n - j), top, _mm512_loadu_ps(row + j));
            const float shift = scale * _mm512_reduce_max_ps(top);
            for (long j = 0; j < N; j += LANES) {
                const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(row + j), _mm512_set1_ps(scale), _mm512_set1_ps(shift));
                const __m512 y = _mm512_maskz_mov_ps(lanes(n - j), power_of_2(x));
                sum = _mm512_add_ps(sum, y);
                put(p + (r * N + j) / PER, y);
            }
            const float total = _mm512_reduce_add_ps(sum);
            inverse[r] = 1 / total;
            if (i + r < m) lse[i + r] = shift + log2f(total);
        }
        product(p, N / PER, 1, v, o, d, N / PER, d);
        store_rows(o, m - i < ROWS ? m - i : ROWS, d, inverse, 1, out + i * out_row, out_row);
    }
    return 1;
}

static int backward_head(Head h, const value *g, long g_row, const float *lse, Gradients to, Scratch *scratch) {
    const long m = h.m, n = h.n, d = h.d, M = round_up(m, ROWS), N = round_up(n, LANES);
    const size_t units = (4 * M * d + 3 * N * d + ROWS * N + 2 * M * N) / PER;
    if (!reserve(scratch, units + 2 * ROWS * N + ROWS * d, 13)) return 0;
    unit *q = take(scratch, M * d / PER), *grad = take(scratch, M * d / PER), *ds = take(scratch, ROWS * N / PER);
    unit *q_joined = take(scratch, M * d / PER), *grad_joined = take(scratch, M * d / PER);
    unit *k = take(scratch, N * d / PER), *v = take(scratch, N * d / PER), *k_joined = take(scratch, N * d / PER);
    unit *p_joined = take(scratch, M * N / PER), *ds_joined = take(scratch, M * N / PER);
    float *s = take(scratch, ROWS * N), *dp = take(scratch, ROWS * N), *c = take(scratch, ROWS * d);
    const float one = 1, root = 1 / sqrtf((float)d), scale = 1.44269504f * root;
    copy_rows(h.q, h.q_row, m, M, d, q);
    copy_rows(g, g_row, m, M, d, grad);
    join_rows(h.q, h.q_row, m, M, d, q_joined);
    join_rows(g, g_row, m, M, d, grad_joined);
    transpose(h.k, h.k_row, n, N, d, k);
    transpose(h.v, h.v_row, n, N, d, v);
    join_rows(h.k, h.k_row, n, N, d, k_joined);
    for (long i = 0; i < m; i += ROWS) {
        product(q + i * d / PER, d / PER, 1, k, s, N, d / PER, N);
        product(grad + i * d / PER, d / PER, 1, v, dp, N, d / PER, N);
        for (long r = 0; r < ROWS; r += PER) {
            __m512 mean[PER];
            for (int e = 0; e < PER; e++) { /* p in place of s, and the mean of dp under p */
                const int valid = i + r + e < m;
                const __m512 shift = _mm512_set1_ps(valid ? lse[i + r + e] : 0);
                float *s_row = s + (r + e) * N, *dp_row = dp + (r + e) * N;
                __m512 sum = _mm512_setzero_ps();
                for (long j = 0; j < N; j += LANES) {
                    const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(s_row + j), _mm512_set1_ps(scale), shift);
                    const __m512 y = _mm512_maskz_mov_ps(valid ? lanes(n - j) : 0, power_of_2(x));
                    _mm512_storeu_ps(s_row + j, y);
                    sum = _mm512_fmadd_ps(y, _mm512_loadu_ps(dp_row + j), sum);
                }
                mean[e] = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
            }
            for (long j = 0; j < N; j += LANES) {
                __m512 p_rows[PER], ds_rows[PER];
                for (int e = 0; e < PER; e++) {
                    p_rows[e] = _mm512_loadu_ps(s + (r + e) * N + j);
                    ds_rows[e] = _mm512_mul_ps(p_rows[e], _mm512_sub_ps(_mm512_loadu_ps(dp + (r + e) * N + j), mean[e]));
                    put(ds + ((r + e) * N + j) / PER, ds_rows[e]);
                }
                put_rows(p_joined + (i + r) / PER * N + j, p_rows);
                put_rows(ds_joined + (i + r) / PER * N + j, ds_rows);
            }
        }
        product(ds, N / PER, 1, k_joined, c, d, N / PER, d);
        store_rows(c, m - i < ROWS ? m - i : ROWS, d, &root, 0, to.q + i * to.q_row, to.q_row);
    }
    for (long j = 0; j < n; j += ROWS) {
        const long rows = n - j < ROWS ? n - j : ROWS;
        product(p_joined + j, 1, N, grad_joined, c, d, M / PER, d);
        store_rows(c, rows, d, &one, 0, to.v + j * to.v_row, to.v_row);
        product(ds_joined + j, 1, N, q_joined, c, d, M / PER, d);
        store_rows(c, rows, d, &root, 0, to.k + j * to.k_row, to.k_row);
    }
    return 1;
}

/* ---- all heads of all samples ---- */

/* What one call works on. native.py knows the same fields. A row of q, k, v, out, grad or a gradient holds all heads side
   by side; rows are `_row` values apart. */
typedef struct {
    const value *q, *k, *v;
    long q_row, k_row, v_row;
    const int32_t *cu_q, *cu_k; /* where each sample begins */
    long samples, heads, d, queries;
    value *out;
    long out_row;
    float *lse; /* [heads, queries], of powers of 2 */
    const value *grad;
    long grad_row;
    Gradients to;
    long next; /* the first task that no thread has taken */
} Work;

static Head head_at(const Work *w, long sample, long head) {
    const long at_q = w->cu_q[sample], at_k = w->cu_k[sample], column = head * w->d;
    const Head h = {w->q + at_q * w->q_row + column, w->k + at_k * w->k_row + column, w->v + at_k * w->v_row + column,
                    w->q_row, w->k_row, w->v_row, w->cu_q[sample + 1] - at_q, w->cu_k[sample + 1] - at_k, w->d};
    return h;
}

static int forward_task(const Work *w, long sample, long head, Scratch *scratch) {
    const Head h = head_at(w, sample, head);
    const long at = w->cu_q[sample];
    return !h.m || forward_head(h, w->out + at * w->out_row + head * w->d, w->out_row, w->lse + head * w->queries + at, scratch);
}

static int backward_task(const Work *w, long sample, long head, Scratch *scratch) {
    const long at_q = w->cu_q[sample], at_k = w->cu_k[sample], column = head * w->d;
    Gradients to = w->to;
    to.q += at_q * to.q_row + column;
    to.k += at_k * to.k_row + column;
    to.v += at_k * to.v_row + column;
    return backward_head(head_at(w, sample, head), w->grad + at_q * w->grad_row + column, w->grad_row,
                         w->lse + head * w->queries + at_q, to, scratch);
}

static int run(Work *w, int (*task)(const Work *, long, long, Scratch *)) {
    Scratch scratch = {NULL, 0, 0};
    int ok = 1;
    for (long t; ok && (t = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->samples * w->heads;)
        ok = task(w, t / w->heads, t % w->heads, &scratch);
    free(scratch.memory);
    return ok;
}

/* Every thread makes the same call. 0 where memory is short. */
int forward(Work *w) { return run(w, forward_task); }

int backward(Work *w) { return run(w, backward_task); }
