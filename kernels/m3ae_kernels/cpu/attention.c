/* Attention of packed sequences, forward and backward, for CPUs with AVX-512, and with AMX where available.

   A task is one head of one sample, whose scores never leave the caches of the core. All threads call the same entry
   point and take tasks from a shared counter. Each task writes its own rows, so the results do not depend on the number
   of threads.

   BF16: queries, keys, values and gradients are bf16; otherwise, they are float. PAIRS: products are computed from pairs of
   bf16 values that are adjacent along the summed axis; one instruction multiplies 16 x 2 bf16 values and adds the products to
   16 floats. TILES: AMX does the same for 16 x 16 x 16 pairs at a time. Without PAIRS, products are computed from floats. What
   an instruction multiplies in one lane, a pair of bf16 values or one float, is called a unit. Sums are always computed in
   float.

   Shapes: m queries, n keys, d values per head; M and N are m and n rounded up to a multiple of ALIGN. */

#ifdef TILES
#define PAIRS
#endif

#include "vectors.h"

#ifdef TILES
#define BLOCK 32 /* number of rows whose scores are computed together: two tiles */
#define ALIGN 32 /* M and N are multiples of ALIGN */
#else
#define BLOCK 8 /* 8 rows of 3 vectors fill the registers */
#define ALIGN 16
#endif

#ifdef PAIRS
#define PER 2 /* values in a unit */
typedef uint32_t unit;
#else
#define PER 1
typedef float unit;
#endif

/* ---- values and units ---- */

#ifdef PAIRS
/* Store LANES adjacent values of a row as units. */
static void put(unit *dst, __m512 x) { _mm256_storeu_si256((void *)dst, to_bf16(x)); }

/* Store LANES columns of PER rows as units. */
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

/* Copy rows unchanged, with zeros from row m on, for products that sum over d. dst is [M, d / PER]. */
static void copy_rows(const value *x, long row, long m, long M, long d, unit *dst) {
    for (long i = 0; i < M; i++)
        for (long c = 0; c < d; c += LANES)
            put(dst + (i * d + c) / PER, i < m ? load(x + i * row + c) : _mm512_setzero_ps());
}

/* Join PER rows to units, for products that sum over rows: dst[r][c] contains column c of PER rows from row PER * r on. dst is
   [N / PER, d]. */
static void join_rows(const value *x, long row, long n, long N, long d, unit *dst) {
    for (long r = 0; r < N; r += PER)
        for (long c = 0; c < d; c += LANES) {
            __m512 rows[PER];
            for (int e = 0; e < PER; e++) rows[e] = r + e < n ? load(x + (r + e) * row + c) : _mm512_setzero_ps();
            put_rows(dst + r / PER * d + c, rows);
        }
}

/* dst [columns, rows] = the transpose of src [rows, columns], in units of 32 bits; both sizes are multiples of 8. */
static void flip(const void *src, long rows, long columns, void *dst) {
    const uint32_t *from = src;
    uint32_t *to = dst;
    for (long r = 0; r < rows; r += 16)
        for (long c = 0; c < columns; c += 16) {
            __m512i x[16];
            for (int i = 0; i < 16; i++)
                x[i] = r + i < rows ? _mm512_maskz_loadu_epi32(lanes(columns - c), from + (r + i) * columns + c)
                                    : _mm512_setzero_si512();
            flip_square(x);
            for (int i = 0; i < 16 && c + i < columns; i++)
                _mm512_mask_storeu_epi32(to + (c + i) * rows + r, lanes(rows - r), x[i]);
        }
}

/* Store the rows scale[i] * c[i][:] in a result. */
static void store_rows(const float *c, long rows, long d, const float *scale, long scale_step, value *dst, long row) {
    for (long i = 0; i < rows; i++) {
        const __m512 factor = _mm512_set1_ps(scale[i * scale_step]);
        for (long j = 0; j < d; j += LANES) store(dst + i * row + j, _mm512_mul_ps(factor, _mm512_loadu_ps(c + i * d + j)));
    }
}

