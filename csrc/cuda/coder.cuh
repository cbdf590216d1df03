// The algebra that encoding and decoding kernels share: which code a segment has, symbols of N bits in a row, the
// residual of a value.
#pragma once

#include "launch.h"
#include "qcomm/block.h"
#include "qcomm/huffman.h"
#include "qcomm/quantize.h"
#include "tasks.h"

namespace qcomm::cuda {

constexpr std::uint32_t kWordBits = 16;
constexpr std::uint32_t kEmitBits = 2 * kWordBits;  // a lane that would hold this number writes a word first

// Two values in a row, which are loaded and stored as one where their address allows it.
template <class T>
struct alignas(2 * sizeof(T)) PairOf {
    T first, second;
};
template <class T>
__device__ __forceinline__ bool holds_pairs(const T* at) {
    return reinterpret_cast<std::uintptr_t>(at) % sizeof(PairOf<T>) == 0;
}

// Returns bits << by, which is 0 from 32 on. In C++ that would be undefined, and to ask for it another instruction.
__device__ __forceinline__ std::uint32_t shift_left(std::uint32_t bits, std::uint32_t by) {
#ifdef __CUDA_ARCH__
    std::uint32_t shifted;
    asm("shl.b32 %0, %1, %2;" : "=r"(shifted) : "r"(bits), "r"(by));
    return shifted;
#else
    return by < 32u ? bits << by : 0u;
#endif
}

// A segment's code for encoding: an entry (codeword | length << 16) for each symbol; null where it has no code.
struct Code {
    const std::uint32_t* entries;
    int symbols;
};
__device__ inline Code find_code(const EncodeTables& e, const Quantizer& q, int segment) {
    if (!is_block_coded(q.coding)) return {nullptr, 0};
    const int symbols = alphabet_size(q.coding, q.num_bits);
    if (q.table == kTableOnWire) {
        if (e.list_bytes[segment] == 0) return {nullptr, 0};
        return {e.own_entries + e.segments[segment].first_codeword, symbols};
    }
    const int index = StaticTables::index(q.table);
    return index < 0 ? Code{nullptr, 0} : Code{e.codes->encode[index], symbols};
}

// Returns the symbol that stands for a value outside the levels; -1 for range grids, which have none.
__device__ __forceinline__ int escape_of(const Quantizer& q) {
    return q.grid == Grid::kSigma ? escape_symbol(q.num_bits) : -1;
}

// 32-bit word number `word` of n packed symbols: those of u[begin, begin + n). Index is int for a block, whose bits an
// int can count: that saves a division of 64 bits.
template <class Index, class Levels, class Values>
__device__ std::uint32_t packed_word(const Values& u, const Levels& grid, std::int64_t begin, Index n, int num_bits,
                                     Index word) {
    const Index first_bit = 32 * word;
    Index i = first_bit / num_bits;
    int at = static_cast<int>(i * num_bits - first_bit);  // of symbol i in the word; negative where it begins before
    std::uint32_t result = 0;
    for (; at < 32 && i < n; ++i, at += num_bits) {
        const std::uint32_t symbol = grid(u[begin + i]);
        result |= at < 0 ? symbol >> -at : symbol << at;
    }
    return result;
}

// Returns the part of x that quantization loses, in float32.
template <class Tr, class Levels, class T>
__device__ __forceinline__ float residual_of(T x, const Levels& grid, int escape) {
    const std::uint32_t symbol = grid(x);
    if (static_cast<int>(symbol) == escape) return 0.0f;
    return static_cast<float>(x - Tr::widen(Tr::narrow(grid.decode(symbol))));
}

}  // namespace qcomm::cuda
