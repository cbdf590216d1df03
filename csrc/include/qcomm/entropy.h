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
std::uint64_t log2_fixed(std::uint32_t v);

// Entropy in bits * 2^24 of a histogram whose counts sum to less than 2^32.
std::uint64_t entropy_fixed(const std::uint32_t* counts, int bins);

// How many of `count` values are looked at: max(1024, ceil(fraction * count)), but not more than there are.
std::int64_t sample_size(std::int64_t count, double fraction);

// Index of sample i of n: one from each stride, where in the stride a hash of `seed` decides.
std::int64_t sample_index(std::int64_t i, std::int64_t n, std::int64_t count, std::uint32_t seed);

// Histogram of the sample over 2^num_bits floor bins of [lo, hi]; all in bin 0 when lo == hi. On
// up to `threads` threads.
std::vector<std::uint32_t> sample_histogram(const Values& values, double lo, double hi, int num_bits, double fraction,
                                            std::uint32_t seed, int threads = 1);

}  // namespace qcomm
