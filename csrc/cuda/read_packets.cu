// The metadata of packets, checked and turned into the views that the decoding kernels need: where segments, blocks and
// tiles begin (specification: parse_packet() of csrc/cpu/packet_parse.cpp, "What a decoder refuses" in docs/format.md).
//
//   header 40    | dimensions  | records 32*n       | code lengths | block ends 4*B | checksums 4*C | payload
//   all threads  | all threads | a thread each, and | all threads  | a thread each  |               | check_pieces
//                |             | scans of sizes     |              |                |               |
//
// Block: a packet. Shared memory: 8 bytes a warp for each field of a scan, and 0.4 KiB for lists of code lengths.
// Passes: records (checked, and their sizes summed), lists of code lengths, block ends and where segments lie, the
// header checksum. check_pieces then reads raw and fixed segments, 64 KiB a warp.
// Limits: as many segments as the caller expects; 2^42 values.
// Safety: nothing is read before its offset is known to lie in the packet; loops are bounded by sizes that have been
// compared with the packet's.
// Determinism: the status is the largest of the faults.
// Bytes moved per value: none; 8 per block. Raw segments: their size.
#include "block_sum.cuh"
#include "checksum.cuh"
#include "code_list.cuh"
#include "kernels.cuh"
#include "last_block.cuh"
#include "packet_view.cuh"
#include "qcomm/zero_runs.h"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPieceWarps = 4;

constexpr std::int64_t kDimsAt = sizeof(PacketHeader);

// Of a segment, or of several: values, block ends, checksums, bytes that are not in blocks, the units of work that
// decode_packets, sum_packets and check_pieces make of them, and values of zero runs, whose blocks are no segment's
// own.
struct Sizes {
    std::int64_t values = 0, blocks = 0, checksums = 0, plain = 0, tiles = 0, sum_tiles = 0, pieces = 0, runs = 0;
};
using SizeSums = FieldSums<Sizes, &Sizes::values, &Sizes::blocks, &Sizes::checksums, &Sizes::plain, &Sizes::tiles,
                           &Sizes::sum_tiles, &Sizes::pieces, &Sizes::runs>;

struct Shared {
    std::int64_t scratch[SizeSums::kCount][kMaxWarps];
    CodeListShared list;
};

// Header and records are read in words: packets are aligned to 4 bytes, and these structs to 8.
__device__ PacketHeader load_header(const std::uint8_t* packet) {
    std::uint32_t words[sizeof(PacketHeader) / 4];
    for (std::size_t i = 0; i < sizeof(words) / 4; ++i) words[i] = load_u32(packet + 4 * i);
    PacketHeader header;
    memcpy(&header, words, sizeof(header));
    return header;
}

// Bytes that are no packet are another fault than a packet that was not expected: a caller that sees the second has
// mixed up its own packets.
__device__ Fault check_header(const PacketHeader& h, const DecodeTask& task, const DecodeTables& d) {
    const auto bytes = static_cast<std::uint64_t>(task.bytes);
    if (h.magic != kMagic || h.version != kVersion || h.flags > kFlagChecksums || h.reserved != 0 ||
        h.ndim > kMaxDims || h.segment_count < 1 || h.total_bytes > bytes || (task.exact && h.total_bytes != bytes))
        return Fault::kHeader;
    if (h.dtype != d.dtype || h.element_count != static_cast<std::uint64_t>(task.elements) || h.steps != d.steps ||
        h.segment_count > static_cast<std::uint32_t>(d.max_segments))
        return Fault::kMismatch;
    return Fault::kNone;
}

// By every thread alike: there are 64 at most. A factor is compared with the quotient first, so no product overflows.
__device__ Fault check_dims(const std::uint8_t* dims, int ndim, std::uint64_t elements) {
    std::uint64_t product = 1;  // of the dimensions that are not 0
    bool empty = false;
    for (int i = 0; i < ndim; ++i) {
        const std::uint64_t d = load_u64(dims + 8 * i);
        if (d > kMaxElements) return Fault::kRecords;
        if (d == 0) empty = true;
        if (d != 0 && product > kMaxElements / d) return Fault::kRecords;
        if (d != 0) product *= d;
    }
    return (empty ? 0 : product) == elements ? Fault::kNone : Fault::kRecords;
}

