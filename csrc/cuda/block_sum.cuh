// Sums over the threads of a block: a scan within each warp by shuffles, one barrier, and every thread adds up the
// warps before its own. 8 to 16 warps are so few that this is cheaper than a second scan with a second barrier.
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

// Sums of a struct S of 64-bit numbers, all of which are listed in kFields.
template <class S, std::int64_t S::*... kFields>
struct FieldSums {
    static constexpr int kCount = sizeof...(kFields);
    static_assert(sizeof(S) == kCount * sizeof(std::int64_t), "a field is missing");

    // A round of a scan over more items than threads: returns *before, the sum of the rounds until now, plus `mine` of
    // the threads before this one, and adds the round to *before. The scratch may be used again after the next barrier.
    __device__ __forceinline__ static S scan(const S& mine, std::int64_t (*scratch)[kMaxWarps], S* before) {
        constexpr std::int64_t S::* fields[kCount] = {kFields...};
        S sum{};
        // A loop that is unrolled late needs fewer registers than an expression for each field.
#pragma unroll
        for (int f = 0; f < kCount; ++f) {
            std::int64_t round = 0;
            sum.*fields[f] = before->*fields[f] + block_exclusive_sum(mine.*fields[f], scratch[f], &round);
            before->*fields[f] += round;
        }
        return sum;
    }
};

}  // namespace qcomm::cuda
