// Attention of one sequence to another for every head: softmax(q k' / sqrt(d) + bias) v, and its gradients.
//
// q and k may get an RMS norm and a rotation on the way in: so no normalised copy is ever in memory. A head's keys and
// values are packed once, some rows of queries at a time meet all of them, and the scores never leave the cache.
#include <omp.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "formulas.h"
#include "product.h"
#include "scratch.h"

namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr int64_t AHEAD = 16;                           // rows
constexpr int64_t SCORES = 1 << 15;                     // of a block of queries: 128 KB stay in the second cache
constexpr int64_t FEWEST = 8 * TALL, MOST = 16 * TALL;  // queries of a block; few read all keys from far memory again

}  // namespace

extern "C" {

// (outer, inner, tokens, heads, d) floats, the last dimension side by side. Distances in floats.
struct Heads {
    float* data;
    int64_t outer, inner, token, head;
};

// What forward and backward pass share. Norms (d), angles (tokens, d / 2, 2), bias (outer, inner, keys): or null.
struct Attention {
    int64_t outer, inner, queries, keys, heads, d;
    Heads q, k, v;
    const float *q_norm, *k_norm, *angles, *bias;
};

}  // extern "C"

namespace {

float* at(const Heads& of, int64_t outer, int64_t inner, int64_t head) {
    return of.data + outer * of.outer + inner * of.inner + head * of.head;
}

// Asks for a row of d floats that is needed soon: rows lie so far apart that no processor guesses them by itself.
void prefetch(const float* row, int64_t d) {
    for (int64_t c = 0; c < d; c += 16) __builtin_prefetch(row + c);
}

// Of one token and head: x * inverse * norm, turned, times `scale`. Without norm x itself is turned and scaled.
void prepare(const float* x, const float* norm, const float* angles, float scale, int64_t d, float* out) {
    if (norm) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < d; ++c) squares += x[c] * x[c];
        const float inverse = scale / std::sqrt(squares / d + NORM_EPS);
        for (int64_t c = 0; c < d; ++c) out[c] = x[c] * inverse * norm[c];
    } else {
        for (int64_t c = 0; c < d; ++c) out[c] = x[c] * scale;
    }
    if (!angles) return;
    for (int64_t c = 0; c < d; c += 2) {
        const float a = out[c], b = out[c + 1], cosine = angles[c], sine = angles[c + 1];
        out[c] = a * cosine - b * sine;
        out[c + 1] = a * sine + b * cosine;
    }
}

// The way back: from the gradient at what `prepare` gave to that at x, written or added to `out`; adds to `at_norm`.
void unprepare(const float* gradient, const float* x, const float* norm, const float* angles, float scale, int64_t d,
               float* work, float* out, float* at_norm, bool add) {
    for (int64_t c = 0; c < d; ++c) work[c] = gradient[c] * scale;
    if (angles)
        for (int64_t c = 0; c < d; c += 2) {
            const float a = work[c], b = work[c + 1], cosine = angles[c], sine = angles[c + 1];
            work[c] = a * cosine + b * sine;
            work[c + 1] = b * cosine - a * sine;
        }
    if (norm) {
        float squares = 0, along = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < d; ++c) squares += x[c] * x[c];
        const float inverse = 1 / std::sqrt(squares / d + NORM_EPS);
#pragma omp simd reduction(+ : along)
        for (int64_t c = 0; c < d; ++c) {
            const float normed = x[c] * inverse;
            at_norm[c] += work[c] * normed;
            work[c] *= norm[c];
            along += work[c] * normed;
        }
        along /= d;
        for (int64_t c = 0; c < d; ++c) work[c] = inverse * (work[c] - x[c] * inverse * along);
    }
    for (int64_t c = 0; c < d; ++c) out[c] = add ? out[c] + work[c] : work[c];
}

