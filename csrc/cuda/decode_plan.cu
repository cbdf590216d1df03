// The host's side of decoding: how large a launch must be for any packet of the expected shape, and where the kernels
// keep what they find out.
#include <algorithm>
#include <cstring>

#include "kernels.cuh"
#include "packet_view.cuh"
#include "qcomm/huffman.h"

namespace qcomm::cuda {
namespace {

constexpr std::int64_t kMaxLaunch = 0x7FFFFFFF;  // thread blocks
constexpr int kMaxSegments = 1 << 20;
constexpr std::int64_t kPieceWarps = 4;  // of check_pieces

std::int64_t align16(std::int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Of codes that segments have of their own; those of pairs count as 8 bits.
int max_alphabet(int bits) { return bits == 0 ? 0 : 1 << std::max(bits, 2 * kPairBits); }
int code_bits(int bits) { return length_limit(Coding::kSingle, bits); }

}  // namespace

enum DecodePlan::Place : int { kPackets, kSegments, kPieces, kCounters, kCodeLengths, kCodeEntries };

DecodePlan::DecodePlan(DType dtype, int steps, int max_segments, const std::vector<DecodeTask>& tasks,
                       int own_code_bits)
    : dtype_(dtype),
      steps_(steps),
      max_segments_(max_segments),
      packet_count_(static_cast<int>(tasks.size())),
      own_code_bits_(own_code_bits) {
    if (own_code_bits < 0 || own_code_bits > kMaxCodedBits)
        status_ = bad_argument("own_code_bits must be 0..12", own_code_bits);
    if (steps < 1 || steps > kMaxSteps) status_ = bad_argument("steps must be 1..512", steps);
    if (max_segments < 1 || max_segments > kMaxSegments)
        status_ = bad_argument("max_segments must be 1..2^20", max_segments);
    if (tasks.empty()) status_ = bad_argument("there must be at least one packet");
    std::int64_t elements = 0, bytes = 0;
    for (const DecodeTask& task : tasks) {
        if (task.elements < 0 || task.elements > kMaxElements)
            status_ = bad_argument("elements out of range", task.elements);
        if (reinterpret_cast<std::uintptr_t>(task.packet) % 4 != 0)
            status_ = bad_argument("a packet must be aligned to 4 bytes");
        elements = std::max(elements, task.elements);
        bytes = std::max(bytes, task.bytes);
    }
    if (!status_.ok()) return;
    // A segment may have one short tile, and one short piece.
    tiles_ = ceil_div(elements, kDecodeWarps * unit_values(steps)) + max_segments;
    sum_tiles_ = ceil_div(elements, sum_tile_values(steps)) + max_segments;
    const std::int64_t pieces = std::min(bytes, elements * item_bytes(dtype)) / kChecksumPiece + max_segments;
    piece_tiles_ = ceil_div(pieces, kPieceWarps);
    if (std::max({tiles_, sum_tiles_, piece_tiles_, std::int64_t{max_segments}}) * packet_count_ > kMaxLaunch)
        status_ = bad_argument("too many values for one launch", elements);

    blob_.resize(sizeof(DecodeTask) * tasks.size());
    std::memcpy(blob_.data(), tasks.data(), blob_.size());
    const std::int64_t sizes[] = {
        static_cast<std::int64_t>(sizeof(PacketView)),
        static_cast<std::int64_t>(sizeof(SegmentView)) * max_segments,
        4 * kPieceWarps * piece_tiles_,
        4,
        std::int64_t{max_alphabet(own_code_bits)} * max_segments,
        (std::int64_t{2} << code_bits(own_code_bits)) * (own_code_bits > 0 ? max_segments : 0)};
    for (int place = kPackets; place <= kCodeEntries; ++place) {
        workspace_at_[place] = workspace_bytes_;
        workspace_bytes_ += align16(sizes[place] * packet_count_);
    }
}

DecodeTables DecodePlan::tables(const void* blob, const StaticTables* codes, void* workspace, unsigned* faults) const {
    const auto at = [&](Place place) { return static_cast<std::uint8_t*>(workspace) + workspace_at_[place]; };
    return {static_cast<const DecodeTask*>(blob),
            codes,
            packet_count_,
            max_segments_,
            steps_,
            dtype_,
            reinterpret_cast<PacketView*>(at(kPackets)),
            reinterpret_cast<SegmentView*>(at(kSegments)),
            reinterpret_cast<std::uint32_t*>(at(kPieces)),
            kPieceWarps * piece_tiles_,
            reinterpret_cast<unsigned*>(at(kCounters)),
            faults,
            max_alphabet(own_code_bits_),
            code_bits(own_code_bits_),
            at(kCodeLengths),
            reinterpret_cast<std::uint16_t*>(at(kCodeEntries))};
}

void DecodePlan::prepare(const DecodeTables& d, void* stream) const {
    launch_clear(d.counters, 4 * std::int64_t{packet_count_}, stream);
    launch_clear(d.faults, 4 * std::int64_t{packet_count_}, stream);
    launch_read_packets(d, piece_tiles_, stream);
    if (own_code_bits_ > 0) launch_decode_tables(d, stream);
}

Status DecodePlan::decode(const void* blob, const StaticTables* codes, void* workspace, unsigned* faults,
                          void* stream) const {
    QCOMM_RETURN_IF_ERROR(status_);
    const DecodeTables d = tables(blob, codes, workspace, faults);
    prepare(d, stream);
    launch_decode(d, tiles_, stream);
    return launch_status();
}

Status DecodePlan::decode_sum(const void* blob, const StaticTables* codes, void* workspace, unsigned* faults,
                              void* stream, bool add) const {
    QCOMM_RETURN_IF_ERROR(status_);
    if (item_bytes(dtype_) < 4) return bad_argument("a sum needs float32 or float64 packets");
    const DecodeTables d = tables(blob, codes, workspace, faults);
    prepare(d, stream);
    launch_sum(d, sum_tiles_, add, stream);
    return launch_status();
}

}  // namespace qcomm::cuda
