// One run block in one warp: its tokens looked up 32 a step, their positions by a scan, their values put where they are
// (specification: decode_run_block() of qcomm/reference/zero_runs.py).
//
// Codes are read through the first-level cache: a block has too few tokens to be worth a copy in shared memory, and
// neighbours use the same table.
#pragma once

#include <limits>

#include "block_reader.cuh"
#include "lane_reader.cuh"
#include "packet_view.cuh"
#include "warp.cuh"
#include "zero_runs.cuh"

namespace qcomm::cuda {

// Entries of RunCode, in device memory.
struct RunEntries {
    const std::uint32_t* entries;
    __device__ __forceinline__ std::uint32_t operator()(std::uint32_t bits) const {
        const std::uint32_t* const table = entries;
        QCOMM_ASSUME_GLOBAL(table);
        return table[bits & ((1u << kMaxRunCodeLength) - 1u)];
    }
};

// Reads a block front to back in several parts, which may leave out values in front; all 32 lanes call together.
// Nothing of the block is trusted: open() checks its sizes, and read() stays inside whatever the bits are; whether they
// made sense is known at close().
template <class Tr>
class RunReader {
public:
    using T = typename Tr::Arithmetic;

    // Opens a block of n values; false where it is malformed.
    __device__ bool open(const std::uint8_t* block, int bytes, int n, const StaticTables* codes) {
        const RunInfo info = RunInfo::unpack(load_u32(block));
        n_ = n;
        mode_ = info.mode;
        left_ = info.tokens;
        next_ = 0;
        good_ = true;
#pragma unroll
        for (int& end : ends_) end = 0;
        if (!is_readable(info, n)) return false;
        const int body_at = mode_ == RunMode::kCoded ? 4 + 4 * kLanes : 4;
        if (body_at > bytes) return false;
        body_ = block + body_at;
        halves_ = (bytes - body_at) / 2;
        if (mode_ == RunMode::kFixed) return bytes - body_at >= packed_bytes(n, kRunsBits);
        if (mode_ != RunMode::kCoded) return true;
        entries_ = RunEntries{codes->run_decode[info.table]};
        return lanes_.open(block + 4, body_, halves_);
    }

    // Puts those of values [begin, end) that are not 0, by put(position, value). Parts ascend; values in front of
    // `begin` that no part has had are passed over.
    template <class Put>
    __device__ void read(int begin, int end, const RunQuantizer<T>& grid, const Put& put) {
        if (mode_ == RunMode::kFixed) return read_fixed(begin, end, grid, put);
        if (mode_ == RunMode::kNotFinite) {
            const auto nan = Tr::narrow(std::numeric_limits<T>::quiet_NaN());
            for (int i = begin + lane_number(); i < end; i += kWarpLanes) put(i, nan);
        }
        if (mode_ != RunMode::kCoded) return;
        for (;;) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int position = ends_[r] - 1;
                if (position >= begin && position < end && (tokens_[r] & kHasLevel) != 0)
                    put(position, Tr::narrow(grid.decode(level_at(static_cast<int>(tokens_[r] >> 22 & 7u)))));
            }
            // A token that ends behind this part is put by a later one.
            if (next_ >= end || left_ == 0) return;
            take_tokens();
        }
    }

    // After all values have been read: false where tokens are left, or end behind the block, or the bits do not end
    // with them.
    __device__ bool close() const {
        const bool whole = mode_ != RunMode::kCoded || (left_ == 0 && next_ <= n_ && lanes_.whole());
        return __all_sync(kAllLanes, whole && good_);
    }

