// Canonical, length-limited Huffman codes. Lengths alone define a code; they come from package-merge (Larmore and
// Hirschberg, "A fast algorithm for optimal length-limited Huffman codes", J. ACM 37(3), 1990), which is optimal under
// the limit. Codewords are read LSB first.
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
constexpr int alphabet_size(Coding coding, int num_bits) { return coding == Coding::kPair ? 256 : 1 << num_bits; }

// Optimal lengths (0 for an unused symbol, 1 for a lone one) of at most `limit` bits. Precondition: used symbols <=
// 2^limit, limit <= 15, size <= 4096, counts sum below 2^48. Ties go by symbol, and symbols before packages, so the
// result is unique.
void code_lengths(const std::uint64_t* counts, int size, int limit, std::uint8_t* lengths);

// Whether the lengths fill the code space exactly: every bit string then decodes.
bool is_complete(const std::uint8_t* lengths, int size);

// Codewords by (length, symbol), bit-reversed. codes[i] is 0 where lengths[i] is 0.
void canonical_codes(const std::uint8_t* lengths, int size, std::uint16_t* codes);

// Code lengths as nibbles with zero runs, ending where the code is complete; padded to 4 bytes. Precondition:
// is_complete.
std::vector<std::uint8_t> pack_lengths(const std::uint8_t* lengths, int size);

// Reads one list from [data, data + bytes), sets *used to its bytes with the padding. Trusts nothing.
Status unpack_lengths(const std::uint8_t* data, std::int64_t bytes, int size, int limit, std::uint8_t* lengths,
                      std::int64_t* used);

// The same for the 256 neighbouring symbols that are the most frequent, by the lengths of their codewords: what a
// vector unit can hold in registers. codeword | length << 12; 0 where there is none, or it has more than 12 bits.
struct NarrowTable {
    static constexpr int kSymbols = 256, kBits = 12;

    int first = 0;         // symbol
    bool has_all = false;  // no symbol has its codeword elsewhere
    std::uint16_t entries[kSymbols] = {};
};

// codeword | length << 16 for each symbol; 0 where there is none.
struct EncodeTable {
    std::vector<std::uint32_t> entries;
    NarrowTable narrow;

    EncodeTable() = default;
    EncodeTable(const std::uint8_t* lengths, int size);
    bool empty() const { return entries.empty(); }
    bool has(std::uint32_t symbol) const { return entries[symbol] != 0; }
};

// A code in the order of its codewords (shorter ones first, then by symbol), for decoders that compute a symbol's rank
// in that order and do not look up all the bits. A window is the next 16 bits, the first one highest: its codeword has
// the least length l for which window < end[l], and the rank (window >> (16 - l)) + offset[l] mod 2^16.
struct RankTable {
    int longest = 0;  // codeword, in bits
    std::uint32_t end[kMaxCodeLength + 1] = {};
    std::uint16_t offset[kMaxCodeLength + 1] = {};
    std::vector<std::uint16_t> symbols;  // by rank; a multiple of 256, and behind them one that a gather reads
    int count = 0;                       // symbols in use
};

// symbol | length << 12 for each value of the next `bits` bits. Precondition: is_complete, at most 4096 symbols.
struct DecodeTable {
    std::vector<std::uint16_t> entries;
    std::uint32_t mask = 0;
    RankTable ranks;

    DecodeTable() = default;
    DecodeTable(const std::uint8_t* lengths, int size);
    bool empty() const { return entries.empty(); }
};

// The built-in codes of static_tables.h, expanded once per process.
struct StaticCode {
    std::uint8_t id;
    Coding coding;
    int num_bits;
    std::vector<std::uint8_t> lengths;
    EncodeTable encode;
    DecodeTable decode;
};
const StaticCode* find_static_code(std::uint8_t id);  // null when there is none

// The static code whose nominal step is nearest to k, or null: `coding` pair starts at 2^(-1/4), single at 2^(-13/4).
const StaticCode* nearest_static_code(Coding coding, int num_bits, double k);

}  // namespace qcomm