// The rule is check() of qcomm/quantize.h, with the static tables of device memory.
template <class Tr>
__device__ Fault check_record(const SegmentRecord& r, const DecodeTables& d) {
    if (static_cast<unsigned>(r.grid) > 3 || static_cast<unsigned>(r.coding) > kLastCoding) return Fault::kRecords;
    if (r.coding == Coding::kRuns && !d.takes_runs) return Fault::kRecords;
    const Quantizer q = quantizer_of(r);
    const QuantizerFault fault = check<Tr>(q, has_static_table(q) ? d.codes->alphabet(q.table) : StaticAlphabet{});
    if (!is_readable(fault)) return Fault::kRecords;
    // The caller has made room for codes up to an alphabet only.
    const bool own = is_block_coded(r.coding) && r.table == kTableOnWire;
    return own && alphabet_size(r.coding, r.num_bits) > d.max_alphabet ? Fault::kRecords : Fault::kNone;
}

template <class T>
__device__ SegmentRecord record_at(const std::uint8_t* records, int index) {
    WireRecord<T> wire;
    std::uint32_t words[sizeof(wire) / 4];
    const std::uint8_t* const at = records + static_cast<std::int64_t>(sizeof(wire)) * index;
    for (std::size_t i = 0; i < sizeof(words) / 4; ++i) words[i] = load_u32(at + 4 * i);
    memcpy(&wire, words, sizeof(wire));
    return wire.unpack();
}

// Sizes of a record that has been checked. No sum of them overflows: a count is below 2^40, and segments are at most
// 2^20.
__device__ Sizes sizes_of(const SegmentRecord& r, int steps, std::int64_t item, bool checksums) {
    const auto count = static_cast<std::int64_t>(r.count);
    Sizes s;
    s.values = count;
    s.blocks = blocks_in(r, steps);
    s.checksums = checksums_in(r, steps);
    if (r.coding == Coding::kRaw) s.plain = align4(count * item);
    if (r.coding == Coding::kFixed) s.plain = align4(packed_bytes(count, r.num_bits));
    if (r.coding == Coding::kRuns) {
        s.runs = count;  // decode_run_blocks decodes them
    } else {
        const std::int64_t units = is_block_coded(r.coding) ? s.blocks : ceil_div(count, unit_values(steps));
        s.tiles = ceil_div(units, kDecodeWarps);
    }
    s.sum_tiles = ceil_div(count, sum_tile_values(steps));
    s.pieces = checksums ? ceil_div(s.plain, kChecksumPiece) : 0;
    return s;
}

// Returns where a segment begins in the payload: behind the last block before it, and the plain segments since. Block
// ends say where blocks are, and the sizes of plain segments follow from their records; a segment may have either
// behind it.
__device__ std::int64_t begin_of(const SegmentView* segments, int count, int s, const std::uint8_t* ends) {
    const SegmentView& segment = segments[s];
    if (segment.first_end == 0) return segment.plain_before;
    const std::int64_t block = segment.first_end - 1;
    const SegmentView& owner = segments[find_task(segments, count, block, &SegmentView::first_end)];
    return 4 * static_cast<std::int64_t>(load_u32(ends + 4 * block)) + segment.plain_before - owner.plain_before;
}

// Reads all lists of a packet, one after the other, as only the contents of one tell where it ends. Tells whether they
// fill `words` words exactly.
__device__ bool read_code_lists(const DecodeTables& d, const std::uint8_t* lists, std::int64_t words, int number,
                                int segments, Shared* shared) {
    std::int64_t at = 0;
    for (int s = 0; d.max_alphabet > 0 && s < segments; ++s) {
        const Quantizer& q = d.segments_of(number)[s].quantizer;
        if (!is_block_coded(q.coding) || q.table != kTableOnWire) continue;
        const std::int64_t used = read_code_list(
            reinterpret_cast<const std::uint32_t*>(lists) + at, words - at, alphabet_size(q.coding, q.num_bits),
            length_limit(q.coding, q.num_bits), d.lengths_of(number, s), &shared->list);
        if (used < 0) return false;
        at += used;
    }
    return at == words;
}

