#include "qcomm/entropy.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "qcomm/format.h"
#include "qcomm/parallel.h"
#include "qcomm/quantize.h"

namespace qcomm {
namespace {

constexpr std::int64_t kMinSample = 1024;
constexpr std::int64_t kSamplesPerThread = 1 << 15;  // each a cache miss: about 0.1 ms

std::uint32_t mix(std::uint32_t h) {
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    return h ^ h >> 16;
}

}  // namespace

std::uint64_t log2_fixed(std::uint32_t v) {
    if (v == 0) return 0;
    const int exponent = 31 - __builtin_clz(v);
    std::uint64_t mantissa = static_cast<std::uint64_t>(v) << (31 - exponent);  // 1.31 fixed point
    auto result = static_cast<std::uint64_t>(exponent) << kLogFractionBits;
    for (int bit = kLogFractionBits - 1; bit >= 0; --bit) {
        mantissa = mantissa * mantissa >> 31;
        if (mantissa >> 32 != 0) {
            mantissa >>= 1;
            result |= std::uint64_t{1} << bit;
        }
    }
    return result;
}

std::uint64_t entropy_fixed(const std::uint32_t* counts, int bins) {
    std::uint64_t n = 0, weighted = 0;
    int log_bins = 0;
    while (1 << log_bins < bins) ++log_bins;
    for (int i = 0; i < bins; ++i) {
        n += counts[i];
        weighted += counts[i] * log2_fixed(counts[i]);
    }
    if (n == 0) return 0;
    const std::uint64_t whole = n * log2_fixed(static_cast<std::uint32_t>(n));
    const std::uint64_t h = whole > weighted ? (whole - weighted) / n : 0;
    return std::min(h, static_cast<std::uint64_t>(log_bins) << kLogFractionBits);
}

std::int64_t sample_size(std::int64_t count, double fraction) {
    const auto wanted = static_cast<std::int64_t>(std::ceil(fraction * static_cast<double>(count)));
    return std::min(count, std::max(kMinSample, wanted));
}

std::int64_t sample_index(std::int64_t i, std::int64_t n, std::int64_t count, std::uint32_t seed) {
    const std::int64_t stride = count / n;
    const std::uint64_t r = mix(seed + static_cast<std::uint32_t>(i));
    // The stride is below 2^32: a sample has at least 1024 values and a tensor fewer than 2^42.
    return i * stride + static_cast<std::int64_t>(r * static_cast<std::uint64_t>(stride) >> 32);
}

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
                ++counts[lo < hi ? quantizer(x) : 0u];
            }
        });
    });
    for (std::size_t part = 1; part < found.size(); ++part) {
        for (std::size_t bin = 0; bin < found[0].size(); ++bin) found[0][bin] += found[part][bin];
    }
    return std::move(found[0]);
}

}  // namespace qcomm
