// Code lengths from counts, the list of lengths for the packet, and the code itself (specification: code_lengths(),
// pack_lengths() and canonical_codes() of qcomm/huffman.h, own_table() of qcomm/reference/packet.py).
//
//   counts -> sorted by (count, symbol) -> package-merge -> lengths -> nibbles for the packet, codewords for encode.cu
//
//   list    | nibbles, low one first: a length, or 0 r [low high] for a run of unused symbols | zeros to 4 bytes
//
// Thread: symbols tid, tid + 512, ... while sorting and merging, a run of neighbouring ones while packing. Block: a
// segment. Shared memory: 46 KiB; packages of more than 1024 used symbols are in device memory, where the first-level
// cache has them.
// Passes: sort (at most 78 steps), package-merge (at most 14 levels), walk back, then lengths, list and codewords.
// Limits: alphabets of 4096, codewords of 15 bits, counts below 2^48.
// Determinism: integers; every tie is decided by symbol.
// Bytes moved: 8 a symbol of the alphabet in, 5 out.
#include "canonical.cuh"
#include "kernels.cuh"
#include "package_merge.cuh"
#include "qcomm/block.h"
#include "qcomm/sigma_code.h"

namespace qcomm::cuda {
namespace {

static_assert(kCodeThreads / kWarpLanes <= kMaxWarps, "scratch of block_exclusive_sum");

constexpr int kListWords = kMaxAlphabet * 3 / 2 / 8;  // every second symbol unused: three nibbles for two

// For the list. It takes the place of the flags, which are not needed any more by then.
struct Packing {
    std::uint8_t lengths[kMaxAlphabet];
    std::uint16_t used[kMaxAlphabet];  // the used symbols, ascending
    std::uint32_t list[kListWords];
};

struct Shared {
    Count keys[kMaxAlphabet];
    union {
        SymbolFlags flags;
        Packing packing;  // once the merge is walked back
    };
    int used[kMaxCodeLength];
    int scratch[kMaxWarps];
    Count wide_scratch[kMaxWarps];
};
static_assert(sizeof(Shared) <= 48 << 10, "more would have to be asked for");

constexpr int kLongRun = 16 + 255;  // the longest run of unused symbols that is written at once

// Nibbles of a run of unused symbols: 4 for each that is as long as possible, then 2 or 4.
__device__ __forceinline__ int run_nibbles(int run) {
    const int rest = run % kLongRun;
    return run / kLongRun * 4 + (rest == 0 ? 0 : rest < 16 ? 2 : 4);
}

// Writes one thread's part of the list, which begins anywhere in a word. Sizes were summed before, so threads write at
// once.
class NibbleWriter {
public:
    __device__ NibbleWriter(std::uint32_t* list, int at) : list_(list), at_(at) {}
    __device__ void put(unsigned nibble) {  // neighbours in a word are other threads'
        atomicOr(&list_[at_ / 8], nibble << (at_ % 8 * 4));
        ++at_;
    }
    __device__ void put_run(int run) {
        while (run > 0) {
            const int now = run < kLongRun ? run : kLongRun;
            put(0);
            put(static_cast<unsigned>(now < 16 ? now - 1 : 15));
            if (now >= 16) {
                put(static_cast<unsigned>(now - 16) & 15u);
                put(static_cast<unsigned>(now - 16) >> 4);
            }
            run -= now;
        }
    }

private:
    std::uint32_t* list_;
    int at_;
};

// Keys of the used symbols, the others as all ones; returns how many are used. In a sample all are. Ends with a
// barrier.
__device__ int load_keys(const Count* counts, int size, bool sampled, Shared* shared) {
    int mine = 0, used = 0;
    for (int s = static_cast<int>(threadIdx.x); s < size; s += kCodeThreads) {
        const Count count = sampled ? sampled_weight(counts[s]) : counts[s];
        shared->keys[s] = count > 0 ? count << kSymbolBits | static_cast<unsigned>(s) : ~Count{0};
        mine += count > 0;
    }
    block_exclusive_sum(mine, shared->scratch, &used);
    __syncthreads();
    return used;
}

// Sets packing.lengths from the levels' symbols: the symbol of rank r has a bit for each level that uses more than r.
// Returns the bits of all codewords. Ends with a barrier.
__device__ Count set_lengths(int size, int used, int limit, Shared* shared) {
    for (int s = static_cast<int>(threadIdx.x); s < size; s += kCodeThreads) shared->packing.lengths[s] = 0;
    __syncthreads();
    Count mine = 0, bits = 0;
    for (int r = static_cast<int>(threadIdx.x); r < used; r += kCodeThreads) {
        int length = 0;
        for (int level = 0; level < limit; ++level) length += shared->used[level] > r;
        const Count key = shared->keys[r];
        shared->packing.lengths[key & (kMaxAlphabet - 1)] = static_cast<std::uint8_t>(length);
        mine += (key >> kSymbolBits) * static_cast<unsigned>(length);
    }
    block_exclusive_sum(mine, shared->wide_scratch, &bits);
    __syncthreads();
    return bits;
}

// Sets packing.list from packing.lengths, in two scans: the used symbols get ranks, so that a thread sees the run
// before each of its symbols; then the nibbles of all threads get places. Returns its bytes. Ends with a barrier.
__device__ int pack_list(int size, int used, Shared* shared) {
    Packing& p = shared->packing;
    const int per_thread = (size + kCodeThreads - 1) / kCodeThreads, first = static_cast<int>(threadIdx.x) * per_thread;
    const int last = first + per_thread < size ? first + per_thread : size;
    int mine = 0, total = 0;
    for (int s = first; s < last; ++s) mine += p.lengths[s] > 0;
    int rank = block_exclusive_sum(mine, shared->scratch, &total);
    for (int s = first; s < last; ++s) {
        if (p.lengths[s] > 0) p.used[rank++] = static_cast<std::uint16_t>(s);
    }
    for (int i = static_cast<int>(threadIdx.x); i < kListWords; i += kCodeThreads) p.list[i] = 0;
    __syncthreads();
    const auto run_before = [&](int r) { return r == 0 ? static_cast<int>(p.used[0]) : p.used[r] - p.used[r - 1] - 1; };
    mine = 0;
    for (int r = first; r < last && r < used; ++r) mine += run_nibbles(run_before(r)) + 1;
    NibbleWriter writer(p.list, block_exclusive_sum(mine, shared->scratch, &total));
    for (int r = first; r < last && r < used; ++r) {
        writer.put_run(run_before(r));
        writer.put(p.lengths[p.used[r]]);
    }
    __syncthreads();
    return static_cast<int>(align4((total + 1) / 2));
}

// A segment a block: of those that may have a code of their own.
__global__ void __launch_bounds__(kCodeThreads, 1) make_codes(EncodeTables e) {
    DYNAMIC_SHARED(Shared, shared);
    const int s = e.own_segments[blockIdx.x];
    const SegmentTask segment = e.segments[s];
    const Quantizer q = e.quantizers[segment.tensor];
    if (threadIdx.x == 0) e.list_bytes[s] = 0;
    if (!is_block_coded(q.coding) || q.table != kTableOnWire) return;
    const int size = alphabet_size(q.coding, q.num_bits), limit = length_limit(q.coding, q.num_bits);
    Count* const counts = e.counts + segment.first_codeword;
    const bool sampled = samples_own_table(q.grid, q.coding, q.num_bits, segment.count);
    const int used = load_keys(counts, size, sampled, shared);
    if (used < 2) return;  // no code: all blocks are constant
    sort_keys(shared->keys, size);
    merge_packages(shared->keys, used, limit, counts, e.packages + segment.first_codeword, &shared->flags,
                   shared->used);
    Count bits = set_lengths(size, used, limit, shared);
    if (sampled) bits = scale_sampled_bits(bits, q.coding, q.num_bits, segment.count);
    const int bytes = pack_list(size, used, shared);
    const SegmentRecord record{
        static_cast<std::uint64_t>(segment.count), q.grid, q.num_bits, q.coding, q.table, 0.0, 0.0};
    if (q.grid == Grid::kSigma &&
        !sigma_table_pays(bits, bytes, blocks_in(record, e.steps), packed_bytes(segment.count, q.num_bits)))
        return;

    if (threadIdx.x == 0) e.list_bytes[s] = bytes;
    auto* const list = reinterpret_cast<std::uint32_t*>(e.lists + segment.first_codeword);
    for (int i = static_cast<int>(threadIdx.x); i < bytes / 4; i += kCodeThreads) list[i] = shared->packing.list[i];
    std::uint32_t* const entries = e.own_entries + segment.first_codeword;
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kCodeThreads) entries[i] = 0;
    assign_codewords(shared->packing.lengths, size, shared->scratch, nullptr,
                     [&](int symbol, std::uint32_t codeword, int length, int) {
                         entries[symbol] = reverse_bits(codeword, length) | static_cast<std::uint32_t>(length) << 16;
                     });
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_code_lengths(const EncodeTables& e, void* stream) {
    launch_kernel(make_codes, static_cast<unsigned>(e.own_count), kCodeThreads, sizeof(Shared), stream, e);
}
#endif

}  // namespace qcomm::cuda
