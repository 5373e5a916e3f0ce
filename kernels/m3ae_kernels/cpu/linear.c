/* Linear layers in bf16 on CPUs with AMX, or with AVX512_BF16's dot products: x w^T + bias, optionally followed by GELU, and
   the gradient of their input, grad w, optionally times the derivative of a GELU.

   Products are [R, K] by [K, N]. The weight is packed first: pairs along K are adjacent, and N is split into panels of 32
   columns. A panel consists of blocks of 32 x 32 values, and each block consists of two tiles. The panels are divided into parts.
   Each part is multiplied by all rows before the next part is used; a strip of rows stays in a core's first-level cache.
   Results are written with non-temporal stores, because they do not fit into the caches. Every result is a single sum over K
   in float, regardless of the number of threads. */

#include <omp.h>

#include "gelu.h"

#ifdef TILES
#define STRIP 32       /* rows that are multiplied at a time */
#define PART (1 << 19) /* values of the weight per part; a part stays in the second-level cache */
#else
#define STRIP 14
#define PART (1 << 20) /* a part stays in the third-level cache */
#endif
#define ROWS (8 * STRIP) /* rows that a thread takes at a time */

/* Load 32 values of a weight as bf16. */
static inline __m512i values(const void *w, long at, int wide) {
    if (!wide) return _mm512_loadu_si512((const bf16 *)w + at);
    const float *x = (const float *)w + at;
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
}

/* Pack two tiles for k..k+31 of K and columns n..n+31 of the product, from a weight [N, K]. */
static void pack_transposed(const void *w, long K, long k, long n, int wide, bf16 *tiles) {
    for (int half = 0; half < 2; half++, n += 16, tiles += TILE) {
        __m512i x[16];
        for (int r = 0; r < 16; r++) x[r] = values(w, (n + r) * K + k, wide);
        flip_square(x);
        for (int r = 0; r < 16; r++) _mm512_store_si512((void *)(tiles + 32 * r), x[r]);
    }
}

/* Pack the same tiles from a weight [K, N]. */
static void pack(const void *w, long N, long k, long n, int wide, bf16 *tiles) {
    uint16_t left[32], right[32]; /* indices from 32 on select from the second row */
    for (int c = 0; c < 16; c++) {
        left[2 * c] = c, left[2 * c + 1] = 32 + c;
        right[2 * c] = 16 + c, right[2 * c + 1] = 48 + c;
    }
    for (int r = 0; r < 16; r++) {
        const __m512i a = values(w, (k + 2 * r) * N + n, wide), b = values(w, (k + 2 * r + 1) * N + n, wide);
        _mm512_store_si512((void *)(tiles + 32 * r), _mm512_permutex2var_epi16(a, _mm512_loadu_si512(left), b));
        _mm512_store_si512((void *)(tiles + TILE + 32 * r), _mm512_permutex2var_epi16(a, _mm512_loadu_si512(right), b));
    }
}

/* STRIP x 32 sums, and the addresses to which the results are written. */
typedef struct {
    float *sums;
    const float *bias;
    const bf16 *h;
    bf16 *out, *y;
    long rows;
} Result;

static inline __m512 rounded(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(x)), 16));
}

static inline void stream(bf16 *dst, __m512 left, __m512 right) {
    _mm512_stream_si512((void *)dst, (__m512i)_mm512_cvtne2ps_pbh(right, left));
}

/* PLAIN: out is the product plus the bias. BEFORE_GELU: the same, and y is GELU(out). THROUGH_GELU: out is the product
   times the derivative of GELU at h, and y is GELU of h. */
enum { PLAIN, BEFORE_GELU, THROUGH_GELU };

static inline void put_row(const Result *result, long r, long N, int kind) {
    __m512 left = _mm512_load_ps(result->sums + 32 * r), right = _mm512_load_ps(result->sums + 32 * r + 16);
    bf16 *out = result->out + r * N, *y = result->y + r * N;
    if (kind == THROUGH_GELU) {
        __m512 values[2];
        const bf16 *h = result->h + r * N;
        const __m512 derivative = gelu_and_derivative(load(h), values), next = gelu_and_derivative(load(h + 16), values + 1);
        stream(out, _mm512_mul_ps(left, derivative), _mm512_mul_ps(right, next));
        stream(y, values[0], values[1]);
        return;
    }
    if (result->bias) {
        left = _mm512_add_ps(left, _mm512_loadu_ps(result->bias));
        right = _mm512_add_ps(right, _mm512_loadu_ps(result->bias + 16));
    }
    stream(out, left, right);
    if (kind == BEFORE_GELU) stream(y, gelu(rounded(left)), gelu(rounded(right)));
}