private:
    static constexpr int kRows = 4;  // steps whose tokens are looked up together

    template <class Put>
    __device__ void read_fixed(int begin, int end, const RunQuantizer<T>& grid, const Put& put) {
        for (int i = begin + lane_number(); i < end; i += kWarpLanes) {
            const int level = static_cast<int>(load_symbol(body_, halves_, i, kRunsBits)) - kMaxLevel;
            good_ = good_ && level <= kMaxLevel;
            if (level != 0 && level <= kMaxLevel) put(i, Tr::narrow(grid.decode(level)));
        }
    }

    // Looks up the next four steps, as far as there are tokens, and finds where each token ends.
    __device__ __forceinline__ void take_tokens() {
        std::uint32_t bits[kRows];
        // The last token is left to the careful way.
        if (left_ > kRows * kWarpLanes && lanes_.can_take(kRows) && lanes_.all_filled()) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                bits[r] = lanes_.bits();
                tokens_[r] = lanes_.next(entries_);
            }
            lanes_.leave();
            left_ -= kRows * kWarpLanes;
        } else {
            const int lane = lane_number();
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                bits[r] = lanes_.bits();
                tokens_[r] = lanes_.next_guarded(entries_, lane < left_);
                good_ = good_ && (lane != left_ - 1 || (tokens_[r] & kHasLevel) != 0);
                left_ = left_ > kWarpLanes ? left_ - kWarpLanes : 0;
            }
        }
        // The zeros of a step are 2^14 at most, so two steps share one scan.
#pragma unroll
        for (int r = 0; r < kRows; r += 2) {
            const std::uint32_t sums =
                warp_inclusive_sum(values_of(tokens_[r], bits[r]) | values_of(tokens_[r + 1], bits[r + 1]) << 16);
            const std::uint32_t all = __shfl_sync(kAllLanes, sums, kWarpLanes - 1);
            ends_[r] = next_ + static_cast<int>(sums & 0xFFFFu);
            next_ += static_cast<int>(all & 0xFFFFu);
            ends_[r + 1] = next_ + static_cast<int>(sums >> 16);
            next_ += static_cast<int>(all >> 16);
        }
    }

    // Returns how many values a token stands for; 0 where there is none.
    __device__ __forceinline__ static std::uint32_t values_of(std::uint32_t entry, std::uint32_t bits) {
        const std::uint32_t extra = bits >> (entry >> 5 & 15u) & ((1u << (entry >> 9 & 7u)) - 1u);
        return (entry >> 12 & 1023u) + extra + (entry >> 25 & 1u);
    }

    int n_;
    RunMode mode_;
    RunEntries entries_;
    const std::uint8_t* body_;
    int halves_;
    LaneReader lanes_;
    int left_, next_;              // tokens, and the position behind those that have been taken
    std::uint32_t tokens_[kRows];  // the last ones taken
    int ends_[kRows];              // the position behind each; 0: there is none
    bool good_;                    // in this lane, so far
};

// Returns the number of the block that holds a value: the last i for which run_block_begin() is not behind it.
constexpr std::int64_t run_block_of(std::int64_t values, std::int64_t blocks, std::int64_t value) {
    return (blocks * (value / kLanes + 1) - 1) / ceil_div(values, kLanes);
}

// A packet's zero runs, whose places read_packets has checked. Opens the block with number `block`, if its checksum is
// right.
template <class Tr>
__device__ bool open_run_block(const std::uint8_t* packet, const PacketView& view, std::int64_t block, int n,
                               const StaticTables* codes, RunReader<Tr>* reader) {
    const std::uint8_t* const ends = packet + view.ends + 4 * (view.first_run_end + block);
    const std::int64_t begin = block == 0 ? view.runs : 4 * static_cast<std::int64_t>(load_u32(ends - 4));
    const auto bytes = static_cast<int>(4 * static_cast<std::int64_t>(load_u32(ends)) - begin);
    const std::uint8_t* const data = packet + view.payload + begin;
    if (view.checksums != 0) {
        const std::uint32_t sum = warp_checksum(reinterpret_cast<const std::uint32_t*>(data), bytes / 4);
        if (sum != load_u32(packet + view.checksums + 4 * (view.first_run_checksum + block))) return false;
    }
    return reader->open(data, bytes, n, codes);
}

}  // namespace qcomm::cuda
