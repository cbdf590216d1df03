// Values of coding runs to coded blocks, and their new residual (specification: encode_run_block() of
// qcomm/reference/zero_runs.py, encode_lanes() of qcomm/reference/lanes.py).
//
//   q = rint(u / step), at most 3 each side
//   token = (zeros before a level, level), coded as codewords are
//
//   slot   | 32 start windows | words <-- | tokens -->      <--: written backwards
//          (a block that is fixed instead has its packed levels at the front of the words' area)
//
// Thread: one value a row of 32, then one lane, a window of bits in registers. Warp: one run block of the packet, which
// may hold values of several segments. Thread block: 4 blocks of one packet. Shared memory: 868 bytes a warp, the
// table of its block.
// Passes: one over the values, which leaves the tokens in the slot and writes the residual, since no block of zero runs
// is raw; one over the tokens, from the last to the first. Of a packet from which blocks may be dropped, and of float64
// values, zero_runs_payload.cu writes the residual.
// Limits: 512 steps; float32 and float64, since a residual is needed.
// Determinism: a warp owns its block; tokens are placed by ballots.
// Bytes moved per value: 8 and a write of 4; 2 twice for each level that is not 0, and the code's.
#include "kernels.cuh"
#include "lane_writer.cuh"
#include "source.cuh"
#include "warp.cuh"
#include "zero_runs.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = kEncodeWarps * kWarpLanes;
constexpr int kValueRows = 8;  // rows of values that are loaded together, while those before are quantized
constexpr int kRows = 4;       // steps whose tokens are

struct Shared {
    std::uint32_t codes[kEncodeWarps][kRunTokens];
};

// Finds the tokens of a block, front to back. All lanes agree in how many there are and where the last level is.
template <class Tr>
class Tokenizer {
public:
    using T = typename Tr::Arithmetic;
    using Values = Source<Tr, true>;

    __device__ explicit Tokenizer(std::uint16_t* tokens) : tokens_(tokens) { QCOMM_KEEP(below_); }

    // Adds the first n values of `u`, of which the first is at position `at`, and writes their residual if wanted.
    __device__ void add(const Values& u, int n, int at, const RunQuantizer<T>& grid, float* residual_out) {
        int begin = 0;
        if (n >= kGroup) {
            Rows raw = load<true>(u, 0, n);
            for (; begin + kGroup <= n; begin += kGroup) {
                // The next group is loaded before anything is stored: a load behind a store that may be to the same
                // place waits for it. Sum and product are left to the turn that needs them, by which the loads are
                // back. The last turn loads its own again, in vain.
                const Rows next = load<true>(u, begin + 2 * kGroup <= n ? begin + kGroup : begin, n);
                put_group<true>(u, raw, begin, n, at, grid, residual_out);
                raw = next;
            }
        }
        if (begin < n) put_group<false>(u, load<false>(u, begin, n), begin, n, at, grid, residual_out);
    }

    __device__ int tokens() const { return count_; }
    __device__ int nonzeros() const { return count_ - skips_; }
    __device__ bool finite() const { return __all_sync(kAllLanes, finite_); }

private:
    static constexpr int kGroup = kValueRows * kWarpLanes;

    // Rows as they are in memory.
    struct Rows {
        typename Values::Raw values[kValueRows];
    };
    // Behind the last value there are zeros.
    template <bool kWhole>
    __device__ __forceinline__ Rows load(const Values& u, int begin, int n) const {
        Rows rows;
#pragma unroll
        for (int r = 0; r < kValueRows; ++r) {
            const int i = begin + r * kWarpLanes + lane_;
            rows.values[r] = kWhole || i < n ? u.raw(i) : typename Values::Raw{};
        }
        return rows;
    }

    template <bool kWhole>
    __device__ __forceinline__ void put_group(const Values& u, const Rows& rows, int begin, int n, int at,
                                              const RunQuantizer<T>& grid, float* residual_out) {
        float lost[kValueRows];
#pragma unroll
        for (int r = 0; r < kValueRows; ++r) {
            const T x = u.of(rows.values[r]);
            const int level = grid(x);
            lost[r] = grid.lost(x, level);
            if constexpr (kResidualMayOverflow<Tr>) finite_ = finite_ && __builtin_isfinite(lost[r]);
            put_row(level, at + begin + r * kWarpLanes);
        }
        if (residual_out == nullptr) return;
#pragma unroll
        for (int r = 0; r < kValueRows; ++r) {
            const int i = begin + r * kWarpLanes + lane_;
            if (kWhole || i < n) residual_out[i] = lost[r];
        }
    }

