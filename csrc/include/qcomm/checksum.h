// The 32-lane checksum of docs/format.md: any change of a single word changes it; a warp or a vector unit computes 32
// lanes at once. It guards against damage, not against forgery.
#pragma once

#include <cstdint>

namespace qcomm {

// Of `bytes` bytes at `data`, read as little-endian u32 words with zeros after the end. Any alignment; 0 bytes is
// valid.
std::uint32_t checksum(const std::uint8_t* data, std::int64_t bytes);

// Of a raw or fixed segment: the checksum of the checksums of its pieces of kChecksumPiece bytes. On up to
// `threads` threads.
std::uint32_t checksum_pieces(const std::uint8_t* data, std::int64_t bytes, int threads = 1);

}  // namespace qcomm
