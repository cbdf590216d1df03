// Values to coded blocks, quantized and coded in one pass, and the new residual (specification: encode_block() of
// qcomm/reference/packet.py, encode_lanes() of qcomm/reference/lanes.py).
//
//   q = rint(u / step) + R or floor bins of a range
//   x = x << l | code; a word leaves a lane before it would hold 32 bits
//
//   slot   | 32 start windows | escape values <-- | words <-- | escape positions <-- |      <--: written backwards
//          (a block that is fixed instead has its packed symbols at the front of the words' area)
//
// Thread: one lane, a window of bits in registers. Warp: one block of the packet, 32 or 64 values a step, from the last
// step to the first, which is why words are written downwards. Thread block: 4 blocks of one segment, which share its
// code in shared memory: 4 bytes a symbol, 1 KiB for a static code, up to 16 KiB for one of the segment's own.
// Passes: one over the values, plus one over those of blocks that turn out to be fixed, or that have a residual:
// whether a block is raw, which clears it, is known only at the end. That pass loads 16 rows while it stores those
// before: a load behind a store that may be to the same place waits for it, and no other warp hides that time. Raw
// blocks are left to payload.cu, which must see the residual as it was; and so are the residuals of range grids, whose
// segments may still become fixed, and of packets from which blocks may be dropped. Limits: 512 steps; alphabets of 256
// symbols in a static code, 4096 in a code of the segment's own. Determinism: a warp owns its block; nothing depends on
// other warps. Bytes moved per value: its size, and the code's (words 0.3 or so); with a residual 8 and a write of 4
// more. The lanes: F. Giesen, "Interleaved entropy coders", arXiv:1402.3392, 2014.
#include "coder.cuh"
#include "kernels.cuh"
#include "lane_writer.cuh"
#include "source.cuh"
#include "warp.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = kEncodeWarps * kWarpLanes;
constexpr int kRows = 4;           // steps whose values are loaded together, while those before are coded
constexpr int kResidualRows = 16;  // rows of 32 values that are loaded while the residuals of those before are written

//   entry   | codeword, 16 bits | 0 | escape flag at 8 | 0 | length, 5 bits |
//
// Entries of a code in shared memory are turned round: the length below, the codeword in the upper half, as LaneWriter
// takes them.
constexpr std::uint32_t kEscapeFlag = 1u << 8;  // of an entry whose symbol, or one of whose two, is an escape

// An entry of 0, which has no codeword, stays one whose length is 0.
__device__ __forceinline__ std::uint32_t turned_entry(std::uint32_t entry, bool escape) {
    return entry << kCodewordAt | entry >> 16 | (escape ? kEscapeFlag : 0u);
}

// A block's place between this kernel and payload.cu.
struct Slot {
    std::uint8_t* begin;
    SlotShape shape;
};

// Writes a step's escapes in front of the `count` ones that the slot has, and returns how many there are now. Higher
// lanes come first, and in a lane the second value: everything is written from the end.
template <class Tr, class T>
__device__ __forceinline__ int collect(std::uint8_t* slot, SlotShape shape, int count, int at, bool first, bool second,
                                       T first_value, T second_value) {
    const unsigned firsts = __ballot_sync(kAllLanes, first), seconds = __ballot_sync(kAllLanes, second);
    const unsigned above = ~lanes_below(lane_number() + 1);
    int index = count + __popc(firsts & above) + __popc(seconds & above);
    auto* const values = reinterpret_cast<typename Tr::Storage*>(slot + shape.words_at);
    auto* const positions = reinterpret_cast<std::uint16_t*>(slot + shape.positions_at) + shape.max_escapes;
    if (second && ++index <= shape.max_escapes) {
        values[-index] = Tr::narrow(second_value);
        positions[-index] = static_cast<std::uint16_t>(at + 1);
    }
    if (first && ++index <= shape.max_escapes) {
        values[-index] = Tr::narrow(first_value);
        positions[-index] = static_cast<std::uint16_t>(at);
    }
    return count + __popc(firsts) + __popc(seconds);
}

// One warp encodes one block: the first n values of `u`. push_guarded() takes steps that may be short, or before the
// first word. push_rows() takes all others, four at a time, and asks for none of this. A lane pushes 0 bits where it
// has no codeword.
template <class Tr, class Levels, class Values, bool kPairs>
class BlockEncoder {
public:
    using T = typename Tr::Arithmetic;
    using Raw = typename Values::Raw;
    static constexpr int kPerLane = kPairs ? 2 : 1;

