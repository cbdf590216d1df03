// The decisions by a sample of a tensor, once its statistics are known (specification: plan() of
// qcomm/codec/quantize.py; docs/format.md, "Entropy" and "Choice of the code of a sigma segment").
//
//   range grid: histogram of 2^M center bins -> entropy H -> N = min(ceil(H + c), most), at least 1
//   sigma grid: histogram of neighbouring pairs -> the price of each code -> single or pair, static or of its own
//
//   counts  | tensor 0: u64 * its bins | tensor 1 ... |
//
// Thread: a sampled value, or pair, a row. Block of 8 warps: a tile of 4096 sampled values of one tensor. Shared
// memory: 32 KiB of counters.
// Passes: one over the sample; the last block of a tensor then adds up its histogram and decides.
// Limits: 2^32 samples; 4096 bins.
// Determinism: integers, and a few float64 operations in one thread; which block is last only decides where.
// Bytes moved: a sector of 32 bytes a sample.
// The method: A. Oland and B. Raj, "Reducing communication overhead in distributed learning by an order of magnitude
// (almost)", ICASSP 2015.
#include "block_sum.cuh"
#include "coder.cuh"
#include "histogram.cuh"
#include "kernels.cuh"
#include "last_block.cuh"
#include "qcomm/sigma_code.h"
#include "source.cuh"

namespace qcomm::cuda {
namespace {

struct Shared {
    unsigned counters[kHistogramCounters];
    std::uint64_t scratch[8][kMaxWarps];
};

// The sampled values, one after another.
template <class Values>
struct Sampled {
    const Values& u;
    std::int64_t n, count;  // samples, and the values from which they are drawn
    std::uint32_t seed;

    __device__ auto operator[](std::int64_t i) const { return u[sample_index(i, n, count, seed)]; }
};

// The sums are integers, so the result is that of the CPU's loop.
__device__ CodeSample sum_over_block(const CodeSample& mine, std::uint64_t (*scratch)[kMaxWarps]) {
    CodeSample sum;
    block_exclusive_sum(mine.n, scratch[0], &sum.n);
    block_exclusive_sum(mine.weighted, scratch[1], &sum.weighted);
    block_exclusive_sum(mine.used, scratch[2], &sum.used);
    block_exclusive_sum(mine.static_bits, scratch[3], &sum.static_bits);
    return sum;
}

__device__ unsigned static_length(const EncodeTables& e, int table, int codeword) {
    return table == kNoTable ? 0u : e.codes->encode[StaticTables::index(table)][codeword] >> 16;
}

// Returns how often symbol s occurs in pairs, as first or as second: one histogram prices both kinds of codes.
__device__ std::uint32_t count_single(const Count* pairs, int s) {
    Count sum = 0;
    for (int other = 0; other < 1 << kPairBits; ++other)
        sum += pairs[s | other << kPairBits] + pairs[other | s << kPairBits];
    return static_cast<std::uint32_t>(sum);
}

// Completes the quantizer by the tensor's whole histogram; by all threads.
__device__ Quantizer decide(const EncodeTables& e, const TensorTask& tensor, Quantizer q, Shared* shared) {
    const SampleTask& task = tensor.sample;
    const Count* const counts = e.sample_counts + task.first_bin;
    const auto thread = static_cast<int>(threadIdx.x);
    const bool sigma = q.grid == Grid::kSigma, pairs = sigma && q.num_bits == kPairBits;
    CodeSample whole, singles;
    for (int b = thread; b < task.bins; b += kHistogramThreads)
        whole.add(static_cast<std::uint32_t>(counts[b]),
                  static_length(e, pairs ? task.pair_table : task.single_table, b));
    if (pairs && thread < 1 << kPairBits)
        singles.add(count_single(counts, thread), static_length(e, task.single_table, thread));
    whole = sum_over_block(whole, shared->scratch);
    singles = sum_over_block(singles, shared->scratch + 4);
    if (sigma) {
        const SigmaCode code = cheapest_sigma_code(pairs ? singles : whole, pairs ? &whole : nullptr, tensor.count,
                                                   q.num_bits, task.single_table, task.pair_table);
        q.coding = code.coding;
        q.table = code.table;
        return q;
    }
    const double entropy =
        static_cast<double>(entropy_of_sums(whole.n, whole.weighted, task.bins)) / (1 << kLogFractionBits);
    const double wanted = -__builtin_floor(-(entropy + task.c));
    const int bits = wanted < task.most ? static_cast<int>(wanted) : task.most;
    q.num_bits = static_cast<std::uint8_t>(bits > 1 ? bits : 1);
    q.coding = q.num_bits <= kMaxCodedBits ? Coding::kSingle : Coding::kFixed;
    return q;
}

// A tile a block; the last one of a tensor decides.
template <class Tr, bool kAdjusted>
__global__ void __launch_bounds__(kHistogramThreads, 1) sample_tensors(EncodeTables e) {
    DYNAMIC_SHARED(Shared, shared);
    const int t = find_task(e.tensors, e.tensor_count, blockIdx.x, &TensorTask::first_sample_tile);
    const TensorTask& tensor = e.tensors[t];
    const SampleTask& task = tensor.sample;
    const Quantizer q = e.quantizers[t];
    if (q.grid == Grid::kNone) return;
    const SharedCounts counts(shared->counters, task.bins);
    counts.clear();
    __syncthreads();
    const bool sigma = q.grid == Grid::kSigma;
    const std::int64_t values = sigma ? 2 * task.count : task.count;
    const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) - tensor.first_sample_tile) * kSampleTile;
    const int n = static_cast<int>(values - begin < kSampleTile ? values - begin : kSampleTile);
    using Values = Source<Tr, kAdjusted>;
    const Values u(tensor);
    if (sigma) {
        const SampledPairs<Values> sampled{u, task.count, tensor.count / 2, task.seed};
        const auto grid = sigma_quantizer<Tr>(q);
        q.num_bits == kPairBits ? count_codewords<true>(sampled, grid, begin, n, counts.own())
                                : count_codewords<false>(sampled, grid, begin, n, counts.own());
    } else {
        int bits = 0;
        while (1 << bits < task.bins) ++bits;
        const RangeQuantizer grid(Grid::kRangeCenter, bits, q.p0, q.p1);
        count_codewords<false>(Sampled<Values>{u, task.count, tensor.count, task.seed}, grid, begin, n, counts.own());
    }
    __syncthreads();
    counts.flush(e.sample_counts + task.first_bin);
    const auto tiles = static_cast<unsigned>(ceil_div(values, kSampleTile));
    if (!is_last_block(&e.counters[e.tensor_count + t], tiles)) return;
    Quantizer decided = decide(e, tensor, q, shared);
    if (threadIdx.x != 0) return;
    if (!sigma && !RangeQuantizer(decided.grid, decided.num_bits, decided.p0, decided.p1).usable())
        decided = {Grid::kNone, 0, Coding::kRaw, kTableOnWire, 0.0, 0.0};
    e.quantizers[t] = decided;
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_sample(const EncodeTables& e, bool adjusted, std::int64_t tiles, void* stream) {
    with_source(e.dtype, adjusted, [&](auto traits, auto is_adjusted) {
        launch_kernel(sample_tensors<decltype(traits), decltype(is_adjusted)::value>, static_cast<unsigned>(tiles),
                      kHistogramThreads, sizeof(Shared), stream, e);
    });
}
#endif

}  // namespace qcomm::cuda
