// The host's side of decoding: how large a launch must be for any packet of the expected shape, and where the kernels
// keep what they find out.
#include <algorithm>
#include <cstring>

#include "kernels.cuh"
#include "packet_view.cuh"

namespace qcomm::cuda {
namespace {

constexpr std::int64_t kMaxLaunch = 0x7FFFFFFF;  // thread blocks
constexpr int kMaxSegments = 1 << 20;
constexpr std::int64_t kPieceWarps = 4;  // of check_pieces

std::int64_t align16(std::int64_t bytes) { return (bytes + 15) / 16 * 16; }

}  // namespace

enum DecodePlan::Place : int { kPackets, kSegments, kPieces, kCounters };

DecodePlan::DecodePlan(DType dtype, int steps, int max_segments, const std::vector<DecodeTask>& tasks)
    : dtype_(dtype), steps_(steps), max_segments_(max_segments), packet_count_(static_cast<int>(tasks.size())) {
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
    if (std::max({tiles_, sum_tiles_, piece_tiles_}) * packet_count_ > kMaxLaunch)
        status_ = bad_argument("too many values for one launch", elements);

    blob_.resize(sizeof(DecodeTask) * tasks.size());
    std::memcpy(blob_.data(), tasks.data(), blob_.size());
    const std::int64_t sizes[] = {static_cast<std::int64_t>(sizeof(PacketView)),
                                  static_cast<std::int64_t>(sizeof(SegmentView)) * max_segments,
                                  4 * kPieceWarps * piece_tiles_, 4};
    for (int place = kPackets; place <= kCounters; ++place) {
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
            faults};
}

Status DecodePlan::decode(const void* blob, const StaticTables* codes, void* workspace, unsigned* faults,
                          void* stream) const {
    QCOMM_RETURN_IF_ERROR(status_);
    const DecodeTables d = tables(blob, codes, workspace, faults);
    launch_clear(d.counters, 4 * std::int64_t{packet_count_}, stream);
    launch_clear(d.faults, 4 * std::int64_t{packet_count_}, stream);
    launch_read_packets(d, piece_tiles_, stream);
    launch_decode(d, tiles_, stream);
    return launch_status();
}

Status DecodePlan::decode_sum(const void* blob, const StaticTables* codes, void* workspace, unsigned* faults,
                              void* stream) const {
    QCOMM_RETURN_IF_ERROR(status_);
    if (item_bytes(dtype_) < 4) return bad_argument("a sum needs float32 or float64 packets");
    const DecodeTables d = tables(blob, codes, workspace, faults);
    launch_clear(d.counters, 4 * std::int64_t{packet_count_}, stream);
    launch_clear(d.faults, 4 * std::int64_t{packet_count_}, stream);
    launch_read_packets(d, piece_tiles_, stream);
    launch_sum(d, sum_tiles_, stream);
    return launch_status();
}

}  // namespace qcomm::cuda
