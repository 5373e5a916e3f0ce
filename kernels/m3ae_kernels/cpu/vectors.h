/* Code shared by the CPU kernels: vectors of 16 floats, and AMX tiles.

   BF16: values are bf16 in memory; otherwise, they are float. TILES: AMX is available. */

#ifndef M3AE_FAST_VECTORS
#define M3AE_FAST_VECTORS

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16 /* number of floats in a vector */

typedef uint16_t bf16;

#ifdef BF16
typedef bf16 value;
#else
typedef float value;
#endif

static inline long smaller(long a, long b) { return a < b ? a : b; }

static inline long round_up(long x, long multiple) { return (x + multiple - 1) / multiple * multiple; }

static inline __mmask16 lanes(long count) { return count >= LANES ? 0xFFFF : (1u << count) - 1; }

#ifdef BF16
static inline __m512 load(const value *x) {
    const __m256i half = _mm256_loadu_si256((const void *)x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline void store(value *dst, __m512 x) { _mm256_storeu_si256((void *)dst, to_bf16(x)); }

static inline __m512 load_some(const value *x, long count) {
    const __m256i half = _mm256_maskz_loadu_epi16(lanes(count), x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline void store_some(value *dst, long count, __m512 x) { _mm256_mask_storeu_epi16(dst, lanes(count), to_bf16(x)); }
#else
static inline __m512 load(const value *x) { return _mm512_loadu_ps(x); }

static inline void store(value *dst, __m512 x) { _mm512_storeu_ps(dst, x); }

static inline __m512 load_some(const value *x, long count) { return _mm512_maskz_loadu_ps(lanes(count), x); }

static inline void store_some(value *dst, long count, __m512 x) { _mm512_mask_storeu_ps(dst, lanes(count), x); }
#endif

/* Return 2 ** x, but at least 2 ** -100. On [-1/2, 1/2], bf16 uses the cubic with the least relative error, 7.5e-5, which is
   4 % of the rounding error of bf16; float uses the Taylor polynomial, with a relative error below 2e-7. */
static inline __m512 power_of_2(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-100), x); /* avoids denormals, which are slow; this order of operands preserves NaN */
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#ifdef BF16
    __m512 y = _mm512_set1_ps(5.517166e-2f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.24261112f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.69326099f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.99992807f));
#else
    __m512 y = _mm512_set1_ps(1.52527338e-5f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.54035304e-4f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.33335581e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(9.61812911e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.55041087e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.40226507e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.93147181e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
#endif
    return _mm512_scalef_ps(y, _mm512_sub_ps(x, r));
}

/* Transpose 16 x 16 numbers of 32 bits: first within pairs, then within pairs of pairs, then in blocks of 128 bits. */
static inline void flip_square(__m512i x[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int e = 0; e < 2; e++) {
            x[i + 2 * e] = _mm512_unpacklo_epi64(y[i + e], y[i + e + 2]);
            x[i + 2 * e + 1] = _mm512_unpackhi_epi64(y[i + e], y[i + e + 2]);
        }
    for (int c = 0; c < 4; c++) {
        const __m512i even = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88), odd = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
        const __m512i even_after = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
        const __m512i odd_after = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
        y[c] = _mm512_shuffle_i32x4(even, even_after, 0x88);
        y[4 + c] = _mm512_shuffle_i32x4(odd, odd_after, 0x88);
        y[8 + c] = _mm512_shuffle_i32x4(even, even_after, 0xdd);
        y[12 + c] = _mm512_shuffle_i32x4(odd, odd_after, 0xdd);
    }
    for (int i = 0; i < 16; i++) x[i] = y[i];
}

#define TILE 512 /* number of values in a tile: 16 rows of 32 */

#ifdef TILES
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Tiles;

/* Configure 8 tiles of 16 rows of 64 bytes, and return the thread's previous configuration of tiles. */
static inline Tiles take_tiles(void) {
    Tiles before, config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_storeconfig(&before);
    _tile_loadconfig(&config);
    return before;
}

static inline void give_tiles_back(Tiles before) {
    if (before.palette) _tile_loadconfig(&before);
    else _tile_release();
}
#else
typedef int Tiles; /* without AMX, there are no tiles to configure */

static inline Tiles take_tiles(void) { return 0; }

static inline void give_tiles_back(Tiles before) {}
#endif

#endif
