// Counting codewords in shared memory. Where one codeword of ten thousand is almost all of them, atomic additions to
// its counter would wait for each other; so a warp counts its most frequent codeword with a ballot, in a register, and
// the counters of the others stand in shared memory several times over, one set for one or a few warps.
#pragma once

#include "launch.h"
#include "qcomm/format.h"
#include "tasks.h"
#include "warp.cuh"

namespace qcomm::cuda {

constexpr int kHistogramThreads = 256;
constexpr int kHistogramWarps = kHistogramThreads / kWarpLanes;
constexpr int kHistogramCounters = 8192;  // 32 KiB

// The counters of a thread block, `size` <= 4096 codewords several times over.
class SharedCounts {
public:
    __device__ SharedCounts(unsigned* counters, int size)
        : counters_(counters),
          size_(size),
          copies_(kHistogramCounters / size < kHistogramWarps ? kHistogramCounters / size : kHistogramWarps) {}

    // By all threads; a barrier must follow.
    __device__ void clear() const {
        for (int i = static_cast<int>(threadIdx.x); i < copies_ * size_; i += kHistogramThreads) counters_[i] = 0;
    }
    // Returns the counters of the calling warp, which it may share with others: additions are atomic.
    __device__ unsigned* own() const { return counters_ + warp_number() % copies_ * size_; }

    // Adds them to counters in device memory; by all threads, behind a barrier.
    __device__ void flush(Count* to) const {
        for (int s = static_cast<int>(threadIdx.x); s < size_; s += kHistogramThreads) {
            unsigned sum = 0;
            for (int c = 0; c < copies_; ++c) sum += counters_[c * size_ + s];
            if (sum > 0) atomicAdd(&to[s], static_cast<Count>(sum));
        }
    }

private:
    unsigned* counters_;
    int size_, copies_;
};

// The counting of one warp: its most frequent codeword in a register, all others in shared memory.
class WarpCounter {
public:
    __device__ explicit WarpCounter(unsigned* counters) : counters_(counters) {}

    // A codeword in every lane that has one; by the whole warp.
    __device__ __forceinline__ void add(std::uint32_t codeword, bool present) {
        if (frequent_ == kNone) frequent_ = most_frequent(codeword, present);
        const bool hit = present && codeword == frequent_;
        hits_ += static_cast<unsigned>(__popc(__ballot_sync(kAllLanes, hit)));
        if (present && !hit) atomicAdd(&counters_[codeword], 1u);
    }
    // After the last add(); by the whole warp.
    __device__ void finish() const {
        if (lane_number() == 0 && hits_ > 0) atomicAdd(&counters_[frequent_], hits_);
    }

private:
    static constexpr std::uint32_t kNone = ~0u;

    // Returns the codeword that most lanes have, of those the largest. It is looked for in the first row only: a guess
    // that turns out wrong costs time, and no count.
    __device__ static std::uint32_t most_frequent(std::uint32_t codeword, bool present) {
        const unsigned alike = __match_any_sync(kAllLanes, present ? codeword : kNone);
        unsigned best = present ? static_cast<unsigned>(__popc(alike)) << 16 | codeword : 0u;
        for (int d = kWarpLanes / 2; d > 0; d /= 2) {
            const unsigned other = __shfl_xor_sync(kAllLanes, best, d);
            best = other > best ? other : best;
        }
        return best & 0xFFFFu;
    }

    unsigned* counters_;
    std::uint32_t frequent_ = kNone;
    unsigned hits_ = 0;
};

// Codewords of u[begin, begin + n) to a warp's counters; warps take rows in turn.
template <bool kPairs, class Levels, class Values>
__device__ void count_codewords(const Values& u, const Levels& grid, std::int64_t begin, int n, unsigned* counters) {
    constexpr int kPerLane = kPairs ? 2 : 1;
    WarpCounter counter(counters);
#pragma unroll 4
    for (int row = warp_number() * kWarpLanes * kPerLane; row < n; row += kHistogramThreads * kPerLane) {
        const int i = row + lane_number() * kPerLane;
        std::uint32_t codeword = 0;
        if (i < n) codeword = grid(u[begin + i]);
        if constexpr (kPairs) {
            const auto zero = static_cast<std::uint32_t>(sigma_radius(kPairBits));
            codeword |= (i + 1 < n ? grid(u[begin + i + 1]) : zero) << kPairBits;
        }
        counter.add(codeword, i < n);
    }
    counter.finish();
}

}  // namespace qcomm::cuda