    __device__ BlockEncoder(const Values& u, const Levels& grid, int escape, int n, const std::uint32_t* entries,
                            bool has_code, const Slot& slot)
        : u_(u),
          grid_(grid),
          escape_(escape),
          n_(n),
          entries_(entries),
          has_code_(has_code),
          slot_(slot),
          lanes_(reinterpret_cast<std::uint16_t*>(slot.begin + slot.shape.positions_at)),
          reference_(grid(u[0])) {
        QCOMM_KEEP(lane_);
        std::uint32_t all[kPerLane];
        for (std::uint32_t& symbol : all) symbol = reference_;
        reference_entry_ = has_code ? entries[codeword(all)] : 0u;
    }

    // From the last step to the first.
    __device__ void run() {
        const int codewords = (n_ + kPerLane - 1) / kPerLane;
        int step = (codewords - 1) / kWarpLanes;
        // Steps in which all lanes have all their values. Rare cases take the slower way through all: a grid that
        // lacks levels, and having no code, where nothing is pushed.
        const int whole = has_code_ && grid_.has_all_levels() ? n_ / (kWarpLanes * kPerLane) : 0;
        for (; step >= 0 && (step >= whole || !lanes_.started() || (step + 1) % kRows != 0); --step) push_guarded(step);
        if (step < 0) return;
        lanes_.enter();
        // A tensor may begin at any element. Where one begins between two pairs, all of its pairs lie so: the question
        // is asked once for a block, not for every load.
        if constexpr (kPairs) {
            u_.holds_pairs() ? run_rows<true>(step) : run_rows<false>(step);
        } else {
            run_rows<false>(step);
        }
        lanes_.leave();
    }

    // The block's result; the start windows go to the slot.
    __device__ BlockResult finish(int num_bits) {
        const auto item = static_cast<int>(sizeof(typename Tr::Storage));
        const bool constant = !__any_sync(kAllLanes, different_ != 0) && static_cast<int>(reference_) != escape_;
        reinterpret_cast<std::uint32_t*>(slot_.begin)[lane_number()] = lanes_.window();
        const int words = lanes_.words();
        const BlockShape shape{n_, num_bits, item, escapes_, words};
        const BlockMode mode = choose_mode(shape, constant, has_code_);
        const bool with_escapes = mode == BlockMode::kFixed || mode == BlockMode::kCoded;
        const BlockInfo info{mode, with_escapes ? escapes_ : 0, constant ? reference_ : 0u};
        return {info.pack(), static_cast<std::uint32_t>(words), static_cast<std::uint32_t>(shape.bytes(mode) / 4)};
    }

private:
    // Steps of which all are whole, four a turn. kTogether: the values of a pair are one load.
    template <bool kTogether>
    __device__ __forceinline__ void run_rows(int step) {
        Raw x[kRows][kPerLane];
        load_rows<kTogether>(step, x);
        for (; step >= 0; step -= kRows) {
            // A bucket has few blocks for the processors of a GPU, so no other warp hides the time of loads. Sum and
            // product are left to the turn that needs them. The last turn loads its own again, in vain.
            Raw next[kRows][kPerLane];
            load_rows<kTogether>(step < kRows ? step : step - kRows, next);
            push_rows(step, x);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
                for (int v = 0; v < kPerLane; ++v) x[r][v] = next[r][v];
            }
        }
    }

    // The values of kRows whole steps, the last one first.
    template <bool kTogether>
    __device__ __forceinline__ void load_rows(int step, Raw (&x)[kRows][kPerLane]) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if constexpr (kTogether) {
                u_.raw_pair(first_value(step - r), x[r]);
            } else {
#pragma unroll
                for (int v = 0; v < kPerLane; ++v) x[r][v] = u_.raw(first_value(step - r) + v);
            }
        }
    }

    // Four whole steps: all symbols first, then all lookups, and only then the pushes, each of which waits for the one
    // before. Escapes are rare, so one ballot asks for them in all four.
    __device__ __forceinline__ void push_rows(int step, const Raw (&x)[kRows][kPerLane]) {
        std::uint32_t entries[kRows], flags = 0;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            std::uint32_t symbols[kPerLane];
#pragma unroll
            for (int v = 0; v < kPerLane; ++v) symbols[v] = grid_.symbol_of_all(u_.of(x[r][v]));
            entries[r] = entries_[codeword(symbols)];
            different_ |= entries[r] ^ reference_entry_;  // no two codewords are equal
            flags |= entries[r];
        }
        if (ballot_bits(flags, kEscapeFlag) != 0) {
#pragma unroll 1
            for (int r = 0; r < kRows; ++r) keep_escapes(step - r, kPerLane);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) lanes_.push(entries[r]);
    }

    // A step that may be short; its odd tail's second symbol is the level zero.
    __device__ void push_guarded(int step) {
        const int at = first_value(step);
        const int present = n_ - at >= kPerLane ? kPerLane : n_ - at;  // of this lane's values; may be negative
        std::uint32_t symbols[kPerLane];
        for (int v = 0; v < kPerLane; ++v)
            symbols[v] = v < present ? grid_(u_[at + v]) : static_cast<std::uint32_t>(sigma_radius(kPairBits));
        if (__any_sync(kAllLanes, note(symbols, present))) keep_escapes(step, present);
        lanes_.push_first(present > 0 && has_code_ ? entries_[codeword(symbols)] : 0u);
    }

    __device__ __forceinline__ int first_value(int step) const { return (step * kWarpLanes + lane_) * kPerLane; }
    __device__ __forceinline__ static std::uint32_t codeword(const std::uint32_t (&symbols)[kPerLane]) {
        if constexpr (kPairs) return symbols[0] | symbols[1] << kPairBits;
        return symbols[0];
    }

    // Compares with the first symbol: a block is constant while no bit has differed. Tells whether there is an escape.
    __device__ __forceinline__ bool note(const std::uint32_t (&symbols)[kPerLane], int present) {
        bool escapes = false;
#pragma unroll
        for (int v = 0; v < kPerLane; ++v) {
            if (v >= present) continue;
            different_ |= symbols[v] ^ reference_;
            escapes |= static_cast<int>(symbols[v]) == escape_;
        }
        return escapes;
    }

    // Rare, so the values are read again.
    __device__ __forceinline__ void keep_escapes(int step, int present) {
        const int at = first_value(step);
        T x[2] = {};
        bool escapes[2] = {};
        for (int v = 0; v < kPerLane; ++v) {
            if (v >= present) continue;
            x[v] = u_[at + v];
            escapes[v] = static_cast<int>(grid_(x[v])) == escape_;
        }
        escapes_ = collect<Tr>(slot_.begin, slot_.shape, escapes_, at, escapes[0], escapes[1], x[0], x[1]);
    }

    const Values& u_;
    const Levels& grid_;
    const int escape_;
    const int n_;
    const std::uint32_t* const entries_;
    const bool has_code_;
    const Slot& slot_;
    LaneWriter lanes_;
    const std::uint32_t reference_;
    std::uint32_t reference_entry_;  // of a codeword of such symbols alone
    std::uint32_t different_ = 0;
    int lane_ = lane_number();
    int escapes_ = 0;
};

