/* The tanh approximation of GELU (arXiv 1606.08415, section 2) and its derivative, for CPUs with AVX-512.

   0.5 x (1 + tanh(u / 2)) = x / (1 + e ** -u) with u = sqrt(8 / pi) (x + 0.044715 x ** 3). */

#ifndef M3AE_FAST_GELU
#define M3AE_FAST_GELU

#include "vectors.h"

#define LINEAR 1.5957691216f /* sqrt(8 / pi) */
#define CUBE 0.044715f
#define LOG2_E 1.4426950409f

/* Return 1 / (1 + e ** -u), and set *rest = e ** -u; both are accurate for very small and very large u.
   |x| must be at most 64. */
static inline __m512 gate(__m512 x, __m512 square, __m512 *rest) {
    const __m512 derivative = _mm512_fmadd_ps(square, _mm512_set1_ps(-LOG2_E * LINEAR * CUBE), _mm512_set1_ps(-LOG2_E * LINEAR));
    *rest = power_of_2(_mm512_mul_ps(x, derivative));
    const __m512 sum = _mm512_add_ps(_mm512_set1_ps(1), *rest);
    __m512 inverse = _mm512_rcp14_ps(sum); /* accurate to 14 bits; bf16 has 8 */
#ifndef BF16
    const __m512 error = _mm512_fnmadd_ps(sum, inverse, _mm512_set1_ps(1));
    const __m512 better = _mm512_fmadd_ps(error, inverse, inverse);
    inverse = _mm512_mask_mov_ps(better, _mm512_cmp_ps_mask(inverse, _mm512_setzero_ps(), _CMP_EQ_OQ), inverse);
#endif
    return inverse;
}

static inline __m512 within(__m512 x) { /* this order of operands preserves NaN */
    return _mm512_min_ps(_mm512_set1_ps(64), _mm512_max_ps(_mm512_set1_ps(-64), x));
}

static inline __m512 gelu(__m512 x) {
    __m512 rest;
    const __m512 near = within(x);
    return _mm512_mul_ps(x, gate(near, _mm512_mul_ps(near, near), &rest));
}

/* Return the derivative at x, g + x g (1 - g) u', where g is the gate, and set *value = gelu(x). */
static inline __m512 gelu_and_derivative(__m512 x, __m512 *value) {
    __m512 rest;
    const __m512 near = within(x), square = _mm512_mul_ps(near, near), g = gate(near, square, &rest);
    const __m512 derivative = _mm512_fmadd_ps(square, _mm512_set1_ps(3 * LINEAR * CUBE), _mm512_set1_ps(LINEAR));
    const __m512 below = _mm512_mul_ps(_mm512_mul_ps(g, _mm512_min_ps(rest, _mm512_set1_ps(1e30f))), g); /* g (1 - g) */
    *value = _mm512_mul_ps(x, g);
    return _mm512_fmadd_ps(_mm512_mul_ps(near, derivative), below, g);
}

#endif
