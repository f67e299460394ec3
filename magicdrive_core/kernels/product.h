// The product of two matrices that lie in cache: a tile of the result stays in registers while it is summed.
#pragma once

#include "vectors.h"

constexpr int TALL = 6;  // rows of a tile
#ifdef __AVX512F__
constexpr int WIDE = 4;  // vectors of its rows: 6 x 4 sums leave 8 of 32 registers
#else
constexpr int WIDE = 2;  // 6 x 2 sums leave 4 of 16 registers
#endif
constexpr int64_t DEPTH = 384;  // of a product at a time: what of the right side is in use stays in the second cache

// A matrix read by its rows' and columns' distances.
struct Matrix {
    const float* data;
    int64_t row, column;
};

// TALL rows and N vectors of columns of `result` = left right + `start`, a row of which every row begins; null: what is
// there for `add`, else zero. The right side's columns lie side by side.
template <int N>
__attribute__((always_inline)) static inline void tile(int64_t depth, Matrix left, const float* right,
                                                       int64_t right_row, float* result, int64_t result_row, bool add,
                                                       const float* start) {
    for (int i = 0; i < TALL; ++i)  // so that its lines are there when the sums are
        for (int j = 0; j < N; ++j) __builtin_prefetch(result + i * result_row + j * LANES, 1);
    Vec sums[TALL][N] = {};
    if (start)
        for (int i = 0; i < TALL; ++i)
            for (int j = 0; j < N; ++j) sums[i][j] = load(start + j * LANES);
    for (int64_t k = 0; k < depth; ++k) {
        Vec b[N];
        for (int j = 0; j < N; ++j) b[j] = load(right + k * right_row + j * LANES);
        const float* a = left.data + k * left.column;
#pragma GCC unroll 6
        for (int i = 0; i < TALL; ++i) {
            const Vec factor = all(a[i * left.row]);
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) sums[i][j] += factor * b[j];
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
            float* at = result + i * result_row + j * LANES;
            store(at, add ? load(at) + sums[i][j] : sums[i][j]);
        }
}

// result (+)= left right, or left right + `start`, a row. There must be rows. They are made up to a multiple of TALL,
// columns of LANES: memory must be there for them.
// With `Stream` the right side is one of many panels, WIDE vectors wide, on the way through far memory: what follows is
// asked for while a part is in use.
template <bool Stream = false>
static inline void product(int64_t rows, int64_t columns, int64_t depth, Matrix left, const float* right,
                           int64_t right_row, float* result, int64_t result_row, bool add,
                           const float* start = nullptr) {
    for (int64_t begin = 0; begin < depth; begin += DEPTH) {
        const int64_t part = depth - begin < DEPTH ? depth - begin : DEPTH;
        const bool onto = add || begin > 0;
        for (int64_t j = 0; j < columns; j += WIDE * LANES) {
            const int64_t vectors = round_up(columns - j, LANES) / LANES;
            const float* b = right + begin * right_row + j;
            const float* first = start && !onto ? start + j : nullptr;
            const float* next = b + part * right_row;
            const int64_t share = round_up(part * right_row * TALL / rows, 16);
            for (int64_t i = 0; i < rows; i += TALL) {
                if (Stream) {
                    for (int64_t c = 0; c < share; c += 16) __builtin_prefetch(next + c, 0, 2);
                    next += share;
                }
                const Matrix a = {left.data + i * left.row + begin * left.column, left.row, left.column};
                float* c = result + i * result_row + j;
                if (vectors >= WIDE)
                    tile<WIDE>(part, a, b, right_row, c, result_row, onto, first);
#ifdef __AVX512F__
                else if (vectors == 3)
                    tile<3>(part, a, b, right_row, c, result_row, onto, first);
                else if (vectors == 2)
                    tile<2>(part, a, b, right_row, c, result_row, onto, first);
#endif
                else
                    tile<1>(part, a, b, right_row, c, result_row, onto, first);
            }
        }
    }
}
