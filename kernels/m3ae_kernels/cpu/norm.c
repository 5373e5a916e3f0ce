/* Gradients of a LayerNorm for bf16 inputs. The gradients of weight and bias are summed in float. */

#include "vectors.h"

/* x, grad and dx are [R, D]; weight is [D]; mean and rstd, the reciprocal standard deviation, are [R]. sums [blocks, 2, D] must
   be zero; they receive the contributions of each block of `rows` rows to the gradients of weight and bias. The sums do
   not depend on the number of threads. */
void backward(const bf16 *grad, const bf16 *x, const float *weight, const float *mean, const float *rstd, bf16 *dx, float *sums,
              long R, long D, long rows, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long first = 0; first < R; first += rows) {
        float *of_weight = sums + first / rows * 2 * D, *of_bias = of_weight + D;
        for (long r = first; r < smaller(R, first + rows); r++) {
            const bf16 *g = grad + r * D, *at = x + r * D;
            const __m512 centre = _mm512_set1_ps(mean[r]), scale = _mm512_set1_ps(rstd[r]);
            __m512 sum = _mm512_setzero_ps(), along = _mm512_setzero_ps(); /* sums of g w, and of g w times the normalised x */
            for (long i = 0; i < D; i += LANES) {
                const __mmask16 some = lanes(D - i);
                const __m512 gradient = load_some(g + i, D - i);
                const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(load_some(at + i, D - i), centre), scale);
                const __m512 product = _mm512_mul_ps(gradient, normed), w = _mm512_maskz_loadu_ps(some, weight + i);
                sum = _mm512_fmadd_ps(gradient, w, sum);
                along = _mm512_fmadd_ps(product, w, along);
                const __m512 total = _mm512_maskz_loadu_ps(some, of_weight + i), plain = _mm512_maskz_loadu_ps(some, of_bias + i);
                _mm512_mask_storeu_ps(of_weight + i, some, _mm512_add_ps(total, product));
                _mm512_mask_storeu_ps(of_bias + i, some, _mm512_add_ps(plain, gradient));
            }
            const __m512 mean_sum = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / D);
            const __m512 mean_along = _mm512_set1_ps(_mm512_reduce_add_ps(along) / D);
            for (long i = 0; i < D; i += LANES) {
                const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(load_some(at + i, D - i), centre), scale);
                const __m512 weighted = _mm512_mul_ps(load_some(g + i, D - i), _mm512_maskz_loadu_ps(lanes(D - i), weight + i));
                const __m512 rest = _mm512_fnmadd_ps(normed, mean_along, _mm512_sub_ps(weighted, mean_sum));
                store_some(dx + r * D + i, D - i, _mm512_mul_ps(scale, rest));
            }
        }
    }
}