// A packet whose header has been checked, and where the parts of its metadata begin.
struct Reading {
    const DecodeTask* task;
    SegmentView* views;  // of its segments
    int segments;
    bool has_checksums;
    std::int64_t total;  // bytes of the packet
    std::int64_t records_at, lengths_at, ends_at;
};

__device__ Reading begin_reading(const DecodeTables& d, const DecodeTask& task, int number, const PacketHeader& h) {
    Reading p{};
    p.task = &task;
    p.views = d.segments + d.place_of(number, 0);
    p.segments = static_cast<int>(h.segment_count);
    p.has_checksums = (h.flags & kFlagChecksums) != 0;
    p.total = static_cast<std::int64_t>(h.total_bytes);
    p.records_at = kDimsAt + 8 * h.ndim;
    p.lengths_at = p.records_at + record_bytes(h.dtype) * h.segment_count;
    p.ends_at = p.lengths_at + std::int64_t{4} * h.lengths_words;
    return p;
}

// Fills a view, except for the fields that block ends decide.
__device__ void put_view(SegmentView* view, const SegmentRecord& r, const Sizes& before, const Sizes& own) {
    view->count = static_cast<std::int64_t>(r.count);
    view->first_value = before.values;
    view->plain_before = before.plain;
    view->plain_bytes = own.plain;
    view->payload = 0;  // check_ends() knows it
    view->first_end = before.blocks;
    view->first_checksum = before.checksums;
    view->blocks = own.blocks;
    view->first_tile = before.tiles;
    view->first_sum_tile = before.sum_tiles;
    view->first_piece = before.pieces;
    view->first_run = before.runs;
    view->quantizer = quantizer_of(r);
    view->code_mask = 0;
}

// Checks the segment records, a thread each, and makes views of them. *all receives the sum of their sizes. The result
// is this thread's: whether a record of its own is bad.
template <class Tr>
__device__ bool read_records(const Reading& p, const DecodeTables& d, Shared* shared, Sizes* all) {
    bool bad = false;
    *all = Sizes{};
    for (int at = 0; at < p.segments; at += kThreads) {
        const int i = at + static_cast<int>(threadIdx.x);
        SegmentRecord record{};
        Sizes size{};
        if (i < p.segments) {
            record = record_at<typename Tr::Arithmetic>(p.task->packet + p.records_at, i);
            if (check_record<Tr>(record, d) != Fault::kNone) {
                bad = true;
            } else {
                size = sizes_of(record, d.steps, sizeof(typename Tr::Storage), p.has_checksums);
            }
        }
        const int present = p.segments - at < kThreads ? p.segments - at : kThreads;
        const Sizes before = SizeSums::scan(size, shared->scratch, all, present);
        if (i < p.segments) put_view(&p.views[i], record, before, size);
        __syncthreads();  // the next round uses the scratch again
    }
    return bad;
}

__device__ std::int64_t end_of_block(const std::uint8_t* ends, std::int64_t block) {
    return 4 * static_cast<std::int64_t>(load_u32(ends + 4 * block));
}

// Returns where a segment that begins at `begin` ends in the payload.
__device__ std::int64_t end_of(const SegmentView& view, std::int64_t begin, const std::uint8_t* ends) {
    return view.blocks > 0 ? end_of_block(ends, view.first_end + view.blocks - 1) : begin + view.plain_bytes;
}

