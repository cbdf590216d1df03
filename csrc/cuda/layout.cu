// Where everything goes in the packets: sizes are known, so fallbacks are decided and offsets are sums (specification:
// write_segment() and encode_packet() of qcomm/reference/packet.py).
//
//   header 40 | dimensions 8*ndim | records 32*segments | code lengths | block ends 4*B | checksums 4*C | payload
//   written here ....................................................... | written by payload.cu ..................
//
// Thread: every 256th block, then every 256th segment. Block: a packet. Shared memory: 8 bytes a warp for each scan.
// Passes: a scan of the sizes of the packet's blocks; segments choose, in parallel, whether they become fixed or raw;
// scans over segments give the offsets. If the packet then exceeds its capacity, blocks are dropped, and all is done
// again: of the blocks that may be, those of sigma segments with a residual, in their order, the first ones stay, as
// many as there is room for; the others become blocks of zeros of 4 bytes, whose values the residual keeps. Run blocks
// are the last in that order, as they are in the packet.
// Limits: a packet below 16 GiB, whose block ends fit 32 bits in units of 4 bytes (EncodePlan refuses more).
// Determinism: integers only.
// Bytes moved per value: nothing to speak of; 16 per block.
#include "block_sum.cuh"
#include "kernels.cuh"
#include "qcomm/block.h"
#include "qcomm/zero_runs.h"
#include "warp.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = 256;
static_assert(sizeof(PacketHeader) % 4 == 0 && sizeof(WireRecord<float>) % 4 == 0, "both are written in words");

// Bytes of payload and of lists, numbers of block ends and checksums, values: of a segment, or of all before it.
struct Sizes {
    std::int64_t payload, ends, checksums, lengths, elements;
};
using SizeSums = FieldSums<Sizes, &Sizes::payload, &Sizes::ends, &Sizes::checksums, &Sizes::lengths, &Sizes::elements>;

struct Shared {
    std::uint32_t units[kMaxWarps];
    std::int64_t sums[SizeSums::kCount][kMaxWarps];
};

// Structs are written in words: packets are aligned to 4 bytes only.
template <class T>
__device__ void write_words(std::uint8_t* out, const T& value) {
    std::uint32_t words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
    for (std::size_t i = 0; i < sizeof(T) / 4; ++i) reinterpret_cast<std::uint32_t*>(out)[i] = words[i];
}

// Sets ends[i] to the units of the packet's blocks up to and including i, in rounds of as many blocks as threads.
__device__ void sum_blocks(const BlockResult* blocks, std::int64_t count, std::uint32_t* ends, std::uint32_t* scratch) {
    std::uint32_t before = 0;
    for (std::int64_t at = 0; at < count; at += kThreads) {
        const std::int64_t i = at + threadIdx.x;
        const std::uint32_t units = i < count ? blocks[i].units : 0u;
        std::uint32_t total = 0;
        const auto present = static_cast<int>(count - at < kThreads ? count - at : kThreads);
        const std::uint32_t sum = before + block_exclusive_sum(units, scratch, &total, present) + units;
        if (i < count) ends[i] = sum;
        before += total;
        __syncthreads();
    }
}

