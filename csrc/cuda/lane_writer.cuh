// A warp's lanes while they take codewords: the encoder's half of csrc/include/qcomm/block.h (specification:
// encode_lanes() of qcomm/reference/lanes.py). Codewords are pushed from the last step to the first, so words are
// written downwards, from the end of their area.
//
// A codeword is an entry: its length in the 5 lowest bits, its bits in the upper half. So neither has to be cut out: a
// shift looks at its 5 lowest bits only, and so does the sum that says whether a lane is full. An entry of 0 pushes
// nothing. Codewords of 16 bits are possible, and no word is missed for them: a lane that holds 31 bits writes one.
#pragma once

#include "coder.cuh"
#include "warp.cuh"

namespace qcomm::cuda {

constexpr int kCodewordAt = 16;

// Before the first word lanes may hold fewer than 16 bits, and a step may be short: push_first() takes those steps.
// push() takes all others, between enter() and leave(), and asks for none of this.
class LaneWriter {
public:
    // Words are written in front of `words_end`.
    __device__ explicit LaneWriter(std::uint16_t* words_end) : words_end_(words_end) {
        QCOMM_KEEP_POINTER(words_end_);
        QCOMM_ASSUME_GLOBAL(words_end_);
        QCOMM_KEEP(from_here_);
    }

    // Pushes a codeword in every lane. Bits that have left a lane stay above the others until window(): a word is the
    // 16 bits below `count_`, whatever is above.
    __device__ __forceinline__ void push_first(std::uint32_t entry) {
        const std::uint32_t length = entry & 31u;
        unsigned full = __ballot_sync(kAllLanes, count_ + length >= kEmitBits);
        if (full != 0 && !started_) {
            started_ = true;
            count_ = count_ < kWordBits ? kWordBits : count_;
            // Lanes that have been raised are full, too, if their codeword has 16 bits.
            full = __ballot_sync(kAllLanes, count_ + length >= kEmitBits);
        }
        if (count_ + length >= kEmitBits) {
            count_ -= kWordBits;
            put_word(full, count_);
        }
        next_word_ -= __popc(full);
        append(entry);
        count_ += length;
    }

    // Whether a word has been written, so that all lanes hold 16 bits or more.
    __device__ __forceinline__ bool started() const { return started_; }
    // Between these `count_` is the number of bits beyond 16, so that one of its bits says whether a lane is full.
    __device__ __forceinline__ void enter() { count_ -= kWordBits; }
    __device__ __forceinline__ void leave() { count_ += kWordBits; }

    // The same in lanes that have all started and have an entry each. They hold 15 bits beyond 16 at most, to which a
    // length adds 16 at most.
    __device__ __forceinline__ void push(std::uint32_t entry) {
        const std::uint32_t sum = count_ + entry;
        const unsigned full = ballot_bits(sum, kWordBits);
        if ((sum & kWordBits) != 0) put_word(full, count_);
        next_word_ -= __popc(full);
        append(entry);
        count_ = sum & (kWordBits - 1);
    }

    // The start window of this lane, after the last push.
    __device__ __forceinline__ std::uint32_t window() const { return (bits_ & ((1u << count_) - 1u)) | 1u << count_; }
    // How many words the lanes have written together.
    __device__ __forceinline__ int words() const { return -next_word_; }

private:
    // Writes a full lane's word. Lanes above write theirs behind it, so a step's words are in the order of the lanes.
    __device__ __forceinline__ void put_word(unsigned full, std::uint32_t shift) {
        words_end_[next_word_ - __popc(full & from_here_)] = static_cast<std::uint16_t>(bits_ >> shift);
    }
    __device__ __forceinline__ void append(std::uint32_t entry) {
        bits_ = (bits_ << (entry & 31u)) + (entry >> kCodewordAt);
    }

    std::uint16_t* words_end_;
    std::uint32_t bits_ = 0;
    std::uint32_t count_ = 0;                           // bits in the window; in push() those beyond 16
    unsigned from_here_ = ~lanes_below(lane_number());  // this lane and those above
    int next_word_ = 0;                                 // before words_end_: words are written from the end
    bool started_ = false;                              // a word has been written
};

}  // namespace qcomm::cuda
