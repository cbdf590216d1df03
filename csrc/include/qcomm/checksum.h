// The 32-lane checksum of docs/format.md: any change of a single word changes it; a warp or a vector unit computes 32
// lanes at once. It guards against damage, not against forgery.
#pragma once

#include <cstdint>

namespace qcomm {

// Returns the checksum of `bytes` bytes at `data`, read as little-endian u32 words with zeros after the end. Any
// alignment will do, and 0 bytes are valid.
// The number of bytes is part of the result, so zeros that are appended inside the last word change it.
std::uint32_t checksum(const std::uint8_t* data, std::int64_t bytes);

// Returns the checksum of a raw or fixed segment: that of the checksums of its pieces of kChecksumPiece bytes. It works
// on up to `threads` threads, and the result does not depend on their number.
// It is not checksum() of the same bytes, even if they are one piece: readers need no case for short segments.
std::uint32_t checksum_pieces(const std::uint8_t* data, std::int64_t bytes, int threads = 1);

}  // namespace qcomm