/* ---- products: c [rows, columns] = a [rows, units] b [units, columns], all contiguous ---- */

#ifdef TILES
/* `rows`, `columns` and 2 * `units` must be multiples of 32. */
static void product(const unit *a, const unit *b, float *c, long rows, long columns, long units) {
    for (long i = 0; i < rows; i += 32)
        for (long j = 0; j < columns; j += 32) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (long p = 0; p < units; p += 16) {
                _tile_loadd(4, a + i * units + p, 4 * units);
                _tile_loadd(5, a + (i + 16) * units + p, 4 * units);
                _tile_loadd(6, b + p * columns + j, 4 * columns);
                _tile_loadd(7, b + p * columns + j + 16, 4 * columns);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, c + i * columns + j, 4 * columns);
            _tile_stored(1, c + i * columns + j + 16, 4 * columns);
            _tile_stored(2, c + (i + 16) * columns + j, 4 * columns);
            _tile_stored(3, c + (i + 16) * columns + j + 16, 4 * columns);
        }
}
#else
/* Compute 8 rows of `vectors` vectors. */
static inline __attribute__((always_inline)) void tile(const unit *a, const unit *b, float *c, long columns, long units,
                                                       const int vectors) {
    __m512 sum[8][3];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_setzero_ps();
    for (long p = 0; p < units; p++)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++)
                sum[i][v] = multiply_add(a[i * units + p], b + p * columns + v * LANES, sum[i][v]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(c + i * columns + v * LANES, sum[i][v]);
}

/* `rows` must be a multiple of 8, and `columns` a multiple of LANES. */
static void product(const unit *a, const unit *b, float *c, long rows, long columns, long units) {
    for (long i = 0; i < rows; i += 8)
        for (long j = 0; j < columns;) {
            const long left = (columns - j) / LANES;
            const int vectors = left == 4 || left == 2 ? 2 : left == 1 ? 1 : 3;
            if (vectors == 3) tile(a + i * units, b + j, c + i * columns + j, columns, units, 3);
            if (vectors == 2) tile(a + i * units, b + j, c + i * columns + j, columns, units, 2);
            if (vectors == 1) tile(a + i * units, b + j, c + i * columns + j, columns, units, 1);
            j += vectors * LANES;
        }
}
#endif

/* ---- one head of one sample ---- */

typedef struct {
    char *memory;
    size_t size, used;
} Scratch;

static void *take(Scratch *s, size_t values) { /* values of 4 bytes */
    void *block = s->memory + s->used;
    s->used += round_up(4 * values, 64);
    return block;
}

/* Reserve memory for `blocks` blocks with `values` values of 4 bytes in total. */
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
    long q_row, k_row, v_row; /* strides between rows, in values */
    long m, n, d;
} Head;

typedef struct {
    value *q, *k, *v;
    long q_row, k_row, v_row;
} Gradients;

