// Run blocks to values (specification: decode_packet() of qcomm/reference/decode.py).
//
//   out[i] = level(i) * step of i's segment
//
//   block  | info u32 | start windows | words u16 ... | see zero_runs_reader.cuh
//
// Thread: a token a row of 32. Warp: a run block, which may hold values of several segments. Thread block: 4 of one
// packet. No shared memory.
// Passes: one over the block's bytes for the checksum, one that stores zeros, one over the tokens.
// Limits: codes of at most 11 bits with 5 more.
// Safety: every read is inside the block, whose place read_packets has checked; a token takes a value at least, or it
// is the last one. Determinism: a warp owns its values. Bytes moved per value: its size to memory, the code's from
// there.
#include "checksum.cuh"
#include "kernels.cuh"
#include "zero_runs_reader.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = kDecodeWarps * kWarpLanes;

// Decodes values [begin, end) of a packet's zero runs, which are a block; false where it is malformed. Values may have
// been written by then.
template <class Tr>
__device__ bool decode_run_block(const DecodeTables& d, int number, std::int64_t block, std::int64_t begin,
                                 std::int64_t end) {
    using Storage = typename Tr::Storage;
    const PacketView& view = d.packets[number];
    const SegmentView* const segments = d.segments_of(number);
    auto* const out = static_cast<Storage*>(d.tasks[number].out);
    RunReader<Tr> reader;
    if (!open_run_block<Tr>(d.tasks[number].packet, view, block, static_cast<int>(end - begin), d.codes, &reader))
        return false;
    for_run_parts(segments, view.segments, begin, end, [&](int s, std::int64_t offset, int n, int at) {
        Storage* values = out + segments[s].first_value + offset;
        QCOMM_ASSUME_GLOBAL(values);
        const auto zero = Tr::narrow(typename Tr::Arithmetic(0));
#pragma unroll 8
        for (int i = lane_number(); i < n; i += kWarpLanes) values[i] = zero;
        __syncwarp();  // a level's lane is another than its zero's
        reader.read(at, at + n, RunQuantizer<typename Tr::Arithmetic>(segments[s].quantizer.p1),
                    [&](int position, Storage value) { values[position - at] = value; });
    });
    return reader.close();
}

// A run block a warp, tile_count thread blocks a packet.
template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) decode_run_blocks(DecodeTables d, int tile_count) {
    const int number = static_cast<int>(blockIdx.x) / tile_count, tile = static_cast<int>(blockIdx.x) % tile_count;
    // Only faults of earlier launches must be seen; whether those of this one are does not matter.
    if (__syncthreads_or(threadIdx.x == 0 && atomicOr(&d.faults[number], 0u) != 0)) return;
    const std::int64_t values = d.packets[number].run_values, blocks = d.packets[number].run_blocks;
    const std::int64_t block = std::int64_t{tile} * kDecodeWarps + warp_number();
    if (block >= blocks) return;
    const bool good = decode_run_block<Tr>(d, number, block, run_block_begin(values, blocks, block),
                                           run_block_begin(values, blocks, block + 1));
    if (!good && lane_number() == 0) report(&d.faults[number], Fault::kBlock);
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_decode_runs(const DecodeTables& d, std::int64_t tile_count, void* stream) {
    with_source(d.dtype, false, [&](auto traits, auto) {
        launch_kernel(decode_run_blocks<decltype(traits)>, static_cast<unsigned>(tile_count * d.packet_count), kThreads,
                      0, stream, d, static_cast<int>(tile_count));
    });
}
#endif

}  // namespace qcomm::cuda
