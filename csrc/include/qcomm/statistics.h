// One pass over a tensor: extremes, sum of squares (its order of additions is part of the format), whether all values
// are finite.
#pragma once

#include <cstdint>

#include "qcomm/values.h"

namespace qcomm {

// Everything that choosing a grid needs to know of a tensor: a range grid its extremes, a sigma grid its RMS, and both
// whether it may be quantized at all. On CUDA the struct stays in device memory as it is.
struct Statistics {
    double minimum = 0.0;  // 0 for an empty tensor; never -0.0
    double maximum = 0.0;
    // Infinite where squares of large float64 values overflow. The sigma grid made of it is not usable, so the tensor
    // travels raw.
    double sum_squares = 0.0;  // see docs/format.md, "sum"
    bool finite = true;        // when false the other fields say nothing
};

// Measures u in one pass, on up to `threads` threads. The result does not depend on their number: the sum is that of
// blocks of 4096 values, added in a fixed tree, because every rank and every device must find the same step.
Statistics measure(const Values& values, int threads = 1);

}  // namespace qcomm
