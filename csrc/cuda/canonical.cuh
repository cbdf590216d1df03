// Canonical codewords from code lengths, by a thread block (specification: canonical_codes() of qcomm/huffman.h).
#pragma once

#include "block_sum.cuh"
#include "qcomm/format.h"

namespace qcomm::cuda {

// Behind the codewords of each length: the next codeword, and the rank of the next symbol.
struct CodeLevels {
    std::uint32_t end[kMaxCodeLength + 1], last_rank[kMaxCodeLength + 1];
};

// Calls put(symbol, codeword, length, rank) for each used symbol; ranks count by (length, symbol), and the codeword's
// first bit is its highest. Each thread has a run of neighbouring symbols. Begins behind a barrier and ends with one.
// `levels` may be null.
template <class Put>
__device__ void assign_codewords(const std::uint8_t* lengths, int size, int* scratch, CodeLevels* levels, Put put) {
    const int threads = static_cast<int>(blockDim.x), per_thread = (size + threads - 1) / threads;
    const int begin = static_cast<int>(threadIdx.x) * per_thread;
    const int end = begin + per_thread < size ? begin + per_thread : size;
    std::uint32_t codeword = 0;
    int rank = 0;
#pragma unroll 1
    for (int length = 1; length <= kMaxCodeLength; ++length, codeword <<= 1) {
        int mine = 0, total = 0;
        for (int s = begin; s < end; ++s) mine += lengths[s] == length;
        int before = block_exclusive_sum(mine, scratch, &total);
        for (int s = begin; s < end; ++s) {
            if (lengths[s] != length) continue;
            put(s, codeword + static_cast<std::uint32_t>(before), length, rank + before);
            ++before;
        }
        codeword += static_cast<std::uint32_t>(total);
        rank += total;
        if (levels != nullptr && threadIdx.x == 0) {
            levels->end[length] = codeword;
            levels->last_rank[length] = static_cast<std::uint32_t>(rank);
        }
        __syncthreads();
    }
}

// In packets a codeword's first bit is its lowest.
__device__ __forceinline__ std::uint32_t reverse_bits(std::uint32_t bits, int count) {
    return __brev(bits) >> (32 - count);
}

}  // namespace qcomm::cuda