    // Adds the tokens of a row of levels, a lane each, of which the first is at position `at`.
    __device__ __forceinline__ void put_row(int level, int at) {
        const unsigned row = __ballot_sync(kAllLanes, level != 0), below = row & below_;
        if (row == 0) return;
        if (at + kWarpLanes - next_ > kSkipZeros) put_skips(at + __ffs(static_cast<int>(row)) - 1 - next_);
        if (level != 0) {
            // Zeros since the last level of the row, or of the rows before: of these, skips have taken whole 512.
            const int before = below == 0 ? at - next_ : 0;
            const int run = (lane_ - kWarpLanes + __clz(static_cast<int>(below)) + before) & (kSkipZeros - 1);
            std::uint16_t* const tokens = tokens_;
            QCOMM_ASSUME_GLOBAL(tokens);
            tokens[count_ + __popc(below)] = static_cast<std::uint16_t>(run << kTokenRunAt | (level + kMaxLevel));
        }
        count_ += __popc(row);
        next_ = at + kWarpLanes - __clz(static_cast<int>(row));
    }
    // Adds the skips among so many zeros.
    __device__ void put_skips(int zeros) {
        const int skips = zeros / kSkipZeros;
#pragma unroll 1
        for (int i = lane_; i < skips; i += kWarpLanes) tokens_[count_ + i] = static_cast<std::uint16_t>(kSkip);
        count_ += skips;
        skips_ += skips;
    }

    std::uint16_t* tokens_;
    int count_ = 0, skips_ = 0;  // tokens, and those of them without a level
    int next_ = 0;               // the position behind the last level
    bool finite_ = true;         // this lane's residuals
    int lane_ = lane_number();
    unsigned below_ = lanes_below(lane_number());
};

// Returns what a lane pushes for a token: its codeword with the extra bits behind. Classes of octave o begin at
// multiples of 2^o and have o extra bits (run_class() of zero_runs.h), so both follow from the run by shifts; and 512,
// the skip, is the class behind the last one.
__device__ __forceinline__ std::uint32_t token_entry(std::uint32_t token, const std::uint32_t* codes) {
    const std::uint32_t run = token >> kTokenRunAt;
    int octave = 29 - __clz(static_cast<int>(run | 4u));
    octave = octave < 5 ? octave : 5;
    const std::uint32_t number = 4u * static_cast<std::uint32_t>(octave) + (run >> octave);
    const std::uint32_t level = token & 7u;  // + 3; of a skip 0
    const std::uint32_t code = codes[number * kTokenLevels + level - (level > kMaxLevel ? 1u : 0u)];
    const std::uint32_t extra = run & ((1u << octave) - 1u);
    return ((code & 0xFFFFu) | extra << (code >> 16 & 31u)) << kCodewordAt | code >> 24;
}

// Codes tokens from the last step to the first. It gives up with more words than `limit`.
__device__ void push_tokens(LaneWriter& lanes, const std::uint16_t* tokens, int count, int limit,
                            const std::uint32_t* codes) {
    QCOMM_ASSUME_GLOBAL(tokens);
    const int lane = lane_number(), whole = count / kWarpLanes;
    int step = (count - 1) / kWarpLanes;
    for (; step >= 0 && (step >= whole || !lanes.started() || (step + 1) % kRows != 0); --step) {
        const int t = step * kWarpLanes + lane;
        lanes.push_first(t < count ? token_entry(tokens[t], codes) : 0u);
    }
    if (step < 0) return;
    lanes.enter();
    std::uint32_t now[kRows], next[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) now[r] = tokens[(step - r) * kWarpLanes + lane];
    for (; step >= 0 && lanes.words() <= limit; step -= kRows) {
        // The last turn loads its own again, in vain.
        const int ahead = step < kRows ? step : step - kRows;
#pragma unroll
        for (int r = 0; r < kRows; ++r) next[r] = tokens[(ahead - r) * kWarpLanes + lane];
        std::uint32_t entries[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) entries[r] = token_entry(now[r], codes);
#pragma unroll
        for (int r = 0; r < kRows; ++r) lanes.push(entries[r]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) now[r] = next[r];
    }
    lanes.leave();
}

// Adds 3 bits at bit `at` of 96.
__device__ __forceinline__ void flip_bits(std::uint32_t (&words)[kRunsBits], int at, std::uint32_t bits) {
    const std::uint64_t wide = static_cast<std::uint64_t>(bits) << (at % 32);
#pragma unroll
    for (int w = 0; w < kRunsBits; ++w) {
        if (w == at / 32) words[w] ^= static_cast<std::uint32_t>(wide);
        if (w == at / 32 + 1) words[w] ^= static_cast<std::uint32_t>(wide >> 32);
    }
}

