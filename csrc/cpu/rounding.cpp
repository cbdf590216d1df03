// The loop is kernels_loops.inl's; here it is dealt to threads.
#include "qcomm/rounding.h"

#include "kernels.h"
#include "qcomm/parallel.h"

namespace qcomm {

void divide_to_bfloat(const float* values, std::int64_t count, float divisor, std::uint16_t* out, int threads) {
    const Kernels& k = kernels();
    // The loop waits for memory rather than for arithmetic, so a thread needs more values than an encoder's to pay:
    // these are a quarter of a millisecond.
    parallel_for(count, part_count(count, 8 * kValuesPerThread, threads),
                 [&](int, std::int64_t begin, std::int64_t end) {
                     k.divide_to_bfloat(values + begin, end - begin, divisor, out + begin);
                 });
}

}  // namespace qcomm
