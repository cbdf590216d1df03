// The wire format as structs. docs/format.md describes every byte and is the contract; this header is its C++ form.
//
//   header 40 | dimensions 8*ndim | records R*segments | code lengths | block ends 4*B | checksums 4*C | payload
//
// A packet is a pure function of its input: every encoder writes the same bytes, so nothing here may change without a
// new version. Structs are copied to and from the bytes as they are; they have no padding and no pointers.
#pragma once

#include <cstdint>
#include <cstring>

#include "qcomm/dtype.h"

namespace qcomm {

constexpr std::uint32_t kMagic = 0x4D4D4351;  // "QCMM"
constexpr std::uint8_t kVersion = 2;
// A bit of PacketHeader::flags: the payload has checksums. The metadata always have one.
constexpr std::uint8_t kFlagChecksums = 1;

// Lanes of a block: one GPU warp. A block's codewords are dealt to them in turn, so 32 are decoded at a time.
constexpr int kLanes = 32;
// Symbols per lane of a block. Positions in the largest block, one of pairs, still fit an escape's u16, and a block's
// scratch fits a core's cache.
constexpr int kMaxSteps = 512;
constexpr int kMaxDims = 64;  // torch's own limit
// Widest single symbols with a Huffman code: an entry of a decoding table is a u16, of which a length takes 4 bits.
constexpr int kMaxCodedBits = 12;
constexpr int kMaxCodeLength = 15;  // a length is a nibble on the wire
// A lane holds at least this number of bits before a lookup, so no codeword is cut off by the end of its window.
constexpr int kWindowBits = 16;
static_assert(kMaxCodeLength < kWindowBits, "a lane always holds a whole codeword");
constexpr int kPairBits = 4;  // the two symbols of a pair code are nibbles
constexpr int kRunsBits = 3;  // levels of zero runs are -3..3
constexpr int kDimensionBytes = 8;
constexpr int kChecksumBytes = 4;
// Bytes of a raw or fixed segment under one inner checksum. Pieces let threads and warps share a long segment.
constexpr int kChecksumPiece = 65536;

// Two numbers of SegmentRecord::table name no static table: the packet has the segment's code lengths, or the segment
// has no code and therefore no coded blocks.
constexpr std::uint8_t kTableOnWire = 0;
constexpr std::uint8_t kNoTable = 255;

// The kind of levels to which a segment's values are rounded; quantize.h has the arithmetic.
enum class Grid : std::uint8_t { kNone = 0, kRangeCenter = 1, kRangeEndpoint = 2, kSigma = 3 };
// A segment's payload: the values as they are; nothing, since all are one value; symbols of N bits in a row; blocks of
// codewords for single symbols, or for pairs of neighbours; a part of the packet's run blocks, which zero_runs.h has.
enum class Coding : std::uint8_t { kRaw = 0, kConstant = 1, kFixed = 2, kSingle = 3, kPair = 4, kRuns = 5 };
constexpr unsigned kLastCoding = 5;
// The form of one block of a segment that is coded single or pair; choose_mode() of block.h picks it.
enum class BlockMode : std::uint8_t { kConstant = 0, kFixed = 1, kCoded = 2, kRaw = 3 };

// Every field of a packet that is read is hostile until parse_packet() has checked it: sizes are compared with the
// bytes present before they are used, and in an order in which no sum overflows.
struct PacketHeader {
    std::uint32_t magic;
    std::uint8_t version;
    DType dtype;
    std::uint8_t flags;
    std::uint8_t ndim;
    // Covers bytes [0, payload) with this field zero, so all that is decoded before the payload.
    std::uint32_t header_checksum;
    std::uint32_t segment_count;
    // Is the product of the dimensions as well as the sum of the segments' counts; a reader checks both.
    std::uint64_t element_count;
    std::uint64_t total_bytes;
    std::uint16_t steps;  // symbols per lane in a whole block
    std::uint16_t reserved;
    // Says how large all lists of code lengths are together: only its contents tell where one list ends.
    std::uint32_t lengths_words;
};
static_assert(sizeof(PacketHeader) == 40, "the header is 40 bytes on the wire");

// A segment is a run of values that share one grid: a tensor, or the part of one that falls into a packet. This is its
// record in memory. On the wire it is a WireRecord.
struct SegmentRecord {
    std::uint64_t count;
    Grid grid;
    std::uint8_t num_bits;
    Coding coding;
    std::uint8_t table;
    double p0;  // range: lo; constant: the value
    double p1;  // range: hi; sigma: step
};

constexpr std::uint64_t kMaxSegmentValues = (std::uint64_t{1} << 40) - 1;  // a count has 40 bits on the wire

// A record on the wire, in the arithmetic T of the packet's dtype: 16 bytes, and 24 for float64. Packets of small
// tensors at low rates are a few kilobytes, of which longer records would be a tenth. Nothing is lost: the parameters
// of a grid are values of T, as check() of quantize.h demands.
template <class T>
struct WireRecord {
    std::uint64_t head;  // bits 0-39 count, 40-43 coding, 44-47 grid, 48-55 num_bits, 56-63 table
    T p0, p1;