// Finds the segment's final quantizer, and returns its sizes. `units` are those of its blocks. The order of the
// choices is the CPU encoder's (csrc/cpu/segment_encoder.h): constant and raw stay; blocks become fixed on a range
// grid, if that is no larger; either becomes raw, if that is no larger and no residual has been updated for it.
__device__ Sizes settle(const EncodeTables& e, int s, std::int64_t item, std::uint32_t units, Quantizer* q) {
    const SegmentTask& segment = e.segments[s];
    const Quantizer none{Grid::kNone, 0, Coding::kRaw, kTableOnWire, 0.0, 0.0};
    if (segment.count == 0) {
        *q = none;
        q->coding = Coding::kConstant;
    }
    const Sizes raw{align4(segment.count * item), 0, 1, 0, segment.count};
    if (q->coding == Coding::kRaw) return raw;
    // The blocks of zero runs are no segment's own.
    if (q->coding == Coding::kConstant || q->coding == Coding::kRuns) return {0, 0, 0, 0, segment.count};
    const auto cost = [&](const Sizes& of) {
        return of.payload + of.lengths + 4 * of.ends + (e.checksums ? 4 * of.checksums : 0);
    };
    const Sizes fixed{align4(packed_bytes(segment.count, q->num_bits)), 0, 1, 0, segment.count};
    Sizes size = fixed;
    if (is_block_coded(q->coding)) {
        const std::int64_t blocks = ceil_div(segment.count, values_per_block(q->coding, e.steps));
        const bool own = q->table == kTableOnWire;
        const int list = own ? e.list_bytes[s] : 0;
        size = {4 * static_cast<std::int64_t>(units), blocks, blocks, list, segment.count};
        if (own && list == 0) q->table = kNoTable;
        if (is_range(q->grid) && cost(size) >= cost(fixed)) {
            q->coding = Coding::kFixed;
            q->table = kTableOnWire;
            size = fixed;
        }
    }
    if (segment.residual_out == nullptr && cost(size) >= cost(raw)) {
        *q = none;
        return raw;
    }
    return size;
}

// Settles the packet's segments and says where each begins among the packet's parts; returns their sizes together.
__device__ Sizes place_segments(const EncodeTables& e, const PacketTask& packet, std::int64_t item, Shared* shared) {
    const std::uint32_t* const ends = e.ends + packet.first_block;
    Sizes before{};
    for (int at = 0; at < packet.segments; at += kThreads) {
        const int i = at + static_cast<int>(threadIdx.x), s = packet.first_segment + i;
        const int present = packet.segments - at < kThreads ? packet.segments - at : kThreads;
        Sizes size{};
        SegmentState state{};
        if (i < packet.segments) {
            const SegmentTask& segment = e.segments[s];
            const std::int64_t first = segment.first_block - packet.first_block;
            state.quantizer = e.quantizers[segment.tensor];
            state.units_before = first == 0 ? 0 : ends[first - 1];
            const std::uint32_t end = segment.blocks == 0 ? 0u : ends[first + segment.blocks - 1];
            const auto units = segment.blocks == 0 ? 0u : end - static_cast<std::uint32_t>(state.units_before);
            size = settle(e, s, item, units, &state.quantizer);
        }
        const Sizes place = SizeSums::scan(size, shared->sums, &before, present);
        state.payload = place.payload;
        state.first_end = place.ends;
        state.first_checksum = place.checksums;
        state.lengths = place.lengths;
        state.list_bytes = static_cast<int>(size.lengths);
        if (i < packet.segments) e.segment_states[s] = state;
        __syncthreads();
    }
    return before;
}

// A block that may be dropped: the units that this saves (0: it may not), its values, its info without them.
struct Candidate {
    std::int64_t saved, values;
    std::uint32_t info;
};

// Only blocks of sigma segments with a residual may be dropped, for only their values are not lost by it. One that
// takes a word already saves nothing.
__device__ Candidate candidate(const EncodeTables& e, const PacketTask& packet, std::int64_t block) {
    const std::uint32_t units = block < packet.blocks ? e.blocks[packet.first_block + block].units : 0u;
    if (units <= 1) return {0, 0, 0};
    if (const std::int64_t run = block - (packet.blocks - packet.run_blocks); run >= 0) {
        const RunTotal total = e.run_totals[blockIdx.x];
        const std::int64_t values =
            run_block_begin(total.values, total.blocks, run + 1) - run_block_begin(total.values, total.blocks, run);
        return {std::int64_t{units} - 1, values, RunInfo{RunMode::kZeros, 0, 0}.pack()};
    }
    const int s = packet.first_segment + find_task(e.segments + packet.first_segment, packet.segments,
                                                   packet.first_block + block, &SegmentTask::first_block);
    const SegmentTask& segment = e.segments[s];
    const Quantizer& q = e.segment_states[s].quantizer;
    if (segment.residual_out == nullptr || q.grid != Grid::kSigma) return {0, 0, 0};
    const std::int64_t per_block = values_per_block(q.coding, e.steps);
    const std::int64_t rest = segment.count - (packet.first_block + block - segment.first_block) * per_block;
    const BlockInfo zeros{BlockMode::kConstant, 0, static_cast<std::uint32_t>(sigma_radius(q.num_bits))};
    return {std::int64_t{units} - 1, rest < per_block ? rest : per_block, zeros.pack()};
}

