#include "qcomm/rounding.h"

#include "kernels.h"
#include "qcomm/parallel.h"

namespace qcomm {

void divide_to_bfloat(const float* values, std::int64_t count, float divisor, std::uint16_t* out, int threads) {
    const Kernels& k = kernels();
    // Each thread has a quarter of a millisecond to do.
    parallel_for(count, part_count(count, 8 * kValuesPerThread, threads),
                 [&](int, std::int64_t begin, std::int64_t end) {
                     k.divide_to_bfloat(values + begin, end - begin, divisor, out + begin);
                 });
}

}  // namespace qcomm
