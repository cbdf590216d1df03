// Packets: segments of values to bytes and back; docs/format.md is the contract. Encoding a well-formed request cannot
// fail half-way: every precondition is checked before the first byte, and before the first residual, is written.
#pragma once

#include <cstdint>
#include <vector>

#include "qcomm/format.h"
#include "qcomm/quantize.h"
#include "qcomm/status.h"
#include "qcomm/values.h"

namespace qcomm {

// A segment to encode. It borrows its values and residuals; residual_out is written while the segment is encoded.
struct SegmentInput {
    Values values;  // all segments of a packet have the dtype of its options
    Quantizer quantizer;
    // Receives u - decoded(u) of each value, or null. It may be values.residual. A constant NaN leaves it untouched: a
    // step in which a gradient is not finite is skipped, and must not poison the residual.
    float* residual_out = nullptr;
    // Of coding runs: receives the sums of squares of the scaled values and of the new residuals of a sample, and its
    // size, or null, and behind them the number of its blocks that are not finite. They predict the next step, which
    // then needs no pass of its own.
    double* sample_out = nullptr;  // [kSampleNumbers]
};

constexpr int kSampleNumbers = 4;

// The properties of a packet as a whole.
struct EncodeOptions {
    DType dtype = DType::kFloat32;
    // At most kMaxDims. Precondition, not checked: their product is the sum of the segments' counts.
    std::vector<std::int64_t> dims;
    bool checksums = true;
    int steps = 256;  // symbols per lane in a block, 1..kMaxSteps
    int threads = 1;  // maximum number of threads; the bytes do not depend on it
};

// Returns an upper bound of the packet's size, whatever the values are: every block raw, every list at its longest.
// encode_packet() needs that much room even if the packet turns out smaller, since it writes before it knows.
std::int64_t encode_bound(const std::vector<SegmentInput>& segments, const EncodeOptions& options);

// Writes a packet to [out, out + capacity), capacity >= encode_bound(...); *total_bytes receives its size. Bytes
// between there and `capacity` may be overwritten. After an error nothing has been written, the residuals included.
Status encode_packet(const std::vector<SegmentInput>& segments, const EncodeOptions& options, std::uint8_t* out,
                     std::int64_t capacity, std::int64_t* total_bytes);

// A packet whose metadata has been checked: header, records, code lengths, sizes, header checksum. It borrows the
// caller's bytes, which must stay as they are while the view is used: they are not checked a second time.
struct PacketView {
    PacketHeader header;
    std::vector<std::int64_t> dims;
    std::vector<SegmentRecord> records;
    std::vector<std::int64_t> lengths_at;  // byte offset of each segment's list of code lengths, where it has one
    const std::uint8_t* lengths = nullptr;
    const std::uint8_t* block_ends = nullptr;  // u32, unaligned
    const std::uint8_t* checksums = nullptr;   // u32, unaligned; null when there are none
    const std::uint8_t* payload = nullptr;
    std::int64_t payload_bytes = 0;
};
// Fills *view, or says why [packet, packet + bytes) is no packet. It trusts nothing and reads nothing outside. `bytes`
// must be the packet's size exactly; its memory is bounded by a small multiple of them. The payload is not looked at.
Status parse_packet(const std::uint8_t* packet, std::int64_t bytes, PacketView* view);

// The front of a packet is its header, dimensions and segment records: what a reader must know before it allocates
// memory. Both functions are for a packet of `bytes` bytes of which only the first `present` are readable at `packet`.
// *front_bytes receives the front's size, at most `bytes`; needs the header.
Status measure_front(const std::uint8_t* packet, std::int64_t present, std::int64_t bytes, std::int64_t* front_bytes);
// Fills header, dims and records of `view`; needs the front. Checks all of it but the header checksum, which covers
// bytes behind the front.
Status parse_front(const std::uint8_t* packet, std::int64_t present, std::int64_t bytes, PacketView* view);

// Decodes all segments to `out` (header.element_count elements of header.dtype). With `accumulate` it adds them to the
// values there, in float32 or float64; 16-bit packets are refused, since their sums would be rounded to 16 bits each
// time. Blocks are checked as they are met, so after an error the contents of `out` are unspecified. At most `threads`
// threads work at once, and the values do not depend on their number.
Status decode_packet(const PacketView& view, void* out, bool accumulate, int threads = 1);

// Consecutive elements of a buffer.
struct Place {
    std::int64_t offset, count;
};
// Decodes all segments to `places` of `buffer`, which has `count` elements of header.dtype: the packet's values in
// order fill one place after the other. Saves the copy from memory that decode_packet() needs. Places must lie in the
// buffer and hold as many values as the packet; they should not overlap. After an error their contents are unspecified.
Status decode_packet_to(const PacketView& view, const std::vector<Place>& places, void* buffer, std::int64_t count,
                        int threads = 1);

// Adds how often each symbol occurs in segment `index` to counts[65536]. Values that have no symbol (raw, constant)
// count nothing.
// Preconditions: index < view.records.size(), and the counts are initialised.
Status count_symbols(const PacketView& view, std::size_t index, std::uint64_t* counts);

}  // namespace qcomm