// The largest of a row, the bias added to it before. `columns` are `keys` made up to whole vectors.
float maximum(float* row, const float* bias, int64_t keys, int64_t columns) {
    if (bias)
        for (int64_t j = 0; j < keys; ++j) row[j] += bias[j];
    for (int64_t j = keys; j < columns; ++j) row[j] = NEVER;
    Vec most[4] = {all(NEVER), all(NEVER), all(NEVER), all(NEVER)};  // four: a single one would wait for itself
    int64_t j = 0;
    for (; j + 4 * LANES <= columns; j += 4 * LANES)
        for (int i = 0; i < 4; ++i) most[i] = larger(most[i], load(row + j + i * LANES));
    for (; j < columns; j += LANES) most[0] = larger(most[0], load(row + j));
    return largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

// 2^(row - its maximum) of every row in place, and the sums of these. A row of which every key is hidden sums to NaN.
void exponentials(float* scores, const float* bias, int64_t rows, int64_t keys, int64_t columns, float* sums) {
    float maxima[TALL];
    for (int64_t begin = 0; begin < rows; begin += TALL) {
        const int64_t some = rows - begin < TALL ? rows - begin : TALL;
        for (int64_t i = 0; i < some; ++i) maxima[i] = maximum(scores + (begin + i) * columns, bias, keys, columns);
        for (int64_t i = 0; i < some; ++i) {
            float* row = scores + (begin + i) * columns;
            Vec total = {};
            for (int64_t j = 0; j < columns; j += LANES) {
                const Vec weight = power_of_two(load(row + j) - maxima[i]);
                store(row + j, weight);
                total += weight;
            }
            sums[begin + i] = maxima[i] == NEVER ? std::numeric_limits<float>::quiet_NaN() : sum(total);
        }
    }
}

// Makes of a row's exponentials its weights, and of the gradients at the weights those at the scores.
void softmax_backward(float* row, float* slopes, float inverse, int64_t columns) {
    Vec along = {};
    for (int64_t j = 0; j < columns; j += LANES) {
        const Vec weight = load(row + j) * inverse;
        store(row + j, weight);
        along += weight * load(slopes + j);
    }
    const float mean = sum(along);
    for (int64_t j = 0; j < columns; j += LANES) store(slopes + j, load(row + j) * (load(slopes + j) - mean));
}

// One head's keys and values, packed.
struct Packed {
    int64_t keys, columns, d, width;  // columns and width: keys and d made up to whole vectors
    float *k, *k_turned, *v, *v_turned;
    const float* bias;

    Packed(const Attention& a, Scratch& scratch, bool backward)
        : keys(a.keys), columns(round_up(a.keys, LANES)), d(a.d), width(round_up(a.d, LANES)) {
        k = scratch.take(keys * width);
        k_turned = scratch.take(width * columns);
        v = scratch.take(keys * width);
        v_turned = backward ? scratch.take(width * columns) : nullptr;
    }

    static int64_t floats(const Attention& a) {
        return 2 * round_up(a.d, LANES) * (a.keys + round_up(a.keys, LANES));
    }

    void fill(const Attention& a, int64_t outer, int64_t inner, int64_t head) {
        const float *from_k = at(a.k, outer, inner, head), *from_v = at(a.v, outer, inner, head);
        for (int64_t j = 0; j < keys; ++j) {
            prefetch(from_k + (j + AHEAD) * a.k.token, d);
            prefetch(from_v + (j + AHEAD) * a.v.token, d);
            const float* angles = a.angles ? a.angles + j * d : nullptr;
            prepare(from_k + j * a.k.token, a.k_norm, angles, 1, d, k + j * width);
            std::memcpy(v + j * width, from_v + j * a.v.token, d * sizeof(float));
            for (int64_t c = d; c < width; ++c) k[j * width + c] = v[j * width + c] = 0;
        }
        turn(k, keys, width, d, columns, k_turned);
        if (v_turned) turn(v, keys, width, d, columns, v_turned);
        bias = a.bias ? a.bias + (outer * a.inner + inner) * keys : nullptr;
    }
};

int64_t rows_at_once(const Attention& a) {
    const int64_t fitting = SCORES / round_up(a.keys, LANES) / TALL * TALL;
    const int64_t some = fitting < FEWEST ? FEWEST : fitting > MOST ? MOST : fitting;
    const int64_t whole = round_up(a.queries, TALL);
    return some < whole ? some : whole;
}

struct Rows {
    int64_t begin, count;
};

// The queries of one block, prepared; rows up to a multiple of TALL are zero.
void fill_queries(const Attention& a, int64_t outer, int64_t inner, int64_t head, Rows rows, float* q) {
    const int64_t width = round_up(a.d, LANES);
    const float scale = LOG2_E / std::sqrt(float(a.d));  // weights are powers of two
    const float* from = at(a.q, outer, inner, head);
    std::memset(q, 0, round_up(rows.count, TALL) * width * sizeof(float));
    for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t token = rows.begin + i;
        prefetch(from + (token + AHEAD) * a.q.token, a.d);
        prepare(from + token * a.q.token, a.q_norm, a.angles ? a.angles + token * a.d : nullptr, scale, a.d,
                q + i * width);
    }
}

}  // namespace