/* The rows of x that are multiplied at a time. */
typedef struct {
    const bf16 *x;
    long row; /* stride between rows, in values */
    /* the next row of the following strip to prefetch, and the number of rows to prefetch with each panel */
    const bf16 *next;
    long fetched;
} Strip;

#ifdef TILES
/* Return the STRIP rows from row r on. If some of them do not exist, they are copied to `buffer`, with zeros for the missing
   rows. */
static inline Strip take_strip(const bf16 *x, bf16 *buffer, long r, long R, long K, long row, long panels) {
    if (r + STRIP <= R) return (Strip){x + r * row, row, x + (r + STRIP) * row, (STRIP - 1 + panels) / panels};
    memset(buffer, 0, STRIP * K * sizeof(bf16));
    for (long i = 0; r + i < R; i++) memcpy(buffer + i * K, x + (r + i) * row, K * sizeof(bf16));
    return (Strip){buffer, K, buffer, 0};
}

/* Compute the product of a strip and a panel, and store it as the sums of `now`. Meanwhile, write the previous result to
   memory, and prefetch rows of the next strip and the values `h` of this result, so that loads and stores overlap with the AMX
   instructions. The tiles of the weight bypass the first-level cache (tileloaddt1). */
static inline void multiply(Strip *strip, const bf16 *panel, long steps, const Result *now, Result *before, long N,
                            int kind) {
    const long each = (STRIP - 1 + steps) / steps, row = strip->row;
    const bf16 *x = strip->x, *next = strip->next;
    strip->next += strip->fetched * row;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long t = 0; t < steps; t++, x += 32, panel += 2 * TILE, next += 32) {
        for (long i = 0; i < strip->fetched; i++) _mm_prefetch((const char *)(next + i * row), _MM_HINT_T1);
        _tile_loadd(4, x, 2 * row);
        _tile_loadd(5, x + 16 * row, 2 * row);
        _tile_stream_loadd(6, panel, 64);
        _tile_stream_loadd(7, panel + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        for (long r = t * each; r < (t + 1) * each; r++) {
            if (r < before->rows) put_row(before, r, N, kind);
            if (kind == THROUGH_GELU && r < now->rows) _mm_prefetch((const char *)(now->h + r * N), _MM_HINT_T0);
        }
    }
    float *sums = now->sums;
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 512, 128);
    _tile_stored(3, sums + 528, 128);
    *before = *now;
}
#else
/* Copy the STRIP rows from row r on to `buffer`, with zeros for missing rows, in blocks of 32 values per row. Without this
   copy, rows at a distance of a power of two would evict each other from the cache. */
static inline Strip take_strip(const bf16 *x, bf16 *buffer, long r, long R, long K, long row, long panels) {
    for (long i = 0; i < STRIP; i++)
        for (long k = 0; k < K; k += 32) {
            const __m512i some = r + i < R ? _mm512_loadu_si512(x + (r + i) * row + k) : _mm512_setzero_si512();
            _mm512_store_si512((void *)(buffer + k * STRIP + i * 32), some);
        }
    return (Strip){.x = buffer};
}

/* Compute the product of a strip and a panel, and write it to memory: each bf16 pair of a row is broadcast and multiplied by 32
   columns. */
static inline void multiply(Strip *strip, const bf16 *panel, long steps, const Result *now, Result *before, long N,
                            int kind) {
    const bf16 *x = strip->x;
    __m512 left[STRIP], right[STRIP];
#pragma GCC unroll 16
    for (int r = 0; r < STRIP; r++) left[r] = right[r] = _mm512_setzero_ps();
    if (kind == THROUGH_GELU)
        for (long r = 0; r < now->rows; r++) _mm_prefetch((const char *)(now->h + r * N), _MM_HINT_T0);
    for (long t = 0; t < steps; t++, x += 32 * STRIP, panel += 2 * TILE)
        for (int k = 0; k < 32; k += 2) {
            const bf16 *at = panel + 16 * k;
            const __m512bh a = (__m512bh)_mm512_load_si512(at), b = (__m512bh)_mm512_load_si512(at + TILE);
            _mm_prefetch((const char *)(at + 2 * TILE), _MM_HINT_T0);
            _mm_prefetch((const char *)(at + 3 * TILE), _MM_HINT_T0);
#pragma GCC unroll 16
            for (int r = 0; r < STRIP; r++) {
                const __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const int *)(x + 32 * r + k));
                left[r] = _mm512_dpbf16_ps(left[r], pair, a);
                right[r] = _mm512_dpbf16_ps(right[r], pair, b);
            }
        }