// Checks that block ends ascend and that segments, with the run blocks behind them, fill the payload; notes where each
// segment begins there. *runs receives where the run blocks begin. The result is this thread's: whether an end or a
// segment of its own is bad.
__device__ bool check_ends(const Reading& p, std::int64_t blocks, std::int64_t shared_blocks,
                           std::int64_t payload_bytes, std::int64_t* runs) {
    const std::uint8_t* const ends = p.task->packet + p.ends_at;
    const int last = p.segments - 1;
    *runs = end_of(p.views[last], begin_of(p.views, p.segments, last, ends), ends);
    bool bad =
        shared_blocks == 0 ? *runs != payload_bytes : end_of_block(ends, blocks + shared_blocks - 1) != payload_bytes;
    for (std::int64_t b = threadIdx.x; b < shared_blocks; b += kThreads) {
        const std::int64_t begin = b == 0 ? *runs : end_of_block(ends, blocks + b - 1);
        const std::int64_t end = end_of_block(ends, blocks + b);
        bad |= end <= begin || end > payload_bytes;
    }
    for (std::int64_t b = threadIdx.x; b < blocks; b += kThreads) {
        const int s = find_task(p.views, p.segments, b, &SegmentView::first_end);
        const std::int64_t begin =
            b == p.views[s].first_end ? begin_of(p.views, p.segments, s, ends) : end_of_block(ends, b - 1);
        const std::int64_t end = end_of_block(ends, b);
        bad |= end <= begin || end > payload_bytes;
    }
    for (int s = static_cast<int>(threadIdx.x); s < p.segments; s += kThreads) {
        SegmentView& view = p.views[s];
        view.payload = begin_of(p.views, p.segments, s, ends);
        bad |= end_of(view, view.payload, ends) > payload_bytes;
    }
    return bad;
}

// By the first warp: whether the metadata, which end where the payload begins, have the checksum that the header says.
__device__ Fault check_metadata(const std::uint8_t* packet, std::int64_t payload_at, std::uint32_t expected) {
    constexpr std::int64_t kOwn = offsetof(PacketHeader, header_checksum) / 4;
    static_assert(kOwn < kWarpLanes, "it is in the first row");
    const auto* const words = reinterpret_cast<const std::uint32_t*>(packet);
    const std::int64_t lane = lane_number(), count = payload_at / 4;
    WarpChecksum sum;
    if (lane < count) sum.absorb(lane == kOwn ? 0u : words[lane]);
    absorb_words(sum, words, lane + kWarpLanes, count);
    return sum.finish(payload_at) == expected ? Fault::kNone : Fault::kHeader;
}

template <class Tr>
__device__ Fault read_packet(const DecodeTables& d, const DecodeTask& task, int number, Shared* shared) {
    if (task.bytes < static_cast<std::int64_t>(sizeof(PacketHeader))) return Fault::kHeader;
    const PacketHeader h = load_header(task.packet);
    const Fault fault = check_header(h, task, d);
    if (fault != Fault::kNone) return fault;
    const Reading p = begin_reading(d, task, number, h);
    // From here on dimensions, records and lists lie in the packet; how long the tables behind them are the records
    // tell.
    if (p.ends_at > p.total || p.total % 4 != 0) return Fault::kHeader;
    if (check_dims(p.task->packet + kDimsAt, h.ndim, h.element_count) != Fault::kNone) return Fault::kRecords;

    Sizes all;
    // Barriers follow each pass: the next one reads the findings of other threads, and all must agree to go on.
    const bool bad_record = read_records<Tr>(p, d, shared, &all);
    if (__syncthreads_or(bad_record) || all.values != task.elements) return Fault::kRecords;
    if (!read_code_lists(d, p.task->packet + p.lengths_at, h.lengths_words, number, p.segments, shared))
        return Fault::kRecords;

    const std::int64_t shared_blocks = run_blocks(all.runs, d.steps);
    if (shared_blocks > kMaxRunBlocks) return Fault::kRecords;
    const std::int64_t sums_at = p.ends_at + 4 * (all.blocks + shared_blocks);
    const std::int64_t payload_at = sums_at + (p.has_checksums ? 4 * (all.checksums + shared_blocks) : 0);
    if (payload_at > p.total) return Fault::kLayout;
    std::int64_t runs = 0;
    if (__syncthreads_or(check_ends(p, all.blocks, shared_blocks, p.total - payload_at, &runs))) return Fault::kLayout;
    if (threadIdx.x == 0) {
        PacketView& view = d.packets[number];
        view.ends = p.ends_at;
        view.checksums = p.has_checksums ? sums_at : 0;
        view.payload = payload_at;
        view.tiles = all.tiles;
        view.sum_tiles = all.sum_tiles;
        view.pieces = all.pieces;
        view.run_values = all.runs;
        view.run_blocks = shared_blocks;
        view.runs = runs;
        view.first_run_end = all.blocks;
        view.first_run_checksum = all.checksums;
        view.segments = p.segments;
    }
    return warp_number() == 0 ? check_metadata(p.task->packet, payload_at, h.header_checksum) : Fault::kNone;
}