extern "C" {

// Writes softmax(q k' / sqrt(d) + bias) v to `out`, or adds it.
void attention(const Attention* of, Heads out, int add, int threads) {
    const Attention& a = *of;
    const int64_t items = a.outer * a.inner * a.heads, block = rows_at_once(a);
    if (items == 0 || a.queries == 0) return;
    // Where heads are fewer than threads, each is shared: keys are packed anew for every share.
    const int64_t blocks = (a.queries + block - 1) / block;
    const int64_t wanted = (threads + items - 1) / items, shares = wanted < blocks ? wanted : blocks;
    const int64_t columns = round_up(a.keys, LANES), width = round_up(a.d, LANES);
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(Packed::floats(a) + block * (columns + 2 * width + 1) + 4 * LANES);
        Packed packed(a, scratch, false);
        float* q = scratch.take(block * width);
        float* scores = scratch.take(block * columns);
        float* result = scratch.take(block * width);
        float* sums = scratch.take(block);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items * shares; ++item) {
            const int64_t share = item % shares, head = item / shares % a.heads;
            const int64_t inner = item / shares / a.heads % a.inner, outer = item / shares / a.heads / a.inner;
            packed.fill(a, outer, inner, head);
            float* to = at(out, outer, inner, head);
            const int64_t end = blocks * (share + 1) / shares;
            for (int64_t which = blocks * share / shares; which < end; ++which) {
                const int64_t begin = which * block, left = a.queries - begin;
                const Rows rows = {begin, left < block ? left : block};
                fill_queries(a, outer, inner, head, rows, q);
                for (int64_t i = 0; i < rows.count; ++i) prefetch(to + (begin + i) * out.token, a.d);
                product(rows.count, a.keys, a.d, {q, width, 1}, packed.k_turned, columns, scores, columns, false);
                exponentials(scores, packed.bias, rows.count, a.keys, columns, sums);
                product(rows.count, a.d, a.keys, {scores, columns, 1}, packed.v, width, result, width, false);
                for (int64_t i = 0; i < rows.count; ++i) {
                    float* row = to + (begin + i) * out.token;
                    const float factor = 1 / sums[i];
                    for (int64_t c = 0; c < a.d; ++c)
                        row[c] = add ? row[c] + result[i * width + c] * factor : result[i * width + c] * factor;
                }
            }
        }
    }
}

