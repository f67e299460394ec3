// Vectors of floats, and what is made of them: sums, maxima, powers of two, squares with rows and columns exchanged.
//
// Written with GCC's vector types, so that one text serves AVX-512 and AVX2; nothing else was tried.
#pragma once

#include <cstdint>

#ifdef __AVX512F__
constexpr int LANES = 16;  // floats of a vector
#else
constexpr int LANES = 8;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

static inline int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

static inline Vec load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }

static inline void store(float* to, Vec x) { *reinterpret_cast<Unaligned*>(to) = x; }

static inline Vec all(float x) { return x - Vec{}; }

static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// The vector with its halves of 2 STEP floats exchanged.
template <int STEP>
static inline Vec swapped(Vec x) {
    Ints lanes;
    for (int j = 0; j < LANES; ++j) lanes[j] = j ^ STEP;
    return __builtin_shuffle(x, lanes);
}

static inline float sum(Vec x) {
    if (LANES == 16) x += swapped<LANES / 2>(x);
    x += swapped<4>(x);
    x += swapped<2>(x);
    return (x + swapped<1>(x))[0];
}

static inline float largest(Vec x) {
    if (LANES == 16) x = larger(x, swapped<LANES / 2>(x));
    x = larger(x, swapped<4>(x));
    x = larger(x, swapped<2>(x));
    return larger(x, swapped<1>(x))[0];
}

constexpr float LOG2_E = 1.44269504f;

// 2^x to 2e-7 of itself, NaN for NaN. x must be below 128. Below -64 it is 0: beside the 1 that stands in the same sum
// that is nothing, and products of such numbers would be denormal, which takes a processor a hundred cycles each.
static inline Vec power_of_two(Vec x) {
    const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, in the low bits
    const Vec shifted = x + shifter;
    const Vec r = x - (shifted - shifter);
    // The polynomial of degree 5 that is nearest to 2^r for |r| <= 1/2 (Remez): 7.5e-8 of the result at most.
    Vec p = r * 1.3276472e-3f + 9.6755410e-3f;
    p = p * r + 5.5507131e-2f;
    p = p * r + 0.24022120f;
    p = p * r + 0.69314694f;
    p = p * r + 1.0000001f;
    return x < all(-64.0f) ? Vec{} : (Vec)((Ints)p + ((Ints)shifted << 23));
}

// Exchanges the halves of every pair of neighbouring squares of STEP x STEP floats that lie off the diagonal.
template <int STEP>
static inline void exchange(Vec (&square)[LANES]) {
    Ints first, second;
    for (int j = 0; j < LANES; ++j) {
        first[j] = j & STEP ? LANES + j - STEP : j;
        second[j] = j & STEP ? LANES + j : j + STEP;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
        if (i & STEP) continue;
        const Vec a = square[i], b = square[i + STEP];
        square[i] = __builtin_shuffle(a, b, first);
        square[i + STEP] = __builtin_shuffle(a, b, second);
    }
}

// Rows become columns.
static inline void transpose(Vec (&square)[LANES]) {
    exchange<1>(square);
    exchange<2>(square);
    exchange<4>(square);
    if (LANES == 16) exchange<8 % LANES>(square);
}

// Of (rows, columns) with rows `from_row` apart makes (columns, rows) with rows `to_row` apart; the latter is also to
// which number rows are made up, with zeros. Columns are made up to whole vectors.
static inline void turn(const float* from, int64_t rows, int64_t from_row, int64_t columns, int64_t to_row, float* to) {
    for (int64_t i = 0; i < to_row; i += LANES)
        for (int64_t j = 0; j < columns; j += LANES) {
            Vec square[LANES];
            for (int64_t r = 0; r < LANES; ++r) square[r] = i + r < rows ? load(from + (i + r) * from_row + j) : Vec{};
            transpose(square);
            for (int64_t c = 0; c < LANES; ++c) store(to + (j + c) * to_row + i, square[c]);
        }
}
