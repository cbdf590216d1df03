// A packet's list of code lengths, read by a thread block (specification: unpack_lengths() of qcomm/huffman.h). The
// meaning of a nibble depends on those before it: a length, the size of a run of unused symbols, or one of the two
// nibbles of a long run. Each thread has a word of eight nibbles; it finds for every meaning that its first nibble may
// have which one the first nibble behind it has, and a scan of these maps tells all threads where they stand.
#pragma once

#include "block_sum.cuh"
#include "qcomm/format.h"

namespace qcomm::cuda {

//   kLength --1..15--> kLength       a symbol's length
//   kLength ---0-----> kRun          a run of unused symbols follows
//   kRun    ---0..14-> kLength       ... of that number plus 1
//   kRun    ---15----> kRunLow --any--> kRunHigh --any--> kLength       ... of 16 plus two nibbles
enum NibbleState : unsigned { kLength, kRun, kRunLow, kRunHigh };

// Returns the state behind a nibble.
__device__ __forceinline__ unsigned next_state(unsigned state, unsigned nibble) {
    if (state == kLength) return nibble > 0 ? kLength : kRun;
    if (state == kRun) return nibble < 15 ? kLength : kRunLow;
    return state == kRunLow ? kRunHigh : kLength;
}

// A map from each of the four states, in two bits, to the state behind a word: a byte. Maps compose in any grouping, so
// a scan can combine them.
__device__ inline unsigned state_map(std::uint32_t word) {
    unsigned map = 0;
    for (unsigned from = kLength; from <= kRunHigh; ++from) {
        unsigned state = from;
        for (int n = 0; n < 8; ++n) state = next_state(state, word >> (4 * n) & 15u);
        map |= state << (2 * from);
    }
    return map;
}
__device__ __forceinline__ unsigned apply(unsigned map, unsigned state) { return map >> (2 * state) & 3u; }
__device__ inline unsigned compose(unsigned first, unsigned then) {
    unsigned map = 0;
    for (unsigned from = kLength; from <= kRunHigh; ++from) map |= apply(then, apply(first, from)) << (2 * from);
    return map;
}

// A warp's map, symbols and Kraft sum; the word behind the list, once a thread has found it.
struct CodeListShared {
    unsigned maps[kMaxWarps];
    int symbols[kMaxWarps], sums[kMaxWarps];
    std::int64_t end;
};

// Returns the state at each thread's word, `state` being that of the first thread; *state becomes that behind the last.
__device__ inline unsigned scan_states(std::uint32_t word, unsigned* state, unsigned* scratch) {
    unsigned map = state_map(word);
    for (int d = 1; d < kWarpLanes; d *= 2) {
        const unsigned before = __shfl_up_sync(kAllLanes, map, static_cast<unsigned>(d));
        if (lane_number() >= d) map = compose(before, map);
    }
    if (lane_number() == kWarpLanes - 1) scratch[warp_number()] = map;
    const unsigned before = __shfl_up_sync(kAllLanes, map, 1u);
    __syncthreads();
    unsigned own = *state;
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarpLanes; ++w) {
        if (w == warp_number()) own = *state;
        *state = apply(scratch[w], *state);
    }
    return lane_number() == 0 ? own : apply(before, own);
}

// Reads the eight nibbles of a word.
class WordReader {
public:
    // `previous` is the word before.
    __device__ WordReader(std::uint32_t word, std::uint32_t previous, unsigned state, int symbol, int sum)
        : word_(word), low_(previous >> 28), state_(state), symbol_(symbol), sum_(sum) {}

    static constexpr int kWhole =
        1 << kMaxCodeLength;  // Kraft sum of a complete code, in units of the longest codeword

