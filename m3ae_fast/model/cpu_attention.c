/* Attention of packed sequences in bf16, forward and backward, for CPUs with AVX-512 bf16.

   A task is one head of one sample: its scores never leave the core's caches. Threads call the same entry point and
   take tasks from a shared counter; each task writes rows of its own, so results do not depend on their number.

   Products are sums of pairs: one instruction multiplies 16 x 2 bf16 and adds to 16 floats. A pair is two neighbours
   along the summed axis, in one uint32. Shapes: m queries, n keys, d values a head; M and N are m and n rounded up. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16 /* floats of a vector */
#define ROWS 8   /* rows of a tile; 8 rows of 3 vectors fill the registers */

typedef uint16_t bf16;
typedef uint32_t pair;

static long round_up(long x, long multiple) { return (x + multiple - 1) / multiple * multiple; }

static __mmask16 lanes(long count) { return count >= LANES ? 0xFFFF : (1u << count) - 1; }

/* ---- layouts ---- */

/* dst[p][j] = pair p of row j: the summed axis is d. dst is [d / 2, N]. */
static void transpose_pairs(const bf16 *x, long row, long n, long N, long d, pair *dst) {
    const __m512i steps = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32((int)row));
    for (long j = 0; j < N; j += LANES) {
        const bf16 *first = x + (j < n ? j : 0) * row;
        for (long p = 0; p < d / 2; p++)
            _mm512_storeu_si512(dst + p * N + j, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), lanes(n > j ? n - j : 0),
                                                                             steps, first + 2 * p, sizeof(bf16)));
    }
}

static __m512i interleave(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

/* dst[r][c] = rows 2 r and 2 r + 1 at column c: the summed axis is the rows. dst is [N / 2, d]. */
static void join_rows(const bf16 *x, long row, long n, long N, long d, pair *dst) {
    for (long r = 0; r < N; r += 2)
        for (long c = 0; c < d; c += LANES) {
            __m256i low = r < n ? _mm256_loadu_si256((const void *)(x + r * row + c)) : _mm256_setzero_si256();
            __m256i high = r + 1 < n ? _mm256_loadu_si256((const void *)(x + (r + 1) * row + c)) : _mm256_setzero_si256();
            _mm512_storeu_si512(dst + r / 2 * d + c, interleave(low, high));
        }
}

/* Rows [M, d] side by side, zero from row m on. */
static void copy_rows(const bf16 *x, long row, long m, long M, long d, bf16 *dst) {
    for (long i = 0; i < m; i++) memcpy(dst + i * d, x + i * row, d * sizeof(bf16));
    memset(dst + m * d, 0, (M - m) * d * sizeof(bf16));
}

static __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

/* scale * c[i][:] as bf16 into rows of a result. */
static void store_rows(const float *c, long rows, long d, const float *scale, long scale_step, bf16 *dst, long row) {
    for (long i = 0; i < rows; i++) {
        const __m512 factor = _mm512_set1_ps(scale[i * scale_step]);
        for (long j = 0; j < d; j += LANES)
            _mm256_storeu_si256((void *)(dst + i * row + j), to_bf16(_mm512_mul_ps(factor, _mm512_loadu_ps(c + i * d + j))));
    }
}

/* ---- products ---- */

/* c[i][:] = sum over p of a[i * a_row + p * a_pair] * b[p][:] for ROWS rows and `vectors` vectors. */
static inline __attribute__((always_inline)) void tile(const pair *a, long a_row, long a_pair, const pair *b, long b_row,
                                                       float *c, long c_row, long pairs, const int vectors) {
    __m512 sum[ROWS][3];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_setzero_ps();
    for (long p = 0; p < pairs; p++) {
        __m512bh right[3];
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + p * b_row + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[i * a_row + p * a_pair]);
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], left, right[v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(c + i * c_row + v * LANES, sum[i][v]);
}

/* ROWS rows of a product; `columns` is a multiple of LANES. */
static void product(const pair *a, long a_row, long a_pair, const pair *b, float *c, long columns, long pairs, long row) {
    for (long j = 0; j < columns;) {
        const long left = (columns - j) / LANES;
        const int vectors = left == 4 || left == 2 ? 2 : left == 1 ? 1 : 3;
        if (vectors == 3) tile(a, a_row, a_pair, b + j, row, c + j, row, pairs, 3);
        if (vectors == 2) tile(a, a_row, a_pair, b + j, row, c + j, row, pairs, 2);
        if (vectors == 1) tile(a, a_row, a_pair, b + j, row, c + j, row, pairs, 1);
        j += vectors * LANES;
    }
}

/* 2 ** x to 3e-6 relative, x <= 0: Taylor's polynomial on [-1/2, 1/2]. */
static inline __m512 power_of_2(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126), x); /* in this order a NaN stays one */
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 y = _mm512_set1_ps(1.33335581e-3f);
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