static int forward_head(Head h, value *out, long out_row, float *lse, Scratch *scratch) {
    const long m = h.m, n = h.n, d = h.d, M = round_up(m, ALIGN), N = round_up(n, ALIGN);
    if (!reserve(scratch, (M * d + BLOCK * N + 3 * N * d) / PER + BLOCK * N + BLOCK * d, 7)) return 0;
    unit *q = take(scratch, M * d / PER), *p = take(scratch, BLOCK * N / PER);
    unit *k = take(scratch, N * d / PER), *k_flipped = take(scratch, N * d / PER), *v = take(scratch, N * d / PER);
    float *s = take(scratch, BLOCK * N), *o = take(scratch, BLOCK * d);
    const float scale = 1.44269504f / sqrtf((float)d);
    copy_rows(h.q, h.q_row, m, M, d, q);
    copy_rows(h.k, h.k_row, n, N, d, k);
    flip(k, N, d / PER, k_flipped);
    join_rows(h.v, h.v_row, n, N, d, v);
    for (long i = 0; i < m; i += BLOCK) {
        float shift[BLOCK], total[BLOCK], inverse[BLOCK];
        const long rows = m - i < BLOCK ? m - i : BLOCK;
        product(q + i * d / PER, k_flipped, s, BLOCK, N, d / PER);
        for (long r = 0; r < rows; r++) { /* all maxima are computed first, so that no row's sum has to wait for them */
            const float *row = s + r * N;
            __m512 top = _mm512_set1_ps(-INFINITY);
            for (long j = 0; j < n; j += LANES) top = _mm512_mask_max_ps(top, lanes(n - j), top, _mm512_loadu_ps(row + j));
            shift[r] = scale * _mm512_reduce_max_ps(top);
        }
        for (long r = 0; r < rows; r++) {
            const float *row = s + r * N;
            const __m512 less = _mm512_set1_ps(shift[r]);
            __m512 sum = _mm512_setzero_ps();
            for (long j = 0; j < N; j += LANES) {
                const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(row + j), _mm512_set1_ps(scale), less);
                const __m512 y = _mm512_maskz_mov_ps(lanes(n > j ? n - j : 0), power_of_2(x));
                sum = _mm512_add_ps(sum, y);
                put(p + (r * N + j) / PER, y);
            }
            total[r] = _mm512_reduce_add_ps(sum);
        }
        for (long r = 0; r < rows; r++) {
            inverse[r] = n ? 1 / total[r] : 0; /* without keys, the result is 0 */
            lse[i + r] = n ? shift[r] + log2f(total[r]) : INFINITY;
        }
        product(p, v, o, BLOCK, d, N / PER);
        store_rows(o, rows, d, inverse, 1, out + i * out_row, out_row);
    }
    return 1;
}

