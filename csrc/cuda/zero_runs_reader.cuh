// One run block in one warp: its tokens looked up 32 a step, their positions by a scan, their values put where they are
// (specification: decode_run_block() of qcomm/reference/zero_runs.py).
//
// A sum reads codes through the first-level cache: its warps have other packets' blocks, and so other tables.
// zero_runs_decode.cu has the block's in shared memory.
#pragma once

#include <limits>

#include "block_reader.cuh"
#include "lane_reader.cuh"
#include "packet_view.cuh"
#include "warp.cuh"
#include "zero_runs.cuh"

namespace qcomm::cuda {

constexpr std::uint32_t kRunCodeMask = (1u << kMaxRunCodeLength) - 1u;

// Entries of RunCode, in device memory.
struct FarRunEntries {
    const std::uint32_t* entries;
    __device__ __forceinline__ std::uint32_t place(std::uint32_t rest, std::uint32_t word, std::uint32_t shift) const {
        return entry_place<2>(rest, word, shift, kRunCodeMask);
    }
    __device__ __forceinline__ std::uint32_t at(std::uint32_t place) const {
        const auto* const entry =
            reinterpret_cast<const std::uint32_t*>(reinterpret_cast<const std::uint8_t*>(entries) + place);
        QCOMM_ASSUME_GLOBAL(entry);
        return *entry;
    }
};

// A block's parts, told apart and checked: but for its tokens, nothing of it is trusted then.
struct RunBlock {
    RunMode mode;
    int table, tokens, halves;  // u16 behind its info and start windows
    const std::uint8_t *windows, *body;

    // False where the block, which has n values, is malformed.
    __device__ bool open(const std::uint8_t* block, int bytes, int n) {
        const RunInfo info = RunInfo::unpack(load_u32(block));
        if (!is_readable(info, n)) return false;
        mode = info.mode;
        table = info.table;
        tokens = info.tokens;
        const int body_at = mode == RunMode::kCoded ? 4 + 4 * kLanes : 4;
        windows = block + 4;
        body = block + body_at;
        halves = (bytes - body_at) / 2;
        return body_at <= bytes && (mode != RunMode::kFixed || bytes - body_at >= packed_bytes(n, kRunsBits));
    }
};

// Puts those of values [begin, end) of a fixed block that are not 0, by put(position, value), a thread every
// `threads`th. False where one is no level.
template <class Tr, class Put>
__device__ bool read_fixed_levels(const RunBlock& block, int begin, int end, int thread, int threads,
                                  const RunQuantizer<typename Tr::Arithmetic>& grid, const Put& put) {
    bool good = true;
    for (int i = begin + thread; i < end; i += threads) {
        const int level = static_cast<int>(load_symbol(block.body, block.halves, i, kRunsBits)) - kMaxLevel;
        good = good && level <= kMaxLevel;
        if (level != 0 && level <= kMaxLevel) put(i, Tr::narrow(grid.decode(level)));
    }
    return good;
}

constexpr int kRunRows = 4;  // steps whose tokens are looked up together

// Returns how many values a token stands for, by its entry and the bits that it was found in; 0 where there is none.
__device__ __forceinline__ std::uint32_t values_of(std::uint32_t entry, std::uint32_t bits) {
    const std::uint32_t extra = bits >> (entry >> 5 & 15u) & ((1u << (entry >> 9 & 7u)) - 1u);
    return (entry >> 12 & 1023u) + extra + (entry >> 25 & 1u);
}

// Looks the tokens of a coded block up, front to back, by a warp.
template <class Entries>
class RunTokens {
public:
    // `buffer` is the warp's own.
    __device__ bool open(const RunBlock& block, const Entries& entries, LaneBuffer* buffer) {
        left_ = block.tokens;
        good_ = true;
        entered_ = false;
        entries_ = entries;
        return lanes_.open(block.windows, block.body, block.halves, buffer);
    }
    __device__ int left() const { return left_; }

