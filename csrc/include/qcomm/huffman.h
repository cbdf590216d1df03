// Canonical, length-limited Huffman codes. Lengths alone define a code, so a packet carries nothing else of it; they
// come from package-merge (Larmore and Hirschberg, "A fast algorithm for optimal length-limited Huffman codes", J. ACM
// 37(3), 1990), which is optimal under the limit. Codewords are read LSB first.
#pragma once

#include <cstdint>
#include <vector>

#include "qcomm/format.h"
#include "qcomm/status.h"

namespace qcomm {

// Longest codeword of a table in a packet. 12 bits are a decoder's table of 8 KiB, which the static codes need as well;
// fewer cost more than 5 % on small alphabets with heavy tails.
constexpr int length_limit(Coding coding, int num_bits) {
    if (coding == Coding::kPair || num_bits <= 8) return 12;
    return num_bits + 4 < kMaxCodeLength ? num_bits + 4 : kMaxCodeLength;
}
// Returns the symbols of an alphabet: a pair is one symbol, first | second << 4.
constexpr int alphabet_size(Coding coding, int num_bits) { return coding == Coding::kPair ? 256 : 1 << num_bits; }

// Finds optimal lengths (0 for an unused symbol, 1 for a lone one) of at most `limit` bits. Precondition: used symbols
// <= 2^limit, limit <= 15, size <= 4096, counts sum below 2^48. Ties go by symbol, and symbols before packages, so the
// result is unique.
// The bounds let csrc/cuda sort count and symbol as one number of 64 bits, count << 12 | symbol.
void code_lengths(const std::uint64_t* counts, int size, int limit, std::uint8_t* lengths);

// Tells whether the lengths fill the code space exactly (their Kraft sum is 1): every bit string then decodes, and a
// decoder's table has no holes to be checked for at each symbol. A lone symbol's code is not complete.
bool is_complete(const std::uint8_t* lengths, int size);

// Assigns codewords by (length, symbol), counting up, and reverses their bits: a decoder then finds the next codeword
// in the lowest bits of a lane, which it looks up without a shift. codes[i] is 0 where lengths[i] is 0.
void canonical_codes(const std::uint8_t* lengths, int size, std::uint16_t* codes);

// Returns code lengths as nibbles with zero runs, ending where the code is complete, padded to 4 bytes. Symbols behind
// that point are unused, so the list needs no size of its own. Precondition: is_complete.
std::vector<std::uint8_t> pack_lengths(const std::uint8_t* lengths, int size);

// Reads one list from [data, data + bytes) and sets *used to its bytes with the padding. It trusts nothing: after an ok
// status the lengths are a complete code of at most `limit` bits over `size` symbols, otherwise they mean nothing.
Status unpack_lengths(const std::uint8_t* data, std::int64_t bytes, int size, int limit, std::uint8_t* lengths,
                      std::int64_t* used);

// A part of an EncodeTable that fits a vector unit's registers: the 256 neighbouring symbols that are the most
// frequent, by the lengths of their codewords. An entry is codeword | length << 12, and 0 where there is no codeword or
// it has more than 12 bits. An encoder looks there first, and only steps that meet another symbol go to memory.
struct NarrowTable {
    static constexpr int kSymbols = 256, kBits = 12;

    int first = 0;         // symbol
    bool has_all = false;  // no symbol has its codeword elsewhere
    std::uint16_t entries[kSymbols] = {};
};

// A code for encoding: codeword | length << 16 for each symbol, 0 where there is none. No codeword's entry is 0, since
// its length is not.
struct EncodeTable {
    std::vector<std::uint32_t> entries;
    NarrowTable narrow;

    EncodeTable() = default;
    EncodeTable(const std::uint8_t* lengths, int size);
    bool empty() const { return entries.empty(); }
    // Tells whether the symbol can be coded.
    // The symbol must be of the alphabet, as quantizers' symbols are: it is not checked.
    bool has(std::uint32_t symbol) const { return entries[symbol] != 0; }
};

// A code in the order of its codewords (shorter ones first, then by symbol), for decoders that compute a symbol's rank
// in that order and do not look up all the bits. A window is the next 16 bits, the first one highest: its codeword has
// the least length l for which window < end[l], and the rank (window >> (16 - l)) + offset[l] mod 2^16.
struct RankTable {
    int longest = 0;  // codeword, in bits
    // end[l] is the first window behind those that begin with a codeword of l bits or fewer.
    std::uint32_t end[kMaxCodeLength + 1] = {};
    std::uint16_t offset[kMaxCodeLength + 1] = {};
    std::vector<std::uint16_t> symbols;  // by rank; a multiple of 256, and behind them one that a gather reads
    int count = 0;                       // symbols in use
};

// A code for decoding by one lookup: symbol | length << 12 for each value of the next `longest codeword` bits, so a
// codeword of length l has 2^(bits - l) entries. Precondition: is_complete, at most 4096 symbols. The vector holds one
// entry more, since a gather reads 32 bits.
struct DecodeTable {
    std::vector<std::uint16_t> entries;
    std::uint32_t mask = 0;
    RankTable ranks;

    DecodeTable() = default;
    DecodeTable(const std::uint8_t* lengths, int size);
    bool empty() const { return entries.empty(); }
};

// A built-in code of static_tables.h. All are expanded once per process, when the first is asked for.
struct StaticCode {
    std::uint8_t id;
    Coding coding;
    int num_bits;
    std::vector<std::uint8_t> lengths;
    EncodeTable encode;
    DecodeTable decode;
};
// Returns the code of a table's number, or null when there is none. It lives as long as the process.
const StaticCode* find_static_code(std::uint8_t id);

// Returns the static code whose nominal step is nearest to k by ratio, the lower number on a tie, or null where none
// has this coding and number of bits. Nominal steps are 2^(j/4): for pairs from 2^(-1/4), for single symbols from
// 2^(-13/4).
const StaticCode* nearest_static_code(Coding coding, int num_bits, double k);

}  // namespace qcomm
