// Layer norm with modulation, and GELU's tanh form.
#pragma once

#include <cmath>

#include "vectors.h"

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

extern "C" {

// LN(x) * (1 + scale) + shift: row r has the shift and scale (groups, width) of r / period % groups.
struct Modulation {
    const float *shift, *scale;
    int64_t period, groups;

    int64_t at(int64_t r, int64_t width) const { return r / period % groups * width; }
};

}  // extern "C"

// Row r of x (rows, width), modulated.
static inline void modulate_row(const float* x, int64_t r, int64_t width, const Modulation& by, float* out) {
    const float *from = x + r * width, *shift = by.shift + by.at(r, width), *scale = by.scale + by.at(r, width);
    const Norm norm(from, width);
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) out[c] = (from[c] - norm.mean) * norm.inverse * (1 + scale[c]) + shift[c];
}

// sigmoid(GELU_SCALE x + GELU_CUBE x^3), which is (1 + tanh(half of it)) / 2: GELU is x times that. At least 2^-64, so
// that no product with it is denormal.
static inline Vec gelu_gate(Vec x) {
    const Vec power = x * (x * x * GELU_CUBE + GELU_SCALE) * -LOG2_E;
    return 1 / (1 + power_of_two(power > all(64.0f) ? all(64.0f) : power));
}
