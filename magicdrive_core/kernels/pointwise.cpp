// Layer norm with modulation, and GELU's gradient: each number is read once and written once.
#include <omp.h>

#include <cmath>
#include <cstring>

#include "formulas.h"

extern "C" {

// LN(x) * (1 + scale) + shift, of (rows, width).
void modulate(const float* x, int64_t rows, int64_t width, const Modulation* by, float* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) modulate_row(x, r, width, *by, out + r * width);
}

// Writes the gradient at x; adds those at shift and scale to `at_sums` (threads, count, 2, width).
void modulate_backward(const float* gradient, const float* x, int64_t rows, int64_t width, const Modulation* by,
                       float* at_x, float* at_sums, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float* own = at_sums + omp_get_thread_num() * by->count * 2 * width;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t own_row = by->at(r, width);
            const float *from = x + r * width, *factor = by->scale + own_row, *g = gradient + r * width;
            const Norm norm(from, width);
            float *at_shift = own + own_row * 2, *at_scale = at_shift + width, *to = at_x + r * width;
            float mean = 0, along = 0;
#pragma omp simd reduction(+ : mean, along)
            for (int64_t c = 0; c < width; ++c) {
                const float normed = (from[c] - norm.mean) * norm.inverse, inner = g[c] * (1 + factor[c]);
                at_shift[c] += g[c];
                at_scale[c] += g[c] * normed;
                mean += inner;
                along += inner * normed;
            }
            mean /= width;
            along /= width;
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) {
                const float normed = (from[c] - norm.mean) * norm.inverse;
                to[c] = norm.inverse * (g[c] * (1 + factor[c]) - mean - normed * along);
            }
        }
    }
}

// `value` = GELU(x) in its tanh form, x sigmoid(s x + c x^3), and the gradient there becomes that at x.
void gelu_backward(const float* x, float* gradient, int64_t count, float* value, int threads) {
    const int64_t whole = count / LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i <= whole; ++i) {
        const int64_t bytes = (i < whole ? LANES : count - whole * LANES) * sizeof(float);
        float work[2][LANES] = {};
        std::memcpy(work[0], x + i * LANES, bytes);
        std::memcpy(work[1], gradient + i * LANES, bytes);
        const Vec v = load(work[0]);
        const GeluGate gate(v);
        const Vec result = v * gate.open;
        const Vec slope = gate.open + result * gate.shut * (v * v * (3 * GELU_CUBE) + GELU_SCALE);
        store(work[0], result);
        store(work[1], load(work[1]) * slope);
        std::memcpy(value + i * LANES, work[0], bytes);
        std::memcpy(gradient + i * LANES, work[1], bytes);
    }
}

}  // extern "C"
