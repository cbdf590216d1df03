#include "qcomm/statistics.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.h"
#include "qcomm/format.h"

namespace qcomm {
namespace {

constexpr int kSumBlock = 4096;

double pairwise_sum(std::vector<double>& sums) {
    for (std::size_t n = sums.size(); n > 1; n = (n + 1) / 2) {
        for (std::size_t i = 0; i < n / 2; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
        if (n % 2 != 0) sums[n / 2] = sums[n - 1];
    }
    return sums.empty() ? 0.0 : sums[0];
}

}  // namespace

Statistics measure(const Values& values) {
    if (values.count == 0) return {};
    const Kernels& k = kernels();
    std::vector<double> sums;
    sums.reserve(static_cast<std::size_t>(ceil_div(values.count, kSumBlock)));
    Statistics result;
    double low = std::numeric_limits<double>::infinity(), high = -low;
    alignas(64) double scratch[kSumBlock];  // room for either arithmetic
    for (std::int64_t begin = 0; begin < values.count; begin += kSumBlock) {
        const int n = static_cast<int>(std::min<std::int64_t>(kSumBlock, values.count - begin));
        const BlockStatistics block = k.measure(load_block(k, values, begin, n, scratch), values.dtype, n);
        low = std::min(low, block.minimum);
        high = std::max(high, block.maximum);
        result.finite &= block.finite;
        sums.push_back(block.sum_squares);
    }
    // + 0.0 turns -0.0 into 0.0: which zero a minimum finds depends on the order of the comparisons.
    result.minimum = low + 0.0;
    result.maximum = high + 0.0;
    result.sum_squares = pairwise_sum(sums);
    return result;
}

}  // namespace qcomm
