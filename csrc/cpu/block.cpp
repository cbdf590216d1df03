// Symbols of N bits in a row, LSB first: the body of a fixed block, and a fixed segment.
//
// A buffer of 64 bits stands between symbols and bytes. Packing, it holds fewer than 32 bits before it takes a symbol
// of at most 16; unpacking, it holds fewer than 16 before it takes a byte. So it never overflows.
#include "qcomm/block.h"

#include <cstring>

namespace qcomm {

void pack_bits(const std::uint16_t* symbols, std::int64_t count, int num_bits, std::uint8_t* out) {
    std::uint64_t buffer = 0;
    int filled = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        buffer |= static_cast<std::uint64_t>(symbols[i]) << filled;
        filled += num_bits;
        // Four bytes leave at a time: a store for each would take most of the time.
        if (filled < 32) continue;
        const auto word = static_cast<std::uint32_t>(buffer);
        std::memcpy(out, &word, sizeof(word));
        out += sizeof(word);
        buffer >>= 32;
        filled -= 32;
    }
    // The rest goes byte by byte, since another thread may own the bytes behind the row.
    for (; filled > 0; filled -= 8, buffer >>= 8) *out++ = static_cast<std::uint8_t>(buffer);
}

void unpack_bits(const std::uint8_t* in, std::int64_t count, int num_bits, std::uint16_t* symbols) {
    const std::uint32_t mask = (1u << num_bits) - 1u;
    const std::int64_t total = packed_bytes(count, num_bits);
    std::uint64_t buffer = 0;
    int filled = 0;
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        // Bytes come one by one, and none from behind the row: it may end where the caller's memory does.
        while (filled < num_bits && at < total) {
            buffer |= static_cast<std::uint64_t>(in[at++]) << filled;
            filled += 8;
        }
        symbols[i] = static_cast<std::uint16_t>(buffer & mask);
        buffer >>= num_bits;
        filled -= num_bits;
    }
}

}  // namespace qcomm
