// Linear maps and MLPs of modulated rows: a block of rows stays in cache from the norm to the result.
#include <omp.h>

#include <cstring>

#include "formulas.h"
#include "product.h"
#include "scratch.h"

namespace {

constexpr int64_t PANEL = WIDE * LANES;  // outputs
constexpr int64_t BLOCK = 192;           // rows at a time, at most

}  // namespace

extern "C" {

// y = x weight' + bias: weight (outputs, inputs), both in multiples of LANES; bias or null.
struct Weights {
    const float *weight, *bias;
    int64_t inputs, outputs;
};

}  // extern "C"

namespace {

// The weights as panels (inputs, PANEL), whose rows a product reads one after the other.
class Panels {
   public:
    Panels(const Weights& of, Scratch& scratch) : of_(of), panels_(scratch.take(floats(of))) {}

    static int64_t floats(const Weights& of) { return of.inputs * round_up(of.outputs, PANEL); }

    // By all threads of a parallel region together.
    void fill() {
#pragma omp for schedule(static)
        for (int64_t j = 0; j < of_.outputs; j += PANEL)
            turn(of_.weight + j * of_.inputs, columns(j), of_.inputs, of_.inputs, PANEL, panels_ + j * of_.inputs);
    }

    // `to` = x weight' + bias, of `rows` rows, made up to a multiple of TALL in x; `tile` (TALL, PANEL) is for work.
    void multiply(const float* x, int64_t rows, float* tile, float* to) const {
        const int64_t whole = rows / TALL * TALL;
        for (int64_t j = 0; j < of_.outputs; j += PANEL) {
            if (whole > 0) product_of(x, whole, j, to + j, of_.outputs);
            if (whole == rows) continue;
            product_of(x + whole * of_.inputs, TALL, j, tile, PANEL);
            for (int64_t i = whole; i < rows; ++i)
                std::memcpy(to + i * of_.outputs + j, tile + (i - whole) * PANEL, columns(j) * sizeof(float));
        }
    }

    // `to` = GELU(x weight' + bias); `hidden` gets GELU's input, or is null; `tile` (rows, PANEL).
    void multiply_gelu(const float* x, int64_t rows, float* tile, float* hidden, float* to) const {
        for (int64_t j = 0; j < of_.outputs; j += PANEL) {
            product_of(x, rows, j, tile, PANEL);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t c = 0; c < columns(j); c += LANES) {
                    const Vec y = load(tile + i * PANEL + c);
                    if (hidden) store(hidden + i * of_.outputs + j + c, y);
                    store(to + i * of_.outputs + j + c, y * GeluGate(y).open);
                }
        }
    }

   private:
    void product_of(const float* x, int64_t rows, int64_t j, float* to, int64_t to_row) const {
        product<true>(rows, columns(j), of_.inputs, {x, of_.inputs, 1}, panels_ + j * of_.inputs, PANEL, to, to_row,
                      false, of_.bias ? of_.bias + j : nullptr);
    }

    int64_t columns(int64_t begin) const {
        const int64_t left = of_.outputs - begin;
        return left < PANEL ? left : PANEL;
    }

    const Weights& of_;
    float* panels_;
};

// How many rows a block has, so that all threads get equally many.
int64_t block_of(int64_t rows, int threads) {
    const int64_t blocks = round_up((rows + BLOCK - 1) / BLOCK, threads);
    return round_up((rows + blocks - 1) / blocks, TALL);
}

// Modulated rows, made up to a multiple of TALL with zeros.
void fill_rows(const float* x, int64_t begin, int64_t count, int64_t width, const Modulation& by, float* to) {
    for (int64_t i = 0; i < count; ++i) modulate_row(x, begin + i, width, by, to + i * width);
    std::memset(to + count * width, 0, (round_up(count, TALL) - count) * width * sizeof(float));
}

}  // namespace

extern "C" {

// out (rows, outputs) = the linear map of x (rows, inputs), modulated.
void linear(const float* x, int64_t rows, const Weights* weights, const Modulation* by, float* out, int threads) {
    if (rows == 0) return;
    const Weights& of = *weights;
    const int64_t block = block_of(rows, threads), own_floats = block * (of.inputs + PANEL) + 3 * LANES;
    Scratch shared(Panels::floats(of) + own_floats);
    Panels panels(of, shared);
#pragma omp parallel num_threads(threads)
    {
        const bool first = omp_get_thread_num() == 0;  // whose scratch holds the panels
        Scratch own(first ? 0 : own_floats);
        Scratch& scratch = first ? shared : own;
        float* some = scratch.take(block * of.inputs);
        float* tile = scratch.take(block * PANEL);
        panels.fill();
#pragma omp for schedule(static)
        for (int64_t begin = 0; begin < rows; begin += block) {
            const int64_t count = rows - begin < block ? rows - begin : block;
            fill_rows(x, begin, count, of.inputs, *by, some);
            panels.multiply(some, count, tile, out + begin * of.outputs);
        }
    }
}

// out (rows, width) = down(GELU(up(x modulated))); `hidden` (rows, hidden width) gets what GELU was given, unless null.
void mlp(const float* x, int64_t rows, const Weights* up, const Weights* down, const Modulation* by, float* hidden,
         float* out, int threads) {
    if (rows == 0) return;
    const int64_t width = up->inputs, wide = up->outputs, block = block_of(rows, threads);
    const int64_t own_floats = block * (width + wide + PANEL) + 4 * LANES;
    Scratch shared(Panels::floats(*up) + Panels::floats(*down) + own_floats);
    Panels ups(*up, shared), downs(*down, shared);
#pragma omp parallel num_threads(threads)
    {
        const bool first = omp_get_thread_num() == 0;
        Scratch own(first ? 0 : own_floats);
        Scratch& scratch = first ? shared : own;
        float* some = scratch.take(block * width);
        float* tile = scratch.take(block * PANEL);
        float* active = scratch.take(block * wide);
        ups.fill();
        downs.fill();
#pragma omp for schedule(static)
        for (int64_t begin = 0; begin < rows; begin += block) {
            const int64_t count = rows - begin < block ? rows - begin : block;
            fill_rows(x, begin, count, width, *by, some);
            ups.multiply_gelu(some, count, tile, hidden ? hidden + begin * wide : nullptr, active);
            std::memset(active + count * wide, 0, (round_up(count, TALL) - count) * wide * sizeof(float));
            downs.multiply(active, count, tile, out + begin * width);
        }
    }
}

}  // extern "C"
