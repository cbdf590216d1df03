// What reading a packet's metadata and reading its blocks have in common.
#pragma once

#include <cstdint>
#include <cstring>

#include "qcomm/block.h"
#include "qcomm/packet.h"

namespace qcomm {

inline std::uint32_t load_u32(const std::uint8_t* at) {
    std::uint32_t word;
    std::memcpy(&word, at, sizeof(word));
    return word;
}

// Takes `bytes` from what is left of a packet; null when there are not so many.
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

// Bytes of a segment that is not block-coded.
inline std::int64_t plain_bytes(const SegmentRecord& r, DType dtype) {
    const auto count = static_cast<std::int64_t>(r.count);
    if (r.coding == Coding::kRaw) return align4(count * item_bytes(dtype));
    return r.coding == Coding::kFixed ? align4(packed_bytes(count, r.num_bits)) : 0;
}

}  // namespace qcomm
