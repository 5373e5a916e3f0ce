/* Gradients of a linear layer's weight and bias, computed from bf16 values on CPUs with AMX or with AVX512_BF16's dot products:
   left^T right, and the sums of left and of right over their rows.

   The wider of the two operands is `wide`, the other one is `narrow`; the result is [W, N], or [N, W] if `transposed` is set.
   Products sum over rows, so both operands are packed as pairs of adjacent rows; AMX requires the transpose of this layout for
   `wide`. A thread takes a panel of columns of `wide`, and sums its products with all of `narrow` in its cache, DEPTH rows at a
   time. The results therefore do not depend on the number of threads.

   Pairs are created by unpacklo and unpackhi, which select alternating groups of 4 columns: each tile contains 16 of 32
   columns. The first tile contains the groups with even numbers, and the second tile contains the groups with odd numbers.
   Sums over rows are stored with the even columns first, followed by the odd ones. */

#include "vectors.h"

#define DEPTH 256 /* rows of a block */
#define STEPS (DEPTH / 32)
#ifdef TILES
#define STRIP 32 /* columns of wide that are multiplied at a time */
#else
#define STRIP 14
#endif
#define STRIP_VALUES (DEPTH * STRIP + 32) /* a block of a strip, plus space for the excess of the last store */

static inline __m512i row_of_32(const bf16 *x, long row, long at, long rows) {
    return at < rows ? _mm512_loadu_si512(x + at * row) : _mm512_setzero_si512();
}

static inline void add(__m512i x, __m512 *even, __m512 *odd) {
    *even = _mm512_add_ps(*even, _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)));
    *odd = _mm512_add_ps(*odd, _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xFFFF0000))));
}

/* Pack 32 rows and 32 columns into two tiles of pairs of rows, or into the transpose of these tiles. */
static inline void pack(const bf16 *x, long row, long at, long rows, int transpose, bf16 *tiles, float *sums) {
    __m512i low[16], high[16];
    __m512 even = _mm512_loadu_ps(sums), odd = _mm512_loadu_ps(sums + 16);
    for (int i = 0; i < 16; i++) {
        const __m512i a = row_of_32(x, row, at + 2 * i, rows), b = row_of_32(x, row, at + 2 * i + 1, rows);
        add(a, &even, &odd);
        add(b, &even, &odd);
        low[i] = _mm512_unpacklo_epi16(a, b);
        high[i] = _mm512_unpackhi_epi16(a, b);
    }
    if (transpose) flip_square(low), flip_square(high);
    for (int i = 0; i < 16; i++) {
        _mm512_store_si512((void *)(tiles + 32 * i), low[i]);
        _mm512_store_si512((void *)(tiles + TILE + 32 * i), high[i]);
    }
    _mm512_storeu_ps(sums, even);
    _mm512_storeu_ps(sums + 16, odd);
}

/* Add the sums of `columns` columns to dst, in the order of the columns. */
static void add_sums(const float *sums, long columns, float *dst) {
    for (long c = 0; c < columns; c++) dst[c] += sums[c / 32 * 32 + c % 32 / 2 + c % 2 * 16];
}

/* Store 32 values in column order, given the values of the even column groups and those of the odd column groups. */
static inline void put_in_order(__m512i even, __m512i odd, float *dst) {
    const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    _mm512_storeu_si512(dst, _mm512_permutex2var_epi64(even, first, odd));
    _mm512_storeu_si512(dst + 16, _mm512_permutex2var_epi64(even, second, odd));
}

#ifdef TILES
/* Pack 32 rows of a panel of wide, which has `width` columns, as step t of a block. */
static inline void pack_wide(const bf16 *x, long row, long at, long rows, long width, long t, bf16 *a, float *sums) {
    for (long i = 0; i < width; i += STRIP)
        pack(x + i, row, at, rows, 1, a + i / STRIP * STRIP_VALUES + t * 2 * TILE, sums + i);
}

static void add_wide_sums(const float *sums, long width, float *dst) { add_sums(sums, width, dst); }

/* Add the products of `steps` pairs of tiles of a and b to c, which contains 32 x 32 floats in four tiles. If `first` is set, c
   is overwritten. */
