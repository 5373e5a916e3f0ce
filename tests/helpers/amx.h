/* AMX instructions, emulated by AVX-512 instructions, so that kernels written for AMX run on CPUs without it. Tiles have 16 rows of 64 bytes. */

#include <immintrin.h>
#include <string.h>

static _Thread_local __attribute__((aligned(64))) char tiles[8][16][64];

static inline void load_tile(int tile, const char *from, long stride) {
    for (int r = 0; r < 16; r++) memcpy(tiles[tile][r], from + r * stride, 64);
}

static inline void store_tile(int tile, char *to, long stride) {
    for (int r = 0; r < 16; r++) memcpy(to + r * stride, tiles[tile][r], 64);
}

static inline void multiply_tiles(int sums, int left, int right) {
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < 16; k++) {
            int pair;
            memcpy(&pair, tiles[left][r] + 4 * k, 4);
            const __m512bh all = (__m512bh)_mm512_set1_epi32(pair), row = (__m512bh)_mm512_load_si512(tiles[right][k]);
            _mm512_store_ps(tiles[sums][r], _mm512_dpbf16_ps(_mm512_load_ps(tiles[sums][r]), all, row));
        }
}

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#define _tile_loadd(tile, from, stride) load_tile(tile, (const char *)(from), stride)
#define _tile_stream_loadd(tile, from, stride) load_tile(tile, (const char *)(from), stride)
#define _tile_stored(tile, to, stride) store_tile(tile, (char *)(to), stride)
#define _tile_zero(tile) memset(tiles[tile], 0, sizeof tiles[tile])
#define _tile_dpbf16ps(sums, left, right) multiply_tiles(sums, left, right)
#define _tile_loadconfig(config) ((void)(config))
#define _tile_storeconfig(config) memset(config, 0, 64)
#define _tile_release() ((void)0)