/* Process blocks of keys. Columns are queries, so that the values per query form vectors. */
static int backward_head(Head h, const value *out, long out_row, const value *g, long g_row, const float *lse, Gradients to,
                         Scratch *scratch) {
    const long m = h.m, n = h.n, d = h.d, M = round_up(m, ALIGN), N = round_up(n, ALIGN);
    const size_t units = (6 * M * d + 4 * N * d + 2 * BLOCK * M + M * N) / PER;
    if (!reserve(scratch, units + 2 * BLOCK * M + BLOCK * d + 2 * M * d + 2 * M, 20)) return 0;
    unit *q = take(scratch, M * d / PER), *q_flipped = take(scratch, M * d / PER), *q_joined = take(scratch, M * d / PER);
    unit *grad = take(scratch, M * d / PER), *grad_flipped = take(scratch, M * d / PER);
    unit *grad_joined = take(scratch, M * d / PER);
    unit *k = take(scratch, N * d / PER), *v = take(scratch, N * d / PER);
    unit *k_joined = take(scratch, N * d / PER), *k_across = take(scratch, N * d / PER);
    unit *p = take(scratch, BLOCK * M / PER), *ds = take(scratch, BLOCK * M / PER), *ds_joined = take(scratch, M * N / PER);
    float *s = take(scratch, BLOCK * M), *dp = take(scratch, BLOCK * M), *c = take(scratch, BLOCK * d);
    float *dq_across = take(scratch, M * d), *dq = take(scratch, M * d), *sums = take(scratch, M), *mean = take(scratch, M);
    const float one = 1, root = 1 / sqrtf((float)d);
    const __m512 scale = _mm512_set1_ps(1.44269504f * root);
    copy_rows(h.q, h.q_row, m, M, d, q);
    copy_rows(g, g_row, m, M, d, grad);
    copy_rows(h.k, h.k_row, n, N, d, k);
    copy_rows(h.v, h.v_row, n, N, d, v);
    flip(q, M, d / PER, q_flipped);
    flip(grad, M, d / PER, grad_flipped);
    join_rows(h.q, h.q_row, m, M, d, q_joined);
    join_rows(g, g_row, m, M, d, grad_joined);
    join_rows(h.k, h.k_row, n, N, d, k_joined);
    flip(k_joined, N / PER, d, k_across);
    for (long i = 0; i < M; i++) { /* the mean of dp weighted by p is the dot product of out and grad; padding has p = 0 */
        __m512 sum = _mm512_setzero_ps();
        for (long j = 0; i < m && j < d; j += LANES)
            sum = _mm512_fmadd_ps(load(out + i * out_row + j), load(g + i * g_row + j), sum);
        mean[i] = _mm512_reduce_add_ps(sum);
        sums[i] = i < m ? lse[i] : 1e30f;
    }
    for (long j = 0; j < N; j += BLOCK) {
        product(k + j * d / PER, q_flipped, s, BLOCK, M, d / PER);
        product(v + j * d / PER, grad_flipped, dp, BLOCK, M, d / PER);
        for (long r = 0; r < BLOCK; r += PER)
            for (long i = 0; i < M; i += LANES) {
                __m512 ds_rows[PER];
                for (int e = 0; e < PER; e++) {
                    const long at = (r + e) * M + i;
                    const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(s + at), scale, _mm512_loadu_ps(sums + i));
                    const __m512 y = _mm512_maskz_mov_ps(j + r + e < n ? 0xFFFF : 0, power_of_2(x));
                    ds_rows[e] = _mm512_mul_ps(y, _mm512_sub_ps(_mm512_loadu_ps(dp + at), _mm512_loadu_ps(mean + i)));
                    put(p + at / PER, y);
                    put(ds + at / PER, ds_rows[e]);
                }
                put_rows(ds_joined + (j + r) / PER * M + i, ds_rows);
            }
        const long rows = n - j < BLOCK ? n - j : BLOCK;
        if (rows > 0) {
            product(p, grad_joined, c, BLOCK, d, M / PER);
            store_rows(c, rows, d, &one, 0, to.v + j * to.v_row, to.v_row);
            product(ds, q_joined, c, BLOCK, d, M / PER);
            store_rows(c, rows, d, &root, 0, to.k + j * to.k_row, to.k_row);
        }
    }
    product(k_across, ds_joined, dq_across, d, M, N / PER);
    flip(dq_across, d, M, dq);
    store_rows(dq, m, d, &root, 0, to.q, to.q_row);
    return 1;
}

/* ---- all heads of all samples ---- */

/* The arguments of a call; the class `_Work` in native.py has the same fields. A row of q, k, v, out, grad or a gradient
   contains all heads, one after another; the fields `..._row` are the strides between rows, in values. */
typedef struct {
    const value *q, *k, *v;
    long q_row, k_row, v_row;
    const int32_t *cu_q, *cu_k; /* first row of each sample */
    long samples, heads, d, queries;
    value *out;
    long out_row;
    float *lse; /* [heads, queries], base-2 logarithms of sums of exponentials */
    const value *grad;
    long grad_row;
    Gradients to;
    long next; /* number of the next task that no thread has taken */
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
    return backward_head(head_at(w, sample, head), w->out + at_q * w->out_row + column, w->out_row,
                         w->grad + at_q * w->grad_row + column, w->grad_row, w->lse + head * w->queries + at_q, to, scratch);
}

static int run(Work *w, int (*task)(const Work *, long, long, Scratch *)) {
    Scratch scratch = {NULL, 0, 0};
    int ok = 1;
    const Tiles before = take_tiles();
    for (long t; ok && (t = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->samples * w->heads;)
        ok = task(w, t / w->heads, t % w->heads, &scratch);
    give_tiles_back(before);
    free(scratch.memory);
    return ok;
}

/* Must be called by every thread with the same arguments. Returns 0 if an allocation fails. */
int forward(Work *w) { return run(w, forward_task); }

int backward(Work *w) { return run(w, backward_task); }