// Writes the gradients at q, k and v, or adds them; adds those at the norms to `at_norms` (threads, 2, d).
void attention_backward(const Attention* of, Heads gradient, Heads at_q, Heads at_k, Heads at_v, float* at_norms,
                        int add_q, int add_kv, int threads) {
    const Attention& a = *of;
    const int64_t items = a.outer * a.inner * a.heads, block = rows_at_once(a);
    const int64_t columns = round_up(a.keys, LANES), width = round_up(a.d, LANES);
    const float scale = 1 / std::sqrt(float(a.d));
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(Packed::floats(a) + block * (3 * width + 2 * columns + 1) + 2 * columns * (2 * width + TALL) +
                        width + 13 * LANES);
        Packed packed(a, scratch, true);
        float* q = scratch.take(block * width);
        float* from = scratch.take(block * width);
        float* dq = scratch.take(block * width);
        float* weights = scratch.take(block * columns + LANES);
        float* slopes = scratch.take(block * columns + LANES);
        float* sums = scratch.take(block);
        float* dk_turned = scratch.take((width + TALL) * columns);
        float* dv_turned = scratch.take((width + TALL) * columns);
        float* dk = scratch.take(columns * width);
        float* dv = scratch.take(columns * width);
        float* work = scratch.take(width);
        float* norms = at_norms + omp_get_thread_num() * 2 * a.d;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items; ++item) {
            const int64_t head = item % a.heads, inner = item / a.heads % a.inner, outer = item / a.heads / a.inner;
            packed.fill(a, outer, inner, head);
            const float *q_rows = at(a.q, outer, inner, head), *k_rows = at(a.k, outer, inner, head);
            const float* gradients = at(gradient, outer, inner, head);
            float *to_q = at(at_q, outer, inner, head), *to_k = at(at_k, outer, inner, head);
            float* to_v = at(at_v, outer, inner, head);
            for (int64_t begin = 0; begin < a.queries; begin += block) {
                const int64_t left = a.queries - begin;
                const Rows rows = {begin, left < block ? left : block};
                fill_queries(a, outer, inner, head, rows, q);
                std::memset(from, 0, round_up(rows.count, TALL) * width * sizeof(float));
                for (int64_t i = 0; i < rows.count; ++i) {
                    const float* row = gradients + (begin + i) * gradient.token;
                    prefetch(row + AHEAD * gradient.token, a.d);
                    prefetch(to_q + (begin + i) * at_q.token, a.d);
                    std::memcpy(from + i * width, row, a.d * sizeof(float));
                }
                product(rows.count, a.keys, a.d, {q, width, 1}, packed.k_turned, columns, weights, columns, false);
                product(rows.count, a.keys, a.d, {from, width, 1}, packed.v_turned, columns, slopes, columns, false);
                exponentials(weights, packed.bias, rows.count, a.keys, columns, sums);
                for (int64_t i = 0; i < rows.count; ++i)
                    softmax_backward(weights + i * columns, slopes + i * columns, 1 / sums[i], columns);
                product(rows.count, a.d, a.keys, {slopes, columns, 1}, packed.k, width, dq, width, false);
                // Turned, so that the large matrices are read row by row.
                product(a.d, a.keys, rows.count, {from, 1, width}, weights, columns, dv_turned, columns, begin > 0);
                product(a.d, a.keys, rows.count, {q, 1, width}, slopes, columns, dk_turned, columns, begin > 0);
                for (int64_t i = 0; i < rows.count; ++i) {
                    const int64_t token = begin + i;
                    unprepare(dq + i * width, q_rows + token * a.q.token, a.q_norm,
                              a.angles ? a.angles + token * a.d : nullptr, scale, a.d, work,
                              to_q + token * at_q.token, norms, add_q);
                }
            }
            turn(dk_turned, a.d, columns, a.keys, width, dk);
            turn(dv_turned, a.d, columns, a.keys, width, dv);
            for (int64_t j = 0; j < a.keys; ++j) {
                prefetch(k_rows + (j + AHEAD) * a.k.token, a.d);
                prefetch(to_k + (j + AHEAD) * at_k.token, a.d);
                prefetch(to_v + (j + AHEAD) * at_v.token, a.d);
                unprepare(dk + j * width, k_rows + j * a.k.token, a.k_norm, a.angles ? a.angles + j * a.d : nullptr,
                          1 / LOG2_E, a.d, work, to_k + j * at_k.token, norms + a.d, add_kv);
                float* to = to_v + j * at_v.token;
                for (int64_t c = 0; c < a.d; ++c) to[c] = add_kv ? to[c] + dv[j * width + c] : dv[j * width + c];
            }
        }
    }
}

}  // extern "C"