static inline void multiply(const bf16 *a, const bf16 *b, long b_step, long steps, int first, float *c) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, c, 64);
        _tile_loadd(1, c + 256, 64);
        _tile_loadd(2, c + 512, 64);
        _tile_loadd(3, c + 768, 64);
    }
    for (long t = 0; t < steps; t++, a += 2 * TILE, b += b_step) {
        _tile_loadd(4, a, 64);
        _tile_loadd(5, a + TILE, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
}

/* Store 32 x 32 floats from four tiles in the rows of dst, which are `row` apart, or in its columns if `transposed` is set.
   */
static inline void put(const float *c, long width, int transposed, float *dst, long row) {
    for (int half = 0; half < 2; half++) {
        const float *left = c + half * (transposed ? 256 : 512), *right = left + (transposed ? 512 : 256);
        __m512i x[16], y[16];
        for (int r = 0; r < 16; r++) x[r] = _mm512_load_si512(left + 16 * r), y[r] = _mm512_load_si512(right + 16 * r);
        if (transposed) flip_square(x), flip_square(y);
        for (int r = 0; r < 16; r++) {
            float *to = dst + (r / 4 * 8 + r % 4 + 4 * half) * row;
            put_in_order(x[r], y[r], to);
        }
    }
}
#else
/* Pack 32 rows of a panel of wide, which has `width` columns, as step t of a block: the pairs of STRIP columns, row by row.
   */
static inline void pack_wide(const bf16 *x, long row, long at, long rows, long width, long t, bf16 *a, float *sums) {
    const __m512bh one = (__m512bh)_mm512_set1_epi16(0x3F80);
    for (long k = 0; k < 32; k += 2) {
        const bf16 *first = x + (at + k) * row;
        for (long i = 0, strip = 0; i < width; i += STRIP, strip++) {
            /* whole vectors are stored, because masked stores are slow; the next row overwrites the excess */
            const __mmask16 some = lanes(width - i);
            const __m256i none = _mm256_setzero_si256();
            const __m512i low = _mm512_cvtepu16_epi32(at + k < rows ? _mm256_maskz_loadu_epi16(some, first + i) : none);
            const __m512i high = _mm512_cvtepu16_epi32(at + k + 1 < rows ? _mm256_maskz_loadu_epi16(some, first + row + i) : none);
            const __m512i pairs = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
            _mm512_storeu_si512(a + strip * STRIP_VALUES + (t * 32 + k) * STRIP, pairs);
            float *sum = sums + strip * LANES;
            _mm512_store_ps(sum, _mm512_dpbf16_ps(_mm512_load_ps(sum), (__m512bh)pairs, one));
        }
    }
}

static void add_wide_sums(const float *sums, long width, float *dst) {
    for (long i = 0; i < width; i++) dst[i] += sums[i / STRIP * LANES + i % STRIP];
}

/* Add the products of a strip and 32 columns over `steps` times 32 rows to c, which contains STRIP x 32 floats. If `first` is
   set, c is overwritten. */
static inline void multiply(const bf16 *a, const bf16 *b, long b_step, long steps, int first, float *c) {
    __m512 even[STRIP], odd[STRIP];
#pragma GCC unroll 16
    for (int i = 0; i < STRIP; i++) {
        even[i] = first ? _mm512_setzero_ps() : _mm512_load_ps(c + 32 * i);
        odd[i] = first ? _mm512_setzero_ps() : _mm512_load_ps(c + 32 * i + 16);
    }
    for (long t = 0; t < steps; t++, b += b_step)
        for (int k = 0; k < 32; k += 2, a += 2 * STRIP) {
            const bf16 *at = b + 16 * k;
            const __m512bh x = (__m512bh)_mm512_load_si512(at), y = (__m512bh)_mm512_load_si512(at + TILE);
            _mm_prefetch((const char *)(at + b_step), _MM_HINT_T0);
            _mm_prefetch((const char *)(at + b_step + TILE), _MM_HINT_T0);
#pragma GCC unroll 16
            for (int i = 0; i < STRIP; i++) {
                const __m512bh pair = (__m512bh)_mm512_set1_epi32(((const int *)a)[i]);
                even[i] = _mm512_dpbf16_ps(even[i], pair, x);
                odd[i] = _mm512_dpbf16_ps(odd[i], pair, y);
            }
        }
#pragma GCC unroll 16
    for (int i = 0; i < STRIP; i++) _mm512_store_ps(c + 32 * i, even[i]), _mm512_store_ps(c + 32 * i + 16, odd[i]);
}

/* Store STRIP x 32 floats, of which the first `width` rows are used, in the rows of dst, which are `row` apart, or in its columns if
   `transposed` is set. */
static inline void put(const float *c, long width, int transposed, float *dst, long row) {
    const long count = smaller(STRIP, width);
    if (!transposed) {
        for (long i = 0; i < count; i++, c += 32) put_in_order(_mm512_load_si512(c), _mm512_load_si512(c + 16), dst + i * row);
        return;
    }
    for (int half = 0; half < 2; half++) {
        __m512i x[16];
        for (int i = 0; i < 16; i++) x[i] = i < STRIP ? _mm512_load_si512(c + 32 * i + 16 * half) : _mm512_setzero_si512();
        flip_square(x);
        for (int r = 0; r < 16; r++) _mm512_mask_storeu_epi32(dst + (r / 4 * 8 + r % 4 + 4 * half) * row, lanes(count), x[r]);
    }
}
#endif

/* `wide` is [rows, W] and `narrow` is [rows, N]; `wide_row` and `narrow_row` are their strides between rows, in values. W and N
   are multiples of 32. `packed` has space for N values per row, for `rows` rounded up to a multiple of 32. `wide_sums` and
   `narrow_sums` must be zero. A thread takes about `panel` columns. Returns 0 if an allocation fails. */
int weight_gradient(const bf16 *wide, const bf16 *narrow, long rows, long W, long N, long wide_row, long narrow_row,
                    int transposed, bf16 *packed, float *out, float *wide_sums, float *narrow_sums, long panel, int threads) {
    const long deep = round_up(rows, 32) / 32, blocks = round_up(deep, STEPS) / STEPS, b_step = N / 16 * TILE;
    const long strips = (panel + STRIP - 1) / STRIP, lanes_of_sums = strips * round_up(STRIP, LANES);
    panel = strips * STRIP;
    float *sums = calloc(blocks * N, sizeof(float));
    int ok = sums != NULL;
#pragma omp parallel num_threads(threads) if (ok)
    {
        bf16 *a = aligned_alloc(64, strips * STRIP_VALUES * sizeof(bf16));
        float *c = aligned_alloc(64, panel * N * sizeof(float));
        float *column_sums = aligned_alloc(64, lanes_of_sums * sizeof(float));
        const int allocated = ok && a && c && column_sums;
        if (!allocated) {
#pragma omp atomic write
            ok = 0;
        }
#pragma omp barrier
        const int go = ok;
        const Tiles before = take_tiles();
#pragma omp for
        for (long block = 0; block < (go ? blocks : 0); block++)
            for (long t = block * STEPS; t < smaller(deep, (block + 1) * STEPS); t++)
                for (long j = 0; j < N; j += 32)
                    pack(narrow + j, narrow_row, t * 32, rows, 0, packed + t * b_step + j / 16 * TILE, sums + block * N + j);
#pragma omp for schedule(dynamic)
        for (long first = 0; first < (go ? W : 0); first += panel) {
            const long width = smaller(panel, W - first);
            memset(column_sums, 0, lanes_of_sums * sizeof(float));
            for (long t0 = 0; t0 < deep; t0 += STEPS) {
                const long steps = smaller(deep - t0, STEPS);
                for (long t = 0; t < steps; t++)
                    pack_wide(wide + first, wide_row, (t0 + t) * 32, rows, width, t, a, column_sums);
                for (long i = 0; i < width; i += STRIP)
                    for (long j = 0; j < N; j += 32)
                        multiply(a + i / STRIP * STRIP_VALUES, packed + t0 * b_step + j / 16 * TILE, b_step, steps, !t0,
                                 c + i * N + j * STRIP);
            }
            for (long i = 0; i < width; i += STRIP)
                for (long j = 0; j < N; j += 32)
                    put(c + i * N + j * STRIP, width - i, transposed,
                        transposed ? out + j * W + first + i : out + (first + i) * N + j, transposed ? W : N);
            add_wide_sums(column_sums, width, wide_sums + first);
        }
        give_tiles_back(before);
        free(a);
        free(c);
        free(column_sums);
    }
    for (long block = 0; ok && block < blocks; block++) add_sums(sums + block * N, N, narrow_sums);
    free(sums);
    return ok;
}
