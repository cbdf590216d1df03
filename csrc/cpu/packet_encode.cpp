// Packets, writing. A segment is encoded behind the space that the largest possible metadata takes; when all sizes are
// known the payload moves down to where it belongs: by nothing, unless a segment fell back to another coding or one
// behind the first has a table.
#include <cstddef>
#include <cstring>

#include "qcomm/checksum.h"
#include "qcomm/packet.h"
#include "segment_encoder.h"

namespace qcomm {
namespace {

constexpr std::uint64_t kMaxPayloadBytes = std::uint64_t{4} << 32;  // block ends count 4-byte units in 32 bits

// Returns the most payload that a segment can come to.
std::int64_t max_payload_bytes(std::int64_t count, const Quantizer& q, DType dtype, int steps) {
    const SegmentRecord record = make_record(count, q);
    switch (q.coding) {
        case Coding::kConstant:
            return 0;
        case Coding::kFixed:
            return align4(packed_bytes(count, q.num_bits));
        case Coding::kRaw:
            return align4(count * item_bytes(dtype));
        case Coding::kRuns:
            return 0;  // in the run blocks
        default:
            return max_block_bytes(count, blocks_in(record, steps), dtype);  // every block may fall back to raw
    }
}

// Returns the number of values of coding runs.
std::int64_t sum_run_values(const std::vector<SegmentInput>& segments) {
    std::int64_t total = 0;
    for (const SegmentInput& segment : segments) {
        if (segment.quantizer.coding == Coding::kRuns) total += segment.values.count;
    }
    return total;
}

// Returns the most bytes of a packet's metadata, if its lists of code lengths have `lengths_bytes`.
std::int64_t metadata_bytes(const std::vector<SegmentInput>& segments, const EncodeOptions& options,
                            std::int64_t lengths_bytes) {
    std::int64_t total = sizeof(PacketHeader) + 8 * static_cast<std::int64_t>(options.dims.size()) + lengths_bytes;
    for (const SegmentInput& segment : segments) {
        const SegmentRecord record = make_record(segment.values.count, segment.quantizer);
        // A segment that falls back to raw or fixed has no more: it has one checksum, as many as one block.
        total += record_bytes(options.dtype) + 4 * blocks_in(record, options.steps) +
                 4 * checksums_in(record, options.steps);
    }
    return total + 8 * run_blocks(sum_run_values(segments), options.steps);
}

// Returns the most bytes that all lists of code lengths can have.
std::int64_t sum_max_lengths(const std::vector<SegmentInput>& segments) {
    std::int64_t total = 0;
    for (const SegmentInput& segment : segments) total += max_lengths_bytes(segment.quantizer);
    return total;
}

// Finds everything that could go wrong with a segment, so that encoding it cannot fail.
Status check_segment(const SegmentInput& segment, DType dtype, std::int64_t index) {
    if (segment.values.dtype != dtype)
        return bad_argument("a segment's dtype differs from the packet's; segment", index);
    if (segment.values.is_adjusted() && item_bytes(dtype) < 4) {
        return bad_argument(
            "a residual or a scale needs float32 or float64 values: 16 bits cannot carry them exactly; segment", index);
    }
    if (static_cast<std::uint64_t>(segment.values.count) > kMaxSegmentValues)
        return bad_argument("a segment must have fewer than 2^40 values; segment", index);
    if (segment.quantizer.coding == Coding::kRuns && segment.values.count > 0 && segment.residual_out == nullptr)
        return bad_argument("coding runs needs a residual, which keeps what levels beyond 3 would lose; segment",
                            index);
    const QuantizerFault fault = check(segment.quantizer, dtype);
    return fault == QuantizerFault::kNone ? Status{} : bad_argument(refusal_of(fault), index);
}

// Writes all in front of the payload, and last the checksum over it, with the checksum's own field still 0.
void write_metadata(const SegmentEncoder& encoder, const EncodeOptions& options, std::int64_t payload_at,
                    std::int64_t total, std::uint8_t* out) {
    std::uint64_t elements = 0;
    for (const SegmentRecord& record : encoder.records) elements += record.count;
    // Fields that are reserved must be 0.
    PacketHeader header{};
    header.magic = kMagic;
    header.version = kVersion;
    header.dtype = options.dtype;
    header.flags = options.checksums ? kFlagChecksums : 0;
    header.ndim = static_cast<std::uint8_t>(options.dims.size());
    header.segment_count = static_cast<std::uint32_t>(encoder.records.size());
    header.element_count = elements;
    header.total_bytes = static_cast<std::uint64_t>(total);
    header.steps = static_cast<std::uint16_t>(options.steps);
    header.lengths_words = static_cast<std::uint32_t>(encoder.lengths.size() / 4);

    // The parts in the format's order; nothing is aligned beyond 4 bytes, so all are copied.
    std::uint8_t* at = out;
    const auto put = [&](const void* data, std::size_t bytes) {
        if (bytes > 0) std::memcpy(at, data, bytes);
        at += bytes;
    };
    put(&header, sizeof(header));
    put(options.dims.data(), 8 * options.dims.size());
    dispatch(options.dtype, [&](auto traits) {
        for (const SegmentRecord& record : encoder.records) {
            const auto wire = WireRecord<typename decltype(traits)::Arithmetic>::of(record);
            put(&wire, sizeof(wire));
        }
    });
    put(encoder.lengths.data(), encoder.lengths.size());
    put(encoder.block_ends.data(), 4 * encoder.block_ends.size());
    if (options.checksums) put(encoder.checksums.data(), 4 * encoder.checksums.size());
    const std::uint32_t sum = checksum(out, payload_at);
    std::memcpy(out + offsetof(PacketHeader, header_checksum), &sum, sizeof(sum));
}

}  // namespace

std::int64_t encode_bound(const std::vector<SegmentInput>& segments, const EncodeOptions& options) {
    std::int64_t total = metadata_bytes(segments, options, sum_max_lengths(segments));
    for (const SegmentInput& segment : segments) {
        total += max_payload_bytes(segment.values.count, segment.quantizer, options.dtype, options.steps);
    }
    const std::int64_t values = sum_run_values(segments);
    return total + align4(max_run_block_bytes(values, run_blocks(values, options.steps)));
}

Status encode_packet(const std::vector<SegmentInput>& segments, const EncodeOptions& options, std::uint8_t* out,
                     std::int64_t capacity, std::int64_t* total_bytes) {
    if (segments.empty()) return bad_argument("a packet needs at least one segment");
    if (options.steps < 1 || options.steps > kMaxSteps) return bad_argument("steps must be 1..512", options.steps);
    if (options.dims.size() > kMaxDims)
        return bad_argument("a tensor has at most 64 dimensions", static_cast<std::int64_t>(options.dims.size()));
    // All segments are checked before the first is encoded, since encoding updates residuals.
    for (std::size_t i = 0; i < segments.size(); ++i) {
        QCOMM_RETURN_IF_ERROR(check_segment(segments[i], options.dtype, static_cast<std::int64_t>(i)));
    }
    const std::int64_t bound = encode_bound(segments, options);
    // The bound counts, not the size: whether a tensor is refused must not depend on its values.
    if (static_cast<std::uint64_t>(bound) >= kMaxPayloadBytes)
        return bad_argument("a packet holds at most 16 GiB; split the tensor", bound);
    if (capacity < bound) return no_space("the destination is smaller than encode_bound", bound);

    // The payload is written where it would begin with the largest possible metadata, whose true size is known only at
    // the end. Moving it down once is cheaper than a second buffer, and mostly there is nothing to move.
    //
    //   | largest metadata possible ............ | payload ......... |
    //   | metadata ............... | payload ......... |
    const std::int64_t provisional = metadata_bytes(segments, options, sum_max_lengths(segments));
    SegmentEncoder encoder(options, out + provisional);
    for (const SegmentInput& segment : segments) {
        dispatch(options.dtype, [&](auto traits) { encoder.encode(traits, segment); });
    }
    encoder.finish();
    const std::int64_t metadata = record_bytes(options.dtype) * static_cast<std::int64_t>(segments.size()) +
                                  static_cast<std::int64_t>(sizeof(PacketHeader) + 8 * options.dims.size() +
                                                            encoder.lengths.size() + 4 * encoder.block_ends.size() +
                                                            (options.checksums ? 4 * encoder.checksums.size() : 0));
    if (encoder.payload() != out + metadata)
        std::memmove(out + metadata, encoder.payload(), static_cast<std::size_t>(encoder.payload_bytes));
    *total_bytes = metadata + encoder.payload_bytes;
    write_metadata(encoder, options, metadata, *total_bytes, out);
    return {};
}

}  // namespace qcomm