static void *take(Scratch *s, size_t bytes) {
    void *block = s->memory + s->used;
    s->used += round_up(bytes, 64);
    return block;
}

static int reserve(Scratch *s, size_t bytes) {
    s->used = 0;
    if (bytes <= s->size) return 1;
    free(s->memory);
    s->size = round_up(bytes, 64);
    s->memory = aligned_alloc(64, s->size);
    return s->memory != NULL;
}

typedef struct {
    const bf16 *q, *k, *v;
    long q_row, k_row, v_row; /* from row to row, in values */
    long m, n, d;
} Head;

static int forward_head(Head h, bf16 *out, float *lse, long heads, Scratch *scratch) {
    const long m = h.m, n = h.n, d = h.d, M = round_up(m, ROWS), N = round_up(n, LANES);
    if (!reserve(scratch, (2 * M * d + 4 * N * d + 6 * ROWS * N + 4 * ROWS * d) + 5 * 64)) return 0;
    bf16 *q = take(scratch, 2 * M * d), *p = take(scratch, 2 * ROWS * N);
    pair *k = take(scratch, 2 * N * d), *v = take(scratch, 2 * N * d);
    float *s = take(scratch, 4 * ROWS * N), *o = take(scratch, 4 * ROWS * d);
    const float scale = 1.44269504f / sqrtf((float)d);
    copy_rows(h.q, h.q_row, m, M, d, q);
    transpose_pairs(h.k, h.k_row, n, N, d, k);
    join_rows(h.v, h.v_row, n, N, d, v);
    for (long i = 0; i < m; i += ROWS) {
        float inverse[ROWS];
        product((pair *)q + i * d / 2, d / 2, 1, k, s, N, d / 2, N);
        for (long r = 0; r < ROWS; r++) {
            float *row = s + r * N;
            __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
            for (long j = 0; j < n; j += LANES) top = _mm512_mask_max_ps(top, lanes(n - j), top, _mm512_loadu_ps(row + j));
            const float shift = scale * _mm512_reduce_max_ps(top);
            for (long j = 0; j < N; j += LANES) {
                const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(row + j), _mm512_set1_ps(scale), _mm512_set1_ps(shift));
                const __m512 y = _mm512_maskz_mov_ps(lanes(n - j), power_of_2(x));
                sum = _mm512_add_ps(sum, y);
                _mm256_storeu_si256((void *)(p + r * N + j), to_bf16(y));
            }
            const float total = _mm512_reduce_add_ps(sum);
            inverse[r] = 1 / total;
            if (i + r < m) lse[(i + r) * heads] = shift + log2f(total);
        }
        product((pair *)p, N / 2, 1, v, o, d, N / 2, d);
        store_rows(o, m - i < ROWS ? m - i : ROWS, d, inverse, 1, out + i * heads * d, heads * d);
    }
    return 1;
}

