// The residuals of range grids (specification: update_residual() of qcomm/reference/packet.py).
//
//   residual[i] = float32(u[i] - decoded(u[i]))
//
//   residual  | segment 0: f32 * count | segment 1 ... |
//
// A launch of its own, after payload.cu: whether a segment on a range grid is coded or fixed is decided by its size,
// and symbols of a fixed one reach over the borders between warps, so that until then u, of which the residual may be a
// part, must stay.
//
// Thread: a value a row. Warp: every units-th row of 32 values of one segment. Block: 4 such warps. No shared memory.
// Passes: one. Eight rows are loaded before one is stored: a load behind a store that may be to the same place waits
// for it.
// Limits: as payload.cu.
// Determinism: each value by itself.
// Bytes moved per value: 8 and a write of 4.
#include "coder.cuh"
#include "kernels.cuh"
#include "source.cuh"
#include "warp.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = kEncodeWarps * kWarpLanes;
constexpr int kRows = 8;  // whose values are loaded together

// A unit a warp.
template <class Tr, bool kAdjusted>
__global__ void __launch_bounds__(kThreads, 1) update_range_residuals(EncodeTables e) {
    const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kEncodeWarps + warp_number();
    const int p = find_task(e.packets, e.packet_count, unit, &PacketTask::first_unit);
    const PacketTask& packet = e.packets[p];
    if (!e.packet_states[p].fits || unit - packet.first_unit >= packet.units) return;
    const int s = packet.first_segment +
                  find_task(e.segments + packet.first_segment, packet.segments, unit, &SegmentTask::first_unit);
    const SegmentTask& segment = e.segments[s];
    const Quantizer& q = e.segment_states[s].quantizer;
    if (segment.residual_out == nullptr || !is_range(q.grid)) return;
    const Source<Tr, kAdjusted> u(e.tensors[segment.tensor], segment.offset);
    const RangeQuantizer grid(q.grid, q.num_bits, q.p0, q.p1);
    // In registers: memory might change with each residual that is stored.
    float* const residual_out = segment.residual_out;
    const std::int64_t count = segment.count, stride = segment.units * kWarpLanes;
    std::int64_t i = (unit - segment.first_unit) * kWarpLanes + lane_number();
#pragma unroll 1
    for (; i + (kRows - 1) * stride < count; i += kRows * stride) {
        typename Source<Tr, kAdjusted>::Raw x[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) x[r] = u.raw(i + r * stride);
#pragma unroll
        for (int r = 0; r < kRows; ++r) residual_out[i + r * stride] = residual_of<Tr>(u.of(x[r]), grid, -1);
    }
#pragma unroll 1
    for (; i < count; i += stride) residual_out[i] = residual_of<Tr>(u[i], grid, -1);
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_range_residuals(const EncodeTables& e, bool adjusted, std::int64_t tiles, void* stream) {
    with_source(e.dtype, adjusted, [&](auto traits, auto is_adjusted) {
        launch_kernel(update_range_residuals<decltype(traits), decltype(is_adjusted)::value>,
                      static_cast<unsigned>(tiles), kThreads, 0, stream, e);
    });
}
#endif

}  // namespace qcomm::cuda
