// Values of zero runs to tokens, by a warp: the first pass of zero_runs_encode.cu, whose header says where they go.
#pragma once

#include "source.cuh"
#include "warp.cuh"
#include "zero_runs.cuh"

namespace qcomm::cuda {

constexpr int kValueRows = 8;  // rows of values that are loaded together, while those before are quantized
constexpr int kGroup = kValueRows * kWarpLanes;

// A warp's part of the values, and where its tokens are in the slot.
struct Part {
    int at, end, skips;  // the first token that has a level, behind the last one, and skips among these
    int first, next;     // positions: of the first level, and behind the last one
};

// Finds the tokens of a part, front to back. All lanes agree in how many there are and where the last level is. Zeros
// in front of the first level may go on in the part before, so its token gets its run later.
template <class Tr>
class Tokenizer {
public:
    using T = typename Tr::Arithmetic;
    using Values = Source<Tr, true>;

    // The part begins at position `begin`, and so do its tokens, of which there are no more than values.
    __device__ Tokenizer(std::uint16_t* tokens, int begin)
        : tokens_(tokens), part_{begin, begin, 0, kNoLevel, kNoLevel} {
        QCOMM_KEEP(below_);
        QCOMM_KEEP(here_);
    }

    // Adds the first n values of `u`, of which the first is at position `at`, and writes their residual if wanted.
    __device__ void add(const Values& u, int n, int at, const RunQuantizer<T>& grid, float* residual_out) {
        int begin = 0;
        // The next group is loaded before anything is stored: a load behind a store that may be to the same place waits
        // for it. Sum and product are left to the turn that needs them, by which the loads are back. The last turn
        // loads its own again, in vain.
        const auto turn = [&](const Rows& raw, Rows& next) {
            if (begin + kGroup > n || is_far(at + begin)) return false;
            next = load<true>(u, begin + 2 * kGroup <= n ? begin + kGroup : begin, n);
            put_group<true, false>(u, raw, begin, n, at, grid, residual_out);
            begin += kGroup;
            return true;
        };
        while (begin + kGroup <= n) {
            Rows one = load<true>(u, begin, n), other;
            while (turn(one, other) && turn(other, one)) {
            }
            if (begin + kGroup > n) break;
            put_group<true, true>(u, load<true>(u, begin, n), begin, n, at, grid, residual_out);
            begin += kGroup;
        }
        if (begin < n) put_group<false, true>(u, load<false>(u, begin, n), begin, n, at, grid, residual_out);
    }

    __device__ Part part() const { return part_; }
    __device__ bool finite() const { return finite_; }

private:
    // Far enough in front of all positions that the first level is met in the rare branch.
    static constexpr int kNoLevel = -2 * kMaxRunBlockValues;

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

    // Whether the last level is so far from the group at `at` that skips may be needed, as in front of the first one.
    __device__ __forceinline__ bool is_far(int at) const { return at + kGroup - part_.next > kSkipZeros; }

    template <bool kWhole, bool kFar>
    __device__ __forceinline__ void put_group(const Values& u, const Rows& raw, int begin, int n, int at,
                                              const RunQuantizer<T>& grid, float* residual_out) {
        float lost[kValueRows];
        std::uint32_t levels[kValueRows];  // in the 16 lowest bits
        unsigned rows[kValueRows];         // the lanes that have one
#pragma unroll
        for (int r = 0; r < kValueRows; ++r) {
            const T x = u.of(raw.values[r]), rounded = grid.rounded(x), level = grid.level(rounded);
            lost[r] = grid.lost_in(x, level);
            levels[r] = lowest_bits(rounded);
            rows[r] = __ballot_sync(kAllLanes, level != T(0));
            if constexpr (kResidualMayOverflow<Tr>) finite_ = finite_ && __builtin_isfinite(lost[r]);
        }
        at += begin;
        if constexpr (kFar) meet_first(rows, at);
#pragma unroll
        for (int r = 0; r < kValueRows; ++r) put_row(levels[r], rows[r], at + r * kWarpLanes);
        if (residual_out == nullptr) return;
#pragma unroll
        for (int r = 0; r < kValueRows; ++r) {
            const int i = begin + r * kWarpLanes + lane_;
            if (kWhole || i < n) residual_out[i] = lost[r];
        }
    }

    // Of float32 the sum has 2^22 at bit 22 and of float64 nothing below bit 32: neither reaches the token's bits.
    __device__ __forceinline__ static std::uint32_t lowest_bits(T rounded) {
        if constexpr (sizeof(T) == sizeof(float)) {
            return bit_cast<std::uint32_t>(rounded);
        } else {
            return static_cast<std::uint32_t>(bit_cast<std::uint64_t>(rounded));
        }
    }

    // Takes whole 512 from the zeros in front of a group's first level: all others of the group have fewer. Of the
    // part's first level it only notes the place, and leaves room for the skips that its zeros in the part will need.
    __device__ void meet_first(const unsigned (&rows)[kValueRows], int at) {
        int first = -1;
#pragma unroll
        for (int r = kValueRows - 1; r >= 0; --r)
            if (rows[r] != 0) first = at + r * kWarpLanes + __ffs(static_cast<int>(rows[r])) - 1;
        if (first < 0) return;
        if (part_.first < 0) {
            part_.at += (first - part_.at) / kSkipZeros;
            part_.end = part_.at;
            part_.first = part_.next = first;
            return;
        }
        const int skips = (first - part_.next) / kSkipZeros;
#pragma unroll 1
        for (int i = lane_; i < skips; i += kWarpLanes) tokens_[part_.end + i] = static_cast<std::uint16_t>(kSkip);
        part_.end += skips;
        part_.skips += skips;
        part_.next += skips * kSkipZeros;
    }

    // Adds the tokens of a row of levels, a lane each, of which the first is at position `at`. Without a branch, so
    // that rows need not wait for each other.
    __device__ __forceinline__ void put_row(std::uint32_t level, unsigned row, int at) {
        const unsigned below = row & below_;
        // Zeros since the last level of the row, or of the rows before.
        const int run = lane_ - kWarpLanes + __clz(static_cast<int>(below)) + (below == 0 ? at - part_.next : 0);
        std::uint32_t token = (static_cast<std::uint32_t>(run) << kTokenRunAt) + level + std::uint32_t{kMaxLevel};
        std::uint16_t* place = tokens_ + part_.end + __popc(below);
        QCOMM_KEEP(token);
        QCOMM_KEEP_POINTER(place);
        QCOMM_ASSUME_GLOBAL(place);
        if ((row & here_) != 0) *place = static_cast<std::uint16_t>(token);
        part_.end += __popc(row);
        part_.next = row != 0 ? at + kWarpLanes - __clz(static_cast<int>(row)) : part_.next;
    }

    std::uint16_t* tokens_;
    Part part_;
    bool finite_ = true;  // this lane's residuals
    int lane_ = lane_number();
    unsigned below_ = lanes_below(lane_number()), here_ = 1u << lane_number();
};

}  // namespace qcomm::cuda
