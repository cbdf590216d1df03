// Helpers that reading a packet's metadata and reading its blocks share.
#pragma once

#include <cstdint>
#include <cstring>

#include "qcomm/block.h"
#include "qcomm/packet.h"

namespace qcomm {

// Packets may begin at any address, so words are copied and never pointed at.
inline std::uint32_t load_u32(const std::uint8_t* at) {
    std::uint32_t word;
    std::memcpy(&word, at, sizeof(word));
    return word;
}

// A place in bytes that are not trusted, and the number of bytes left. take() returns where the next `bytes` begin and
// moves on, or returns null and stays where fewer are left. A reader that takes each part this way never leaves the
// packet.
class Cursor {
public:
    Cursor(const std::uint8_t* begin, std::int64_t bytes) : at_(begin), left_(bytes) {}
    const std::uint8_t* take(std::uint64_t bytes) {
        if (bytes > static_cast<std::uint64_t>(left_)) return nullptr;
        const std::uint8_t* taken = at_;
        at_ += bytes;
        left_ -= static_cast<std::int64_t>(bytes);
        return taken;
    }
    std::int64_t left() const { return left_; }

private:
    const std::uint8_t* at_;
    std::int64_t left_;
};

// Returns the number of values of coding runs.
inline std::int64_t run_values(const PacketView& view) {
    std::int64_t total = 0;
    for (const SegmentRecord& r : view.records) {
        if (r.coding == Coding::kRuns) total += static_cast<std::int64_t>(r.count);
    }
    return total;
}

// Returns the payload bytes of a segment that is not block-coded.
inline std::int64_t plain_bytes(const SegmentRecord& r, DType dtype) {
    const auto count = static_cast<std::int64_t>(r.count);
    if (r.coding == Coding::kRaw) return align4(count * item_bytes(dtype));
    return r.coding == Coding::kFixed ? align4(packed_bytes(count, r.num_bits)) : 0;
}

}  // namespace qcomm
