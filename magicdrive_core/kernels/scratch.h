// Memory of one thread that stays for its next call: fresh pages cost more than what is computed on them.
#pragma once

#include <vector>

#include "vectors.h"

class Scratch {
   public:
    explicit Scratch(int64_t floats) {
        if (int64_t(store_.size()) < floats + LANES) store_.resize(floats + LANES);
        next_ = reinterpret_cast<float*>(round_up(reinterpret_cast<int64_t>(store_.data()), LANES * 4));
    }

    // So many floats, from the beginning of a cache line on; all that is taken must have been asked for.
    float* take(int64_t floats) {
        float* taken = next_;
        next_ += round_up(floats, LANES);
        return taken;
    }

   private:
    float* next_;
    static inline thread_local std::vector<float> store_;
};