    // Whether take_whole() is to be called, after begin(): the last token is left to the careful way. Where it says no,
    // fetch() may change that.
    __device__ __forceinline__ bool has_whole() const {
        return entered_ && left_ > kRunRows * kWarpLanes && lanes_.holds(kRunRows);
    }
    __device__ __forceinline__ void begin() {
        if (entered_ || left_ <= kRunRows * kWarpLanes || !lanes_.may_enter(kRunRows)) return;
        lanes_.enter(entries_);
        entered_ = true;
    }
    __device__ __forceinline__ bool fetch() { return entered_ && lanes_.fetch(); }
    // Takes the next four steps, which have tokens in every lane.
    __device__ __forceinline__ void take_whole(std::uint32_t (&tokens)[kRunRows], std::uint32_t (&bits)[kRunRows]) {
#pragma unroll
        for (int r = 0; r < kRunRows; ++r) {
            bits[r] = lanes_.bits();
            tokens[r] = lanes_.next(entries_);
        }
        left_ -= kRunRows * kWarpLanes;
    }
    // Takes the next four steps, as far as there are tokens. The entry of a lane without a token is 0.
    __device__ __forceinline__ void take(std::uint32_t (&tokens)[kRunRows], std::uint32_t (&bits)[kRunRows]) {
        const int lane = lane_number();
        if (entered_) lanes_.leave();
        entered_ = false;
#pragma unroll
        for (int r = 0; r < kRunRows; ++r) {
            bits[r] = lanes_.bits();
            tokens[r] = lanes_.next_guarded(entries_, lane < left_);
            good_ = good_ && (lane != left_ - 1 || (tokens[r] & kHasLevel) != 0);
            left_ = left_ > kWarpLanes ? left_ - kWarpLanes : 0;
        }
    }
    // After all have been taken: whether the bits of this lane end with them, the last one being a level's.
    __device__ bool whole() const { return good_ && left_ == 0 && lanes_.whole(); }

private:
    Entries entries_;
    LaneReader lanes_;
    int left_;
    bool good_;     // in this lane, so far
    bool entered_;  // the next ones may be taken together
};

// Finds where each token ends, by two rows of values_of() at a time: the values of a row are 2^14 at most, so two share
// one scan. `next` is the position behind those before.
__device__ __forceinline__ void scan_rows(std::uint32_t one, std::uint32_t other, int* next, int* one_end,
                                          int* other_end) {
    const std::uint32_t sums = warp_inclusive_sum(one | other << 16);
    const std::uint32_t all = __shfl_sync(kAllLanes, sums, kWarpLanes - 1);
    *one_end = *next + static_cast<int>(sums & 0xFFFFu);
    *next += static_cast<int>(all & 0xFFFFu);
    *other_end = *next + static_cast<int>(sums >> 16);
    *next += static_cast<int>(all >> 16);
}

// Reads a block front to back in several parts, which may leave out values in front; all 32 lanes call together.
// Nothing of the block is trusted: open() checks its sizes, and read() stays inside whatever the bits are; whether they
// made sense is known at close().
template <class Tr>
class RunReader {
public:
    using T = typename Tr::Arithmetic;

    // Opens a block of n values; false where it is malformed.
    __device__ bool open(const std::uint8_t* block, int bytes, int n, const StaticTables* codes, LaneBuffer* buffer) {
        n_ = n;
        next_ = 0;
        good_ = true;
#pragma unroll
        for (int& end : ends_) end = 0;
        if (!block_.open(block, bytes, n)) return false;
        return block_.mode != RunMode::kCoded ||
               tokens_.open(block_, FarRunEntries{codes->run_decode[block_.table]}, buffer);
    }

