// One pass over a tensor: extremes, sum of squares (its order of additions is part of the format), whether all values
// are finite.
#pragma once

#include <cstdint>

#include "qcomm/values.h"

namespace qcomm {

struct Statistics {
    double minimum = 0.0;  // 0 for an empty tensor; never -0.0
    double maximum = 0.0;
    double sum_squares = 0.0;  // see docs/format.md, "sum"
    bool finite = true;        // when false the other fields say nothing
};

// On up to `threads` threads; the result does not depend on their number.
Statistics measure(const Values& values, int threads = 1);

}  // namespace qcomm
