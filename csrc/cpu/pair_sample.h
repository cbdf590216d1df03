// A sample of a sigma segment's neighbouring values, quantized: what its code is chosen by, and made of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "qcomm/format.h"
#include "qcomm/values.h"

namespace qcomm {

// Histograms of the same pairs, so that codes of both kinds are priced by the same values.
struct PairSample {
    explicit PairSample(int num_bits) : singles(std::size_t{1} << num_bits), pairs(num_bits == kPairBits ? 256 : 0) {}
    std::vector<std::uint32_t> singles, pairs;  // of the symbols, and for nibbles of the pairs
};

// Draws `n` neighbours 2a and 2a + 1, for indices a of a sample of half the values, with at most `threads` threads.
PairSample draw_pairs(const Values& values, int num_bits, double step, std::int64_t n, std::uint32_t seed, int threads);

}  // namespace qcomm
