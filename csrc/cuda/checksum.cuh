// The checksum of docs/format.md in one warp: lane j takes words j, j + 32, ... in order, then the lanes fold.
#pragma once

#include "warp.cuh"

namespace qcomm::cuda {

// A lane's state of a checksum whose words the caller hands over in order: they may come from memory, or pass by on
// their way to it.
class WarpChecksum {
public:
    __device__ WarpChecksum() : h_(0x9E3779B9u * static_cast<std::uint32_t>(lane_number() + 1)) {}

    __device__ __forceinline__ void absorb(std::uint32_t word) {
        h_ = (h_ ^ word) * 0x85EBCA6Bu;
        h_ ^= h_ >> 15;
    }

    // By the whole warp; every lane gets the result. `bytes` is the size of the words absorbed.
    __device__ std::uint32_t finish(std::int64_t bytes) {
        for (unsigned d = kWarpLanes / 2; d > 0; d /= 2) {
            const std::uint32_t other = __shfl_down_sync(kAllLanes, h_, d);
            h_ = h_ * 0xC2B2AE35u ^ (other << 13 | other >> 19);
        }
        return __shfl_sync(kAllLanes, h_, 0) ^ static_cast<std::uint32_t>(bytes);
    }

private:
    std::uint32_t h_;
};

// Absorbs this lane's words of a row in device memory: i, i + 32, ... in front of `end`. Several are on their way at
// once.
template <class Index>
__device__ inline void absorb_words(WarpChecksum& sum, const std::uint32_t* data, Index i, Index end) {
    constexpr int kAtOnce = 8;
    for (; i + (kAtOnce - 1) * kWarpLanes < end; i += kAtOnce * kWarpLanes) {
        std::uint32_t words[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) words[k] = data[i + k * kWarpLanes];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) sum.absorb(words[k]);
    }
#pragma unroll 1
    for (; i < end; i += kWarpLanes) sum.absorb(data[i]);
}

// Of `words` words in device memory, by a warp.
template <class Index>
__device__ inline std::uint32_t warp_checksum(const std::uint32_t* data, Index words) {
    WarpChecksum sum;
    absorb_words(sum, data, static_cast<Index>(lane_number()), words);
    return sum.finish(std::int64_t{4} * words);
}

}  // namespace qcomm::cuda
