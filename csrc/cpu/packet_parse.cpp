// Packets, reading the metadata. The bytes are hostile: every size is checked before it is used, and in an order in
// which no sum can overflow. The order is
//
//   1. the header, whose total_bytes must be the bytes present
//   2. dimensions, records and lists, of sizes that the header says, taken from those bytes
//   3. each record, and so the number of blocks and of checksums
//   4. the tables of both, whose sizes follow; the rest is the payload
//   5. the checksum over 1 to 4, which fails for most damage, and only then
//   6. code lengths and block ends, whose contents are walked through
//
// After that a decoder may rely on offsets; the payload's own contents it still may not trust.
#include <cstddef>
#include <cstring>

#include "packet_parts.h"
#include "qcomm/checksum.h"
#include "qcomm/huffman.h"
#include "qcomm/zero_runs.h"

namespace qcomm {
namespace {

// Far above any tensor, and safe to multiply by an item's bits: 2^40 * 64 fits 63 bits.
constexpr std::uint64_t kMaxElements = kMaxSegmentValues;

// Checks the fields that can be judged by themselves, and the size. A field that a later version may use must be 0 now.
Status check_header(const PacketHeader& h, std::int64_t bytes) {
    if (h.magic != kMagic) return bad_packet("these bytes are not a qcomm packet: wrong magic number");
    if (h.version != kVersion)
        return bad_packet("the packet has another version; this library reads version 2, found", h.version);
    if (!is_valid(h.dtype)) return bad_packet("unknown dtype", static_cast<std::int64_t>(h.dtype));
    if (h.flags > kFlagChecksums || h.reserved != 0) return bad_packet("unknown flags or reserved fields");
    if (h.ndim > kMaxDims) return bad_packet("too many dimensions", h.ndim);
    if (h.segment_count < 1) return bad_packet("a packet needs at least one segment");
    if (h.element_count > kMaxElements) return bad_packet("element count out of range");
    if (h.steps < 1 || h.steps > kMaxSteps) return bad_packet("steps must be 1..512, found", h.steps);
    if (h.total_bytes > static_cast<std::uint64_t>(bytes))
        return bad_packet("the packet is truncated; bytes present", bytes);
    if (h.total_bytes < static_cast<std::uint64_t>(bytes))
        return bad_packet("there are bytes after the end of the packet; its size",
                          static_cast<std::int64_t>(h.total_bytes));
    return {};
}

// Checks that the dimensions multiply to the element count. Each factor is compared with the quotient before it is
// multiplied, so the product never overflows.
Status check_dims(const std::vector<std::int64_t>& dims, std::uint64_t elements) {
    // The product of the dimensions that are not 0: torch computes strides from them also for an empty tensor.
    std::uint64_t product = 1;
    bool empty = false;
    for (const std::int64_t d : dims) {
        if (d < 0 || static_cast<std::uint64_t>(d) > kMaxElements) return bad_packet("a dimension is out of range", d);
        empty |= d == 0;
    }
    for (const std::int64_t d : dims) {
        if (d == 0) continue;
        product = product > kMaxElements / static_cast<std::uint64_t>(d) ? kMaxElements + 1
                                                                         : product * static_cast<std::uint64_t>(d);
        if (product > kMaxElements) return bad_packet("the dimensions' product is out of range");
    }
    return (empty ? 0 : product) == elements ? Status{}
                                             : bad_packet("the dimensions do not agree with the element count");
}

// Returns the text for a record with a fault that is not readable. It differs from refusal_of(), which advises a
// caller.
const char* damage_of(QuantizerFault fault) {
    switch (fault) {
        case QuantizerFault::kNumBits:
        case QuantizerFault::kSigmaNumBits:
            return "num_bits does not fit the grid; segment";
        case QuantizerFault::kUnusable:
            return "a grid's parameters are not usable; segment";
        case QuantizerFault::kFixedOnSigma:
            return "coding fixed needs a range grid; segment";
        case QuantizerFault::kPair:
            return "coding pair needs a sigma grid of 4 bits; segment";
        case QuantizerFault::kRuns:
            return "coding runs needs a sigma grid of 3 bits; segment";
        case QuantizerFault::kOwnCode:
            return "no codes exist for so many bits; segment";
        case QuantizerFault::kStaticCode:
            return "unknown static table; segment";
        // Both are readable, so no packet is refused for them.
        case QuantizerFault::kStaticOnRange:
        case QuantizerFault::kNone:
            break;
    }
    return "";
}

// Checks a record by itself. Raw and constant segments use neither grid nor table: those fields may hold anything.
Status check_record(const SegmentRecord& r, DType dtype, std::int64_t index) {
    if (static_cast<unsigned>(r.grid) > 3 || static_cast<unsigned>(r.coding) > kLastCoding)
        return bad_packet("unknown grid or coding; segment", index);
    const QuantizerFault fault = check(quantizer_of(r), dtype);
    return is_readable(fault) ? Status{} : bad_packet(damage_of(fault), index);
}

// Tells whether the packet has the code lengths of a segment.
bool has_lengths(const SegmentRecord& r) { return is_block_coded(r.coding) && r.table == kTableOnWire; }

// Checks that the code lengths of all segments are codes and fill their area exactly.
Status check_lengths(PacketView* view, std::int64_t bytes) {
    std::vector<std::uint8_t> lengths(std::size_t{1} << kMaxCodedBits);
    std::int64_t at = 0;
    view->lengths_at.assign(view->records.size(), 0);
    for (std::size_t i = 0; i < view->records.size(); ++i) {
        const SegmentRecord& r = view->records[i];
        if (!has_lengths(r)) continue;
        std::int64_t used = 0;
        view->lengths_at[i] = at;
        QCOMM_RETURN_IF_ERROR(unpack_lengths(view->lengths + at, bytes - at, alphabet_size(r.coding, r.num_bits),
                                             length_limit(r.coding, r.num_bits), lengths.data(), &used));
        at += used;
    }
    return at == bytes ? Status{} : bad_packet("the code lengths do not fill their area");
}

// Checks that segments and blocks divide the payload without gaps: each block end lies behind the one before and inside
// the payload, so a block has at least its info word, and the last segment ends where the payload does.
Status check_layout(const PacketView& view) {
    std::int64_t at = 0, block = 0;
    const auto pass_blocks = [&](std::int64_t count) -> Status {
        for (std::int64_t i = 0; i < count; ++i, ++block) {
            const std::int64_t end = 4 * static_cast<std::int64_t>(load_u32(view.block_ends + 4 * block));
            if (end <= at || end > view.payload_bytes) return bad_packet("a block's end is out of order; block", block);
            at = end;
        }
        return {};
    };
    for (const SegmentRecord& r : view.records) {
        QCOMM_RETURN_IF_ERROR(pass_blocks(blocks_in(r, view.header.steps)));
        at += plain_bytes(r, view.header.dtype);
        if (at > view.payload_bytes) return bad_packet("the payload is truncated; bytes present", view.payload_bytes);
    }
    QCOMM_RETURN_IF_ERROR(pass_blocks(run_blocks(run_values(view), view.header.steps)));
    return at == view.payload_bytes ? Status{} : bad_packet("the payload has bytes that belong to no segment");
}

Status read_header(const std::uint8_t* packet, std::int64_t present, std::int64_t bytes, PacketHeader* h) {
    if (present < static_cast<std::int64_t>(sizeof(*h)))
        return bad_packet("a packet has at least 40 bytes; found", present);
    std::memcpy(h, packet, sizeof(*h));
    return check_header(*h, bytes);
}

std::uint64_t dims_bytes(const PacketHeader& h) { return std::uint64_t{kDimensionBytes} * h.ndim; }
std::uint64_t records_bytes(const PacketHeader& h) {
    return static_cast<std::uint64_t>(record_bytes(h.dtype)) * std::uint64_t{h.segment_count};
}
// Records of 2^32 segments are 2^37 bytes, so the sum fits whatever the header says.
std::uint64_t front_bytes_of(const PacketHeader& h) { return sizeof(h) + dims_bytes(h) + records_bytes(h); }

}  // namespace

Status measure_front(const std::uint8_t* packet, std::int64_t present, std::int64_t bytes, std::int64_t* front_bytes) {
    PacketHeader h;
    QCOMM_RETURN_IF_ERROR(read_header(packet, present, bytes, &h));
    if (front_bytes_of(h) > static_cast<std::uint64_t>(bytes)) return bad_packet("the packet's metadata is truncated");
    *front_bytes = static_cast<std::int64_t>(front_bytes_of(h));
    return {};
}

Status parse_front(const std::uint8_t* packet, std::int64_t present, std::int64_t bytes, PacketView* view) {
    PacketHeader& h = view->header;
    QCOMM_RETURN_IF_ERROR(read_header(packet, present, bytes, &h));
    Cursor cursor(packet + sizeof(h), present - static_cast<std::int64_t>(sizeof(h)));
    const std::uint8_t* dims = cursor.take(dims_bytes(h));
    const std::uint8_t* records = cursor.take(records_bytes(h));
    if (dims == nullptr || records == nullptr) return bad_packet("the packet's metadata is truncated");
    view->dims.resize(h.ndim);
    if (h.ndim > 0) std::memcpy(view->dims.data(), dims, dims_bytes(h));
    // Bytes for all of these are present, so a header cannot ask for more memory than a packet's size.
    view->records.resize(h.segment_count);
    for (SegmentRecord& record : view->records) {
        record = load_record(h.dtype, records);
        records += record_bytes(h.dtype);
    }

    std::uint64_t elements = 0;
    for (std::size_t i = 0; i < view->records.size(); ++i) {
        const SegmentRecord& r = view->records[i];
        QCOMM_RETURN_IF_ERROR(check_record(r, h.dtype, static_cast<std::int64_t>(i)));
        elements += r.count;
        // After each record, so that the sum never wraps round.
        if (elements > kMaxElements) return bad_packet("the segments' counts are out of range");
    }
    if (elements != h.element_count) return bad_packet("the segments' counts do not agree with the element count");
    return check_dims(view->dims, elements);
}

Status parse_packet(const std::uint8_t* packet, std::int64_t bytes, PacketView* view) {
    QCOMM_RETURN_IF_ERROR(parse_front(packet, bytes, bytes, view));
    const PacketHeader& h = view->header;
    Cursor cursor(packet, bytes);
    cursor.take(front_bytes_of(h));  // there: parse_front has read it
    view->lengths = cursor.take(std::uint64_t{4} * h.lengths_words);
    if (view->lengths == nullptr) return bad_packet("the packet's metadata is truncated");

    std::uint64_t blocks = 0, sums = 0;
    for (const SegmentRecord& r : view->records) {
        blocks += static_cast<std::uint64_t>(blocks_in(r, h.steps));
        sums += static_cast<std::uint64_t>(checksums_in(r, h.steps));
    }
    const auto shared = static_cast<std::uint64_t>(run_blocks(run_values(*view), h.steps));
    if (shared > kMaxRunBlocks) return bad_packet("too many run blocks", static_cast<std::int64_t>(shared));
    blocks += shared;
    sums += shared;
    const bool with_checksums = (h.flags & kFlagChecksums) != 0;
    view->block_ends = cursor.take(4 * blocks);
    // An empty part has a place, too, so null still tells that a part is cut off.
    view->checksums = cursor.take(with_checksums ? kChecksumBytes * sums : 0);
    if (view->block_ends == nullptr || view->checksums == nullptr)
        return bad_packet("the packet's block table is truncated");
    if (!with_checksums) view->checksums = nullptr;
    view->payload_bytes = cursor.left();
    view->payload = cursor.take(static_cast<std::uint64_t>(cursor.left()));

    // The checksum is computed of a copy, in which its own field can be 0.
    std::vector<std::uint8_t> metadata(packet, view->payload);
    std::memset(metadata.data() + offsetof(PacketHeader, header_checksum), 0, sizeof(std::uint32_t));
    if (checksum(metadata.data(), static_cast<std::int64_t>(metadata.size())) != h.header_checksum) {
        return bad_packet("the packet's metadata is damaged: wrong header checksum");
    }
    QCOMM_RETURN_IF_ERROR(check_lengths(view, std::int64_t{4} * h.lengths_words));
    return check_layout(*view);
}

}  // namespace qcomm
