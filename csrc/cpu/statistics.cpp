// Blocks of 4096 values are measured by the kernels, in the format's order; here they are dealt to threads, and their
// sums are added in a fixed tree. Extremes and flags have no order.
#include "qcomm/statistics.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.h"
#include "qcomm/format.h"
#include "qcomm/parallel.h"

namespace qcomm {
namespace {

constexpr int kSumBlock = 4096;
constexpr std::int64_t kBlocksPerThread = 4 * kValuesPerThread / kSumBlock;  // a scan is that much cheaper than coding

// Neighbours become one sum, level by level, and an odd last one is carried over. The tree depends on the number of
// sums alone, which no other order of additions would: threads and GPUs must add alike.
double pairwise_sum(std::vector<double>& sums) {
    for (std::size_t n = sums.size(); n > 1; n = (n + 1) / 2) {
        for (std::size_t i = 0; i < n / 2; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
        if (n % 2 != 0) sums[n / 2] = sums[n - 1];
    }
    return sums.empty() ? 0.0 : sums[0];
}

}  // namespace

// Infinities stand for "none yet"; an empty tensor never meets them, as it returns before.
Statistics measure(const Values& values, int threads) {
    if (values.count == 0) return {};
    const Kernels& k = kernels();
    const std::int64_t blocks = ceil_div(values.count, kSumBlock);
    std::vector<double> sums(static_cast<std::size_t>(blocks));
    const int parts = part_count(blocks, kBlocksPerThread, threads);
    const double infinity = std::numeric_limits<double>::infinity();
    // Each thread's extremes, and one sum for each block: blocks are dealt to threads, but sums are not.
    std::vector<Statistics> found(static_cast<std::size_t>(parts), Statistics{infinity, -infinity, 0.0, true});
    parallel_for(blocks, parts, [&](int part, std::int64_t first, std::int64_t last) {
        // A copy on the thread's stack: neighbours in `found` share cache lines.
        Statistics own = found[static_cast<std::size_t>(part)];
        for (std::int64_t i = first; i < last; ++i) {
            const std::int64_t begin = i * kSumBlock;
            const int n = static_cast<int>(std::min<std::int64_t>(kSumBlock, values.count - begin));
            const BlockStatistics block = k.measure(values, begin, n);
            own.minimum = std::min(own.minimum, block.minimum);
            own.maximum = std::max(own.maximum, block.maximum);
            own.finite &= block.finite;
            sums[static_cast<std::size_t>(i)] = block.sum_squares;
        }
        found[static_cast<std::size_t>(part)] = own;
    });
    Statistics result = found[0];
    for (const Statistics& part : found) {
        result.minimum = std::min(result.minimum, part.minimum);
        result.maximum = std::max(result.maximum, part.maximum);
        result.finite &= part.finite;
    }
    // + 0.0 turns -0.0 into 0.0: which zero a minimum finds depends on the order of the comparisons.
    result.minimum += 0.0;
    result.maximum += 0.0;
    result.sum_squares = pairwise_sum(sums);
    return result;
}

}  // namespace qcomm
