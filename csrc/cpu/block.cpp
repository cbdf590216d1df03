#include "qcomm/block.h"

#include <cstring>

namespace qcomm {
void pack_bits(const std::uint16_t* symbols, std::int64_t count, int num_bits, std::uint8_t* out) {
    std::uint64_t buffer = 0;
    int filled = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        buffer |= static_cast<std::uint64_t>(symbols[i]) << filled;
        filled += num_bits;
        if (filled < 32) continue;
        const auto word = static_cast<std::uint32_t>(buffer);
        std::memcpy(out, &word, sizeof(word));
        out += sizeof(word);
        buffer >>= 32;
        filled -= 32;
    }
    for (; filled > 0; filled -= 8, buffer >>= 8) *out++ = static_cast<std::uint8_t>(buffer);
}

void unpack_bits(const std::uint8_t* in, std::int64_t count, int num_bits, std::uint16_t* symbols) {
    const std::uint32_t mask = (1u << num_bits) - 1u;
    const std::int64_t total = packed_bytes(count, num_bits);
    std::uint64_t buffer = 0;
    int filled = 0;
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < count; ++i) {
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
