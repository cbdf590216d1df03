// How often each codeword occurs in a segment, from which its own code is made (specification: own_table() of
// qcomm/reference/packet.py; csrc/cpu/codeword_counts.h).
//
//   counts[codeword(i)] += 1 for every i, or for every second i with pairs
//
//   counts  | segment 0: u64 * its alphabet | segment 1 ... |        an alphabet is 2^N single symbols or 256 pairs
//
// Thread: a codeword a row. Warp: every 8th row of 32 codewords of a tile. Block of 8 warps: a tile of 32768 values of
// one segment. Shared memory: 32 KiB of counters, the alphabet as often as it fits, at most 8 times.
// Passes: one over the values, for all segments of all packets in one launch, or over a sample of neighbouring pairs
// (samples_own_table); segments without a code of their own cost a block that returns.
// Limits: alphabets of 4096.
// Determinism: sums of integers.
// Bytes moved per value: its size (and 4 for a residual).
// The ballot for the most frequent codeword follows from nvCOMP's and DietGPU's experience with skewed data:
// replicating alone still serialises within a warp.
#include "coder.cuh"
#include "histogram.cuh"
#include "kernels.cuh"
#include "qcomm/sigma_code.h"
#include "source.cuh"

namespace qcomm::cuda {
namespace {

struct Shared {
    unsigned counters[kHistogramCounters];
};
// The first block of a segment that has enough values for a sample counts it alone.
static_assert(kHistogramTile == 2 * kTablePairs);

// A tile a block.
template <class Tr, bool kAdjusted>
__global__ void __launch_bounds__(kHistogramThreads, 1) count_segments(EncodeTables e) {
    DYNAMIC_SHARED(Shared, shared);
    const int s = find_task(e.segments, e.segment_count, blockIdx.x, &SegmentTask::first_histogram_tile);
    const SegmentTask& segment = e.segments[s];
    const Quantizer q = e.quantizers[segment.tensor];
    if (!is_block_coded(q.coding) || q.table != kTableOnWire) return;
    const SharedCounts counts(shared->counters, alphabet_size(q.coding, q.num_bits));
    counts.clear();
    __syncthreads();
    const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) - segment.first_histogram_tile) * kHistogramTile;
    const std::int64_t rest = segment.count - begin;
    const int n = static_cast<int>(rest < kHistogramTile ? rest : kHistogramTile);
    using Values = Source<Tr, kAdjusted>;
    const Values u(e.tensors[segment.tensor], segment.offset);
    if (samples_own_table(q.grid, q.coding, q.num_bits, segment.count)) {
        if (begin > 0) return;
        const SampledPairs<Values> sampled{u, kTablePairs, segment.count / 2, 0};
        q.coding == Coding::kPair ? count_codewords<true>(sampled, sigma_quantizer<Tr>(q), 0, n, counts.own())
                                  : count_codewords<false>(sampled, sigma_quantizer<Tr>(q), 0, n, counts.own());
    } else if (q.grid != Grid::kSigma) {
        count_codewords<false>(u, RangeQuantizer(q.grid, q.num_bits, q.p0, q.p1), begin, n, counts.own());
    } else if (q.coding == Coding::kPair) {
        count_codewords<true>(u, sigma_quantizer<Tr>(q), begin, n, counts.own());
    } else {
        count_codewords<false>(u, sigma_quantizer<Tr>(q), begin, n, counts.own());
    }
    __syncthreads();
    counts.flush(e.counts + segment.first_codeword);
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_histogram(const EncodeTables& e, bool adjusted, std::int64_t tiles, void* stream) {
    with_source(e.dtype, adjusted, [&](auto traits, auto is_adjusted) {
        launch_kernel(count_segments<decltype(traits), decltype(is_adjusted)::value>, static_cast<unsigned>(tiles),
                      kHistogramThreads, sizeof(Shared), stream, e);
    });
}
#endif

}  // namespace qcomm::cuda
