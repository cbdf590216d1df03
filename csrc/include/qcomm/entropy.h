// Entropy of a sampled M-bit histogram, in exact integer arithmetic: the number of bits N that follows from it is the
// same on every machine. The method: Oland and Raj, "Reducing communication overhead in distributed learning by an
// order of magnitude", ICASSP 2015.
#pragma once

#include <cstdint>
#include <vector>

#include "qcomm/values.h"

namespace qcomm {

constexpr int kLogFractionBits = 24;
constexpr int kMaxEntropyBits = 12;

// floor(2^24 * log2(v)) to within the last bit, by repeated squaring; 0 for v = 0.
QCOMM_HOST_DEVICE inline std::uint64_t log2_fixed(std::uint32_t v) {
    if (v == 0) return 0;
    int exponent = 0;
    while (v >> exponent > 1) ++exponent;
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

// Entropy in bits * 2^24 of counts that sum to n < 2^32, `weighted` being the sum of count * log2_fixed(count).
QCOMM_HOST_DEVICE inline std::uint64_t entropy_of_sums(std::uint64_t n, std::uint64_t weighted, int bins) {
    std::uint64_t most = 0;  // log2(bins)
    while (bins >> most > 1) ++most;
    most <<= kLogFractionBits;
    const std::uint64_t whole = n * log2_fixed(static_cast<std::uint32_t>(n));
    const std::uint64_t h = whole > weighted ? (whole - weighted) / n : 0;
    return h < most ? h : most;
}
// Of a histogram.
std::uint64_t entropy_fixed(const std::uint32_t* counts, int bins);

// How many of `count` values are looked at: max(1024, ceil(fraction * count)), but not more than there are.
std::int64_t sample_size(std::int64_t count, double fraction);

// Index of sample i of n: one from each stride, where in the stride a hash of `seed` decides.
QCOMM_HOST_DEVICE inline std::int64_t sample_index(std::int64_t i, std::int64_t n, std::int64_t count,
                                                   std::uint32_t seed) {
    const std::int64_t stride = count / n;
    std::uint32_t h = seed + static_cast<std::uint32_t>(i);
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    h ^= h >> 16;
    // The stride is below 2^32: a sample has at least 1024 values and a tensor fewer than 2^42.
    return i * stride + static_cast<std::int64_t>(h * static_cast<std::uint64_t>(stride) >> 32);
}

// Histogram of the sample over 2^num_bits floor bins of [lo, hi]; all in bin 0 when lo == hi. On
// up to `threads` threads.
std::vector<std::uint32_t> sample_histogram(const Values& values, double lo, double hi, int num_bits, double fraction,
                                            std::uint32_t seed, int threads = 1);

}  // namespace qcomm