    // Puts those of values [begin, end) that are not 0, by put(position, value). Parts ascend; values in front of
    // `begin` that no part has had are passed over.
    template <class Put>
    __device__ void read(int begin, int end, const RunQuantizer<T>& grid, const Put& put) {
        if (block_.mode == RunMode::kFixed)
            good_ &= read_fixed_levels<Tr>(block_, begin, end, lane_number(), kWarpLanes, grid, put);
        if (block_.mode == RunMode::kNotFinite) {
            const auto nan = Tr::narrow(std::numeric_limits<T>::quiet_NaN());
            for (int i = begin + lane_number(); i < end; i += kWarpLanes) put(i, nan);
        }
        if (block_.mode != RunMode::kCoded) return;
        for (;;) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int position = ends_[r] - 1;
                if (position >= begin && position < end && (found_[r] & kHasLevel) != 0)
                    put(position, Tr::narrow(grid.decode(level_at(static_cast<int>(found_[r] >> 22 & 7u)))));
            }
            // A token that ends behind this part is put by a later one.
            if (next_ >= end || tokens_.left() == 0) return;
            take_tokens();
        }
    }

    // After all values have been read: false where tokens are left, or end behind the block, or the bits do not end
    // with them.
    __device__ bool close() const {
        const bool whole = block_.mode != RunMode::kCoded || (next_ <= n_ && tokens_.whole());
        return __all_sync(kAllLanes, whole && good_);
    }

private:
    static constexpr int kRows = kRunRows;

    // Looks up the next four steps, as far as there are tokens, and finds where each token ends.
    __device__ __forceinline__ void take_tokens() {
        std::uint32_t bits[kRows];
        tokens_.begin();
        if (!tokens_.has_whole()) tokens_.fetch();
        tokens_.has_whole() ? tokens_.take_whole(found_, bits) : tokens_.take(found_, bits);
#pragma unroll
        for (int r = 0; r < kRows; r += 2)
            scan_rows(values_of(found_[r], bits[r]), values_of(found_[r + 1], bits[r + 1]), &next_, &ends_[r],
                      &ends_[r + 1]);
    }

    int n_;
    RunBlock block_;
    RunTokens<FarRunEntries> tokens_;
    int next_;                    // the position behind the tokens that have been taken
    std::uint32_t found_[kRows];  // the last ones taken
    int ends_[kRows];             // the position behind each; 0: there is none
    bool good_;                   // fixed levels of this lane, so far
};

// Returns the number of the block that holds a value: the last i for which run_block_begin() is not behind it.
constexpr std::int64_t run_block_of(std::int64_t values, std::int64_t blocks, std::int64_t value) {
    return (blocks * (value / kLanes + 1) - 1) / ceil_div(values, kLanes);
}

// Where a run block lies in its packet; read_packets has checked that.
struct RunBytes {
    const std::uint8_t* data;
    int bytes;
};
__device__ inline RunBytes find_run_block(const std::uint8_t* packet, const PacketView& view, std::int64_t block) {
    const std::uint8_t* const ends = packet + view.ends + 4 * (view.first_run_end + block);
    const std::int64_t begin = block == 0 ? view.runs : 4 * static_cast<std::int64_t>(load_u32(ends - 4));
    return {packet + view.payload + begin, static_cast<int>(4 * static_cast<std::int64_t>(load_u32(ends)) - begin)};
}
// By a warp: whether the block's checksum is right, if it has one.
__device__ inline bool is_run_block_whole(const std::uint8_t* packet, const PacketView& view, std::int64_t block,
                                          const RunBytes& at) {
    if (view.checksums == 0) return true;
    const std::uint32_t sum = warp_checksum(reinterpret_cast<const std::uint32_t*>(at.data), at.bytes / 4);
    return sum == load_u32(packet + view.checksums + 4 * (view.first_run_checksum + block));
}

// Opens the block with number `block` of a packet's zero runs, if its checksum is right.
template <class Tr>
__device__ bool open_run_block(const std::uint8_t* packet, const PacketView& view, std::int64_t block, int n,
                               const StaticTables* codes, LaneBuffer* buffer, RunReader<Tr>* reader) {
    const RunBytes at = find_run_block(packet, view, block);
    return is_run_block_whole(packet, view, block, at) && reader->open(at.data, at.bytes, n, codes, buffer);
}

}  // namespace qcomm::cuda
