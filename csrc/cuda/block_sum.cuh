// Sums over the threads of a block.
#pragma once

#include "warp.cuh"

namespace qcomm::cuda {

// Scratch of block_exclusive_sum, in shared memory: one number a warp.
constexpr int kMaxWarps = 32;

// The sum of the values of the threads before this one; *total receives that of all. The scratch may be used again
// after the next barrier.
template <class T>
__device__ T block_exclusive_sum(T value, T* scratch, T* total) {
    const T inclusive = warp_inclusive_sum(value);
    if (lane_number() == kWarpLanes - 1) scratch[warp_number()] = inclusive;
#ifndef QCOMM_PLANT_MISSING_BARRIER
    __syncthreads();
#endif
    T before = 0, sum = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarpLanes; ++w) {
        if (w == warp_number()) before = sum;
        sum = static_cast<T>(sum + scratch[w]);
    }
    *total = sum;
    return static_cast<T>(before + inclusive - value);
}

}  // namespace qcomm::cuda
