// Where the values of each segment are among those of coding runs, which share blocks (specification: add_run_blocks()
// of qcomm/reference/packet.py).
//
//   first_run[s] = sum of the counts of the packet's segments of coding runs before s
//
// A launch of its own, behind the measurement: a tensor that turns out constant or raw takes no part, and all that
// follow move up.
//
// Thread: every 256th segment. Block: a packet. Shared memory: 8 bytes a warp.
// Passes: one scan over segments.
// Limits: none.
// Determinism: integers only.
// Bytes moved per value: none; 64 per segment.
#include "block_sum.cuh"
#include "kernels.cuh"
#include "qcomm/zero_runs.h"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = 256;

struct Shared {
    std::int64_t sums[kMaxWarps];
};

// A packet a block.
__global__ void __launch_bounds__(kThreads, 1) place_runs(EncodeTables e) {
    DYNAMIC_SHARED(Shared, shared);
    const PacketTask& packet = e.packets[blockIdx.x];
    std::int64_t before = 0;
    for (int at = 0; at < packet.segments; at += kThreads) {
        const int i = at + static_cast<int>(threadIdx.x), s = packet.first_segment + i;
        std::int64_t values = 0, round = 0;
        if (i < packet.segments && e.quantizers[e.segments[s].tensor].coding == Coding::kRuns)
            values = e.segments[s].count;
        const std::int64_t first = before + block_exclusive_sum(values, shared->sums, &round);
        if (i < packet.segments) e.run_places[s] = {first, values};
        before += round;
        __syncthreads();
    }
    if (threadIdx.x == 0) e.run_totals[blockIdx.x] = {before, run_blocks(before, e.steps)};
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_place_runs(const EncodeTables& e, void* stream) {
    launch_kernel(place_runs, static_cast<unsigned>(e.packet_count), kThreads, sizeof(Shared), stream, e);
}
#endif

}  // namespace qcomm::cuda
