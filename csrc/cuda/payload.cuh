// How a warp writes a part of a packet: words pass through its lanes in the order of the checksum.
#pragma once

#include "checksum.cuh"

namespace qcomm::cuda {

// Words [lane's first, end) of a row that a warp writes; word i is word_at(i). Several are read before the first is
// written: the compiler may not move a read above a write, and each would wait for memory by itself.
template <class Index, class WordAt>
__device__ __forceinline__ void write_words(std::uint32_t* to, Index first, Index end, WarpChecksum& sum,
                                            const WordAt& word_at) {
    constexpr int kAtOnce = 8;
    Index i = first;
    for (; i + (kAtOnce - 1) * kWarpLanes < end; i += kAtOnce * kWarpLanes) {
        std::uint32_t words[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) words[k] = word_at(i + k * kWarpLanes);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            to[i + k * kWarpLanes] = words[k];
            sum.absorb(words[k]);
        }
    }
#pragma unroll 1
    for (; i < end; i += kWarpLanes) {
        const std::uint32_t word = word_at(i);
        to[i] = word;
        sum.absorb(word);
    }
}

}  // namespace qcomm::cuda
