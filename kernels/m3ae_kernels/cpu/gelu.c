/* GELU and its gradient over whole tensors. */

#include "gelu.h"

void forward(const value *x, value *y, long count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i += LANES) store_some(y + i, count - i, gelu(load_some(x + i, count - i)));
}

/* Set dx to grad times the derivative of GELU at x, and y to GELU of x. */
void backward(const value *grad, const value *x, value *dx, value *y, long count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i += LANES) {
        __m512 result;
        const __m512 derivative = gelu_and_derivative(load_some(x + i, count - i), &result);
        store_some(dx + i, count - i, _mm512_mul_ps(load_some(grad + i, count - i), derivative));
        store_some(y + i, count - i, result);
    }
}
