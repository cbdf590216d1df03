// Optimal code lengths under a limit, by a thread block: package-merge, each level merged by all threads at once. A
// thread finds the two items of its package by a binary search along a diagonal of the merge, so that a level costs two
// barriers; of each level only the packages stay, and which items were symbols. The lengths follow by walking back, as
// in csrc/cpu/huffman.cpp, and are the same: ties go by symbol, and symbols before packages.
//
//   keys      | count << 12 | symbol, ascending | ...        64 bits; unused symbols lie behind, as all ones
//   flags     | level 1: 4096 pairs of items * 2 bits | level 2 ...     1 KiB a level
//   packages  two arrays of 64 bits, of this level and of the one before
//
// Sources: L. Larmore and D. Hirschberg, "A fast algorithm for optimal length-limited Huffman codes", J. ACM 37(3),
// 1990; O. Green, R. McColl and D. Bader, "GPU merge path", ICS 2012.
#pragma once

#include "histogram.cuh"
#include "qcomm/format.h"
#include "warp.cuh"

namespace qcomm::cuda {

constexpr int kCodeThreads = 512;
constexpr int kMaxAlphabet = 1 << kMaxCodedBits;
constexpr int kSymbolBits = kMaxCodedBits;  // below the count in a key
constexpr int kNearSymbols = 1024;          // up to this number of used ones have their packages in shared memory

// Of each level but the first, whose items are all symbols: which items are. Of each pair one bit for its first item
// and one for its second.
struct SymbolFlags {
    std::uint32_t words[kMaxCodeLength - 1][2][kMaxAlphabet / kWarpLanes];
};
static_assert(3 * kNearSymbols <= kMaxAlphabet, "keys and both arrays of packages");

// Bitonic sort of `size` keys, a power of two. Begins behind a barrier and ends with one.
__device__ inline void sort_keys(Count* keys, int size) {
    for (int k = 2; k <= size; k *= 2) {
        for (int j = k / 2; j > 0; j /= 2) {
            for (int t = static_cast<int>(threadIdx.x); t < size / 2; t += kCodeThreads) {
                const int low = 2 * t - (t & (j - 1)), high = low + j;
                const Count a = keys[low], b = keys[high];
                if ((a > b) == ((low & k) == 0)) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
            __syncthreads();
        }
    }
}

// A level's items: n symbols and `count` packages, merged.
struct Level {
    const Count* keys;
    int n;
    const Count* packages;
    int count;

    __device__ __forceinline__ Count symbol(int i) const { return keys[i] >> kSymbolBits; }
    // Returns how many of the first `at` items are symbols. Items `at` of the merge lie on the diagonal symbols +
    // packages = at; along it, a symbol is taken as long as it is no heavier than the package that would stand in its
    // place.
    __device__ int symbols_before(int at) const {
        int low = at > count ? at - count : 0, high = at < n ? at : n;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (symbol(middle) <= packages[at - 1 - middle]) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }
    // The weight of the item that follows *symbols symbols and *before packages, which it advances; whether it is a
    // symbol.
    __device__ __forceinline__ bool next(int* symbols, int* before, Count* weight) const {
        const bool is_symbol = *before >= count || (*symbols < n && symbol(*symbols) <= packages[*before]);
        *weight = is_symbol ? symbol((*symbols)++) : packages[(*before)++];
        return is_symbol;
    }
};

// used[level] = how many of the cheapest symbols a level uses, for `limit` levels and the first n >= 2 keys of
// kMaxAlphabet. `far` and `farther` have room for n packages each in device memory. Begins behind a barrier and ends
// with one.
__device__ inline void merge_packages(Count* keys, int n, int limit, Count* far, Count* farther, SymbolFlags* flags,
                                      int* used) {
    Count* from = n <= kNearSymbols ? keys + kNearSymbols : far;
    Count* to = n <= kNearSymbols ? keys + 2 * kNearSymbols : farther;
    int count = n / 2;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kCodeThreads)
        from[i] = (keys[2 * i] >> kSymbolBits) + (keys[2 * i + 1] >> kSymbolBits);
    __syncthreads();
#pragma unroll 1
    for (int depth = 1; depth < limit; ++depth) {
        const Level level{keys, n, from, count};
        const int next_count = (n + count) / 2;
        for (int row = warp_number() * kWarpLanes; row < next_count; row += kCodeThreads) {
            const int i = row + lane_number();
            bool first = false, second = false;
            if (i < next_count) {
                int symbols = level.symbols_before(2 * i), before = 2 * i - symbols;
                Count a, b;
                first = level.next(&symbols, &before, &a);
                second = level.next(&symbols, &before, &b);
                to[i] = a + b;
            }
            const unsigned firsts = __ballot_sync(kAllLanes, first), seconds = __ballot_sync(kAllLanes, second);
            if (lane_number() == 0) {
                flags->words[depth - 1][0][row / kWarpLanes] = firsts;
                flags->words[depth - 1][1][row / kWarpLanes] = seconds;
            }
        }
        count = next_count;
        Count* const free = from;
        from = to;
        to = free;
        __syncthreads();
    }
    // One warp walks back; a level's flags are a few words for each lane. A level takes its cheapest items, an even
    // number, of which each package is two items of the level below.
    if (warp_number() == 0) {
        int take = 2 * n - 2;  // items; always an even number
        for (int depth = limit - 1; depth > 0; --depth) {
            int symbols = 0;
            for (int w = lane_number(); w * kWarpLanes < take / 2; w += kWarpLanes) {
                const int pairs = take / 2 - w * kWarpLanes;
                const unsigned mask = lanes_below(pairs < kWarpLanes ? pairs : kWarpLanes);
                symbols += __popc(flags->words[depth - 1][0][w] & mask);
                symbols += __popc(flags->words[depth - 1][1][w] & mask);
            }
            for (int d = kWarpLanes / 2; d > 0; d /= 2) symbols += __shfl_xor_sync(kAllLanes, symbols, d);
            if (lane_number() == 0) used[depth] = symbols;
            take = 2 * (take - symbols);
        }
        if (lane_number() == 0) used[0] = take;
    }
    __syncthreads();
}

}  // namespace qcomm::cuda
