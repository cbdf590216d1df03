// A block of symbols: 32 interleaved lanes that share one stream of 16-bit words in the order in which a decoder asks
// for them, so that a warp or a vector unit decodes 32 symbols a step (the idea: F. Giesen, "Interleaved entropy
// coders", arXiv:1402.3392, 2014).
//
//   info u32 | 32 start windows u32 | escapes | words u16, lane 0 first in each step | zeros to 4 bytes
//
// Invariant while words remain: a lane holds 16..31 bits, a codeword has at most 15. The encoder runs backwards and
// therefore writes downwards; what it writes last is what the decoder reads first. The loops over lanes are in
// csrc/cpu/kernels_*.
#pragma once

#include <cstdint>

#include "qcomm/format.h"

namespace qcomm {

// Codewords of one block at most, each of which writes at most one word.
constexpr int kMaxCodewords = kLanes * kMaxSteps;
constexpr int kMaxBlockValues = 2 * kMaxCodewords;

// `count` symbols of `num_bits` bits each, LSB first; packed_bytes() of output. unpack reads no more than that.
constexpr std::int64_t packed_bytes(std::int64_t count, int num_bits) {
    return count / 8 * num_bits + ceil_div(count % 8 * num_bits, 8);  // in this order a huge count does not overflow
}
void pack_bits(const std::uint16_t* symbols, std::int64_t count, int num_bits, std::uint8_t* out);
void unpack_bits(const std::uint8_t* in, std::int64_t count, int num_bits, std::uint16_t* symbols);

}  // namespace qcomm
