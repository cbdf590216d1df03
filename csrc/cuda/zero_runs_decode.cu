// Run blocks to values (specification: decode_packet() of qcomm/reference/decode.py).
//
//   out[i] = level(i) * step of i's segment
//
//   block  | info u32 | start windows | words u16 ... | see zero_runs_reader.cuh
//
// Thread block: a run block, which may hold values of several segments. Its first warp looks tokens up and hands them
// to the others by shared memory (3 KiB, with the table 12); these put the levels of those before, a token a lane. They
// are not needed by the chain from codeword to codeword, which is what takes the time. Passes: one over the block's
// bytes for the checksum, while zeros are stored, one over the tokens. Limits: codes of at most 11 bits with 5 more.
// Safety: every read is inside the block, whose place read_packets has checked; a token takes a value at least, or it
// is the last one. Determinism: a thread block owns its values. Bytes moved per value: its size to memory, the code's
// from there.
#include "checksum.cuh"
#include "kernels.cuh"
#include "zero_runs_reader.cuh"

namespace qcomm::cuda {
namespace {

// A put warp has about as much to do for four rows as the first warp has to look up twelve.
constexpr int kPutWarps = 3;
constexpr int kThreads = (1 + kPutWarps) * kWarpLanes;
constexpr int kRows = kRunRows;
using Tokens = RunTokens<NearEntries>;

// Tokens on their way: how many values each stands for, and above them its level.
constexpr int kLevelAt = 16;
constexpr std::uint32_t kLevelBits = 15u << 22;  // level_place() and kHasLevel of an entry
constexpr std::uint32_t kTokenHasLevel = kHasLevel >> (22 - kLevelAt);

struct Shared {
    std::uint32_t codes[kRunCodeMask + 1];                  // the block's table
    LaneBuffer words;                                       // of the first warp
    std::uint32_t tokens[2][kPutWarps][kRows][kWarpLanes];  // one half is filled while the other is put
    int before[2][kPutWarps][kWarpLanes];                   // values of each lane's tokens in front of them
};

// Hands four rows of tokens to a put warp, and adds their values to those of this lane so far. The sum over the lanes
// is left to that warp: it would take longer than a lookup.
__device__ __forceinline__ void hand_over(const std::uint32_t (&found)[kRows], const std::uint32_t (&bits)[kRows],
                                          Shared* shared, int half, int warp, int* values) {
    shared->before[half][warp][lane_number()] = *values;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const std::uint32_t mine = values_of(found[r], bits[r]);
        shared->tokens[half][warp][r][lane_number()] = mine | (found[r] & kLevelBits) >> (22 - kLevelAt);
        *values += static_cast<int>(mine);
    }
}

// By a whole warp; every lane gets the sum.
__device__ __forceinline__ int sum_of_lanes(int value) {
    for (int d = kWarpLanes / 2; d > 0; d /= 2) value += __shfl_xor_sync(kAllLanes, value, d);
    return value;
}

// Looks up the tokens of all put warps, as far as there are any. *values counts those of this lane's tokens.
__device__ void take_tokens(Tokens* tokens, Shared* shared, int half, int* values) {
    int w = 0;
    tokens->begin();
    // A loop of its own, so that neither the careful way nor more words are between its turns.
    do {
#pragma unroll 1
        for (; w < kPutWarps && tokens->has_whole(); ++w) {
            std::uint32_t found[kRows], bits[kRows];
            tokens->take_whole(found, bits);
            hand_over(found, bits, shared, half, w, values);
        }
    } while (w < kPutWarps && tokens->fetch());
#pragma unroll 1
    for (; w < kPutWarps; ++w) {
        std::uint32_t found[kRows], bits[kRows];
        tokens->take(found, bits);
        hand_over(found, bits, shared, half, w, values);
    }
}

// Calls f(segment, its values, n, position in the block) for the parts of segments that values [begin, end) of a
// packet's zero runs consist of.
template <class Storage, class F>
__device__ void for_values(const DecodeTables& d, int number, std::int64_t begin, std::int64_t end, const F& f) {
    const SegmentView* const segments = d.segments_of(number);
    auto* const out = static_cast<Storage*>(d.tasks[number].out);
    for_run_parts(segments, d.packets[number].segments, begin, end, [&](int s, std::int64_t offset, int n, int at) {
        Storage* values = out + segments[s].first_value + offset;
        QCOMM_ASSUME_GLOBAL(values);
        f(segments[s], values, n, at);
    });
}

// Puts the levels of a warp's tokens; values [begin, end) of a packet's zero runs are the block.
template <class Tr>
__device__ void put_levels(const DecodeTables& d, int number, std::int64_t begin, std::int64_t end,
                           const Shared* shared, int half) {
    using Storage = typename Tr::Storage;
    const int w = warp_number() - 1, first = sum_of_lanes(shared->before[half][w][lane_number()]);
    int next = first, ends[kRows];
    std::uint32_t tokens[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) tokens[r] = shared->tokens[half][w][r][lane_number()];
#pragma unroll
    for (int r = 0; r < kRows; r += 2)
        scan_rows(tokens[r] & 0xFFFFu, tokens[r + 1] & 0xFFFFu, &next, &ends[r], &ends[r + 1]);
    const std::int64_t from = begin + first < end ? begin + first : end, to = begin + next < end ? begin + next : end;
    for_values<Storage>(d, number, from, to, [&](const SegmentView& segment, Storage* values, int n, int at) {
        const RunQuantizer<typename Tr::Arithmetic> grid(segment.quantizer.p1);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int i = ends[r] - 1 - first - at;
            if (i >= 0 && i < n && (tokens[r] & kTokenHasLevel) != 0)
                values[i] = Tr::narrow(grid.decode(level_at(static_cast<int>(tokens[r] >> kLevelAt & 7u))));
        }
    });
}

