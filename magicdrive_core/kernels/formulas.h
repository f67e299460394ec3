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

// LN(x) * (1 + scale) + shift, shift and scale (count, width). `period` rows in a row share one; `inner` of them follow
// each other, and these rows come `repeat` times before the next `inner` ones are taken.
struct Modulation {
    const float *shift, *scale;
    int64_t period, inner, repeat, count;

    int64_t at(int64_t r, int64_t width) const {
        const int64_t step = r / period;
        return (step / (inner * repeat) * inner + step % inner) % count * width;
    }
};

}  // extern "C"

// Row r of x (rows, width), modulated.
static inline void modulate_row(const float* x, int64_t r, int64_t width, const Modulation& by, float* out) {
    const float *from = x + r * width, *shift = by.shift + by.at(r, width), *scale = by.scale + by.at(r, width);
    const Norm norm(from, width);
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) out[c] = (from[c] - norm.mean) * norm.inverse * (1 + scale[c]) + shift[c];
}

// sigmoid(u) with u = GELU_SCALE x + GELU_CUBE x^3, which is (1 + tanh(u / 2)) / 2: GELU is x times that.
struct GeluGate {
    Vec open, shut;  // sigmoid(u), at least 2^-64, so that no product with it is denormal, and sigmoid(-u)

    explicit GeluGate(Vec x) {
        const Vec power = x * (x * x * GELU_CUBE + GELU_SCALE) * -LOG2_E;
        const Vec e = power_of_two(power > all(64.0f) ? all(64.0f) : power);
        open = 1 / (1 + e);
        shut = e * open;  // 1 - open would be as exact as 1, which it is near
    }
};
