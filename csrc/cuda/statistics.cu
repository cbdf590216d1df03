// Statistics and quantizers of many tensors in one launch (specification: qcomm/codec/_native.py,
// qcomm/codec/quantize.py).
//
//   sum = a pairwise tree over blocks of 4096 values, each of which is summed in 32 lanes; sigma = sqrt(sum / count)
//
//   values    | 4096: lane 0 1 ... 31 0 1 ... | 4096 | ... 8 of these are a tile ... | next tile
//   tree        \_____________warp____________/ \____/ \___________ block __________/ \_ last block of the tensor
//
// Thread: every 32nd value of 4096. Warp: 4096 values, lanes folded by shuffles. Block of 8 warps: 32768 values, an
// aligned subtree of the format's tree, so that no tile depends on its neighbours. Shared memory: 256 partial results,
// 8 KiB.
// Passes: one. The last block of a tensor adds its tiles' results, level by level, and derives the quantizer.
// Limits: 2^42 values a tensor; 2^31 tiles a launch.
// Determinism: the order of additions is the format's, whatever the order of blocks; which block is last only decides
// where the last levels are added.
// Bytes moved per value: its size (and 4 for a residual).
#include <limits>

#include "kernels.cuh"
#include "last_block.cuh"
#include "source.cuh"
#include "warp.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kSumBlock = 4096;
constexpr int kThreads = kStatisticsThreads;
constexpr int kWarps = kThreads / kWarpLanes;
static_assert(kStatisticsTile == kSumBlock * kWarps, "a tile is a subtree of whole sum blocks");

struct Shared {
    TileStatistics partial[kThreads];
};

// Everything but the sum has no order; the sum's is that of the calls.
__device__ __forceinline__ void combine(TileStatistics& left, const TileStatistics& right) {
    left.minimum = right.minimum < left.minimum ? right.minimum : left.minimum;
    left.maximum = right.maximum > left.maximum ? right.maximum : left.maximum;
    left.sum_squares += right.sum_squares;
    left.finite &= right.finite;
    left.nonzero |= right.nonzero;
}

// Combines neighbours until one is left, in partial[0], and ends with a barrier. An odd last one has no partner and
// stays where the next level looks for it: partial[i * 2^level], which is the carrying over of the format's tree.
__device__ void fold_pairwise(TileStatistics* partial, int n) {
    for (int d = 1; d < n; d *= 2) {
        __syncthreads();
        const int i = static_cast<int>(threadIdx.x) * 2 * d;
        if (i + d < n) combine(partial[i], partial[i + d]);
    }
    __syncthreads();
}

// Measures n <= 4096 values; lane 0 has the result. The fold by shuffles is the format's: lane j takes lane j + 16, 8,
// ...
template <class Tr, bool kAdjusted>
__device__ TileStatistics measure_block(const Source<Tr, kAdjusted>& u, std::int64_t begin, int n) {
    using T = typename Tr::Arithmetic;
    T low = std::numeric_limits<T>::infinity(), high = -low, poison = 0;  // x * 0 is NaN for every non-finite x
    double squares = 0.0;
    bool nonzero = false;
#pragma unroll 8
    for (int i = lane_number(); i < n; i += kWarpLanes) {
        const T x = u[begin + i];
        low = x < low ? x : low;
        high = x > high ? x : high;
        poison += x * T(0);
        nonzero |= u.value(begin + i) != T(0);
        const double wide = static_cast<double>(x);
        // The product of two float32 is exact in float64, so there the fused form is the same number.
        squares = sizeof(T) == sizeof(float) ? __builtin_fma(wide, wide, squares) : squares + wide * wide;
    }
    TileStatistics result{static_cast<double>(low), static_cast<double>(high), squares, poison == T(0), nonzero};
    for (unsigned d = kWarpLanes / 2; d > 0; d /= 2) {
        const TileStatistics other{
            __shfl_down_sync(kAllLanes, result.minimum, d), __shfl_down_sync(kAllLanes, result.maximum, d),
            __shfl_down_sync(kAllLanes, result.sum_squares, d), __shfl_down_sync(kAllLanes, result.finite, d),
            __shfl_down_sync(kAllLanes, result.nonzero, d)};
        combine(result, other);
    }
    return result;
}

