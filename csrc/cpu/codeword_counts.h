// How often each codeword occurs in a segment: what its own table is made of. Each thread counts what it has quantized,
// as long as that is in the first-level cache.
#pragma once

#include <cstdint>
#include <vector>

#include "qcomm/huffman.h"
#include "qcomm/quantize.h"

namespace qcomm {

class CodewordCounts {
public:
    explicit CodewordCounts(const Quantizer& q)
        : pairs_(q.coding == Coding::kPair),
          size_(static_cast<std::size_t>(alphabet_size(q.coding, q.num_bits))),
          tables_(kTables * size_) {}

    // Counts n symbols. Where pairs are coded, n is odd at most at the segment's end.
    void add(const std::uint16_t* symbols, int n) {
        if (!pairs_) {
            count(n, [&](int i) -> std::size_t { return symbols[i]; });
            return;
        }
        const auto pair = [](std::uint32_t first, std::uint32_t second) { return first | second << kPairBits; };
        count(n / 2, [&](int i) -> std::size_t { return pair(symbols[2 * i], symbols[2 * i + 1]); });
        if (n % 2 != 0) ++tables_[pair(symbols[n - 1], static_cast<std::uint32_t>(sigma_radius(kPairBits)))];
    }

    // counts[s] += how often codeword s was met.
    void add_to(std::vector<std::uint64_t>* counts) const {
        for (std::size_t i = 0; i < tables_.size(); ++i) (*counts)[i % size_] += tables_[i];
    }

private:
    // Several, so that a run of equal symbols does not wait for its own increments.
    static constexpr int kTables = 4;

    template <class Codeword>
    void count(int n, Codeword codeword) {
        int i = 0;
        for (; i + kTables <= n; i += kTables) {
            for (int t = 0; t < kTables; ++t) ++tables_[static_cast<std::size_t>(t) * size_ + codeword(i + t)];
        }
        for (; i < n; ++i) ++tables_[codeword(i)];
    }

    bool pairs_;
    std::size_t size_;
    std::vector<std::uint64_t> tables_;
};

}  // namespace qcomm
