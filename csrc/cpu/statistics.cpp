#include "qcomm/statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "qcomm/format.h"

namespace qcomm {
namespace {

constexpr int kSumBlock = 4096;

// Lanes hold independent accumulators, so the compiler may vectorise without reordering a single addition.
template <class T>
struct Accumulator {
    T low[kLanes], high[kLanes];
    double squares[kLanes];
    T poison = 0;  // x * 0 is NaN for every non-finite x: stays 0 while all is well

    Accumulator() {
        std::fill_n(low, kLanes, std::numeric_limits<T>::infinity());
        std::fill_n(high, kLanes, -std::numeric_limits<T>::infinity());
    }

    double sum_block(const T* u, int count) {
        std::fill_n(squares, kLanes, 0.0);
        T zeros[kLanes] = {};
        int i = 0;
        for (; i + kLanes <= count; i += kLanes) {
            for (int j = 0; j < kLanes; ++j) {
                const T x = u[i + j];
                low[j] = x < low[j] ? x : low[j];
                high[j] = x > high[j] ? x : high[j];
                squares[j] += static_cast<double>(x) * static_cast<double>(x);
                zeros[j] += x * T(0);
            }
        }
        for (int j = 0; i < count; ++i, ++j) {
            low[j] = std::min(low[j], u[i]);
            high[j] = std::max(high[j], u[i]);
            squares[j] += static_cast<double>(u[i]) * static_cast<double>(u[i]);
            zeros[j] += u[i] * T(0);
        }
        for (int j = 0; j < kLanes; ++j) poison += zeros[j];
        for (int d = kLanes / 2; d > 0; d /= 2) {
            for (int j = 0; j < d; ++j) squares[j] += squares[j + d];
        }
        return squares[0];
    }
};

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
    return dispatch(values.dtype, [&](auto traits) {
        using Tr = decltype(traits);
        using T = typename Tr::Arithmetic;
        const Reader<Tr> reader(values);
        Accumulator<T> accumulator;
        std::vector<double> sums;
        sums.reserve(static_cast<std::size_t>(ceil_div(values.count, kSumBlock)));
        T u[kSumBlock];
        for (std::int64_t begin = 0; begin < values.count; begin += kSumBlock) {
            const int n = static_cast<int>(std::min<std::int64_t>(kSumBlock, values.count - begin));
            reader.load(begin, n, u);
            sums.push_back(accumulator.sum_block(u, n));
        }
        Statistics result;
        result.finite = accumulator.poison == T(0);
        // + 0.0 turns -0.0 into 0.0: which zero a minimum finds depends on the order of the comparisons.
        result.minimum = static_cast<double>(*std::min_element(accumulator.low, accumulator.low + kLanes)) + 0.0;
        result.maximum = static_cast<double>(*std::max_element(accumulator.high, accumulator.high + kLanes)) + 0.0;
        result.sum_squares = pairwise_sum(sums);
        return result;
    });
}

}  // namespace qcomm
