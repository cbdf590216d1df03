// The host's side of decoding: how large a launch must be for any packet of the expected shape, and where the kernels
// keep their findings. Packets are not read here: they may not even have arrived when the kernels are enqueued. So
// sizes follow from the caller's expectation, and a kernel refuses a packet that is another.
#include <algorithm>
#include <cstring>

#include "kernels.cuh"
#include "packet_view.cuh"
#include "qcomm/huffman.h"
#include "workspace.h"

namespace qcomm::cuda {
namespace {

constexpr std::int64_t kMaxLaunch = 0x7FFFFFFF;  // thread blocks
// The sum of their values then fits 63 bits, although each segment of a packet may claim 2^42.
constexpr int kMaxSegments = 1 << 20;
constexpr std::int64_t kPieceWarps = 4;  // of check_pieces

// The alphabet and the longest codeword of codes that segments have of their own; pairs count as 8 bits.
// A kernel has room for the larger of both alphabets, as it is not known which coding a packet takes: length_limit() is
// 12 for pairs and for up to 8 bits alike.
int max_alphabet(int bits) { return bits == 0 ? 0 : 1 << std::max(bits, 2 * kPairBits); }
int code_bits(int bits) { return length_limit(Coding::kSingle, bits); }

}  // namespace

// The last fault found is told; nothing is launched after any.
DecodePlan::DecodePlan(DType dtype, int steps, int max_segments, const std::vector<DecodeTask>& tasks,
                       int own_code_bits, bool takes_runs)
    : dtype_(dtype),
      steps_(steps),
      max_segments_(max_segments),
      packet_count_(static_cast<int>(tasks.size())),
      own_code_bits_(own_code_bits),
      takes_runs_(takes_runs) {
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
        // Kernels read words, which a GPU does only at multiples of their size.
        if (reinterpret_cast<std::uintptr_t>(task.packet) % 4 != 0)
            status_ = bad_argument("a packet must be aligned to 4 bytes");
        elements = std::max(elements, task.elements);
        bytes = std::max(bytes, task.bytes);
    }
    if (!status_.ok()) return;
    // Whole tiles follow from the elements; besides, each segment may have one short tile, and one short piece.
    tiles_ = ceil_div(elements, kDecodeWarps * unit_values(steps)) + max_segments;
    sum_tiles_ = ceil_div(elements, sum_tile_values(steps)) + max_segments;
    run_tiles_ = takes_runs ? run_blocks(elements, steps) : 0;
    // Pieces are of plain segments, which have no more bytes than the packet, nor than the values themselves.
    const std::int64_t pieces = std::min(bytes, elements * item_bytes(dtype)) / kChecksumPiece + max_segments;
    piece_tiles_ = ceil_div(pieces, kPieceWarps);
    if (std::max({tiles_, sum_tiles_, piece_tiles_, std::int64_t{max_segments}}) * packet_count_ > kMaxLaunch)
        status_ = bad_argument("too many values for one launch", elements);

    // The tasks are read as they are: a blob of one array needs no offsets.
    blob_.resize(sizeof(DecodeTask) * tasks.size());
    std::memcpy(blob_.data(), tasks.data(), blob_.size());
    Workspace measured;
    DecodeTables nowhere{};
    place(&measured, &nowhere);
    workspace_bytes_ = measured.bytes();
}

// Segments, pieces and codes have room by packet and number, as DecodeTables finds them.
void DecodePlan::place(Workspace* workspace, DecodeTables* d) const {
    const std::int64_t packets = packet_count_, segments = packets * max_segments_;
    const std::int64_t own = own_code_bits_ > 0 ? segments : 0;
    workspace->put(d->packets, packets);
    workspace->put(d->segments, segments);
    workspace->put(d->piece_sums, packets * kPieceWarps * piece_tiles_);
    workspace->put(d->counters, packets);
    workspace->put(d->code_lengths, own * max_alphabet(own_code_bits_));
    workspace->put(d->code_entries, own << code_bits(own_code_bits_));
}

DecodeTables DecodePlan::tables(const void* blob, const StaticTables* codes, void* workspace, unsigned* faults) const {
    DecodeTables d{};
    Workspace places(workspace);
    place(&places, &d);
    d.tasks = static_cast<const DecodeTask*>(blob);
    d.codes = codes;
    d.packet_count = packet_count_;
    d.max_segments = max_segments_;
    d.steps = steps_;
    d.dtype = dtype_;
    d.takes_runs = takes_runs_;
    d.max_pieces = kPieceWarps * piece_tiles_;
    d.faults = faults;
    d.max_alphabet = max_alphabet(own_code_bits_);
    d.code_bits = code_bits(own_code_bits_);
    return d;
}

// Everything that precedes the values, for both operations. A packet with a fault is left alone by the launches behind
// the one that found it.
void DecodePlan::prepare(const DecodeTables& d, void* stream) const {
    launch_read_packets(d, piece_tiles_, stream);
    if (own_code_bits_ > 0) launch_decode_tables(d, stream);
}

Status DecodePlan::decode(const void* blob, const StaticTables* codes, void* workspace, unsigned* faults,
                          void* stream) const {
    QCOMM_RETURN_IF_ERROR(status_);
    const DecodeTables d = tables(blob, codes, workspace, faults);
    prepare(d, stream);
    launch_decode(d, tiles_, stream);
    if (takes_runs_) launch_decode_runs(d, run_tiles_, stream);
    return launch_status();
}

Status DecodePlan::decode_sum(const void* blob, const StaticTables* codes, void* workspace, unsigned* faults,
                              void* stream, bool add) const {
    QCOMM_RETURN_IF_ERROR(status_);
    // As on the CPU: a sum in 16 bits would be rounded anew for each packet.
    if (item_bytes(dtype_) < 4) return bad_argument("a sum needs float32 or float64 packets");
    const DecodeTables d = tables(blob, codes, workspace, faults);
    prepare(d, stream);
    launch_sum(d, sum_tiles_, add, stream);
    return launch_status();
}

}  // namespace qcomm::cuda
