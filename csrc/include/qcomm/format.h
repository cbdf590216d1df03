// The wire format as structs. docs/format.md describes every byte and is the contract; this header is its C++ form.
#pragma once

#include <cstdint>

#include "qcomm/dtype.h"

namespace qcomm {

constexpr std::uint32_t kMagic = 0x4D4D4351;  // "QCMM"
constexpr std::uint8_t kVersion = 1;
constexpr std::uint8_t kFlagChecksums = 1;

constexpr int kLanes = 32;          // lanes of a block: one GPU warp
constexpr int kMaxSteps = 512;      // symbols per lane: escape positions fit u16, a block's scratch fits a core's cache
constexpr int kMaxDims = 64;        // torch's own limit
constexpr int kMaxCodedBits = 12;   // widest single symbols with a Huffman code; beyond that fixed width
constexpr int kMaxCodeLength = 15;  // a length is a nibble on the wire
constexpr int kWindowBits =
    16;                       // a lane holds at least this many bits before a lookup, so kMaxCodeLength < kWindowBits
constexpr int kPairBits = 4;  // the two symbols of a pair code are nibbles
constexpr int kDimensionBytes = 8;
constexpr int kChecksumBytes = 4;
constexpr int kChecksumPiece = 65536;  // bytes of a raw or fixed segment under one inner checksum
constexpr std::uint8_t kTableOnWire = 0;
constexpr std::uint8_t kNoTable = 255;

enum class Grid : std::uint8_t { kNone = 0, kRangeCenter = 1, kRangeEndpoint = 2, kSigma = 3 };
// 5 is reserved for rANS: its 32-bit states and 16-bit words fit the same blocks.
enum class Coding : std::uint8_t { kRaw = 0, kConstant = 1, kFixed = 2, kSingle = 3, kPair = 4 };
enum class BlockMode : std::uint8_t { kConstant = 0, kFixed = 1, kCoded = 2, kRaw = 3 };

struct PacketHeader {
    std::uint32_t magic;
    std::uint8_t version;
    DType dtype;
    std::uint8_t flags;
    std::uint8_t ndim;
    std::uint32_t header_checksum;
    std::uint32_t segment_count;
    std::uint64_t element_count;
    std::uint64_t total_bytes;
    std::uint16_t steps;
    std::uint16_t reserved;
    std::uint32_t lengths_words;
};
static_assert(sizeof(PacketHeader) == 40, "the header is 40 bytes on the wire");

struct SegmentRecord {
    std::uint64_t count;
    Grid grid;
    std::uint8_t num_bits;
    Coding coding;
    std::uint8_t table;
    std::uint32_t reserved;
    double p0;  // range: lo; constant: the value
    double p1;  // range: hi; sigma: step
};
static_assert(sizeof(SegmentRecord) == 32, "a segment record is 32 bytes on the wire");

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packets are little-endian and are read in place");

// A block's first word.
struct BlockInfo {
    BlockMode mode;
    int escape_count;
    std::uint32_t symbol;  // of a constant block

    constexpr std::uint32_t pack() const {
        return static_cast<std::uint32_t>(mode) | static_cast<std::uint32_t>(escape_count) << 2 | symbol << 16;
    }
    static constexpr BlockInfo unpack(std::uint32_t word) {
        return {static_cast<BlockMode>(word & 3u), static_cast<int>(word >> 2 & 0x3FFFu), word >> 16};
    }
};

constexpr bool is_range(Grid grid) { return grid == Grid::kRangeCenter || grid == Grid::kRangeEndpoint; }
// Whether values become symbols of a grid.
constexpr bool has_symbols(Coding coding) { return coding != Coding::kRaw && coding != Coding::kConstant; }
constexpr bool is_block_coded(Coding coding) { return coding == Coding::kSingle || coding == Coding::kPair; }

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t align4(std::int64_t bytes) { return (bytes + 3) & ~std::int64_t{3}; }

constexpr std::int64_t values_per_block(Coding coding, int steps) {
    return std::int64_t{kLanes} * steps * (coding == Coding::kPair ? 2 : 1);
}
constexpr std::int64_t blocks_in(const SegmentRecord& segment, int steps) {
    if (!is_block_coded(segment.coding)) return 0;
    const std::int64_t per_block = values_per_block(segment.coding, steps);
    const auto count = static_cast<std::int64_t>(segment.count);
    return count / per_block + (count % per_block != 0);  // no count + per_block: a hostile count must not overflow
}
constexpr std::int64_t checksums_in(const SegmentRecord& segment, int steps) {
    if (segment.coding == Coding::kConstant) return 0;
    return is_block_coded(segment.coding) ? blocks_in(segment, steps) : 1;
}

// The symbol of the level zero of a sigma grid, and the escape above the alphabet's levels.
constexpr int sigma_radius(int num_bits) { return (1 << (num_bits - 1)) - 1; }
constexpr int escape_symbol(int num_bits) { return (1 << num_bits) - 1; }

}  // namespace qcomm
