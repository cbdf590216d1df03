// Values that are sent in bfloat16 without a code: the mean of a collective that does not compress.
#pragma once

#include <cstdint>

namespace qcomm {

// Sets out[i] = bfloat16(bfloat16(values[i]) / divisor), each rounded to nearest even, in one pass over `count` values.
// A NaN stays one. `out` must not overlap `values`. It works on up to `threads` threads.
// Both roundings are needed: the result equals torch's out.copy_(values).div_(divisor), which computes it on devices.
void divide_to_bfloat(const float* values, std::int64_t count, float divisor, std::uint16_t* out, int threads = 1);

}  // namespace qcomm
