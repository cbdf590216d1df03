// Where everything goes in the packets: sizes are known, so fallbacks are decided and offsets are sums (specification:
// write_segment() and encode_packet() of qcomm/reference/packet.py).
//
//   header 40 | dimensions 8*ndim | segment records 32*segments | code lengths | block ends 4*B | checksums 4*C |
//   payload ^ written here ............................................. ^ written by payload.cu
//
// Thread: every 256th block, then every 256th segment. Block: a packet. Shared memory: 8 bytes a warp for each scan.
// Passes: a scan of the sizes of the packet's blocks; segments choose, in parallel, whether they become raw; three
// scans over segments give the offsets. Limits: a packet below 16 GiB, whose block ends fit 32 bits in units of 4 bytes
// (EncodePlan refuses more). Determinism: integers only. Bytes moved per value: nothing to speak of; 16 per block.
#include "block_sum.cuh"
#include "kernels.cuh"
#include "qcomm/block.h"
#include "warp.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = 256;
static_assert(sizeof(PacketHeader) % 4 == 0 && sizeof(SegmentRecord) % 4 == 0, "both are written in words");

struct Shared {
    std::uint32_t units[kMaxWarps];
    std::int64_t payload[kMaxWarps], ends[kMaxWarps], checksums[kMaxWarps], elements[kMaxWarps];
};

template <class T>
__device__ void write_words(std::uint8_t* out, const T& value) {
    std::uint32_t words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
    for (std::size_t i = 0; i < sizeof(T) / 4; ++i) reinterpret_cast<std::uint32_t*>(out)[i] = words[i];
}

// ends[i] = units of the packet's blocks up to and including i.
__device__ void sum_blocks(const BlockResult* blocks, std::int64_t count, std::uint32_t* ends, std::uint32_t* scratch) {
    std::uint32_t before = 0;
    for (std::int64_t at = 0; at < count; at += kThreads) {
        const std::int64_t i = at + threadIdx.x;
        const std::uint32_t units = i < count ? blocks[i].units : 0u;
        std::uint32_t total = 0;
        const std::uint32_t sum = before + block_exclusive_sum(units, scratch, &total) + units;
        if (i < count) ends[i] = sum;
        before += total;
        __syncthreads();
    }
}

struct SegmentSize {
    std::int64_t payload, ends, checksums;
};

__device__ SegmentSize raw_size(std::int64_t count, std::int64_t item) { return {align4(count * item), 0, 1}; }

// The segment's final quantizer, and what it takes.
__device__ SegmentSize settle(const EncodeTables& e, const SegmentTask& segment, std::int64_t item, Quantizer* q,
                              std::uint32_t units) {
    const Quantizer none{Grid::kNone, 0, Coding::kRaw, kTableOnWire, 0.0, 0.0};
    if (segment.count == 0) {
        *q = none;
        q->coding = Coding::kConstant;
    }
    const SegmentSize raw = raw_size(segment.count, item);
    if (q->coding == Coding::kRaw) return raw;
    if (q->coding == Coding::kConstant) return {0, 0, 0};
    SegmentSize size{align4(packed_bytes(segment.count, q->num_bits)), 0, 1};
    if (is_block_coded(q->coding)) size = {4 * static_cast<std::int64_t>(units), segment.blocks, segment.blocks};
    const auto cost = [&](const SegmentSize& s) {
        return s.payload + 4 * s.ends + (e.checksums ? 4 * s.checksums : 0);
    };
    if (segment.residual_out == nullptr && cost(size) >= cost(raw)) {
        *q = none;
        return raw;
    }
    return size;
}

// One packet a block: settles its segments, writes its header (without the checksum), dimensions and records.
__global__ void __launch_bounds__(kThreads, 1)
    layout_packets(EncodeTables e, std::int64_t item, std::int64_t* total_bytes) {
    DYNAMIC_SHARED(Shared, shared);
    const PacketTask packet = e.packets[blockIdx.x];
    std::uint32_t* const ends = e.ends + packet.first_block;
    sum_blocks(e.blocks + packet.first_block, packet.blocks, ends, shared->units);

    SegmentSize before{0, 0, 0};
    std::int64_t elements = 0;
    for (int at = 0; at < packet.segments; at += kThreads) {
        const int i = at + static_cast<int>(threadIdx.x), s = packet.first_segment + i;
        SegmentSize size{0, 0, 0};
        SegmentState state{};
        std::int64_t count = 0;
        if (i < packet.segments) {
            const SegmentTask& segment = e.segments[s];
            const std::int64_t first = segment.first_block - packet.first_block;
            count = segment.count;
            state.quantizer = e.quantizers[segment.tensor];
            state.units_before = first == 0 ? 0 : ends[first - 1];
            const std::uint32_t end = segment.blocks == 0 ? 0u : ends[first + segment.blocks - 1];
            const auto units = segment.blocks == 0 ? 0u : end - static_cast<std::uint32_t>(state.units_before);
            size = settle(e, segment, item, &state.quantizer, units);
        }
        SegmentSize total{0, 0, 0};
        std::int64_t total_elements = 0;
        state.payload = before.payload + block_exclusive_sum(size.payload, shared->payload, &total.payload);
        state.first_end = before.ends + block_exclusive_sum(size.ends, shared->ends, &total.ends);
        state.first_checksum =
            before.checksums + block_exclusive_sum(size.checksums, shared->checksums, &total.checksums);
        block_exclusive_sum(count, shared->elements, &total_elements);
        if (i < packet.segments) e.segment_states[s] = state;
        before = {before.payload + total.payload, before.ends + total.ends, before.checksums + total.checksums};
        elements += total_elements;
        __syncthreads();
    }

    const std::int64_t records_at = static_cast<std::int64_t>(sizeof(PacketHeader)) + 8 * packet.ndim;
    PacketState state{};
    state.ends = records_at + static_cast<std::int64_t>(sizeof(SegmentRecord)) * packet.segments;
    state.checksums = state.ends + 4 * before.ends;
    state.payload = state.checksums + (e.checksums ? 4 * before.checksums : 0);
    const std::int64_t total = state.payload + before.payload;
    state.fits = total <= packet.capacity;
    if (threadIdx.x == 0) {
        e.packet_states[blockIdx.x] = state;
        total_bytes[blockIdx.x] = state.fits ? total : -total;
    }
    if (!state.fits) return;
    if (threadIdx.x == 0) {
        PacketHeader header{};
        header.magic = kMagic;
        header.version = kVersion;
        header.dtype = e.dtype;
        header.flags = e.checksums ? kFlagChecksums : 0;
        header.ndim = static_cast<std::uint8_t>(packet.ndim);
        header.segment_count = static_cast<std::uint32_t>(packet.segments);
        header.element_count = static_cast<std::uint64_t>(elements);
        header.total_bytes = static_cast<std::uint64_t>(total);
        header.steps = static_cast<std::uint16_t>(e.steps);
        write_words(packet.out, header);
    }
    if (static_cast<int>(threadIdx.x) < packet.ndim)
        write_words(packet.out + sizeof(PacketHeader) + 8 * threadIdx.x, e.dims[packet.first_dim + threadIdx.x]);
    for (int i = static_cast<int>(threadIdx.x); i < packet.segments; i += kThreads) {
        const int s = packet.first_segment + i;
        const Quantizer q = e.segment_states[s].quantizer;
        const SegmentRecord record{
            static_cast<std::uint64_t>(e.segments[s].count), q.grid, q.num_bits, q.coding, q.table, 0, q.p0, q.p1};
        write_words(packet.out + records_at + static_cast<std::int64_t>(sizeof(record)) * i, record);
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
