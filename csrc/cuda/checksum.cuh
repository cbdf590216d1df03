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

// Of `words` words in device memory, by a warp.
__device__ inline std::uint32_t warp_checksum(const std::uint32_t* data, std::int64_t words) {
    WarpChecksum sum;
    for (std::int64_t i = lane_number(); i < words; i += kWarpLanes) sum.absorb(data[i]);
    return sum.finish(4 * words);
}

}  // namespace qcomm::cuda