static int backward_head(Head h, const bf16 *g, long g_row, const float *lse, bf16 *dq, bf16 *dk, bf16 *dv, long heads,
                         Scratch *scratch) {
    const long m = h.m, n = h.n, d = h.d, M = round_up(m, ROWS), N = round_up(n, LANES), row = heads * d;
    const size_t bytes = 8 * M * d + 6 * N * d + 10 * ROWS * N + 4 * ROWS * d + 4 * M * N;
    if (!reserve(scratch, bytes + 12 * 64)) return 0;
    bf16 *q = take(scratch, 2 * M * d), *grad = take(scratch, 2 * M * d), *ds = take(scratch, 2 * ROWS * N);
    pair *q_joined = take(scratch, 2 * M * d), *grad_joined = take(scratch, 2 * M * d);
    pair *k = take(scratch, 2 * N * d), *v = take(scratch, 2 * N * d), *k_joined = take(scratch, 2 * N * d);
    pair *p_joined = take(scratch, 2 * M * N), *ds_joined = take(scratch, 2 * M * N);
    float *s = take(scratch, 4 * ROWS * N), *dp = take(scratch, 4 * ROWS * N), *c = take(scratch, 4 * ROWS * d);
    const float one = 1, root = 1 / sqrtf((float)d), scale = 1.44269504f * root;
    copy_rows(h.q, h.q_row, m, M, d, q);
    copy_rows(g, g_row, m, M, d, grad);
    join_rows(h.q, h.q_row, m, M, d, q_joined);
    join_rows(g, g_row, m, M, d, grad_joined);
    transpose_pairs(h.k, h.k_row, n, N, d, k);
    transpose_pairs(h.v, h.v_row, n, N, d, v);
    join_rows(h.k, h.k_row, n, N, d, k_joined);
    for (long i = 0; i < m; i += ROWS) {
        product((pair *)q + i * d / 2, d / 2, 1, k, s, N, d / 2, N);
        product((pair *)grad + i * d / 2, d / 2, 1, v, dp, N, d / 2, N);
        for (long r = 0; r < ROWS; r += 2) {
            __m512 mean[2];
            for (int e = 0; e < 2; e++) { /* p in place of s, and the mean of dp under p */
                const int valid = i + r + e < m;
                const __m512 shift = _mm512_set1_ps(valid ? lse[(i + r + e) * heads] : 0);
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
                __m256i p_half[2], ds_half[2];
                for (int e = 0; e < 2; e++) {
                    const __m512 y = _mm512_loadu_ps(s + (r + e) * N + j);
                    p_half[e] = to_bf16(y);
                    ds_half[e] = to_bf16(_mm512_mul_ps(y, _mm512_sub_ps(_mm512_loadu_ps(dp + (r + e) * N + j), mean[e])));
                    _mm256_storeu_si256((void *)(ds + (r + e) * N + j), ds_half[e]);
                }
                _mm512_storeu_si512(p_joined + (i + r) / 2 * N + j, interleave(p_half[0], p_half[1]));
                _mm512_storeu_si512(ds_joined + (i + r) / 2 * N + j, interleave(ds_half[0], ds_half[1]));
            }
        }
        product((pair *)ds, N / 2, 1, k_joined, c, d, N / 2, d);
        store_rows(c, m - i < ROWS ? m - i : ROWS, d, &root, 0, dq + i * row, row);
    }
    for (long j = 0; j < n; j += ROWS) {
        const long rows = n - j < ROWS ? n - j : ROWS;
        product(p_joined + j, 1, N, grad_joined, c, d, M / 2, d);
        store_rows(c, rows, d, &one, 0, dv + j * row, row);
        product(ds_joined + j, 1, N, q_joined, c, d, M / 2, d);
        store_rows(c, rows, d, &root, 0, dk + j * row, row);
    }
    return 1;
}

/* ---- all heads of all samples. Results are [rows, heads, d], contiguous. Return 0 where memory is short. ---- */

static Head head_at(const bf16 *q, const bf16 *k, const bf16 *v, long q_row, long k_row, long v_row, const int32_t *cu_q,
                    const int32_t *cu_k, long sample, long head, long d) {
    const long at_q = cu_q[sample], at_k = cu_k[sample];
    const Head h = {q + at_q * q_row + head * d, k + at_k * k_row + head * d, v + at_k * v_row + head * d,
                    q_row, k_row, v_row, cu_q[sample + 1] - at_q, cu_k[sample + 1] - at_k, d};
    return h;
}

int forward(const bf16 *q, const bf16 *k, const bf16 *v, long q_row, long k_row, long v_row, const int32_t *cu_q,
            const int32_t *cu_k, long samples, long heads, long d, bf16 *out, float *lse, long *next) {
    Scratch scratch = {NULL, 0, 0};
    int ok = 1;
    for (long t; ok && (t = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < samples * heads;) {
        const long sample = t / heads, head = t % heads, at = cu_q[sample] * heads + head;
        const Head h = head_at(q, k, v, q_row, k_row, v_row, cu_q, cu_k, sample, head, d);
        if (h.m) ok = forward_head(h, out + at * d, lse + at, heads, &scratch);
    }
    free(scratch.memory);
    return ok;
}

int backward(const bf16 *q, const bf16 *k, const bf16 *v, long q_row, long k_row, long v_row, const int32_t *cu_q,
             const int32_t *cu_k, long samples, long heads, long d, const bf16 *grad, long grad_row, const float *lse,
             bf16 *dq, bf16 *dk, bf16 *dv, long *next) {
    Scratch scratch = {NULL, 0, 0};
    int ok = 1;
    for (long t; ok && (t = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < samples * heads;) {
        const long sample = t / heads, head = t % heads, at_q = cu_q[sample] * heads + head, at_k = cu_k[sample] * heads + head;
        const Head h = head_at(q, k, v, q_row, k_row, v_row, cu_q, cu_k, sample, head, d);
        ok = backward_head(h, grad + cu_q[sample] * grad_row + head * d, grad_row, lse + at_q, dq + at_q * d, dk + at_k * d,
                           dv + at_k * d, heads, &scratch);
    }
    free(scratch.memory);
    return ok;
}
