// The choice of a sigma segment's code: a sample of neighbouring pairs is quantized and each candidate is priced, a
// static code by its lengths, a code of the segment's own by its entropy (corrected for the sample's size) and its
// table. All of it is float64 arithmetic in the order written, which docs/format.md defines: csrc/cpu and csrc/cuda
// share it so that both write the same packets. A decoder needs none of it.
#pragma once

#include <cstdint>

#include "qcomm/entropy.h"
#include "qcomm/format.h"
#include "qcomm/huffman.h"
#include "qcomm/quantize.h"

namespace qcomm {

// These numbers are part of the choice, and so of the packets that `auto` writes: changing one changes bytes.
// The fraction that a RangeGrid samples by default; for large tensors the next number is the bound.
constexpr double kSigmaSampleFraction = 0.03;
constexpr std::int64_t kMaxSampledPairs = 1 << 14;  // more would sharpen nothing and cost more than the encoder
constexpr double kOwnTableMustSave = 0.03;          // of the bits: below that a static table's speed is worth more
constexpr double kHuffmanRedundancy = 0.02;         // bits a codeword above entropy
constexpr double kTableBits = 6.0;                  // a used symbol in a list of code lengths
constexpr std::int64_t kTablePairs = 1 << 14;       // sampled for a segment's own table ...
constexpr int kMaxSampledAlphabet = 256;            // ... of at most so many codewords
// A literal, because the logarithms of two C libraries may differ in their last bit.
constexpr double kLn2 = 0x1.62e42fefa39efp-1;
// docs/format.md derives 8 to 134 bytes. Info and windows have 132, and 32 windows of 16 to 31 bits hold about 94 bytes
// of codewords.
constexpr std::int64_t kTypicalBlockBytes = 40;  // of a coded block beyond its codewords

// Returns how many neighbouring pairs of `count` values are sampled.
// A pair is two values, so half a sample's size reads as many. Fewer than two values have no pair, and a segment of
// them gets no code.
inline std::int64_t sampled_pairs(std::int64_t count) {
    const std::int64_t wanted = (sample_size(count, kSigmaSampleFraction) + 1) / 2;
    const std::int64_t most = wanted < kMaxSampledPairs ? wanted : kMaxSampledPairs;
    return count / 2 < most ? count / 2 : most;
}

// The sums of a sample's histogram that price a code: of the counts, of count * log2_fixed(count), of counts that are
// not 0, and of count * length in a static code. They are integers, so threads may add them in any order.
struct CodeSample {
    std::uint64_t n = 0, weighted = 0, used = 0, static_bits = 0;