    // Calls put(symbol, length) until the code is complete. False where the list is malformed before that.
    template <class Put>
    __device__ bool read(int size, int limit, const Put& put) {
        for (int n = 0; n < 8 && sum_ < kWhole; ++n) {
            const unsigned nibble = word_ >> (4 * n) & 15u;
            int run = 0;
            if (state_ == kLength) {
                if (symbol_ >= size || static_cast<int>(nibble) > limit) return false;
                if (nibble > 0) {
                    put(symbol_++, static_cast<std::uint8_t>(nibble));
                    sum_ += kWhole >> nibble;
                }
            } else if (state_ == kRun) {
                run = nibble < 15 ? static_cast<int>(nibble) + 1 : 0;
            } else if (state_ == kRunLow) {
                low_ = nibble;
            } else {
                run = 16 + static_cast<int>(low_ + 16 * nibble);
            }
            if (run > 0 && run > size - symbol_) return false;
            symbol_ += run;
            state_ = next_state(state_, nibble);
        }
        return sum_ <= kWhole;
    }
    __device__ bool complete() const { return sum_ == kWhole; }

    // Of all eight nibbles, whatever they mean: symbols and Kraft sum.
    __device__ void skip(int* symbols, int* sum) const {
        unsigned state = state_, low = low_;
        for (int n = 0; n < 8; ++n) {
            const unsigned nibble = word_ >> (4 * n) & 15u;
            if (state == kLength && nibble > 0) {
                ++*symbols;
                *sum += kWhole >> nibble;
            }
            if (state == kRun && nibble < 15) *symbols += static_cast<int>(nibble) + 1;
            if (state == kRunHigh) *symbols += 16 + static_cast<int>(low + 16 * nibble);
            low = nibble;
            state = next_state(state, nibble);
        }
    }

private:
    std::uint32_t word_, low_;
    unsigned state_;
    int symbol_, sum_;
};

// Reads a list at words[0, available) into lengths[0, size). Returns how many words it takes, or -1 where it is
// malformed. By all threads; ends with a barrier. A malformed list is noticed after 8 * size nibbles at the latest.
__device__ inline std::int64_t read_code_list(const std::uint32_t* words, std::int64_t available, int size, int limit,
                                              std::uint8_t* lengths, CodeListShared* shared) {
    const auto threads = static_cast<int>(blockDim.x);
    for (int s = static_cast<int>(threadIdx.x); s < size; s += threads) lengths[s] = 0;
    if (threadIdx.x == 0) shared->end = 0;
    unsigned state = kLength;
    int symbols = 0, sum = 0;
    for (std::int64_t at = 0;; at += threads) {
        __syncthreads();  // lengths are cleared; all have left the turn before
        const std::int64_t i = at + threadIdx.x;
        const std::uint32_t word = i < available ? words[i] : 0u,
                            previous = i > 0 && i <= available ? words[i - 1] : 0u;
        const unsigned own_state = scan_states(word, &state, shared->maps);
        // First every thread counts the symbols in its word, as if the list went on; sums of these tell where each
        // thread's first symbol is. Then the threads in front of the list's end read theirs in earnest.
        int own_symbols = 0, own_sum = 0, all_symbols = 0, all_sum = 0;
        WordReader(word, previous, own_state, 0, 0).skip(&own_symbols, &own_sum);
        own_symbols = symbols + block_exclusive_sum(own_symbols, shared->symbols, &all_symbols);
        own_sum = sum + block_exclusive_sum(own_sum, shared->sums, &all_sum);
        bool good = true;
        if (own_sum < WordReader::kWhole) {
            WordReader reader(word, previous, own_state, own_symbols, own_sum);
            good = i < available &&
                   reader.read(size, limit, [&](int symbol, std::uint8_t length) { lengths[symbol] = length; });
            if (good && reader.complete()) shared->end = i + 1;
        }
        if (__syncthreads_or(!good)) return -1;
        if (shared->end > 0) break;
        symbols += all_symbols;
        sum += all_sum;
    }
    const std::int64_t end = shared->end;
    __syncthreads();
    return end;
}

}  // namespace qcomm::cuda