// Decodes values [begin, end) of a packet's zero runs, which are a block; false where it is malformed. Values may have
// been written by then. The result is the warp's.
template <class Tr>
__device__ bool decode_run_block(const DecodeTables& d, int number, std::int64_t block, std::int64_t begin,
                                 std::int64_t end, Shared* shared) {
    using Storage = typename Tr::Storage;
    using T = typename Tr::Arithmetic;
    const std::uint8_t* const packet = d.tasks[number].packet;
    const PacketView& view = d.packets[number];
    const RunBytes at = find_run_block(packet, view, block);
    const int size = static_cast<int>(end - begin), thread = static_cast<int>(threadIdx.x);
    RunBlock parts;
    Tokens tokens;
    bool good = parts.open(at.data, at.bytes, size);
    if (!good) return false;
    const bool coded = parts.mode == RunMode::kCoded;
    if (coded) {
        const std::uint32_t* const codes = d.codes->run_decode[parts.table];
#pragma unroll
        for (int i = thread; i <= static_cast<int>(kRunCodeMask); i += kThreads) shared->codes[i] = codes[i];
    }
    if (warp_number() == 0) {
        good = is_run_block_whole(packet, view, block, at) &&
               (!coded || tokens.open(parts, NearEntries{shared->codes, kRunCodeMask}, &shared->words));
    } else {
        const auto value = Tr::narrow(parts.mode == RunMode::kNotFinite ? std::numeric_limits<T>::quiet_NaN() : T(0));
        for_values<Storage>(d, number, begin, end, [&](const SegmentView&, Storage* values, int n, int) {
#pragma unroll 8
            for (int i = thread - kWarpLanes; i < n; i += kPutWarps * kWarpLanes) values[i] = value;
        });
    }
    // A level's thread is another than its zero's.
    if (__syncthreads_or(!good)) return false;
    if (parts.mode == RunMode::kFixed) {
        for_values<Storage>(d, number, begin, end, [&](const SegmentView& segment, Storage* values, int n, int first) {
            good &=
                read_fixed_levels<Tr>(parts, first, first + n, thread, kThreads, RunQuantizer<T>(segment.quantizer.p1),
                                      [&](int position, Storage level) { values[position - first] = level; });
        });
    }
    if (!coded) return __all_sync(kAllLanes, good);
    // In a turn the first warp fills one half of the buffer while the others empty the half of the turn before.
    constexpr int kTurn = kPutWarps * kRows * kWarpLanes;
    int values = 0;
    for (int turn = 0; turn <= (parts.tokens + kTurn - 1) / kTurn; ++turn) {
        if (warp_number() == 0) {
            take_tokens(&tokens, shared, turn % 2, &values);
        } else if (turn > 0) {
            put_levels<Tr>(d, number, begin, end, shared, (turn - 1) % 2);
        }
        __syncthreads();
    }
    return warp_number() != 0 || __all_sync(kAllLanes, sum_of_lanes(values) <= size && tokens.whole());
}

// A run block a thread block, block_count a packet.
template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) decode_run_blocks(DecodeTables d, int block_count) {
    DYNAMIC_SHARED(Shared, shared);
    const int number = static_cast<int>(blockIdx.x) / block_count;
    const std::int64_t block = static_cast<int>(blockIdx.x) % block_count;
    // Only faults of earlier launches must be seen; whether those of this one are does not matter.
    if (__syncthreads_or(threadIdx.x == 0 && atomicOr(&d.faults[number], 0u) != 0)) return;
    const std::int64_t values = d.packets[number].run_values, blocks = d.packets[number].run_blocks;
    if (block >= blocks) return;
    const bool good = decode_run_block<Tr>(d, number, block, run_block_begin(values, blocks, block),
                                           run_block_begin(values, blocks, block + 1), shared);
    if (!good && lane_number() == 0) report(&d.faults[number], Fault::kBlock);
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_decode_runs(const DecodeTables& d, std::int64_t block_count, void* stream) {
    with_source(d.dtype, false, [&](auto traits, auto) {
        launch_kernel(decode_run_blocks<decltype(traits)>, static_cast<unsigned>(block_count * d.packet_count),
                      kThreads, sizeof(Shared), stream, d, static_cast<int>(block_count));
    });
}
#endif

}  // namespace qcomm::cuda
