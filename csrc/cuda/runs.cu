// Runs of values, copied or added: those of a collective that no packet holds (specification: _add_own() and decode()
// of qcomm/collectives/two_phase_steps.py, gather_runs() and scatter_chunk() of qcomm/collectives/packing.py).
//
//   copy      to = from / divisor * factor, NaN where a packet that it comes from is damaged
//   add_own   to = [to +] from * inv_scale, to += residual, residual = 0
//
//   run      | 4096 values: a tile | tile | ... | short tile |  next run | ...
//
// Thread: every 256th value of a tile. Block: a tile of one run. No shared memory.
// Passes: one.
// Limits: 2^31 tiles a launch.
// Determinism: each value by itself, one rounding an operation.
// Bytes moved per value: copy 8 and half that for 16 bits; add_own 12, with a residual 20.
#include <cstring>
#include <limits>

#include "kernels.cuh"
#include "source.cuh"
#include "warp.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = 256;

// The values of a tile: [begin, end) of its run.
struct Tile {
    const Run run;
    std::int64_t begin, end;

    __device__ Tile(const RunTask* tasks, int count) : Tile(tasks[find(tasks, count)]) {}

private:
    __device__ static int find(const RunTask* tasks, int count) {
        return find_task(tasks, count, static_cast<std::int64_t>(blockIdx.x), &RunTask::first_tile);
    }
    __device__ explicit Tile(const RunTask& task)
        : run(task.run), begin((static_cast<std::int64_t>(blockIdx.x) - task.first_tile) * kRunTile) {
        end = run.count - begin < kRunTile ? run.count : begin + kRunTile;
    }
};

// A tile a block. Values of damaged packets become NaN, so that training notices.
template <class Tr>
__global__ void __launch_bounds__(kThreads, 1)
    copy_runs(const RunTask* tasks, int count, double divisor, const double* factor, const unsigned* faults) {
    using T = typename Tr::Arithmetic;
    const Tile tile(tasks, count);
    bool damaged = false;
    for (int f = 0; faults != nullptr && f < tile.run.faults; ++f) damaged |= faults[tile.run.first_fault + f] != 0;
    const T by = static_cast<T>(divisor), times = factor == nullptr ? T(1) : static_cast<T>(*factor);
    if (!damaged && by == T(1) && times == T(1) && tile.run.from == tile.run.to) return;  // decoded where it belongs
    const auto* const from = static_cast<const T*>(tile.run.from);
    auto* const to = static_cast<typename Tr::Storage*>(tile.run.to);
    for (std::int64_t i = tile.begin + threadIdx.x; i < tile.end; i += kThreads)
        to[i] = Tr::narrow(damaged ? std::numeric_limits<T>::quiet_NaN() : from[i] / by * times);
}

// A tile a block. A tensor that measure() has found not finite adds NaN, as its packet would, and its residual waits
// for a better step.
template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) add_runs(const RunTask* tasks, int count, const Quantizer* quantizers,
                                                        const std::uint8_t* absent, const double* inv_scale, bool add) {
    using T = typename Tr::Arithmetic;
    const Tile tile(tasks, count);
    const int t = tile.run.tensor;
    const bool nan = t >= 0 && quantizers[t].coding == Coding::kConstant && !__builtin_isfinite(quantizers[t].p0);
    float* const residual = t >= 0 && absent[t] != 0 ? nullptr : tile.run.residual;
    const T times = inv_scale == nullptr ? T(1) : static_cast<T>(*inv_scale);
    const auto* const from = static_cast<const T*>(tile.run.from);
    auto* const to = static_cast<T*>(tile.run.to);
    for (std::int64_t i = tile.begin + threadIdx.x; i < tile.end; i += kThreads) {
        if (nan) {
            to[i] = std::numeric_limits<T>::quiet_NaN();
            continue;
        }
        T sum = from[i] * times;
        if (add) sum = to[i] + sum;
        if (residual != nullptr) {
            sum += static_cast<T>(residual[i]);
            residual[i] = 0.0f;
        }
        to[i] = sum;
    }
}

}  // namespace

#ifndef __CUDACC_RTC__
RunPlan::RunPlan(DType to, const std::vector<Run>& runs)
    : dtype_(to), run_count_(static_cast<std::int32_t>(runs.size())) {
    std::vector<RunTask> tasks;
    for (const Run& run : runs) {
        if (run.count < 0) status_ = bad_argument("a run's count must not be negative", run.count);
        tasks.push_back({run, tiles_});
        tiles_ += ceil_div(run.count, kRunTile);
    }
    if (tiles_ > 0x7FFFFFFF) status_ = bad_argument("too many values for one launch");
    blob_.resize(sizeof(RunTask) * tasks.size());
    if (!tasks.empty()) std::memcpy(blob_.data(), tasks.data(), blob_.size());
}

Status RunPlan::copy(const void* blob, double divisor, const double* factor, const unsigned* faults,
                     void* stream) const {
    QCOMM_RETURN_IF_ERROR(status_);
    with_source(dtype_, false, [&](auto traits, auto) {
        launch_kernel(copy_runs<decltype(traits)>, static_cast<unsigned>(tiles_), kThreads, 0, stream,
                      static_cast<const RunTask*>(blob), static_cast<int>(run_count_), divisor, factor, faults);
    });
    return launch_status();
}

Status RunPlan::add_own(const void* blob, const EncodePlan& measured, void* workspace, const double* inv_scale,
                        bool add, void* stream) const {
    QCOMM_RETURN_IF_ERROR(status_);
    QCOMM_RETURN_IF_ERROR(measured.status());
    if (item_bytes(dtype_) < 4) return bad_argument("own values are float32 or float64");
    const auto launch = [&](auto traits) {
        launch_kernel(add_runs<decltype(traits)>, static_cast<unsigned>(tiles_), kThreads, 0, stream,
                      static_cast<const RunTask*>(blob), static_cast<int>(run_count_), measured.quantizers(workspace),
                      measured.absent(workspace), inv_scale, add);
    };
    dtype_ == DType::kFloat64 ? launch(Traits<DType::kFloat64>{}) : launch(Traits<DType::kFloat32>{});
    return launch_status();
}
#endif

}  // namespace qcomm::cuda