// Packs the levels of n values by their tokens: 32 values are three words, which the lanes put together. Blocks are
// seldom fixed, as that takes one level in four.
__device__ void pack_levels(const std::uint16_t* tokens, int count, int n, std::uint32_t* packed) {
    const int lane = lane_number();
    int next = 0, done = 0;  // tokens that have been put, and the position behind the last of them
    for (int row = 0; row < n; row += kWarpLanes) {
        std::uint32_t words[kRunsBits] = {};
        if (row + lane < n) flip_bits(words, kRunsBits * lane, kMaxLevel);  // the level 0
        const bool present = next + lane < count;
        const std::uint32_t token = present ? tokens[next + lane] : kSkip;
        const bool skips = token == kSkip;
        const auto advance = static_cast<int>(token >> kTokenRunAt) + (skips ? 0 : 1);
        const int end = done + warp_inclusive_sum(advance);
        const bool here = present && end <= row + kWarpLanes;
        if (here && !skips) flip_bits(words, kRunsBits * (end - 1 - row), (token & 7u) ^ kMaxLevel);
        const int put = __popc(__ballot_sync(kAllLanes, here));  // ends ascend, so these are the first lanes
        done = __shfl_sync(kAllLanes, put > 0 ? end : done, put > 0 ? put - 1 : 0);
        next += put;
#pragma unroll
        for (int w = 0; w < kRunsBits; ++w) {
            for (int d = 1; d < kWarpLanes; d *= 2) words[w] ^= __shfl_xor_sync(kAllLanes, words[w], d);
            if (lane == w) packed[row / kWarpLanes * kRunsBits + w] = words[w];
        }
    }
}

// Encodes values [begin, end) of a packet's zero runs into a slot.
template <class Tr>
__device__ BlockResult encode_run_block(const EncodeTables& e, const PacketTask& packet, std::int64_t begin,
                                        std::int64_t end, std::uint8_t* slot, std::uint32_t* codes) {
    const RunSlotShape shape(e.steps);
    auto* const tokens = reinterpret_cast<std::uint16_t*>(slot + shape.tokens_at);
    Tokenizer<Tr> tokenizer(tokens);
    const bool keeps = !packet.may_drop && !kResidualMayOverflow<Tr>;
    for_run_parts(e.run_places + packet.first_segment, packet.segments, begin, end,
                  [&](int s, std::int64_t offset, int n, int at) {
                      const SegmentTask& segment = e.segments[packet.first_segment + s];
                      const Source<Tr, true> u(e.tensors[segment.tensor], segment.offset + offset);
                      const RunQuantizer<typename Tr::Arithmetic> grid(e.quantizers[segment.tensor].p1);
                      tokenizer.add(u, n, at, grid, keeps ? segment.residual_out + offset : nullptr);
                  });
    const int n = static_cast<int>(end - begin), lane = lane_number();
    const int count = tokenizer.tokens(), nonzeros = tokenizer.nonzeros();
    if (!tokenizer.finite()) return {RunInfo{RunMode::kNotFinite, 0, 0}.pack(), 0, 1};
    if (nonzeros == 0) return {RunInfo{RunMode::kZeros, 0, 0}.pack(), 0, 1};
    const int table = run_table(nonzeros, n, e.codes->run_bounds);
    for (int i = lane; i < kRunTokens; i += kWarpLanes) codes[i] = e.codes->run_encode[table][i];
    __syncwarp();  // codes and tokens are other lanes'
    LaneWriter lanes(tokens);
    push_tokens(lanes, tokens, count, run_block_bytes(RunMode::kFixed, n, 0) / 2, codes);
    reinterpret_cast<std::uint32_t*>(slot)[lane] = lanes.window();
    const RunMode mode = choose_run_mode(n, nonzeros, lanes.words());
    const auto units = static_cast<std::uint32_t>(run_block_bytes(mode, n, lanes.words()) / 4);
    if (mode == RunMode::kCoded)
        return {RunInfo{mode, table, count}.pack(), static_cast<std::uint32_t>(lanes.words()), units};
    __syncwarp();  // other lanes have put words there
    pack_levels(tokens, count, n, reinterpret_cast<std::uint32_t*>(slot + shape.words_at));
    return {RunInfo{mode, 0, 0}.pack(), 0, units};
}

// A run block a warp. Of those that the plan has made room for the last ones may be empty.
template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) encode_run_blocks(EncodeTables e) {
    DYNAMIC_SHARED(Shared, shared);
    const int p = find_task(e.packets, e.packet_count, blockIdx.x, &PacketTask::first_run_tile);
    const PacketTask packet = e.packets[p];
    const std::int64_t block =
        (static_cast<std::int64_t>(blockIdx.x) - packet.first_run_tile) * kEncodeWarps + warp_number();
    if (block >= packet.run_blocks) return;
    const RunTotal total = e.run_totals[p];
    BlockResult result{0, 0, 0};
    if (block < total.blocks) {
        result = encode_run_block<Tr>(e, packet, run_block_begin(total.values, total.blocks, block),
                                      run_block_begin(total.values, total.blocks, block + 1),
                                      e.slots + packet.run_slots + block * RunSlotShape(e.steps).bytes,
                                      shared->codes[warp_number()]);
    }
    if (lane_number() == 0) e.blocks[packet.first_block + packet.blocks - packet.run_blocks + block] = result;
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_encode_run_blocks(const EncodeTables& e, std::int64_t tiles, void* stream) {
    with_residual_source(e.dtype, [&](auto traits) {
        launch_kernel(encode_run_blocks<decltype(traits)>, static_cast<unsigned>(tiles), kThreads, sizeof(Shared),
                      stream, e);
    });
}
#endif

}  // namespace qcomm::cuda
