// A warp's lanes while they give codewords: the decoder's half of csrc/include/qcomm/block.h (specification:
// decode_tokens() of qcomm/reference/lanes.py).
//
// `entries` looks the next codeword up in the lowest bits of a lane and returns an entry, whose 5 lowest bits are the
// codeword's length: 16 at most. Whatever the bits are, nothing is read behind the words; whether they made sense is
// known at the end.
//
// Two ways lead through a block. next() is for steps in which every lane has a codeword, between enter() and leave():
// its words are in shared memory. next_guarded() is for all other steps and reads memory itself.
#pragma once

#include "coder.cuh"
#include "packet_view.cuh"
#include "warp.cuh"

namespace qcomm::cuda {

// The next words of a warp's block, in shared memory, where a step finds them sooner than in a cache. While they are
// used, those behind them are on their way in registers.
struct LaneBuffer {
    static constexpr int kRows = 7, kStrideRows = 5;  // rows of 32 times two words; of these, given up at once
    static constexpr int kWords = 2 * kRows * kWarpLanes, kStride = 2 * kStrideRows * kWarpLanes;
    static constexpr int kEnough = 4 * kWarpLanes;  // words for four steps
    static_assert(kStride + kEnough <= kWords, "what is left moves to the front, and there is room for more");

    std::uint32_t pairs[kRows][kWarpLanes];
};

class LaneReader {
public:
    // Takes the start windows: each lane's bits below a sentinel, its highest 1. A window of 0 has none: false.
    // `words` are `count` u16 at an even address, in front of which and behind which u16 fill up words of 32 bits.
    __device__ bool open(const std::uint8_t* windows, const std::uint8_t* words, int count, LaneBuffer* buffer) {
        words_ = words;
        QCOMM_ASSUME_GLOBAL(words_);
        buffer_ = buffer;
        left_ = count;
        bits_ = load_u32(windows + 4 * lane_number());
        count_ = 31 - __clz(static_cast<int>(bits_));
        const bool started = bits_ != 0;
        if (started) bits_ ^= 1u << count_;
        used_ = count_;
        taken_ = 0;
        below_ = lanes_below(lane_number());
        QCOMM_KEEP(below_);
        return __all_sync(kAllLanes, started);
    }

    // Whether so many next() may follow an enter(): there are words for them, and every lane has 16 bits. Then no lane
    // can use more bits than it has, and next() need not look after it.
    __device__ __forceinline__ bool may_enter(int steps) const {
        return taken_ + steps * kWarpLanes <= left_ && __all_sync(kAllLanes, count_ >= static_cast<int>(kWordBits));
    }
    template <class Entries>
    __device__ __forceinline__ void enter(const Entries& entries) {
        // The word in front fills up the first pair, if that is what it takes.
        at_ = static_cast<int>((reinterpret_cast<std::uintptr_t>(words_) / 2 + static_cast<unsigned>(taken_)) % 2);
        base_ = taken_ - at_;
        load(base_);
        store();
        place_ = entries.place(bits_, 0u, 0u);
    }
    // After the last next(), before next_guarded().
    __device__ __forceinline__ void leave() {
        count_ &= 31;
        taken_ = base_ + at_;
    }

    // Whether there are words in shared memory for so many steps: four at most.
    __device__ __forceinline__ bool holds(int steps) const { return at_ + steps * kWarpLanes <= end_; }
    // Fetches more, where there are too few for four steps. False where nothing has changed.
    __device__ __forceinline__ bool fetch() {
        if (at_ + LaneBuffer::kEnough <= end_ || base_ + LaneBuffer::kWords >= left_) return false;
        at_ -= LaneBuffer::kStride;
        base_ += LaneBuffer::kStride;
        store();
        return true;
    }

    // The bits that the next lookup sees.
    __device__ __forceinline__ std::uint32_t bits() const { return bits_; }

