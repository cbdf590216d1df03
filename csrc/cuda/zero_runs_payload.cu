// Run blocks from their slots into the packets, with their ends and checksums (specification: add_run_blocks() of
// qcomm/reference/packet.py).
//
//   block  | info u32 | start windows | words u16 ... | zeros to 4 bytes
//            lane 0     lane 1 2 ...   each lane puts together the 32-bit words i = lane, lane + 32, ...
//
// Thread: a word of the packet at a time. Warp: a run block. Thread block: 4 of one packet. No shared memory.
// Passes: one, in front of payload.cu, which computes the checksum of the metadata.
// Limits: as zero_runs_encode.cu.
// Determinism: a warp owns its block.
// Bytes moved per value: twice the code's. In a packet from which blocks may be dropped, or of float64 values,
// residuals are written here: 8 and a write of 4 more.
#include "kernels.cuh"
#include "payload.cuh"
#include "source.cuh"
#include "zero_runs.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = kEncodeWarps * kWarpLanes;

// What is behind a block's info and start windows: a row of u16, and zeros.
class RunTail {
public:
    __device__ RunTail(const std::uint8_t* slot, const RunSlotShape& shape, const BlockResult& block, int n)
        : coded_(RunInfo::unpack(block.info).mode == RunMode::kCoded),
          halves_(coded_ ? static_cast<int>(block.words) : static_cast<int>(ceil_div(packed_bytes(n, kRunsBits), 2))),
          at_(coded_ ? reinterpret_cast<const std::uint16_t*>(slot + shape.tokens_at) - halves_
                     : reinterpret_cast<const std::uint16_t*>(slot + shape.words_at)) {
        QCOMM_ASSUME_GLOBAL(at_);
    }

    __device__ bool coded() const { return coded_; }
    __device__ std::uint32_t word(int i) const { return half(2 * i) | half(2 * i + 1) << 16; }

private:
    __device__ std::uint32_t half(int k) const { return k < halves_ ? at_[k] : 0u; }

    bool coded_;
    int halves_;
    const std::uint16_t* at_;
};

// Puts a block's words into the packet and returns their checksum.
__device__ std::uint32_t write_run_block(const std::uint8_t* slot, const RunSlotShape& shape, const BlockResult& block,
                                         int n, std::uint32_t* to) {
    const int words = static_cast<int>(block.units), lane = lane_number();
    WarpChecksum sum;
    if (words == 1) {  // without levels, or dropped: nothing in the slot counts
        if (lane == 0) {
            to[0] = block.info;
            sum.absorb(block.info);
        }
        return sum.finish(4);
    }
    const RunTail tail(slot, shape, block, n);
    const int head = tail.coded() ? 1 + kLanes : 1;
    const int first_rows = words < 2 * kWarpLanes ? words : 2 * kWarpLanes;  // the head is in these
    write_words(to, lane, first_rows, sum, [&](int i) {
        if (i >= head) return tail.word(i - head);
        return i == 0 ? block.info : reinterpret_cast<const std::uint32_t*>(slot)[i - 1];
    });
    write_words(to, lane + 2 * kWarpLanes, words, sum, [&](int i) { return tail.word(i - head); });
    return sum.finish(4 * std::int64_t{words});
}

// Writes the residual of values [begin, end) of a packet's zero runs. That of a dropped block is all of u.
template <class Tr>
__device__ void update_run_residuals(const EncodeTables& e, const PacketTask& packet, std::int64_t begin,
                                     std::int64_t end, bool dropped) {
    for_run_parts(e.run_places + packet.first_segment, packet.segments, begin, end,
                  [&](int s, std::int64_t offset, int n, int) {
                      constexpr int kAtOnce = 8;  // loads before the first store, as in write_words()
                      using T = typename Tr::Arithmetic;
                      const SegmentTask& segment = e.segments[packet.first_segment + s];
                      const Source<Tr, true> u(e.tensors[segment.tensor], segment.offset + offset);
                      const RunQuantizer<T> grid(e.quantizers[segment.tensor].p1);
                      float* const residual = segment.residual_out + offset;
                      for (int at = lane_number(); at < n; at += kAtOnce * kWarpLanes) {
                          T x[kAtOnce];
#pragma unroll
                          for (int k = 0; k < kAtOnce; ++k)
                              x[k] = at + k * kWarpLanes < n ? u[at + k * kWarpLanes] : T(0);
#pragma unroll
                          for (int k = 0; k < kAtOnce; ++k) {
                              const float lost = grid.lost(x[k], dropped ? 0 : grid(x[k]));
                              if (at + k * kWarpLanes < n)
                                  residual[at + k * kWarpLanes] = __builtin_isfinite(lost) ? lost : 0.0f;
                          }
                      }
                  });
}

// A run block a warp.
template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) write_run_blocks(EncodeTables e) {
    const int p = find_task(e.packets, e.packet_count, blockIdx.x, &PacketTask::first_run_tile);
    const PacketTask packet = e.packets[p];
    const PacketState layout = e.packet_states[p];
    const RunTotal total = e.run_totals[p];
    const std::int64_t number =
        (static_cast<std::int64_t>(blockIdx.x) - packet.first_run_tile) * kEncodeWarps + warp_number();
    if (!layout.fits || number >= total.blocks) return;
    const std::int64_t begin = run_block_begin(total.values, total.blocks, number);
    const std::int64_t end = run_block_begin(total.values, total.blocks, number + 1);
    const std::int64_t at = packet.first_block + packet.blocks - packet.run_blocks + number;
    const BlockResult block = e.blocks[at];
    const RunSlotShape shape(e.steps);
    const std::int64_t block_end = layout.runs / 4 + e.ends[at] - layout.units_before_runs;
    auto* const payload = reinterpret_cast<std::uint32_t*>(packet.out + layout.payload);
    const std::uint32_t sum = write_run_block(e.slots + packet.run_slots + number * shape.bytes, shape, block,
                                              static_cast<int>(end - begin), payload + block_end - block.units);
    if (lane_number() == 0) {
        reinterpret_cast<std::uint32_t*>(packet.out + layout.ends)[layout.first_run_end + number] =
            static_cast<std::uint32_t>(block_end);
        if (e.checksums)
            reinterpret_cast<std::uint32_t*>(packet.out + layout.checksums)[layout.first_run_checksum + number] = sum;
    }
    const bool finite = RunInfo::unpack(block.info).mode != RunMode::kNotFinite;
    if ((packet.may_drop || kResidualMayOverflow<Tr>) && finite)
        update_run_residuals<Tr>(e, packet, begin, end, block.words == kDropped);
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_write_run_blocks(const EncodeTables& e, std::int64_t tiles, void* stream) {
    with_residual_source(e.dtype, [&](auto traits) {
        launch_kernel(write_run_blocks<decltype(traits)>, static_cast<unsigned>(tiles), kThreads, 0, stream, e);
    });
}
#endif

}  // namespace qcomm::cuda
