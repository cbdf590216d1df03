// Helpers that the kernels share: lanes of a warp and their sum (by all 32 together), and which task a block has.
//
// A warp's lanes need not run in step, so each operation names all of them and waits until they arrive. It does not
// order memory between lanes: __syncwarp() stands where one writes a place that another has read.
#pragma once

#include <cstdint>

#include "launch.h"

namespace qcomm::cuda {

constexpr int kWarpLanes = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ int lane_number() { return static_cast<int>(threadIdx.x % kWarpLanes); }
__device__ __forceinline__ int warp_number() { return static_cast<int>(threadIdx.x / kWarpLanes); }
__device__ __forceinline__ unsigned lanes_below(int lane) {  // 0 to 32
    return lane < kWarpLanes ? (1u << lane) - 1u : kAllLanes;
}

// The lanes whose value has one of `bits`. nvcc turns such a comparison into three instructions; the hardware has one.
__device__ __forceinline__ unsigned ballot_bits(unsigned value, unsigned bits) {
#ifdef __CUDA_ARCH__
    unsigned lanes;
    asm volatile(
        "{ .reg .pred any; .reg .b32 found; and.b32 found, %1, %2; setp.ne.u32 any, found, 0;"
        " vote.sync.ballot.b32 %0, any, 0xFFFFFFFF; }"
        : "=r"(lanes)
        : "r"(value), "r"(bits));
    return lanes;
#else
    return __ballot_sync(kAllLanes, (value & bits) != 0);
#endif
}

// Returns the sum of the lanes up to and including this one, in five steps of doubling distance (Hillis and Steele,
// "Data parallel algorithms", CACM 29(12), 1986).
template <class T>
__device__ __forceinline__ T warp_inclusive_sum(T value) {
    for (int d = 1; d < kWarpLanes; d *= 2) {
        const T other = __shfl_up_sync(kAllLanes, value, static_cast<unsigned>(d));
        if (lane_number() >= d) value = static_cast<T>(value + other);
    }
    return value;
}

// Returns the last of `count` tasks, ordered by `first`, that begins at or before `at`. Launches cover many tensors,
// segments or packets with one grid, and this is how a block finds its own: some ten reads, which the cache has after
// the first block. Of tasks without anything in them, which begin where the next one does, it skips all.
template <class Task>
__device__ __forceinline__ int find_task(const Task* tasks, int count, std::int64_t at, std::int64_t Task::* first) {
    int low = 0;
    for (int high = count; high - low > 1;) {
        const int middle = (low + high) / 2;
        if (tasks[middle].*first <= at) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

}  // namespace qcomm::cuda