    QCOMM_HOST_DEVICE void add(std::uint32_t count, unsigned static_length) {
        n += count;
        weighted += count * log2_fixed(count);
        used += count > 0;
        static_bits += std::uint64_t{count} * static_length;
    }
    // Returns the bits of `codewords` codewords of the static code: its mean length in the sample, times their number.
    // Prices divide by n: the sample must not be empty.
    QCOMM_HOST_DEVICE double static_cost(double codewords) const {
        return codewords * static_cast<double>(static_bits) / static_cast<double>(n);
    }
    // Returns the bits of as many codewords of a code made for the segment, its table included. A Huffman codeword has
    // at least one bit, however small the entropy.
    QCOMM_HOST_DEVICE double own_cost(double codewords, int bins) const {
        const double entropy = static_cast<double>(entropy_of_sums(n, weighted, bins)) / (1 << kLogFractionBits);
        const auto found = static_cast<double>(used);
        // Miller 1955: a sample's entropy is too small by this.
        const double bias = (found - 1.0) / (2.0 * static_cast<double>(n) * kLn2);
        // In the order of docs/format.md: a sum that is regrouped may round to another choice, and so to other bytes.
        const double bits = entropy + bias + kHuffmanRedundancy;
        return codewords * (bits > 1.0 ? bits : 1.0) + kTableBits * found;
    }
};

// Returns the cheapest code of `count` symbols. Tables are kNoTable where there is no such static code; `pairs` is null
// where the alphabet has none. On a tie single symbols win, and a static table wins unless a list on the wire saves
// kOwnTableMustSave of the bits: a static code needs no histogram and no table in the packet.
QCOMM_HOST_DEVICE inline SigmaCode cheapest_sigma_code(const CodeSample& singles, const CodeSample* pairs,
                                                       std::int64_t count, int num_bits, std::uint8_t single_table,
                                                       std::uint8_t pair_table) {
    const auto symbols = static_cast<double>(count);
    SigmaCode best_static{Coding::kSingle, single_table}, best_own{Coding::kSingle, kTableOnWire};
    bool has_static = single_table != kNoTable;
    double static_cost = has_static ? singles.static_cost(symbols) : 0.0;
    double own_cost = singles.own_cost(symbols, 1 << num_bits);
    if (pairs != nullptr) {
        // An odd last value counts as half a codeword, as in the specification.
        const double codewords = symbols / 2.0;
        if (pair_table != kNoTable) {
            const double cost = pairs->static_cost(codewords);
            if (!has_static || cost < static_cost) {
                has_static = true;
                static_cost = cost;
                best_static = {Coding::kPair, pair_table};
            }
        }
        const double cost = pairs->own_cost(codewords, alphabet_size(Coding::kPair, num_bits));
        if (cost < own_cost) {
            own_cost = cost;
            best_own.coding = Coding::kPair;
        }
    }
    return !has_static || own_cost < (1.0 - kOwnTableMustSave) * static_cost ? best_own : best_static;
}

// Tells whether the table of a sigma segment's own is made of a sample of its pairs, not of all values. Then quantizing
// and coding are one pass, as with a static table. Wide alphabets and short segments are counted whole: a sample would
// cost them more bits than it saves time.
QCOMM_HOST_DEVICE inline bool samples_own_table(Grid grid, Coding coding, int num_bits, std::int64_t count) {
    return grid == Grid::kSigma && alphabet_size(coding, num_bits) <= kMaxSampledAlphabet && count / 2 > kTablePairs;
}
// Returns the weight of a codeword that was met `count` times in the sample. No codeword has 0: any may occur among the
// other values.
QCOMM_HOST_DEVICE inline std::uint64_t sampled_weight(std::uint64_t count) { return 2 * count + 1; }
// Returns the bits of a segment's codewords by those of the sample, `bits` for codewords of weight 1.
QCOMM_HOST_DEVICE inline std::uint64_t scale_sampled_bits(std::uint64_t bits, Coding coding, int num_bits,
                                                          std::int64_t count) {
    const bool pairs = coding == Coding::kPair;
    const auto codewords = static_cast<std::uint64_t>(pairs ? (count + 1) / 2 : count);
    const auto sampled = static_cast<std::uint64_t>(pairs ? kTablePairs : 2 * kTablePairs);
    // Below 2^64: a sample has less than 2^20 bits of weights, a segment less than 2^40 values.
    return bits * codewords / (2 * sampled + static_cast<std::uint64_t>(alphabet_size(coding, num_bits)));
}

// Tells whether a list of `list_bytes` for codewords of `bits` bits pays in a sigma segment that takes `fixed_bytes` at
// fixed width. Such a segment cannot be written a second time, its residual being updated as blocks are written: so
// this is a forecast.
// Escapes are left out of both sides, since coded and fixed blocks store them alike.
QCOMM_HOST_DEVICE inline bool sigma_table_pays(std::uint64_t bits, std::int64_t list_bytes, std::int64_t blocks,
                                               std::int64_t fixed_bytes) {
    return static_cast<std::int64_t>(bits / 8) + list_bytes + kTypicalBlockBytes * blocks < fixed_bytes;
}

}  // namespace qcomm