    QCOMM_INLINE static WireRecord of(const SegmentRecord& r) {
        return {r.count | static_cast<std::uint64_t>(r.coding) << 40 | static_cast<std::uint64_t>(r.grid) << 44 |
                    static_cast<std::uint64_t>(r.num_bits) << 48 | static_cast<std::uint64_t>(r.table) << 56,
                static_cast<T>(r.p0), static_cast<T>(r.p1)};
    }
    // Every field but the count may hold anything afterwards.
    QCOMM_INLINE SegmentRecord unpack() const {
        return {head & kMaxSegmentValues,
                static_cast<Grid>(head >> 44 & 15u),
                static_cast<std::uint8_t>(head >> 48),
                static_cast<Coding>(head >> 40 & 15u),
                static_cast<std::uint8_t>(head >> 56),
                static_cast<double>(p0),
                static_cast<double>(p1)};
    }
};
static_assert(sizeof(WireRecord<float>) == 16 && sizeof(WireRecord<double>) == 24, "records have no padding");
template <class T>
SegmentRecord load_record(const std::uint8_t* at) {
    WireRecord<T> wire;
    std::memcpy(&wire, at, sizeof(wire));
    return wire.unpack();
}
// Reads the record at `at`, which need not be aligned; precondition: is_valid(dtype), record_bytes(dtype) are there.
inline SegmentRecord load_record(DType dtype, const std::uint8_t* at) {
    if (dtype == DType::kFloat64) return load_record<double>(at);
    return load_record<float>(at);
}
constexpr std::int64_t record_bytes(DType dtype) {
    return dtype == DType::kFloat64 ? sizeof(WireRecord<double>) : sizeof(WireRecord<float>);
}

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packets are little-endian and are read in place");

// A block's first word: mode in bits 0-1, escapes in 2-15, a constant's symbol in 16-31. 14 bits suffice for the
// escapes, because a block with more than one in 16 values is raw.
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
// Whether values become symbols of a grid, and whether those are kept in blocks.
constexpr bool has_symbols(Coding coding) { return coding != Coding::kRaw && coding != Coding::kConstant; }
constexpr bool is_block_coded(Coding coding) { return coding == Coding::kSingle || coding == Coding::kPair; }

// Precondition of both: the number is not negative, and the sum that rounds it up does not overflow.
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t align4(std::int64_t bytes) { return (bytes + 3) & ~std::int64_t{3}; }

// Returns the values of a whole block; only the last block of a segment may be shorter.
constexpr std::int64_t values_per_block(Coding coding, int steps) {
    return std::int64_t{kLanes} * steps * (coding == Coding::kPair ? 2 : 1);
}
// Return how many block ends, and how many checksums, a segment has in the metadata, besides those of the run blocks,
// which follow from all segments of that coding together. So a reader knows where the payload begins before it has
// looked at it.
constexpr std::int64_t blocks_in(const SegmentRecord& segment, int steps) {
    if (!is_block_coded(segment.coding)) return 0;
    const std::int64_t per_block = values_per_block(segment.coding, steps);
    const auto count = static_cast<std::int64_t>(segment.count);
    return count / per_block + (count % per_block != 0);  // no count + per_block: a hostile count must not overflow
}
constexpr std::int64_t checksums_in(const SegmentRecord& segment, int steps) {
    if (segment.coding == Coding::kConstant || segment.coding == Coding::kRuns) return 0;
    return is_block_coded(segment.coding) ? blocks_in(segment, steps) : 1;
}

// The symbol of the level zero of a sigma grid, and the escape above the alphabet's levels.
constexpr int sigma_radius(int num_bits) { return (1 << (num_bits - 1)) - 1; }
constexpr int escape_symbol(int num_bits) { return (1 << num_bits) - 1; }

}  // namespace qcomm