#pragma GCC unroll 16
    for (int r = 0; r < STRIP; r++) {
        _mm512_store_ps(now->sums + 32 * r, left[r]);
        _mm512_store_ps(now->sums + 32 * r + 16, right[r]);
    }
    for (long r = 0; r < now->rows; r++) put_row(now, r, N, kind);
}
#endif

/* The computation of `linear`: out [R, N] is the product of x [R, K] and a packed weight, plus bias [N], which may be NULL.
   `row` is the stride between rows of x, in values. */
typedef struct {
    const bf16 *x;
    const float *bias;
    const bf16 *h, *packed;
    bf16 *out, *y;
    long R, K, N, row;
} Product;

/* Compute a thread's part of the product. `buffer`: memory for a strip of rows. */
static inline void work(const Product *all, bf16 *buffer, int kind) {
    const long R = all->R, K = all->K, N = all->N;
    const long steps = K / 32, panels = N / 32, part = smaller(panels, PART / (32 * K) ? PART / (32 * K) : 1);
    const long parts = (panels + part - 1) / part, blocks = (R + ROWS - 1) / ROWS;
    float sums[2][STRIP * 32] __attribute__((aligned(64)));
    Result before = {.rows = 0}; /* the previous result, which is not in memory yet */
    int turn = 0;
#pragma omp for collapse(2) schedule(dynamic)
    for (long first = 0; first < parts; first++)
        for (long block = 0; block < blocks; block++)
            for (long r = block * ROWS; r < smaller(R, (block + 1) * ROWS); r += STRIP) {
                Strip strip = take_strip(all->x, buffer, r, R, K, all->row, part);
                for (long p = first * part; p < smaller(panels, (first + 1) * part); p++, turn = !turn) {
                    const long at = r * N + p * 32;
                    const float *bias = all->bias ? all->bias + p * 32 : NULL;
                    const Result now = {sums[turn], bias, all->h + at, all->out + at, all->y + at, smaller(STRIP, R - r)};
                    multiply(&strip, all->packed + p * steps * 2 * TILE, steps, &now, &before, N, kind);
                }
            }
    for (long r = 0; r < before.rows; r++) put_row(&before, r, N, kind);
}

/* x is [R, K]; `row` is its stride between rows, in values. The weight is float if `wide` is set, otherwise bf16; it is [N, K]
   if `transposed` is set, otherwise [K, N]. bias [N] may be NULL. If h [R, N] is given, the kind is THROUGH_GELU; if only y is
   given, it is BEFORE_GELU. `packed` has space for the weight. K and N are multiples of 32; out, y and packed are aligned to 64
   bytes. Returns 0 if an allocation fails. */
int linear(const bf16 *x, const void *weight, const float *bias, const bf16 *h, bf16 *packed, bf16 *out, bf16 *y, long R,
           long K, long N, long row, int transposed, int wide, int threads) {
    const long steps = K / 32, panels = N / 32;
    const Product all = {x, bias, h, packed, out, y, R, K, N, row};
    bf16 *buffers = aligned_alloc(64, threads * STRIP * K * sizeof(bf16)); /* one strip per thread */
    if (!buffers) return 0;
#pragma omp parallel num_threads(threads)
    {
        bf16 *buffer = buffers + omp_get_thread_num() * STRIP * K;
        const Tiles before = take_tiles();
#pragma omp for collapse(2)
        for (long p = 0; p < panels; p++)
            for (long t = 0; t < steps; t++) {
                bf16 *tiles = packed + (p * steps + t) * 2 * TILE;
                if (transposed) pack_transposed(weight, K, t * 32, p * 32, wide, tiles);
                else pack(weight, N, t * 32, p * 32, wide, tiles);
            }
        if (h) work(&all, buffer, THROUGH_GELU);
        else if (y) work(&all, buffer, BEFORE_GELU);
        else work(&all, buffer, PLAIN);
        _mm_sfence();
        give_tiles_back(before);
    }
    free(buffers);
    return 1;
}
