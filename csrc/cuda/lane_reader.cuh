// A warp's lanes while they give codewords: the decoder's half of csrc/include/qcomm/block.h (specification:
// decode_tokens() of qcomm/reference/lanes.py).
//
// `entries(bits)` looks the next codeword up in the lowest bits of a lane and returns an entry, whose 5 lowest bits are
// the codeword's length: 16 at most. Whatever the bits are, nothing is read behind the words; whether they made sense
// is known at the end.
#pragma once

#include "coder.cuh"
#include "packet_view.cuh"
#include "warp.cuh"

namespace qcomm::cuda {

class LaneReader {
public:
    // Takes the start windows: each lane's bits below a sentinel, its highest 1. A window of 0 has none: false.
    // `words` are `count` u16 at an even address.
    __device__ bool open(const std::uint8_t* windows, const std::uint8_t* words, int count) {
        words_ = words;
        QCOMM_ASSUME_GLOBAL(words_);
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

    // Whether every lane has 16 bits before a lookup. Then, as long as can_take() says that words are left for all
    // lanes that ask, no lane can use more bits than it has: next() looks after neither.
    __device__ __forceinline__ bool all_filled() const {
        return __all_sync(kAllLanes, count_ >= static_cast<int>(kWordBits));
    }
    __device__ __forceinline__ bool can_take(int steps) const { return taken_ + steps * kWarpLanes <= left_; }
    // After the last of several next().
    __device__ __forceinline__ void leave() { count_ &= 31; }

    // The bits that the next lookup sees.
    __device__ __forceinline__ std::uint32_t bits() const { return bits_; }

    // Looks a codeword up in every lane; each then takes a word if it has less than 16 bits left. Before and after,
    // lanes have 16 to 31, in the 5 lowest bits of `count_`; and there are 32 words to take. The load is every lane's:
    // a condition costs more.
    //
    // An entry is subtracted whole: its length is in the lowest bits, and the symbol above does not reach them. Of a
    // count of 16 to 31 less a length of at most 16, bit 4 says whether 16 bits are left. If so it stays; if not, the
    // word that is taken adds 16. Either way bit 4 is then set, which is one instruction, and the bits above, where the
    // symbol has been, are never looked at.
    template <class Entries>
    __device__ __forceinline__ std::uint32_t next(const Entries& entries) {
        const std::uint32_t entry = entries(bits_);
        bits_ >>= entry & 31u;
        const std::uint32_t left = static_cast<std::uint32_t>(count_) - entry;
        const unsigned content = ballot_bits(left, kWordBits);  // lanes that take no word
        const auto* const words = reinterpret_cast<const std::uint16_t*>(words_);
        QCOMM_ASSUME_GLOBAL(words);
        std::uint32_t word = words[taken_ + __popc(~content & below_)];
        QCOMM_KEEP(word);
        if ((left & kWordBits) == 0) bits_ |= word << (left & 31u);
        count_ = static_cast<int>(left | kWordBits);
        taken_ += kWarpLanes - __popc(content);
        return entry;
    }

    // The same in every live lane, when there may be no word, and with a note whether they have used more bits than
    // they had.
    template <class Entries>
    __device__ __forceinline__ std::uint32_t next_guarded(const Entries& entries, bool live) {
        const std::uint32_t entry = live ? entries(bits_) : 0u, length = entry & 31u;
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
    const std::uint8_t* words_;
    std::uint32_t bits_;
    int left_, count_, taken_;  // words, bits in the lane, words that all lanes have taken
    unsigned below_;            // the lanes below this one
    int used_;                  // negative once a lane has used more bits than it had
};

}  // namespace qcomm::cuda