    // Looks a codeword up in every lane; each then takes a word if it has less than 16 bits left. Before and after,
    // lanes have 16 to 31, in the 5 lowest bits of `count_`; and holds() a step's words. The load is every lane's: a
    // condition costs more.
    //
    // An entry is subtracted whole: its length is in the lowest bits, and the symbol above does not reach them. Of a
    // count of 16 to 31 less a length of at most 16, bit 4 says whether 16 bits are left. If so it stays; if not, the
    // word that is taken adds 16. Either way bit 4 is then set, which is one instruction, and the bits above, where the
    // symbol has been, are never looked at. Where it was set, the word is shifted out.
    //
    // The place of the next entry is put together from both halves at once: the chain from lookup to lookup is shorter
    // than by way of the bits.
    template <class Entries>
    __device__ __forceinline__ std::uint32_t next(const Entries& entries) {
        const std::uint32_t entry = entries.at(place_);
        const std::uint32_t rest = bits_ >> (entry & 31u), left = static_cast<std::uint32_t>(count_) - entry;
        const unsigned content = ballot_bits(left, kWordBits);  // lanes that take no word
        const auto* const words = reinterpret_cast<const std::uint16_t*>(buffer_->pairs);
        QCOMM_ASSUME_SHARED(words);
        std::uint32_t word = words[at_ + __popc(~content & below_)];
        QCOMM_KEEP(word);
        const std::uint32_t shift = (left & 31u) | (left & kWordBits) << 1;
        bits_ = rest | shift_left(word, shift);
        place_ = entries.place(rest, word, shift);
        count_ = static_cast<int>(left | kWordBits);
        at_ += kWarpLanes - __popc(content);
        return entry;
    }

    // The same in every live lane, when there may be no word, and with a note whether they have used more bits than
    // they had.
    template <class Entries>
    __device__ __forceinline__ std::uint32_t next_guarded(const Entries& entries, bool live) {
        const std::uint32_t entry = live ? entries.at(entries.place(bits_, 0u, 0u)) : 0u, length = entry & 31u;
        bits_ >>= length;
        count_ -= static_cast<int>(length);
        used_ |= count_;
        bool takes = live && count_ < static_cast<int>(kWordBits);
        const unsigned asking = __ballot_sync(kAllLanes, takes);
        const int word = taken_ + __popc(asking & below_);
        takes = takes && word < left_;
        const std::uint32_t bits = takes ? reinterpret_cast<const std::uint16_t*>(words_)[word] : 0u;
        bits_ |= bits << (count_ & 31);  // only damaged input has a negative count; the shift must stay defined
        count_ += takes ? static_cast<int>(kWordBits) : 0;
        taken_ += __popc(asking);
        return entry;
    }

    // Whether this lane's bits have ended with its last codeword.
    __device__ __forceinline__ bool whole() const { return bits_ == 0 && used_ >= 0; }

private:
    // Puts the pairs that have been read where next() finds them, and reads those behind: all at once.
    __device__ __forceinline__ void store() {
        __syncwarp();  // all lanes have read what was there
#pragma unroll
        for (int r = 0; r < LaneBuffer::kRows; ++r) buffer_->pairs[r][lane_number()] = ahead_[r];
        __syncwarp();
        end_ = left_ - base_ < LaneBuffer::kWords ? left_ - base_ : LaneBuffer::kWords;
        load(base_ + LaneBuffer::kStride);
    }
    // Reads the pairs from word `first` on. Behind the last word there are zeros.
    __device__ __forceinline__ void load(int first) {
        const auto* const pairs = reinterpret_cast<const std::uint32_t*>(words_ + 2 * static_cast<std::int64_t>(first));
        QCOMM_ASSUME_GLOBAL(pairs);
#pragma unroll
        for (int r = 0; r < LaneBuffer::kRows; ++r) {
            const int i = r * kWarpLanes + lane_number();
            ahead_[r] = first + 2 * i < left_ ? pairs[i] : 0u;
        }
    }

    const std::uint8_t* words_;
    LaneBuffer* buffer_;
    std::uint32_t bits_, place_;  // place_: of the next entry, between enter() and leave()
    int left_, count_, taken_;    // words, bits in the lane, words that all lanes have taken
    int at_, end_, base_;         // in the buffer: the next word, behind the last; word that the first one is
    std::uint32_t ahead_[LaneBuffer::kRows];  // pairs that are stored next
    unsigned below_;                          // the lanes below this one
    int used_;                                // negative once a lane has used more bits than it had
};

}  // namespace qcomm::cuda
