// Sums over encodings, which statistics show and capacities follow, kept on the device until they are read.
//
//   account.packet_bytes += sum of sizes   account.largest_packet = max(itself, wanted sizes)   and so on: Account
//
// Thread: every 128th packet, then every 128th tensor. Block: the only one. No shared memory.
// Passes: one.
// Limits: none.
// Determinism: integers only.
// Bytes moved: 24 a packet, 32 a tensor.
#include "kernels.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = 128;

// Atomic additions are of unsigned numbers only; in two's complement signed ones add alike.
__device__ void add(std::int64_t* sum, std::int64_t value) {
    if (value != 0) atomicAdd(reinterpret_cast<Count*>(sum), static_cast<Count>(value));
}

// Each thread sums its share in registers and adds it once. total_bytes is minus the size of a packet that did not fit.
__global__ void __launch_bounds__(kThreads, 1)
    count_encoding(EncodeTables e, const std::int64_t* total_bytes, Account* account) {
    std::int64_t bytes = 0, largest = 0, dropped = 0, unsent = 0, nonfinite = 0;
    for (int p = static_cast<int>(threadIdx.x); p < e.packet_count; p += kThreads) {
        bytes += total_bytes[p] > 0 ? total_bytes[p] : 0;
        unsent += total_bytes[p] <= 0;
        largest = e.wanted_bytes[p] > largest ? e.wanted_bytes[p] : largest;
        dropped += e.dropped[p];
    }
    for (int t = static_cast<int>(threadIdx.x); t < e.tensor_count; t += kThreads) nonfinite += !e.statistics[t].finite;
    add(&account->packet_bytes, bytes);
    add(&account->dropped_values, dropped);
    add(&account->unsent_packets, unsent);
    add(&account->nonfinite_tensors, nonfinite);
    atomicMax(reinterpret_cast<Count*>(&account->largest_packet), static_cast<Count>(largest));
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_count(const EncodeTables& e, const std::int64_t* total_bytes, Account* account, void* stream) {
    launch_kernel(count_encoding, 1, kThreads, 0, stream, e, total_bytes, account);
}
#endif

}  // namespace qcomm::cuda
