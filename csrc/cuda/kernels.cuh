// The launchers of the kernels, one an operation; cuda.h is the interface for users. Each enqueues on `stream` and
// returns. A kernel sees the results of those before it on the stream. `tiles` are thread blocks, as the plan has
// counted them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "launch.h"
#include "tasks.h"

namespace qcomm::cuda {

// statistics.cu
constexpr int kStatisticsThreads = 256;
constexpr std::int64_t kStatisticsTile = 32768;
struct TileStatistics {
    double minimum, maximum, sum_squares;
    unsigned finite, nonzero;  // nonzero: of the values, without their residual
};
constexpr std::int64_t statistics_tiles(std::int64_t count) {
    return count == 0 ? 1 : ceil_div(count, kStatisticsTile);
}
// How many of its values are looked at.
QCOMM_HOST_DEVICE constexpr std::int64_t measured_count(const TensorTask& tensor) {
    return tensor.as_it_is ? 0 : tensor.count;
}
void launch_measure(const EncodeTables& e, bool adjusted, TileStatistics* tiles, std::int64_t tile_count, void* stream);

// Clears device memory.
inline void launch_clear(void* memory, std::int64_t bytes, void* stream) {
#ifdef QCOMM_CUDA_EMULATION
    (void)stream;
    std::memset(memory, 0, static_cast<std::size_t>(bytes));
#elif !defined(__CUDACC_RTC__)
    // Its status is that of the next launch_status().
    (void)cudaMemsetAsync(memory, 0, static_cast<std::size_t>(bytes), static_cast<cudaStream_t>(stream));
#endif
}

// sample.cu: the decisions by a sample, after launch_measure.
constexpr int kSampleTile = 4096;
void launch_sample(const EncodeTables& e, bool adjusted, std::int64_t tiles, void* stream);

// histogram.cu and code_lengths.cu: the codes that segments have of their own.
constexpr std::int64_t kHistogramTile = 32768;
void launch_histogram(const EncodeTables& e, bool adjusted, std::int64_t tiles, void* stream);
void launch_code_lengths(const EncodeTables& e, void* stream);

// encode.cu, layout.cu and payload.cu: the three passes of an encoding.
void launch_encode_blocks(const EncodeTables& e, bool adjusted, std::int64_t tiles, int max_symbols, void* stream);
void launch_layout(const EncodeTables& e, std::int64_t* total_bytes, void* stream);
void launch_payload(const EncodeTables& e, bool adjusted, std::int64_t tiles, void* stream);
// residual.cu: those of segments on range grids, after launch_payload.
void launch_range_residuals(const EncodeTables& e, bool adjusted, std::int64_t tiles, void* stream);

// zero_runs_place.cu, zero_runs_encode.cu and zero_runs_payload.cu: blocks that segments of coding runs share. They are
// placed in front of launch_encode_blocks, encoded beside it, and written in front of launch_payload.
void launch_place_runs(const EncodeTables& e, void* stream);
void launch_encode_run_blocks(const EncodeTables& e, std::int64_t tiles, void* stream);
void launch_write_run_blocks(const EncodeTables& e, std::int64_t tiles, void* stream);

// account.cu: sums over encodings.
void launch_count(const EncodeTables& e, const std::int64_t* total_bytes, Account* account, void* stream);

// runs.cu: runs of values copied or added, by tiles of kRunTile values of one run.
constexpr std::int64_t kRunTile = 4096;
struct RunTask {
    Run run;
    std::int64_t first_tile;
};

// read_packets.cu: metadata and plain segments are checked; decode_tables.cu: codes of segments' own; decode.cu:
// values, with tile_count blocks a packet or a sum.
struct DecodeTables;
void launch_read_packets(const DecodeTables& d, std::int64_t piece_tiles, void* stream);
void launch_decode_tables(const DecodeTables& d, void* stream);
void launch_decode(const DecodeTables& d, std::int64_t tile_count, void* stream);
void launch_decode_runs(const DecodeTables& d, std::int64_t block_count, void* stream);  // zero_runs_decode.cu
void launch_sum(const DecodeTables& d, std::int64_t tile_count, bool add, void* stream);

// Calls f(Traits<dtype>{}, bool_constant<adjusted>{}). 16-bit packets cannot carry adjusted values.
template <class F>
void with_source(DType dtype, bool adjusted, F f) {
#ifdef QCOMM_ONLY_FLOAT32  // a sanitizer's build in the tests, which would take long to compile for all
    (void)dtype;
#else
    switch (dtype) {
        case DType::kFloat16:
            return f(Traits<DType::kFloat16>{}, std::false_type{});
        case DType::kBFloat16:
            return f(Traits<DType::kBFloat16>{}, std::false_type{});
        case DType::kFloat64:
            if (adjusted) return f(Traits<DType::kFloat64>{}, std::true_type{});
            return f(Traits<DType::kFloat64>{}, std::false_type{});
        case DType::kFloat32:
            break;
    }
#endif
    if (adjusted) return f(Traits<DType::kFloat32>{}, std::true_type{});
    return f(Traits<DType::kFloat32>{}, std::false_type{});
}

// Calls f(Traits<dtype>{}) for a dtype whose packets can carry a residual.
template <class F>
void with_residual_source(DType dtype, F f) {
#ifdef QCOMM_ONLY_FLOAT32
    (void)dtype;
#else
    if (dtype == DType::kFloat64) return f(Traits<DType::kFloat64>{});
#endif
    return f(Traits<DType::kFloat32>{});
}

}  // namespace qcomm::cuda