// Calls f(block, its candidate, the units that the candidates before it save) for every block; returns the units that
// all save.
template <class F>
__device__ std::int64_t scan_candidates(const EncodeTables& e, const PacketTask& packet, Shared* shared, F f) {
    std::int64_t before = 0;
    for (std::int64_t at = 0; at < packet.blocks; at += kThreads) {
        const std::int64_t i = at + threadIdx.x;
        const Candidate c = candidate(e, packet, i);
        std::int64_t total = 0;
        const std::int64_t sum = before + block_exclusive_sum(c.saved, shared->sums[0], &total);
        f(i, c, sum);
        before += total;
        __syncthreads();
    }
    return before;
}

// Drops the last candidates, as many as save `excess` units; none where all do not. Returns the values dropped. Which
// ones go is a fixed rule, so it does not depend on the order of threads.
__device__ std::int64_t drop_blocks(const EncodeTables& e, const PacketTask& packet, std::int64_t excess,
                                    Shared* shared) {
    const std::int64_t all = scan_candidates(e, packet, shared, [](std::int64_t, const Candidate&, std::int64_t) {});
    if (all < excess) return 0;
    std::int64_t mine = 0, dropped = 0;
    scan_candidates(e, packet, shared, [&](std::int64_t i, const Candidate& c, std::int64_t before) {
        if (c.saved == 0 || before + c.saved <= all - excess) return;
        e.blocks[packet.first_block + i] = {c.info, kDropped, 1};
        mine += c.values;
    });
    block_exclusive_sum(mine, shared->sums[0], &dropped);
    __syncthreads();
    return dropped;
}

// Places the run blocks behind all segments, to whose sizes theirs are added.
__device__ void place_run_blocks(const EncodeTables& e, const PacketTask& packet, Sizes* sizes, PacketState* state) {
    if (packet.run_blocks == 0) return;
    const std::uint32_t* const ends = e.ends + packet.first_block;
    const std::int64_t before = packet.blocks - packet.run_blocks, blocks = e.run_totals[blockIdx.x].blocks;
    state->runs = sizes->payload;
    state->first_run_end = sizes->ends;
    state->first_run_checksum = sizes->checksums;
    state->units_before_runs = before == 0 ? 0 : ends[before - 1];
    sizes->payload += 4 * (ends[packet.blocks - 1] - state->units_before_runs);
    sizes->ends += blocks;
    sizes->checksums += blocks;
}

// Returns where the parts of a packet begin, and whether it fits. `sizes` are those of its segments, and then of all.
__device__ PacketState place_parts(const EncodeTables& e, const PacketTask& packet, Sizes* sizes) {
    PacketState state{};
    place_run_blocks(e, packet, sizes, &state);
    state.lengths =
        static_cast<std::int64_t>(sizeof(PacketHeader)) + 8 * packet.ndim + record_bytes(e.dtype) * packet.segments;
    state.ends = state.lengths + sizes->lengths;
    state.checksums = state.ends + 4 * sizes->ends;
    state.payload = state.checksums + (e.checksums ? 4 * sizes->checksums : 0);
    state.fits = state.payload + sizes->payload <= packet.capacity;
    return state;
}