// Loads kResidualRows rows of the n values, from `begin` on. Behind the last value there are zeros.
template <bool kWhole, class Values>
__device__ __forceinline__ void load_residual_rows(const Values& u, int begin, int n,
                                                   typename Values::Raw (&x)[kResidualRows]) {
#pragma unroll
    for (int r = 0; r < kResidualRows; ++r) {
        const int i = begin + r * kWarpLanes;
        x[r] = kWhole || i < n ? u.raw(i) : typename Values::Raw{};
    }
}

// Writes the residual of a block's n values, a warp.
template <class Tr, class Levels, class Values>
__device__ void write_residual(const Values& u, int n, const Levels& grid, int escape, float* residual_out) {
    constexpr int kGroup = kResidualRows * kWarpLanes;
    typename Values::Raw x[kResidualRows], next[kResidualRows];
    int i = lane_number(), left = n / kGroup;
    if (left > 0) load_residual_rows<true>(u, i, n, x);
    for (; left > 0; --left, i += kGroup) {
        load_residual_rows<true>(u, left > 1 ? i + kGroup : i, n, next);  // the last turn's own again, in vain
#pragma unroll
        for (int r = 0; r < kResidualRows; ++r)
            residual_out[i + r * kWarpLanes] = residual_of<Tr>(u.of(x[r]), grid, escape);
#pragma unroll
        for (int r = 0; r < kResidualRows; ++r) x[r] = next[r];
    }
    if (n % kGroup == 0) return;
    load_residual_rows<false>(u, i, n, x);
#pragma unroll
    for (int r = 0; r < kResidualRows; ++r)
        if (i + r * kWarpLanes < n) residual_out[i + r * kWarpLanes] = residual_of<Tr>(u.of(x[r]), grid, escape);
}

