// The words of CUDA that csrc/cuda uses, for a host compiler: see scheduler.h for how a kernel then runs.
//
// All shared memory is dynamic, one struct a kernel: it begins as garbage, is new for each block, and ends in a red
// zone (of an array inside it, UndefinedBehaviorSanitizer checks the bounds). Shuffles, ballots and matches order no
// memory;
// __syncwarp and barriers do, and so does a fence with an atomic.
//
// Not here, so not to be used by the kernels: __shared__ variables, asynchronous copies, cooperative groups, CUB.
// Inline PTX is not compiled for the host; the two places that have it have a plain version beside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(emulation::dynamic_memory)

#define threadIdx (emulation::this_thread().index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)
#define EMULATION_LINE int line = __builtin_LINE()

namespace emulation {

EMULATION_RAW inline const Thread& this_thread() { return *current; }

template <class T>
std::uint64_t to_bits(T value) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffles move up to 8 bytes");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(value));
    return bits;
}
template <class T>
T shuffle(unsigned mask, T value, unsigned source, int line) {
    const std::uint64_t bits = warp_operation(Wait::kShuffle, mask, to_bits(value), source, line);
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
template <class T, class F>
T atomic(T* p, F next) {
    before_atomic(p);
    T old, changed;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do changed = next(old);
    while (!__atomic_compare_exchange(p, &old, &changed, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    if (to_bits(old) != to_bits(changed)) progress();
    return old;
}
template <class T>
using Same = std::common_type_t<T>;  // not deduced

}  // namespace emulation

inline void __syncthreads(EMULATION_LINE) { emulation::block_barrier(false, line); }
inline int __syncthreads_count(int p, EMULATION_LINE) {
    return static_cast<int>(emulation::block_barrier(p != 0, line));
}
inline int __syncthreads_or(int p, EMULATION_LINE) { return emulation::block_barrier(p != 0, line) != 0; }
inline void __syncwarp(unsigned mask = ~0u, EMULATION_LINE) {
    emulation::warp_operation(emulation::Wait::kWarp, mask, 0, 0, line);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMULATION_LINE) {
    return static_cast<unsigned>(emulation::warp_operation(emulation::Wait::kBallot, mask, p != 0, 0, line));
}
inline int __any_sync(unsigned mask, int p, EMULATION_LINE) { return __ballot_sync(mask, p, line) != 0; }
inline int __all_sync(unsigned mask, int p, EMULATION_LINE) { return __ballot_sync(mask, p == 0, line) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATION_LINE) {
    const std::uint64_t bits = emulation::to_bits(value);
    return static_cast<unsigned>(emulation::warp_operation(emulation::Wait::kMatch, mask, bits, 0, line));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, EMULATION_LINE) {
    return emulation::shuffle(mask, value, static_cast<unsigned>(source) % emulation::kWarp, line);
}
// A lane that would ask beyond the warp gets its own value.
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, EMULATION_LINE) {
    const unsigned lane = emulation::this_thread().lane;
    return emulation::shuffle(mask, value, lane >= distance ? lane - distance : lane, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, EMULATION_LINE) {
    const unsigned lane = emulation::this_thread().lane;
    return emulation::shuffle(mask, value, lane + distance < emulation::kWarp ? lane + distance : lane, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, EMULATION_LINE) {
    return emulation::shuffle(mask, value, emulation::this_thread().lane ^ static_cast<unsigned>(lanes), line);
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __brev(unsigned v) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (v >> i & 1u) << (31 - i);
    return reversed;
}
template <class T>
T __ldg(const T* p) {
    return *p;
}

template <class T>
T atomicAdd(T* p, emulation::Same<T> v) {
    return emulation::atomic(p, [=](T old) { return static_cast<T>(old + v); });
}
template <class T>
T atomicMin(T* p, emulation::Same<T> v) {
    return emulation::atomic(p, [=](T old) { return v < old ? v : old; });
}
template <class T>
T atomicMax(T* p, emulation::Same<T> v) {
    return emulation::atomic(p, [=](T old) { return old < v ? v : old; });
}
template <class T>
T atomicOr(T* p, emulation::Same<T> v) {
    return emulation::atomic(p, [=](T old) { return static_cast<T>(old | v); });
}
template <class T>
T atomicCAS(T* p, emulation::Same<T> expected, emulation::Same<T> v) {
    return emulation::atomic(p, [=](T old) { return old == expected ? v : old; });
}
template <class T>
T atomicExch(T* p, emulation::Same<T> v) {
    return emulation::atomic(p, [=](T) { return v; });
}
inline void __threadfence() { emulation::fence(); }
inline void __threadfence_block() { emulation::fence(); }

template <class... P, class... A>
void launch_kernel(void (*kernel)(P...), unsigned blocks, unsigned threads, std::size_t shared_bytes, void*,
                   A... args) {
    if (blocks > 0) emulation::launch(blocks, threads, shared_bytes, [=] { kernel(args...); });
}
