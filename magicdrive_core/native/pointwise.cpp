// Layer norm with modulation, and GELU's gradient: each number is read once and written once.
#include <omp.h>

#include <cmath>
#include <cstring>

#include "vectors.h"

namespace {

constexpr float NORM_EPS = 1e-6f;
constexpr float GELU_SCALE = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float GELU_CUBE = 0.044715f * GELU_SCALE;

struct Norm {
    float mean, inverse;  // of the standard deviation

    Norm(const float* x, int64_t width) {
        float total = 0, squares = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t c = 0; c < width; ++c) total += x[c];
        const float m = total / width;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < width; ++c) squares += (x[c] - m) * (x[c] - m);
        mean = m;
        inverse = 1 / std::sqrt(squares / width + NORM_EPS);
    }
};

}  // namespace

extern "C" {

// LN(x) * (1 + scale) + shift, of (rows, width). Row r has the shift and scale (groups, width) of r / period % groups.
void modulate(const float* x, const float* shift, const float* scale, int64_t rows, int64_t width, int64_t period,
              int64_t groups, float* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t group = r / period % groups * width;
        const float *from = x + r * width, *add = shift + group, *factor = scale + group;
        const Norm norm(from, width);
        float* to = out + r * width;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) to[c] = (from[c] - norm.mean) * norm.inverse * (1 + factor[c]) + add[c];
    }
}

// Writes the gradient at x; adds those at shift and scale to `at_groups` (threads, groups, 2, width).
void modulate_backward(const float* gradient, const float* x, const float* scale, int64_t rows, int64_t width,
                       int64_t period, int64_t groups, float* at_x, float* at_groups, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float* own = at_groups + omp_get_thread_num() * groups * 2 * width;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t group = r / period % groups;
            const float *from = x + r * width, *factor = scale + group * width, *g = gradient + r * width;
            const Norm norm(from, width);
            float *at_shift = own + group * 2 * width, *at_scale = at_shift + width, *to = at_x + r * width;
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

// x becomes GELU(x) in its tanh form, x sigmoid(s x + c x^3), and the gradient there becomes that at x.
void gelu_backward(float* x, float* gradient, int64_t count, int threads) {
    const int64_t whole = count / LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i <= whole; ++i) {
        const int64_t some = i < whole ? LANES : count - whole * LANES;
        float work[2][LANES] = {};
        std::memcpy(work[0], x + i * LANES, some * sizeof(float));
        std::memcpy(work[1], gradient + i * LANES, some * sizeof(float));
        const Vec v = load(work[0]), square = v * v;
        const Vec power = v * (square * GELU_CUBE + GELU_SCALE) * -LOG2_E;
        const Vec gate = 1 / (1 + power_of_two(power > all(126.0f) ? all(126.0f) : power));
        const Vec value = v * gate, slope = gate + value * (1 - gate) * (square * (3 * GELU_CUBE) + GELU_SCALE);
        store(work[0], value);
        store(work[1], load(work[1]) * slope);
        std::memcpy(x + i * LANES, work[0], some * sizeof(float));
        std::memcpy(gradient + i * LANES, work[1], some * sizeof(float));
    }
}

}  // extern "C"
