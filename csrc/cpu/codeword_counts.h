// How often each codeword occurs in a segment, from which its own table is made. Each thread counts the symbols it has
// quantized while they are in the first-level cache.
//
// An increment waits until the one before has reached memory if both are of the same counter, and gradients have runs
// of equal symbols. So neighbours count in different tables, and where two symbols fit an index they are counted as
// one: half the increments, and a run of equal symbols then alternates between two tables.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "qcomm/format.h"
#include "qcomm/huffman.h"
#include "qcomm/quantize.h"

namespace qcomm {

// Two cache lines, which processors fetch together: threads whose counts lie side by side must not wait for each other.
constexpr std::size_t kLinePair = 128;

class alignas(kLinePair) CodewordCounts {
public:
    explicit CodewordCounts(const Quantizer& q)
        : bits_(q.num_bits),
          pairs_(q.coding == Coding::kPair),
          joint_(q.num_bits <= kMaxJointBits),
          stride_(std::size_t{1} << (joint_ ? 2 * bits_ : bits_)),
          recent_((joint_ ? 2 : 4) * stride_),
          totals_(static_cast<std::size_t>(alphabet_size(q.coding, q.num_bits))) {}

    // Counts n < 2^30 symbols; one of 32 bits cannot overflow before they are collected. Where pairs are coded, n is
    // odd at most at the segment's end.
    QCOMM_INLINE void add(const std::uint16_t* symbols, int n) {
        if (uncollected_ > kMaxUncollected - n) collect();
        uncollected_ += n;
        const int done = joint_ ? add_joint(symbols, n) : add_single(symbols, n);
        // Symbols left over go to the totals at once. In pairs there is at most one, with the level zero as its second.
        for (int i = done; i < n; ++i) {
            const std::size_t zero = static_cast<std::size_t>(sigma_radius(kPairBits)) << kPairBits;
            ++totals_[symbols[i] | (pairs_ ? zero : 0)];
        }
    }

    // counts[s] += how often codeword s was met.
    void add_to(std::vector<std::uint64_t>* counts) {
        collect();
        for (std::size_t s = 0; s < totals_.size(); ++s) (*counts)[s] += totals_[s];
    }

private:
    static constexpr int kMaxJointBits = 6;  // two tables of 2^12 counters are 32 KiB, a first-level cache
    static constexpr std::int64_t kMaxUncollected = std::int64_t{1} << 32;  // a counter has 32 bits

    // Counts two neighbours of few bits as one, and returns how many symbols that covers. Four symbols are one load,
    // and one shift puts each second symbol beside the first: of `joint`, the lowest bits are first | second << bits,
    // and those from bit 32 on third | fourth << bits.
    QCOMM_INLINE int add_joint(const std::uint16_t* symbols, int n) {
        // Copies, which the increments cannot be taken to change.
        std::uint32_t *const even = recent_.data(), *const odd = even + stride_;
        const std::uint32_t mask = static_cast<std::uint32_t>(stride_) - 1u;
        const int shift = 16 - bits_, done = n / 4 * 4;
        for (int i = 0; i < done; i += 4) {
            std::uint64_t four;
            std::memcpy(&four, symbols + i, sizeof(four));
            const std::uint64_t joint = four | four >> shift;
            ++even[joint & mask];
            ++odd[joint >> 32 & mask];
        }
        if (n - done < 2) return done;
        ++even[symbols[done] | static_cast<std::uint32_t>(symbols[done + 1]) << bits_];
        return done + 2;
    }

    QCOMM_INLINE int add_single(const std::uint16_t* symbols, int n) {
        std::uint32_t *const a = recent_.data(), *const b = a + stride_, *const c = b + stride_, *const d = c + stride_;
        const int done = n / 4 * 4;
        for (int i = 0; i < done; i += 4) {
            std::uint64_t four;
            std::memcpy(&four, symbols + i, sizeof(four));
            ++a[four & 0xFFFF];
            ++b[four >> 16 & 0xFFFF];
            ++c[four >> 32 & 0xFFFF];
            ++d[four >> 48];
        }
        return done;
    }

    // Moves the recent counts to the totals. A joint count is one of each of its two symbols, unless pairs are coded.
    void collect() {
        const std::size_t low = (std::size_t{1} << bits_) - 1;
        for (std::size_t table = 0; table < recent_.size(); table += stride_) {
            for (std::size_t i = 0; i < stride_; ++i) {
                const std::uint32_t count = recent_[table + i];
                if (joint_ && !pairs_) {
                    totals_[i & low] += count;
                    totals_[i >> bits_] += count;
                } else {
                    totals_[i] += count;
                }
            }
        }
        std::fill(recent_.begin(), recent_.end(), 0u);
        uncollected_ = 0;
    }

    int bits_;
    bool pairs_;  // a codeword is two symbols
    bool joint_;  // recent_ counts two symbols
    std::size_t stride_;
    // Several tables, so that a run of equal symbols does not wait for its own increments. Counters of 32 bits let them
    // stay in the first-level cache; the totals have 64.
    std::vector<std::uint32_t> recent_;
    std::vector<std::uint64_t> totals_;
    std::int64_t uncollected_ = 0;
};

}  // namespace qcomm
