// Damage that gets past the front door. Every packet begins with sizes and a checksum of its metadata, which random
// mutations would break nearly always; these functions make them fit again, so that the checks behind them are met.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "qcomm/checksum.h"
#include "qcomm/packet.h"

namespace qcomm::fuzz {

// Where the parts of a packet lie by what its header and records say; false when they do not fit its bytes.
struct Layout {
    std::uint64_t records = 0, block_ends = 0, payload = 0;  // offsets
    std::uint64_t elements = 0, blocks = 0;
    SegmentRecord last{};
};

// Block ends and checksums follow from the records, as for a reader; nothing is read behind `bytes`.
inline bool find_layout(const PacketHeader& h, const std::uint8_t* packet, std::uint64_t bytes, Layout* layout) {
    layout->records = sizeof(PacketHeader) + std::uint64_t{8} * h.ndim;
    layout->block_ends = layout->records + sizeof(SegmentRecord) * std::uint64_t{h.segment_count};
    layout->block_ends += std::uint64_t{4} * h.lengths_words;
    if (h.segment_count == 0 || h.steps == 0 || layout->block_ends > bytes) return false;
    std::uint64_t sums = 0;
    for (std::uint64_t i = 0; i < h.segment_count; ++i) {
        std::memcpy(&layout->last, packet + layout->records + sizeof(SegmentRecord) * i, sizeof(SegmentRecord));
        // Readers refuse larger counts anyway, and below that no sum over an input's segments overflows.
        if (layout->last.count > std::uint64_t{1} << 42) return false;
        layout->elements += layout->last.count;
        layout->blocks += static_cast<std::uint64_t>(blocks_in(layout->last, h.steps));
        sums += static_cast<std::uint64_t>(checksums_in(layout->last, h.steps));
    }
    layout->payload = layout->block_ends + 4 * layout->blocks + ((h.flags & kFlagChecksums) != 0 ? 4 * sums : 0);
    return layout->payload <= bytes;
}

// Rewrites magic number, version, sizes, a flat shape, the last block's end and the header checksum. Returns the new
// size: packets consist of 4-byte units.
inline std::size_t repair(std::uint8_t* packet, std::size_t bytes) {
    if (bytes < sizeof(PacketHeader)) return bytes;
    bytes = bytes / 4 * 4;
    PacketHeader h;
    std::memcpy(&h, packet, sizeof(h));
    h.magic = kMagic;
    h.version = kVersion;
    h.total_bytes = bytes;
    Layout layout;
    const bool found = find_layout(h, packet, bytes, &layout);
    if (found) {
        // Of several dimensions none could be told to be the wrong one: they are left for check_dims() to refuse.
        if (h.ndim == 1) {
            h.element_count = layout.elements;
            std::memcpy(packet + sizeof(h), &layout.elements, sizeof(layout.elements));
        }
        if (layout.blocks > 0 && is_block_coded(layout.last.coding)) {
            const auto end = static_cast<std::uint32_t>((bytes - layout.payload) / 4);
            std::memcpy(packet + layout.block_ends + 4 * (layout.blocks - 1), &end, sizeof(end));
        }
    }
    h.header_checksum = 0;
    std::memcpy(packet, &h, sizeof(h));
    h.header_checksum = checksum(packet, static_cast<std::int64_t>(found ? layout.payload : bytes));
    std::memcpy(packet, &h, sizeof(h));
    return bytes;
}

// Takes the payload's checksums out, so that a damaged payload is read at all. Returns the new size.
inline std::size_t strip_checksums(std::uint8_t* packet, std::size_t bytes) {
    PacketHeader h;
    Layout with, without;
    if (bytes < sizeof(h)) return bytes;
    std::memcpy(&h, packet, sizeof(h));
    if ((h.flags & kFlagChecksums) == 0 || !find_layout(h, packet, bytes, &with)) return bytes;
    // The layout is found twice, since without checksums the payload begins earlier: it moves down to there.
    h.flags = 0;
    std::memcpy(packet, &h, sizeof(h));
    if (!find_layout(h, packet, bytes, &without)) return bytes;
    std::memmove(packet + without.payload, packet + with.payload, bytes - with.payload);
    return bytes - (with.payload - without.payload);
}

}  // namespace qcomm::fuzz
