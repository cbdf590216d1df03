#include "qcomm/rounding.h"

#include "kernels.h"

namespace qcomm {

void divide_to_bfloat(const float* values, std::int64_t count, float divisor, std::uint16_t* out) {
    kernels().divide_to_bfloat(values, count, divisor, out);
}

}  // namespace qcomm
