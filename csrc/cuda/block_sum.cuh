// Sums over the threads of a block: a scan within each warp by shuffles, one barrier, and every thread adds up the
// warps before its own. 8 to 16 warps are so few that this is cheaper than a second scan with a second barrier.
#pragma once

#include "warp.cuh"

namespace qcomm::cuda {

// Scratch of block_exclusive_sum, in shared memory: one number a warp.
constexpr int kMaxWarps = 32;

// The two halves of a sum, with a barrier between them, so that several sums need only one. The first leaves each
// warp's sum in the scratch, and returns that of the warp's threads up to and including this one.
template <class T>
__device__ __forceinline__ T begin_block_sum(T value, T* scratch, int count) {
    const auto thread = static_cast<int>(threadIdx.x);
    const T inclusive = count > 1 ? warp_inclusive_sum(value) : value;
    if (thread == count - 1 || (lane_number() == kWarpLanes - 1 && thread < count)) scratch[warp_number()] = inclusive;
    return inclusive;
}
__device__ __forceinline__ void wait_for_block_sums() {
#ifndef QCOMM_PLANT_MISSING_BARRIER
    __syncthreads();
#endif
}
template <class T>
__device__ __forceinline__ T end_block_sum(T value, T inclusive, const T* scratch, T* total, int count) {
    T before = 0, sum = 0;
    for (int w = 0; w * kWarpLanes < count; ++w) {
        if (w == warp_number()) before = sum;
        sum = static_cast<T>(sum + scratch[w]);
    }
    *total = sum;
    return static_cast<T>(before + inclusive - value);
}

// The sum of the values of the threads before this one; *total receives that of all. Only the first `count` threads
// have a value, and get a sum: with few of them there is little to do. The scratch may be used again after the next
// barrier.
template <class T>
__device__ T block_exclusive_sum(T value, T* scratch, T* total, int count) {
    const T inclusive = begin_block_sum(value, scratch, count);
    wait_for_block_sums();
    return end_block_sum(value, inclusive, scratch, total, count);
}
template <class T>
__device__ T block_exclusive_sum(T value, T* scratch, T* total) {
    return block_exclusive_sum(value, scratch, total, static_cast<int>(blockDim.x));
}

// Sums of a struct S of 64-bit numbers, all of which are listed in kFields.
template <class S, std::int64_t S::*... kFields>
struct FieldSums {
    static constexpr int kCount = sizeof...(kFields);
    static_assert(sizeof(S) == kCount * sizeof(std::int64_t), "a field is missing");

    // A round of a scan over more items than threads: returns *before, the sum of the rounds until now, plus `mine` of
    // the threads before this one, and adds the round to *before. The first `count` threads take part. The scratch may
    // be used again after the next barrier.
    __device__ __forceinline__ static S scan(const S& mine, std::int64_t (*scratch)[kMaxWarps], S* before, int count) {
        constexpr std::int64_t S::* fields[kCount] = {kFields...};
        S sum{};
        // Loops that are unrolled late need fewer registers than an expression for each field.
#pragma unroll
        for (int f = 0; f < kCount; ++f) sum.*fields[f] = begin_block_sum(mine.*fields[f], scratch[f], count);
        wait_for_block_sums();
#pragma unroll
        for (int f = 0; f < kCount; ++f) {
            std::int64_t round = 0;
            const std::int64_t own = end_block_sum(mine.*fields[f], sum.*fields[f], scratch[f], &round, count);
            sum.*fields[f] = before->*fields[f] + own;
            before->*fields[f] += round;
        }
        return sum;
    }
};

}  // namespace qcomm::cuda