// Returns the quantizer that Python's plan() returns, except for the parts that sample.cu then decides.
template <class Tr>
__device__ Quantizer choose_quantizer(const TensorTask& tensor, const Statistics& s) {
    Quantizer q{Grid::kNone, 0, Coding::kRaw, kTableOnWire, 0.0, 0.0};
    if (!s.finite) {
        if (!tensor.nonfinite_is_constant) return q;
        q.coding = Coding::kConstant;
        q.p0 = std::numeric_limits<double>::quiet_NaN();
        return q;
    }
    if (tensor.as_it_is) return q;
    if (s.minimum == s.maximum) {
        q.coding = Coding::kConstant;
        q.p0 = s.minimum;
        return q;
    }
    Quantizer wanted = tensor.wanted;
    bool usable = false;
    if (wanted.grid == Grid::kSigma) {
        using T = typename Tr::Arithmetic;
        wanted.p0 = 0.0;
        wanted.p1 = static_cast<T>(tensor.k * __builtin_sqrt(s.sum_squares / static_cast<double>(tensor.count)));
        usable = is_usable<Tr>(wanted);
    } else if (wanted.grid != Grid::kNone) {
        wanted.p0 = s.minimum;
        wanted.p1 = s.maximum;
        usable = wanted.num_bits == 0 ? __builtin_isfinite(s.maximum - s.minimum)
                                      : RangeQuantizer(wanted.grid, wanted.num_bits, wanted.p0, wanted.p1).usable();
    }
    return usable ? wanted : q;
}

// Each block measures a tile; the last one of a tensor completes its statistics and its quantizer.
template <class Tr, bool kAdjusted>
__global__ void __launch_bounds__(kThreads, 1) measure_tensors(EncodeTables e, TileStatistics* tiles) {
    DYNAMIC_SHARED(Shared, shared);
    const int t = find_task(e.tensors, e.tensor_count, blockIdx.x, &TensorTask::first_tile);
    const TensorTask tensor = e.tensors[t];
    const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) - tensor.first_tile) * kStatisticsTile;
    const std::int64_t values = measured_count(tensor), rest = values - begin;
    const int present = rest >= kStatisticsTile ? kWarps : static_cast<int>(ceil_div(rest, kSumBlock));
    if (warp_number() < present) {
        const std::int64_t at = begin + warp_number() * kSumBlock;
        const int n = static_cast<int>(values - at < kSumBlock ? values - at : kSumBlock);
        const TileStatistics result = measure_block(Source<Tr, kAdjusted>(tensor), at, n);
        if (lane_number() == 0) shared->partial[warp_number()] = result;
    }
    fold_pairwise(shared->partial, present);
    if (threadIdx.x == 0 && present > 0) tiles[blockIdx.x] = shared->partial[0];
    const std::int64_t count = statistics_tiles(values);
    if (!is_last_block(&e.counters[t], static_cast<unsigned>(count))) return;

    // The tiles' results are the leaves of the rest of the tree. Each round folds runs of 256, in place: a run's result
    // goes to the front, where it has been read already.
    TileStatistics* const level = tiles + tensor.first_tile;
    for (std::int64_t n = count; n > 1; n = ceil_div(n, kThreads)) {
        for (std::int64_t at = 0; at < n; at += kThreads) {
            const int m = static_cast<int>(n - at < kThreads ? n - at : kThreads);
            if (static_cast<int>(threadIdx.x) < m) shared->partial[threadIdx.x] = level[at + threadIdx.x];
            fold_pairwise(shared->partial, m);
            if (threadIdx.x == 0) level[at / kThreads] = shared->partial[0];
            __syncthreads();  // before partial[] and level[] are used again
        }
    }
    // One thread decides: a few float64 operations, which are IEEE on every device.
    if (threadIdx.x != 0) return;
    Statistics s;
    bool absent = tensor.zero_keeps_residual && !tensor.as_it_is;
    if (values > 0) {
        const TileStatistics all = level[0];
        // + 0.0 turns -0.0 into 0.0: which zero a minimum finds depends on the order of the comparisons.
        s.minimum = all.minimum + 0.0;
        s.maximum = all.maximum + 0.0;
        s.sum_squares = all.sum_squares;
        s.finite = all.finite != 0;
        absent &= all.nonzero == 0;
    }
    e.statistics[t] = s;
    e.absent[t] = absent;
    e.quantizers[t] =
        absent ? Quantizer{Grid::kNone, 0, Coding::kConstant, kTableOnWire, 0.0, 0.0} : choose_quantizer<Tr>(tensor, s);
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_measure(const EncodeTables& e, bool adjusted, TileStatistics* tiles, std::int64_t tile_count,
                    void* stream) {
    with_source(e.dtype, adjusted, [&](auto traits, auto is_adjusted) {
        launch_kernel(measure_tensors<decltype(traits), decltype(is_adjusted)::value>,
                      static_cast<unsigned>(tile_count), kThreads, sizeof(Shared), stream, e, tiles);
    });
}
#endif

}  // namespace qcomm::cuda
