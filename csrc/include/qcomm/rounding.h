// What is sent in bfloat16 without a code.
#pragma once

#include <cstdint>

namespace qcomm {

// out[i] = bfloat16(bfloat16(values[i]) / divisor), each to nearest even, in one pass over `count` values. On up to
// `threads` threads.
void divide_to_bfloat(const float* values, std::int64_t count, float divisor, std::uint16_t* out, int threads = 1);

}  // namespace qcomm