// One packet a block: settles its segments, writes its header (without the checksum), dimensions, records and lists of
// code lengths.
__global__ void __launch_bounds__(kThreads, 1)
    layout_packets(EncodeTables e, std::int64_t item, std::int64_t* total_bytes) {
    DYNAMIC_SHARED(Shared, shared);
    const PacketTask packet = e.packets[blockIdx.x];
    const BlockResult* const blocks = e.blocks + packet.first_block;
    std::uint32_t* const ends = e.ends + packet.first_block;
    sum_blocks(blocks, packet.blocks, ends, shared->units);
    Sizes sizes = place_segments(e, packet, item, shared);
    PacketState state = place_parts(e, packet, &sizes);
    std::int64_t dropped = 0;
    if (threadIdx.x == 0) e.wanted_bytes[blockIdx.x] = state.payload + sizes.payload;
    if (!state.fits && packet.may_drop) {
        // Dropping changes sizes and so perhaps which segments fall back: everything is summed again.
        const std::int64_t excess = ceil_div(state.payload + sizes.payload - packet.capacity, 4);
        dropped = drop_blocks(e, packet, excess, shared);
        sum_blocks(blocks, packet.blocks, ends, shared->units);
        sizes = place_segments(e, packet, item, shared);
        state = place_parts(e, packet, &sizes);
    }
    const std::int64_t total = state.payload + sizes.payload;
    if (threadIdx.x == 0) {
        e.packet_states[blockIdx.x] = state;
        e.counters[2 * e.tensor_count + static_cast<int>(blockIdx.x)] = 0;  // of write_payload
        e.dropped[blockIdx.x] = dropped;
        total_bytes[blockIdx.x] = state.fits ? total : -total;
    }
    // A packet that does not fit is not begun: payload.cu keeps its values in the residuals.
    if (!state.fits) return;
    if (threadIdx.x == 0) {
        PacketHeader header{};
        header.magic = kMagic;
        header.version = kVersion;
        header.dtype = e.dtype;
        header.flags = e.checksums ? kFlagChecksums : 0;
        header.ndim = static_cast<std::uint8_t>(packet.ndim);
        header.segment_count = static_cast<std::uint32_t>(packet.segments);
        header.element_count = static_cast<std::uint64_t>(sizes.elements);
        header.total_bytes = static_cast<std::uint64_t>(total);
        header.steps = static_cast<std::uint16_t>(e.steps);
        header.lengths_words = static_cast<std::uint32_t>(sizes.lengths / 4);
        write_words(packet.out, header);
    }
    if (static_cast<int>(threadIdx.x) < packet.ndim)
        write_words(packet.out + sizeof(PacketHeader) + 8 * threadIdx.x, e.dims[packet.first_dim + threadIdx.x]);
    const std::int64_t records_at = static_cast<std::int64_t>(sizeof(PacketHeader)) + 8 * packet.ndim;
    for (int i = static_cast<int>(threadIdx.x); i < packet.segments; i += kThreads) {
        const int s = packet.first_segment + i;
        const Quantizer q = e.segment_states[s].quantizer;
        const SegmentRecord record{
            static_cast<std::uint64_t>(e.segments[s].count), q.grid, q.num_bits, q.coding, q.table, q.p0, q.p1};
        std::uint8_t* const at = packet.out + records_at + record_bytes(e.dtype) * i;
        if (e.dtype == DType::kFloat64) {
            write_words(at, WireRecord<double>::of(record));
        } else {
            write_words(at, WireRecord<float>::of(record));
        }
    }
    for (int i = warp_number(); i < packet.segments; i += kThreads / kWarpLanes) {
        const int s = packet.first_segment + i;
        const SegmentState& segment = e.segment_states[s];
        const auto* from = reinterpret_cast<const std::uint32_t*>(e.lists + e.segments[s].first_codeword);
        auto* const to = reinterpret_cast<std::uint32_t*>(packet.out + state.lengths + segment.lengths);
        for (int w = lane_number(); w < segment.list_bytes / 4; w += kWarpLanes) to[w] = from[w];
    }
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_layout(const EncodeTables& e, std::int64_t* total_bytes, void* stream) {
    launch_kernel(layout_packets, static_cast<unsigned>(e.packet_count), kThreads, sizeof(Shared), stream, e,
                  item_bytes(e.dtype), total_bytes);
}
#endif

}  // namespace qcomm::cuda
