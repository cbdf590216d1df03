// Values of coding runs to coded blocks, and their new residual (specification: encode_run_block() of
// qcomm/reference/zero_runs.py, encode_lanes() of qcomm/reference/lanes.py).
//
//   q = rint(u / step), at most 3 each side
//   token = (zeros before a level, level), coded as codewords are
//
//   slot   | 32 start windows | words <-- | tokens -->      <--: written backwards
//          (a block that is fixed instead has its packed levels at the front of the words' area)
//
// Thread: one value a row of 32, then one lane, a window of bits in registers. Thread block: one run block of the
// packet, which may hold values of several segments. Its warps find the tokens of a part each; the first one codes
// them. Shared memory: 868 bytes for the table of the block, 32 for each part.
// Passes: one over the values, which leaves the tokens in the slot and writes the residual, since no block of zero runs
// is raw; one over the tokens, from the last to the first. Of a packet from which blocks may be dropped, and of float64
// values, zero_runs_payload.cu writes the residual.
// Limits: 512 steps; float32 and float64, since a residual is needed.
// Determinism: a thread block owns its run block; tokens are placed by ballots.
// Bytes moved per value: 8 and a write of 4; 2 twice for each level that is not 0, and the code's.
#include "kernels.cuh"
#include "lane_writer.cuh"
#include "warp.cuh"
#include "zero_runs_tokenizer.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kRunWarps = 8;  // of a run block
constexpr int kThreads = kRunWarps * kWarpLanes;
constexpr int kRows = 4;  // steps whose tokens are

// The tokens of all parts are one row. Those of a part begin there with number `first`, and at first + shift in the
// slot.
struct Place {
    int first, shift;
};

struct Shared {
    std::uint32_t codes[kRunTokens];
    Part parts[kRunWarps];
    Place places[kRunWarps];
};

// The tokens of all parts, as one row that each lane reads from the last to the first.
class TokenRow {
public:
    __device__ TokenRow(const std::uint16_t* tokens, const Place* places)
        : tokens_(tokens), places_(places), place_(places[kRunWarps - 1]) {
        QCOMM_ASSUME_GLOBAL(tokens_);
    }
    // Token t, or the first one where t is negative. A lane's t must not ascend.
    __device__ __forceinline__ std::uint32_t operator[](int t) {
        t = t > 0 ? t : 0;
        while (t < place_.first) place_ = places_[--part_];
        const std::uint16_t* const tokens = tokens_;
        QCOMM_ASSUME_GLOBAL(tokens);
        return tokens[t + place_.shift];
    }
    // The place in the slot of any token.
    __device__ static int find(const Place* places, int t) {
        int part = kRunWarps - 1;
        while (t < places[part].first) --part;
        return t + places[part].shift;
    }

private:
    const std::uint16_t* tokens_;
    const Place* places_;
    Place place_;
    int part_ = kRunWarps - 1;
};

struct Totals {
    int tokens, levels;  // of a run block; levels are tokens that have one
};

