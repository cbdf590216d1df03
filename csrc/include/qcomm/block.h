// A block of symbols: 32 interleaved lanes that share one stream of 16-bit words in the order in which a decoder asks
// for them, so that a warp or a vector unit decodes 32 symbols a step (the idea: F. Giesen, "Interleaved entropy
// coders", arXiv:1402.3392, 2014).
//
//   info u32 | 32 start windows u32 | escapes | words u16, lane 0 first in each step | zeros to 4 bytes
//
// Invariant while words remain: a lane holds 16..31 bits, a codeword has at most 15. The encoder runs backwards and
// therefore writes downwards; the word that it writes last is the one that a decoder reads first. The loops over lanes
// are in csrc/cpu/kernels_*.
#pragma once

#include <cstdint>

#include "qcomm/format.h"

namespace qcomm {

// Codewords of one block at most, each of which writes at most one word.
constexpr int kMaxCodewords = kLanes * kMaxSteps;
constexpr int kMaxBlockValues = 2 * kMaxCodewords;
// A block with more than one escape in this number of values is raw: its grid does not fit, and the room that an
// encoder must have for escapes stays small beside the values.
constexpr int kValuesPerEscape = 16;

// Returns the bytes of `count` symbols of `num_bits` bits each, which are packed LSB first without gaps.
constexpr std::int64_t packed_bytes(std::int64_t count, int num_bits) {
    return count / 8 * num_bits + ceil_div(count % 8 * num_bits, 8);  // in this order a huge count does not overflow
}
// Packs symbols below 2^num_bits, 1 <= num_bits <= 16, to packed_bytes() of output; unused bits of the last byte are 0.
// Eight symbols fill whole bytes, so a row can be packed in parts that begin at multiples of eight.
void pack_bits(const std::uint16_t* symbols, std::int64_t count, int num_bits, std::uint8_t* out);
// The inverse. It reads packed_bytes() of input and no more; every result is a symbol, whatever the bytes are.
void unpack_bits(const std::uint8_t* in, std::int64_t count, int num_bits, std::uint16_t* symbols);

// The numbers that decide a block's size. CPU and CUDA fill one and ask it.
struct BlockShape {
    int n, num_bits, item, escapes;  // values, bits of a symbol, bytes of a value, escapes among the values
    int words;                       // of its codewords beyond the start windows, if it is coded

    // Such a block is raw, so an encoder need not code it first.
    QCOMM_INLINE bool has_too_many_escapes() const { return kValuesPerEscape * escapes > n; }

    // Returns the size of the whole block in a mode, with its info word and the zeros that fill 4 bytes.
    QCOMM_INLINE int bytes(BlockMode mode) const {
        const int info = 4, escape_bytes = escapes * (item + 2);
        int body = 0;
        if (mode == BlockMode::kFixed) body = escape_bytes + static_cast<int>(packed_bytes(n, num_bits));
        if (mode == BlockMode::kCoded) body = 4 * kLanes + escape_bytes + 2 * words;
        if (mode == BlockMode::kRaw) body = n * item;
        return (info + body + 3) / 4 * 4;
    }
};

// Returns the mode of a block: the smallest, of equal ones the first of coded, fixed, raw. All encoders must choose
// alike, since the choice is visible in the bytes. `constant`: all values have one symbol, which is not the escape;
// `has_code`: `words` is known, else the block cannot be coded.
QCOMM_INLINE BlockMode choose_mode(const BlockShape& shape, bool constant, bool has_code) {
    if (constant) return BlockMode::kConstant;
    if (shape.has_too_many_escapes()) return BlockMode::kRaw;
    const int fixed = shape.bytes(BlockMode::kFixed), raw = shape.bytes(BlockMode::kRaw);
    const int coded = shape.bytes(BlockMode::kCoded);
    if (has_code && coded <= fixed && coded <= raw) return BlockMode::kCoded;
    return fixed <= raw ? BlockMode::kFixed : BlockMode::kRaw;
}

}  // namespace qcomm
