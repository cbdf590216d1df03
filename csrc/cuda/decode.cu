// Blocks to values, each packet to its own tensor (specification: decode_packet() of qcomm/reference/decode.py). Run
// blocks are decoded by zero_runs_decode.cu.
//
//   out[i] = value(packet, i)
//
//   block  | info u32 | start windows | escape values | escape positions | words u16 ... | see block_reader.cuh
//
// Thread: a lane of a block. Warp: a block, or 32 * steps values of a segment without blocks. Block: 4
// units of one segment, which share its code (16 KiB of shared memory; one of more than 12 bits stays in device memory,
// for the first-level cache) and its table of values (at most 2 KiB).
// Passes: one, and one over the code's bytes before it for the checksum, which is compared before a value is used.
// Limits: codes of at most 15 bits.
// Safety: every read is inside the block, whose place read_packets has checked; every loop is over values of the block.
// Determinism: a warp owns its unit.
// Bytes moved per value: the code's from memory, its size to memory.
// The lanes: F. Giesen, "Interleaved entropy coders", arXiv:1402.3392, 2014.
#include "decode_units.cuh"
#include "kernels.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = kDecodeWarps * kWarpLanes;

// A code and its values, as all four warps look them up, and the words of each.
template <class Tr>
struct Shared {
    LaneBuffer words[kDecodeWarps];
    std::uint32_t entries[StaticTables::kMaxEntries];  // lookup_entry() of each
    typename Tr::Storage values[kMaxValueTable];
};

// Decodes a unit of a segment, by a warp; false where it is malformed. Values may have been written by then.
template <class Tr, class Entries>
__device__ __forceinline__ bool decode_unit(const DecodeTables& d, int number, const SegmentView& segment, int tile,
                                            const Entries& entries, Shared<Tr>* shared) {
    using Storage = typename Tr::Storage;
    const DecodeTask task = d.tasks[number];
    const PacketView& view = d.packets[number];
    const std::int64_t unit = (tile - segment.first_tile) * kDecodeWarps + warp_number();
    const Quantizer& q = segment.quantizer;
    const std::int64_t size = is_block_coded(q.coding) ? values_per_block(q.coding, d.steps) : unit_values(d.steps);
    const std::int64_t begin = unit * size;
    if (begin >= segment.count) return true;
    const int n = static_cast<int>(segment.count - begin < size ? segment.count - begin : size);
    Sink<Storage> sink{static_cast<Storage*>(task.out) + segment.first_value + begin};
    QCOMM_KEEP_POINTER(sink.out);
    QCOMM_ASSUME_GLOBAL(sink.out);
    if (!is_block_coded(q.coding)) {
        read_plain<Tr>(segment, task.packet + view.payload, begin, n, sink);
        return true;
    }
    BlockReader<Tr, Entries> reader;
    if (!open_block<Tr>(task.packet, view, segment, unit, n, entries, shared->values, &shared->words[warp_number()],
                        &reader))
        return false;
    reader.read(0, n, sink);
    return reader.close();
}

// A unit a warp, tile_count blocks a packet.
template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) decode_packets(DecodeTables d, int tile_count) {
    DYNAMIC_SHARED(Shared<Tr>, shared);
    const int number = static_cast<int>(blockIdx.x) / tile_count, tile = static_cast<int>(blockIdx.x) % tile_count;
    // Only faults of earlier launches must be seen; whether those of this one are does not matter.
    if (__syncthreads_or(threadIdx.x == 0 && atomicOr(&d.faults[number], 0u) != 0)) return;
    if (tile >= d.packets[number].tiles) return;
    const SegmentView* const segments = d.segments_of(number);
    const int s = find_task(segments, d.packets[number].segments, tile, &SegmentView::first_tile);
    const DecodeCode code = find_decode_code(d, number, s);
    const bool near = code.mask < StaticTables::kMaxEntries;
    if (near) copy_entries(code, shared->entries, static_cast<int>(threadIdx.x), kThreads);
    fill_values<Tr>(shared->values, segments[s].quantizer, static_cast<int>(threadIdx.x), kThreads);
    __syncthreads();
    const SegmentView& segment = segments[s];
    const bool good = near ? decode_unit<Tr>(d, number, segment, tile, NearEntries{shared->entries, code.mask}, shared)
                           : decode_unit<Tr>(d, number, segment, tile, FarEntries{code}, shared);
    if (!good && lane_number() == 0) report(&d.faults[number], Fault::kBlock);
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_decode(const DecodeTables& d, std::int64_t tile_count, void* stream) {
    with_source(d.dtype, false, [&](auto traits, auto) {
        using Tr = decltype(traits);
        launch_kernel(decode_packets<Tr>, static_cast<unsigned>(tile_count * d.packet_count), kThreads,
                      sizeof(Shared<Tr>), stream, d, static_cast<int>(tile_count));
    });
}
#endif

}  // namespace qcomm::cuda
