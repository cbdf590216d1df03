// The emulation itself: warp operations, barriers and atomics do what CUDA documents, in every order; what would hang
// or be undefined on a GPU ends the program.
#include "cases.h"
#include "launch.h"
#include "suite.h"

namespace qcomm::test {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;

__global__ void warp_operations(unsigned* wrong) {
    const unsigned lane = threadIdx.x % 32, value = lane * lane + blockIdx.x;
    const auto value_of = [&](unsigned l) { return l * l + blockIdx.x; };
    const auto check = [&](bool holds) {
        if (!holds) atomicAdd(wrong, 1u);
    };
    check(__shfl_sync(kAll, value, 5) == value_of(5));
    check(__shfl_up_sync(kAll, value, 3) == value_of(lane < 3 ? lane : lane - 3));
    check(__shfl_down_sync(kAll, static_cast<double>(value), 4) == value_of(lane + 4 < 32 ? lane + 4 : lane));
    check(__shfl_xor_sync(kAll, value, 9) == value_of(lane ^ 9));
    check(__ballot_sync(kAll, lane % 3 == 0) == 0x49249249u);
    check(__match_any_sync(kAll, lane / 8) == 0xFFu << lane / 8 * 8);
    check((__any_sync(kAll, lane == 7) != 0) && (__any_sync(kAll, 0) == 0));
    check((__all_sync(kAll, 1) != 0) && (__all_sync(kAll, lane != 7) == 0));
    if (lane < 16) check(__ballot_sync(0xFFFFu, 1) == 0xFFFFu);
    check(__popc(0xF0F0u) == 8 && __clz(1) == 31 && __clz(0) == 32 && __brev(1u) == 0x80000000u);
    check(__syncthreads_count(lane == 0) == static_cast<int>(blockDim.x / 32));
    check((__syncthreads_or(threadIdx.x == 40) != 0) && (__syncthreads_or(0) == 0));
}

struct Row {
    unsigned values[64];
};

__global__ void reverse_row(unsigned* out) {
    DYNAMIC_SHARED(Row, shared);
    shared->values[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = shared->values[blockDim.x - 1 - threadIdx.x];
}

__global__ void atomics(unsigned* out) {
    atomicAdd(&out[0], threadIdx.x);
    atomicMax(&out[1], threadIdx.x);
    atomicMin(&out[2], threadIdx.x);
    atomicOr(&out[3], 1u << threadIdx.x % 32);
    if (atomicCAS(&out[4], 0u, 7u) == 0) atomicExch(&out[5], 9u);
}

__global__ void barrier_for_some() {
    if (threadIdx.x < 32) __syncthreads();
}
__global__ void exited_lane() {
    if (threadIdx.x == 3) return;
    __syncwarp();
}
__global__ void different_operations() {
    if (threadIdx.x < 16) {
        __syncwarp();
    } else {
        __ballot_sync(kAll, 1);
    }
}
__global__ void wait_for_next_block(unsigned* flags) {
    atomicExch(&flags[blockIdx.x], 1u);
    while (blockIdx.x == 0 && atomicAdd(&flags[1], 0u) == 0) {
    }
    while (blockIdx.x == 1 && atomicAdd(&flags[0], 0u) == 0) {
    }
}

}  // namespace

void emulator_group() {
    unsigned wrong = 0;
    launch_kernel(warp_operations, 3, 64, 0, nullptr, &wrong);
    require(wrong == 0, "warp operations");
    std::vector<unsigned> out(3 * 64);
    launch_kernel(reverse_row, 3, 64, sizeof(Row), nullptr, out.data());
    for (unsigned i = 0; i < out.size(); ++i) require(out[i] == 63 - i % 64, "shared memory behind a barrier");
    std::vector<unsigned> cells = {0, 0, 99, 0, 0, 0};
    launch_kernel(atomics, 2, 40, 0, nullptr, cells.data());
    require(cells == std::vector<unsigned>{2 * 780, 39, 0, 0xFFFFFFFFu, 7, 9}, "atomics");
}

void misuse(const std::string& which) {
    if (which == "misuse-barrier") launch_kernel(barrier_for_some, 1, 64, 0, nullptr);
    if (which == "misuse-exit") launch_kernel(exited_lane, 1, 32, 0, nullptr);
    if (which == "misuse-mix") launch_kernel(different_operations, 1, 32, 0, nullptr);
    unsigned flags[2] = {};
    if (which == "misuse-spin") launch_kernel(wait_for_next_block, 2, 1, 0, nullptr, flags);
}

}  // namespace qcomm::test
