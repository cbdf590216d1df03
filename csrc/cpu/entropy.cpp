// The sample of a tensor. Each thread has a histogram of its own; sums of integers have no order, so the result does
// not depend on the number of threads.
#include "qcomm/entropy.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "qcomm/format.h"
#include "qcomm/parallel.h"
#include "qcomm/quantize.h"

namespace qcomm {
namespace {

// A small sample's entropy is too small, since it misses what is rare; a small tensor is sampled whole.
constexpr std::int64_t kMinSample = 1024;
constexpr std::int64_t kSamplesPerThread = 1 << 15;  // each a cache miss: about 0.1 ms

}  // namespace

std::uint64_t entropy_fixed(const std::uint32_t* counts, int bins) {
    std::uint64_t n = 0, weighted = 0;
    for (int i = 0; i < bins; ++i) {
        n += counts[i];
        weighted += counts[i] * log2_fixed(counts[i]);
    }
    return entropy_of_sums(n, weighted, bins);
}

std::int64_t sample_size(std::int64_t count, double fraction) {
    const auto wanted = static_cast<std::int64_t>(std::ceil(fraction * static_cast<double>(count)));
    return std::min(count, std::max(kMinSample, wanted));
}

// Bins are those of a center grid, whose floor is one multiplication; `quantizer` is not used where lo == hi, since it
// would divide by 0.
std::vector<std::uint32_t> sample_histogram(const Values& values, double lo, double hi, int num_bits, double fraction,
                                            std::uint32_t seed, int threads) {
    const std::int64_t n = sample_size(values.count, fraction);
    const RangeQuantizer quantizer(Grid::kRangeCenter, num_bits, lo, hi);
    const int parts = part_count(n, kSamplesPerThread, threads);
    std::vector<std::vector<std::uint32_t>> found(static_cast<std::size_t>(parts),
                                                  std::vector<std::uint32_t>(std::size_t{1} << num_bits));
    parallel_for(n, parts, [&](int part, std::int64_t first, std::int64_t last) {
        std::uint32_t* const counts = found[static_cast<std::size_t>(part)].data();
        dispatch(values.dtype, [&](auto traits) {
            const Reader<decltype(traits)> reader(values);
            for (std::int64_t i = first; i < last; ++i) {
                const double x = static_cast<double>(reader[sample_index(i, n, values.count, seed)]);
                // Floor bins of [lo, hi]; a constant tensor has no bins to divide.
                ++counts[lo < hi ? quantizer(x) : 0u];
            }
        });
    });
    // Added on one thread: a histogram has at most 4096 bins.
    for (std::size_t part = 1; part < found.size(); ++part) {
        for (std::size_t bin = 0; bin < found[0].size(); ++bin) found[0][bin] += found[part][bin];
    }
    return std::move(found[0]);
}

}  // namespace qcomm