// A packet a block: its metadata, or a fault.
template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) read_packets(DecodeTables d) {
    DYNAMIC_SHARED(Shared, shared);
    const int number = static_cast<int>(blockIdx.x);
    const Fault fault = read_packet<Tr>(d, d.tasks[number], number, shared);
    if (threadIdx.x != 0) return;
    // Both begin here: a launch to clear them would take longer. No other block of this launch looks at them, and the
    // launches behind it see what it has written.
    d.faults[number] = static_cast<unsigned>(fault);
    d.counters[number] = 0;
}

// A piece a warp, tile_count blocks a packet; the last block of a packet compares.
__global__ void __launch_bounds__(kPieceWarps* kWarpLanes) check_pieces(DecodeTables d, int tile_count) {
    const int number = static_cast<int>(blockIdx.x) / tile_count, tile = static_cast<int>(blockIdx.x) % tile_count;
    if (__syncthreads_or(threadIdx.x == 0 && atomicOr(&d.faults[number], 0u) != 0)) return;
    const PacketView packet = d.packets[number];
    const auto tiles = static_cast<int>(ceil_div(packet.pieces, kPieceWarps));
    if (tile >= tiles) return;
    const std::uint8_t* const bytes = d.tasks[number].packet;
    const SegmentView* const segments = d.segments_of(number);
    std::uint32_t* const sums = d.piece_sums + number * d.max_pieces;
    const std::int64_t piece = std::int64_t{tile} * kPieceWarps + warp_number();
    if (piece < packet.pieces) {
        const SegmentView& segment = segments[find_task(segments, packet.segments, piece, &SegmentView::first_piece)];
        const std::int64_t at = (piece - segment.first_piece) * kChecksumPiece, rest = segment.plain_bytes - at;
        const auto* words = reinterpret_cast<const std::uint32_t*>(bytes + packet.payload + segment.payload + at);
        const std::uint32_t sum = warp_checksum(words, (rest < kChecksumPiece ? rest : kChecksumPiece) / 4);
        if (lane_number() == 0) sums[piece] = sum;
    }
    // A segment's checksum is that of its pieces' checksums, which all blocks of the packet have left in device memory.
    if (!is_last_block(&d.counters[number], static_cast<unsigned>(tiles))) return;
    for (int s = warp_number(); s < packet.segments; s += kPieceWarps) {
        const std::int64_t pieces = ceil_div(segments[s].plain_bytes, kChecksumPiece);
        if (pieces == 0) continue;
        const std::uint32_t sum = warp_checksum(sums + segments[s].first_piece, pieces);
        if (lane_number() == 0 && sum != load_u32(bytes + packet.checksums + 4 * segments[s].first_checksum))
            report(&d.faults[number], Fault::kPiece);
    }
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_read_packets(const DecodeTables& d, std::int64_t piece_tiles, void* stream) {
    with_source(d.dtype, false, [&](auto traits, auto) {
        launch_kernel(read_packets<decltype(traits)>, static_cast<unsigned>(d.packet_count), kThreads, sizeof(Shared),
                      stream, d);
    });
    launch_kernel(check_pieces, static_cast<unsigned>(piece_tiles * d.packet_count), kPieceWarps * kWarpLanes, 0,
                  stream, d, static_cast<int>(piece_tiles));
}
#endif

}  // namespace qcomm::cuda
