// Decoding tables of codes that segments have of their own (specification: DecodeTable of qcomm/huffman.h).
//
//   entries[i] = symbol | length << 12 of the codeword that the low bits of i begin with, i < 2^(longest length)
//
//   tables  | packet 0: segment 0: u16 * 2^code_bits | segment 1 ... | packet 1 ...
//
// Thread: entries tid, tid + 256, ...; each looks for its codeword among the lengths, of which there are at most 15, so
// that a short codeword, which has thousands of entries, is no thread's own burden. Block: a segment of a packet.
// Shared memory: 12 KiB.
// Passes: ranks of the symbols by (length, symbol), then the entries.
// Limits: alphabets of 4096, 15 bits.
// Safety: read_packets has checked that the lengths are a complete code.
// Determinism: integers.
// Bytes moved: 1 a symbol in, 2 an entry out.
#include "canonical.cuh"
#include "kernels.cuh"
#include "packet_view.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = 256;

struct Shared {
    std::uint8_t lengths[1 << kMaxCodedBits];
    std::uint16_t symbols[1 << kMaxCodedBits];  // by rank
    CodeLevels levels;
    int scratch[kMaxWarps];
    int longest;
};

// A segment of a packet a block.
__global__ void __launch_bounds__(kThreads, 1) make_decode_tables(DecodeTables d) {
    DYNAMIC_SHARED(Shared, shared);
    const int number = static_cast<int>(blockIdx.x) / d.max_segments, s = static_cast<int>(blockIdx.x) % d.max_segments;
    if (__syncthreads_or(threadIdx.x == 0 && atomicOr(&d.faults[number], 0u) != 0)) return;
    if (s >= d.packets[number].segments) return;
    SegmentView& segment = d.segments[d.place_of(number, s)];
    const Quantizer q = segment.quantizer;
    if (!is_block_coded(q.coding) || q.table != kTableOnWire) return;
    const int size = alphabet_size(q.coding, q.num_bits);
    const std::uint8_t* const lengths = d.lengths_of(number, s);
    if (threadIdx.x == 0) shared->longest = 0;
    __syncthreads();
    int longest = 0;
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
        shared->lengths[i] = lengths[i];
        longest = lengths[i] > longest ? lengths[i] : longest;
    }
    atomicMax(&shared->longest, longest);
    __syncthreads();
    assign_codewords(
        shared->lengths, size, shared->scratch, &shared->levels,
        [&](int symbol, std::uint32_t, int, int rank) { shared->symbols[rank] = static_cast<std::uint16_t>(symbol); });
    longest = shared->longest;
    std::uint16_t* const entries = d.entries_of(number, s);
    for (int i = static_cast<int>(threadIdx.x); i < 1 << longest; i += kThreads) {
        // As a canonical code counts: the first bit highest. The codeword's length is the first whose codewords reach
        // this far, and its rank follows from the last codeword of that length.
        const std::uint32_t bits = reverse_bits(static_cast<std::uint32_t>(i), longest);
        int length = 1;
        while (length < longest && bits >> (longest - length) >= shared->levels.end[length]) ++length;
        const std::uint32_t codeword = bits >> (longest - length);
        const std::uint32_t rank = codeword - shared->levels.end[length] + shared->levels.last_rank[length];
        entries[i] = static_cast<std::uint16_t>(shared->symbols[rank] | length << kMaxCodedBits);
    }
    if (threadIdx.x == 0) segment.code_mask = (1u << longest) - 1u;
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_decode_tables(const DecodeTables& d, void* stream) {
    launch_kernel(make_decode_tables, static_cast<unsigned>(d.packet_count) * static_cast<unsigned>(d.max_segments),
                  kThreads, sizeof(Shared), stream, d);
}
#endif

}  // namespace qcomm::cuda
