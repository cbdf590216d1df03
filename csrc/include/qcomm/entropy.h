// Entropy of a sampled M-bit histogram, in exact integer arithmetic: the number of bits N that follows from it is the
// same on every machine. A logarithm of the C library is not, since libraries differ in its last bit, and N is rounded
// up from it. The method: Oland and Raj, "Reducing communication overhead in distributed learning by an order of
// magnitude", ICASSP 2015.
#pragma once

#include <cstdint>
#include <vector>

#include "qcomm/values.h"

namespace qcomm {

// With 24 bits a sum of count * log2_fixed(count) over fewer than 2^32 samples stays below 2^61, and an entropy is
// exact as a double. With 12 bits a histogram is no larger than an alphabet of kMaxCodedBits, so histogram.cuh of
// csrc/cuda counts the one like the other.
constexpr int kLogFractionBits = 24;  // of a logarithm or an entropy in fixed point
constexpr int kMaxEntropyBits = 12;   // M: at most 4096 bins

// Returns floor(2^24 * log2(v)) to within the last bit, and 0 for v = 0. The integer part is the highest bit's
// position. Squaring the mantissa m in [1, 2) doubles its logarithm: the next bit of the fraction is 1 if m^2 >= 2, and
// then m^2 is halved. A product of two numbers of 32 bits fits 64, so no bit is lost before it is shifted out.
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

// Returns the entropy in bits * 2^24 of counts that sum to 0 < n < 2^32, `weighted` being the sum of count *
// log2_fixed(count): H = log2(n) - sum(c * log2(c)) / n. Sums of integers have no order, so threads may add their parts
// as they come. The errors of the logarithms could leave [0, log2(bins)], hence the bounds.
QCOMM_HOST_DEVICE inline std::uint64_t entropy_of_sums(std::uint64_t n, std::uint64_t weighted, int bins) {
    std::uint64_t most = 0;  // log2(bins)
    while (bins >> most > 1) ++most;
    most <<= kLogFractionBits;
    const std::uint64_t whole = n * log2_fixed(static_cast<std::uint32_t>(n));
    // Compared before they are subtracted: unsigned numbers have no negative difference.
    const std::uint64_t h = whole > weighted ? (whole - weighted) / n : 0;
    return h < most ? h : most;
}
// The same of a histogram of `bins` counts.
std::uint64_t entropy_fixed(const std::uint32_t* counts, int bins);

// Returns how many of `count` values are sampled: max(1024, ceil(fraction * count)), but not more than there are.
// Precondition: 0 < fraction <= 1. Plans for a device call it on the host, so both sample the same values.
std::int64_t sample_size(std::int64_t count, double fraction);

// Returns the index of sample i of n <= count values: one from each stride of count / n, and a hash of i and `seed`
// says where in the stride. Strides spread the sample over the tensor; the hash keeps it from falling in step with a
// period of the values, such as the length of a row. The hash: the "lowbias32" finalizer of C. Wellons, 2018.
// Precondition: 0 <= i < n. Strides do not overlap, so no value is sampled twice.
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

// Returns the sample's histogram over 2^num_bits floor bins of [lo, hi], the extremes of u; all is in bin 0 when they
// are equal. It works on up to `threads` threads.
// Preconditions: 1 <= num_bits <= kMaxEntropyBits, hi - lo is finite, and the sample has fewer than 2^32 values, as
// counters have 32 bits. Where hi - lo is too small to divide by, values fall into the first and the last bin.
std::vector<std::uint32_t> sample_histogram(const Values& values, double lo, double hi, int num_bits, double fraction,
                                            std::uint32_t seed, int threads = 1);

}  // namespace qcomm