// Encodes the first n values of `u` into a slot, and writes their new residual to `residual_out` if it is not null.
template <class Tr, bool kPairs, class Levels, class Values>
__device__ BlockResult encode_block(const Values& u, int n, const Levels& grid, const Quantizer& q,
                                    const std::uint32_t* entries, bool has_code, const Slot& slot,
                                    float* residual_out) {
    const int escape = escape_of(q);
    BlockEncoder<Tr, Levels, Values, kPairs> encoder(u, grid, escape, n, entries, has_code, slot);
    encoder.run();
    const BlockResult result = encoder.finish(q.num_bits);
    const BlockMode mode = BlockInfo::unpack(result.info).mode;
    if (mode == BlockMode::kFixed) {
        __syncwarp();  // other lanes have put code words there
        auto* const packed = reinterpret_cast<std::uint32_t*>(slot.begin + slot.shape.words_at);
        const auto words = static_cast<int>(ceil_div(packed_bytes(n, q.num_bits), 4));
        for (int i = lane_number(); i < words; i += kWarpLanes)
            packed[i] = packed_word<int>(u, grid, 0, n, q.num_bits, i);
    }
    __syncwarp();  // the residual may be part of u, which other lanes have read
    if (residual_out != nullptr && mode != BlockMode::kRaw && q.grid == Grid::kSigma)
        write_residual<Tr>(u, n, grid, escape, residual_out);
    return result;
}

// Each warp encodes one block into its slot. The four of a thread block share the code, which they copy to shared
// memory in the form that the lanes want.
template <class Tr, bool kAdjusted>
__global__ void __launch_bounds__(kThreads, 1) encode_blocks(EncodeTables e) {
    DYNAMIC_SHARED(std::uint32_t, entries);
    const int s = find_task(e.segments, e.segment_count, blockIdx.x, &SegmentTask::first_tile);
    const SegmentTask segment = e.segments[s];
    const Quantizer q = e.quantizers[segment.tensor];
    const bool pairs = q.coding == Coding::kPair;
    const Code code = find_code(e, q, s);
    const bool has_code = code.entries != nullptr;
    for (int i = static_cast<int>(threadIdx.x); has_code && i < code.symbols; i += kThreads) {
        const int first = pairs ? i % (1 << kPairBits) : i, second = pairs ? i >> kPairBits : i;
        entries[i] = turned_entry(code.entries[i], first == escape_of(q) || second == escape_of(q));
    }
    __syncthreads();

    const std::int64_t block =
        (static_cast<std::int64_t>(blockIdx.x) - segment.first_tile) * kEncodeWarps + warp_number();
    if (block >= segment.blocks) return;
    BlockResult result{0, 0, 0};
    const std::int64_t per_block = values_per_block(q.coding, e.steps), begin = block * per_block;
    if (is_block_coded(q.coding) && begin < segment.count) {
        const bool keeps = segment.residual_out != nullptr && !e.packets[segment.packet].may_drop;
        float* const residual_out = keeps ? segment.residual_out + begin : nullptr;
        const SlotShape shape(e.steps, pairs, static_cast<int>(sizeof(typename Tr::Storage)));
        const Slot slot{e.slots + segment.slots + block * shape.bytes, shape};
        const auto n = static_cast<int>(segment.count - begin < per_block ? segment.count - begin : per_block);
        const Source<Tr, kAdjusted> u(e.tensors[segment.tensor], segment.offset + begin);
        if (q.grid == Grid::kSigma) {
            const auto grid = sigma_quantizer<Tr>(q);
            result = pairs ? encode_block<Tr, true>(u, n, grid, q, entries, has_code, slot, residual_out)
                           : encode_block<Tr, false>(u, n, grid, q, entries, has_code, slot, residual_out);
        } else {
            const RangeQuantizer grid(q.grid, q.num_bits, q.p0, q.p1);
            result = encode_block<Tr, false>(u, n, grid, q, entries, has_code, slot, residual_out);
        }
    }
    if (lane_number() == 0) e.blocks[segment.first_block + block] = result;
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_encode_blocks(const EncodeTables& e, bool adjusted, std::int64_t tiles, int max_symbols, void* stream) {
    with_source(e.dtype, adjusted, [&](auto traits, auto is_adjusted) {
        launch_kernel(encode_blocks<decltype(traits), decltype(is_adjusted)::value>, static_cast<unsigned>(tiles),
                      kThreads, sizeof(std::uint32_t) * static_cast<std::size_t>(max_symbols), stream, e);
    });
}
#endif

}  // namespace qcomm::cuda