// Joins the parts of a block, by all warps alike, each of which completes its own: the run of its first token, and the
// skips in front of it. These have room, as the zeros have none.
__device__ Totals join_parts(const Part* parts, Place* places, std::uint16_t* tokens) {
    const int lane = lane_number();
    Totals all{0, 0};
    for (int w = 0, next = 0; w < kRunWarps; ++w) {
        const Part part = parts[w];
        const bool empty = part.end == part.at;
        const int zeros = empty ? 0 : part.first - next, skips = zeros / kSkipZeros;
        if (w == warp_number()) {
            for (int i = lane; i < skips; i += kWarpLanes) tokens[part.at - 1 - i] = static_cast<std::uint16_t>(kSkip);
            if (!empty && lane == 0)
                tokens[part.at] = static_cast<std::uint16_t>(tokens[part.at] + (zeros % kSkipZeros << kTokenRunAt));
            if (lane == 0) places[w] = {all.tokens, part.at - skips - all.tokens};
        }
        all.tokens += skips + part.end - part.at;
        all.levels += part.end - part.at - part.skips;
        next = empty ? next : part.next;
    }
    return all;
}

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
__device__ void push_tokens(LaneWriter& lanes, TokenRow tokens, int count, int limit, const std::uint32_t* codes) {
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
        // The last turn loads the first token, in vain.
#pragma unroll
        for (int r = 0; r < kRows; ++r) next[r] = tokens[(step - kRows - r) * kWarpLanes + lane];
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
__device__ void pack_levels(const std::uint16_t* tokens, const Place* places, int count, int n, std::uint32_t* packed) {
    const int lane = lane_number();
    int next = 0, done = 0;  // tokens that have been put, and the position behind the last of them
    for (int row = 0; row < n; row += kWarpLanes) {
        std::uint32_t words[kRunsBits] = {};
        if (row + lane < n) flip_bits(words, kRunsBits * lane, kMaxLevel);  // the level 0
        const bool present = next + lane < count;
        const std::uint32_t token = present ? tokens[TokenRow::find(places, next + lane)] : kSkip;
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

// Encodes values [begin, end) of a packet's zero runs into a slot, by a thread block. The first warp has the result.
template <class Tr>
__device__ BlockResult encode_run_block(const EncodeTables& e, const PacketTask& packet, std::int64_t begin,
                                        std::int64_t end, std::uint8_t* slot, Shared* shared) {
    const RunSlotShape shape(e.steps);
    auto* const tokens = reinterpret_cast<std::uint16_t*>(slot + shape.tokens_at);
    const int n = static_cast<int>(end - begin), lane = lane_number();
    // Parts are whole groups, but for the last one.
    const int whole = (n + kThreads * kValueRows - 1) / (kThreads * kValueRows) * kGroup;
    const int first = warp_number() * whole < n ? warp_number() * whole : n,
              last = first + whole < n ? first + whole : n;
    Tokenizer<Tr> tokenizer(tokens, first);
    const bool keeps = !packet.may_drop && !kResidualMayOverflow<Tr>;
    for_run_parts(e.run_places + packet.first_segment, packet.segments, begin + first, begin + last,
                  [&](int s, std::int64_t offset, int count, int at) {
                      const SegmentTask& segment = e.segments[packet.first_segment + s];
                      const Source<Tr, true> u(e.tensors[segment.tensor], segment.offset + offset);
                      const RunQuantizer<typename Tr::Arithmetic> grid(e.quantizers[segment.tensor].p1);
                      tokenizer.add(u, count, first + at, grid, keeps ? segment.residual_out + offset : nullptr);
                  });
    if (lane == 0) shared->parts[warp_number()] = tokenizer.part();
    if (__syncthreads_or(!tokenizer.finite())) return {RunInfo{RunMode::kNotFinite, 0, 0}.pack(), 0, 1};
    const Totals all = join_parts(shared->parts, shared->places, tokens);
    if (all.levels == 0) return {RunInfo{RunMode::kZeros, 0, 0}.pack(), 0, 1};
    const int table = run_table(all.levels, n, e.codes->run_bounds);
    for (int i = static_cast<int>(threadIdx.x); i < kRunTokens; i += kThreads)
        shared->codes[i] = e.codes->run_encode[table][i];
    __syncthreads();  // codes, places and tokens are other threads'
    if (warp_number() != 0) return {0, 0, 0};
    LaneWriter lanes(tokens);
    push_tokens(lanes, TokenRow(tokens, shared->places), all.tokens, run_block_bytes(RunMode::kFixed, n, 0) / 2,
                shared->codes);
    reinterpret_cast<std::uint32_t*>(slot)[lane] = lanes.window();
    const RunMode mode = choose_run_mode(n, all.levels, lanes.words());
    const auto units = static_cast<std::uint32_t>(run_block_bytes(mode, n, lanes.words()) / 4);
    if (mode == RunMode::kCoded)
        return {RunInfo{mode, table, all.tokens}.pack(), static_cast<std::uint32_t>(lanes.words()), units};
    __syncwarp();  // other lanes have put words there
    pack_levels(tokens, shared->places, all.tokens, n, reinterpret_cast<std::uint32_t*>(slot + shape.words_at));
    return {RunInfo{mode, 0, 0}.pack(), 0, units};
}

// A run block a thread block, kEncodeWarps a tile. Of those that the plan has made room for the last ones may be empty.
template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) encode_run_blocks(EncodeTables e) {
    DYNAMIC_SHARED(Shared, shared);
    const auto tile = static_cast<std::int64_t>(blockIdx.x / kEncodeWarps);
    const int p = find_task(e.packets, e.packet_count, tile, &PacketTask::first_run_tile);
    const PacketTask packet = e.packets[p];
    const std::int64_t block = (tile - packet.first_run_tile) * kEncodeWarps + blockIdx.x % kEncodeWarps;
    if (block >= packet.run_blocks) return;
    const RunTotal total = e.run_totals[p];
    BlockResult result{0, 0, 0};
    if (block < total.blocks) {
        result = encode_run_block<Tr>(e, packet, run_block_begin(total.values, total.blocks, block),
                                      run_block_begin(total.values, total.blocks, block + 1),
                                      e.slots + packet.run_slots + block * RunSlotShape(e.steps).bytes, shared);
    }
    if (threadIdx.x == 0) e.blocks[packet.first_block + packet.blocks - packet.run_blocks + block] = result;
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_encode_run_blocks(const EncodeTables& e, std::int64_t tiles, void* stream) {
    with_residual_source(e.dtype, [&](auto traits) {
        launch_kernel(encode_run_blocks<decltype(traits)>, static_cast<unsigned>(kEncodeWarps * tiles), kThreads,
                      sizeof(Shared), stream, e);
    });
}
#endif

}  // namespace qcomm::cuda
