// The algebra that encoding and decoding kernels share: which code a segment has, how a block is laid out, symbols of N
// bits in a row, the residual of a value.
#pragma once

#include "launch.h"
#include "qcomm/block.h"
#include "qcomm/huffman.h"
#include "qcomm/quantize.h"
#include "tasks.h"

namespace qcomm::cuda {

constexpr std::uint32_t kWordBits = 16;
constexpr std::uint32_t kEmitBits = 2 * kWordBits;  // a lane that would hold so many writes a word first

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

// The symbol that stands for a value outside the levels; -1 for range grids, which have none.
__device__ __forceinline__ int escape_of(const Quantizer& q) {
    return q.grid == Grid::kSigma ? escape_symbol(q.num_bits) : -1;
}

// What decides a block's size.
struct BlockShape {
    int n, num_bits, item, escapes, words;

    __device__ __forceinline__ int bytes(BlockMode mode) const {
        const int info = 4, escape_bytes = escapes * (item + 2);
        int body = 0;
        if (mode == BlockMode::kFixed) body = escape_bytes + static_cast<int>(packed_bytes(n, num_bits));
        if (mode == BlockMode::kCoded) body = 4 * kLanes + escape_bytes + 2 * words;
        if (mode == BlockMode::kRaw) body = n * item;
        return (info + body + 3) / 4 * 4;
    }
};

__device__ __forceinline__ BlockMode choose_mode(const BlockShape& shape, bool constant, bool has_code) {
    if (constant) return BlockMode::kConstant;
    if (16 * shape.escapes > shape.n) return BlockMode::kRaw;
    const int fixed = shape.bytes(BlockMode::kFixed), raw = shape.bytes(BlockMode::kRaw);
    const int coded = shape.bytes(BlockMode::kCoded);
    if (has_code && coded <= fixed && coded <= raw) return BlockMode::kCoded;
    return fixed <= raw ? BlockMode::kFixed : BlockMode::kRaw;
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

// What quantization loses of x, in float32.
template <class Tr, class Levels, class T>
__device__ __forceinline__ float residual_of(T x, const Levels& grid, int escape) {
    const std::uint32_t symbol = grid(x);
    if (static_cast<int>(symbol) == escape) return 0.0f;
    return static_cast<float>(x - Tr::widen(Tr::narrow(grid.decode(symbol))));
}

}  // namespace qcomm::cuda
