// Packets: segments of values to bytes and back; docs/format.md is the contract. Encoding a well-formed request cannot
// fail half-way: what can go wrong is checked before the first byte, and before the first residual, is written.
#pragma once

#include <cstdint>
#include <vector>

#include "qcomm/format.h"
#include "qcomm/quantize.h"
#include "qcomm/status.h"
#include "qcomm/values.h"

namespace qcomm {

struct SegmentInput {
    Values values;  // all segments of a packet have the dtype of its options
    Quantizer quantizer;
    float* residual_out = nullptr;  // receives u - decoded(u); may be values.residual. Untouched by a constant NaN
};

struct EncodeOptions {
    DType dtype = DType::kFloat32;
    std::vector<std::int64_t> dims;  // their product is the sum of the counts
    bool checksums = true;
    int steps = 256;  // symbols per lane in a block, 1..kMaxSteps
    int threads = 1;  // most that work at once; the bytes do not depend on it
};

// An upper bound of the packet's size, whatever the values are.
std::int64_t encode_bound(const std::vector<SegmentInput>& segments, const EncodeOptions& options);

// Writes a packet to [out, out + capacity), capacity >= encode_bound(...); *total_bytes receives its size. Bytes behind
// it may be overwritten.
Status encode_packet(const std::vector<SegmentInput>& segments, const EncodeOptions& options, std::uint8_t* out,
                     std::int64_t capacity, std::int64_t* total_bytes);

// A packet whose metadata has been checked: header, records, code lengths, sizes, header checksum. Pointers refer to
// the caller's bytes.
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
Status parse_packet(const std::uint8_t* packet, std::int64_t bytes, PacketView* view);

// The front of a packet is its header, dimensions and segment records: what a reader must know before it allocates
// memory. Both functions are for a packet of `bytes` bytes of which only the first `present` are readable at `packet`.
// *front_bytes receives the front's size, at most `bytes`; needs the header.
Status measure_front(const std::uint8_t* packet, std::int64_t present, std::int64_t bytes, std::int64_t* front_bytes);
// Fills header, dims and records of `view`; needs the front. Checks all of it but the header checksum, which covers
// bytes behind the front.
Status parse_front(const std::uint8_t* packet, std::int64_t present, std::int64_t bytes, PacketView* view);

// Decodes all segments to `out` (header.element_count elements of header.dtype). With `accumulate` adds them to what is
// there, in float32 or float64: 16-bit packets are refused. After an error the contents of `out` are unspecified. At
// most `threads` threads work at once.
Status decode_packet(const PacketView& view, void* out, bool accumulate, int threads = 1);

// Adds how often each symbol occurs in segment `index` to counts[65536]. Values that have no symbol (raw, constant)
// count nothing.
Status count_symbols(const PacketView& view, std::size_t index, std::uint64_t* counts);

}  // namespace qcomm
