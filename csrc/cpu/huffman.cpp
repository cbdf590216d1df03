// Codes on the host: lengths from counts, codewords from lengths, lists of lengths as nibbles, and the tables that
// encoders and decoders look up. csrc/cuda/code_lengths.cu makes the same codes on a device.
#include "qcomm/huffman.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "qcomm/static_tables.h"

namespace qcomm {
namespace {

// Package-merge (Larmore and Hirschberg, 1990). A code of n symbols with lengths up to L is a choice of coins: symbol s
// of length l uses its coins of the levels 1 .. l, each of which costs count[s], and n - 1 whole units must be paid at
// the least cost. Level by level, from L on, the coins of a level are paired to packages worth a coin of the next one,
// and merged with its symbols by weight. The 2n - 2 cheapest items of the last level are the choice.
//
// Flags suffice: each level keeps the weights of the level below it and, for itself, which items are symbols. The
// lengths then follow by walking back: the cheapest items of a level are its first symbols and its first packages, and
// k packages are the 2k cheapest items of the level before.
class PackageMerge {
public:
    PackageMerge(std::vector<std::uint64_t> sorted, int limit) : leaves_(std::move(sorted)) {
        level_ = leaves_;
        flags_.emplace_back(leaves_.size(), true);
        for (int depth = 1; depth < limit; ++depth) merge_next();
    }

    // Returns how many of the cheapest symbols each level uses, the shortest codewords' level first.
    std::vector<std::size_t> symbols_used() const {
        std::vector<std::size_t> used;
        std::size_t take = 2 * leaves_.size() - 2;
        for (auto level = flags_.rbegin(); level != flags_.rend(); ++level) {
            const auto symbols = static_cast<std::size_t>(
                std::count(level->begin(), level->begin() + static_cast<std::ptrdiff_t>(take), true));
            used.push_back(symbols);
            take = 2 * (take - symbols);
        }
        return used;
    }

private:
    // Merges the symbols with the packages of the level so far; an odd last item has no partner and is left out. On a
    // tie the symbol is first: the lengths are then unique, as the format needs.
    void merge_next() {
        std::vector<std::uint64_t> merged;
        std::vector<bool> flags;
        merged.reserve(leaves_.size() + level_.size() / 2);
        std::size_t leaf = 0, package = 0;
        while (leaf < leaves_.size() || 2 * package + 1 < level_.size()) {
            // A package is two neighbours of the level below it.
            const bool has_package = 2 * package + 1 < level_.size();
            const std::uint64_t weight = has_package ? level_[2 * package] + level_[2 * package + 1] : 0;
            const bool symbol = leaf < leaves_.size() && (!has_package || leaves_[leaf] <= weight);
            merged.push_back(symbol ? leaves_[leaf++] : weight);
            if (!symbol) ++package;
            flags.push_back(symbol);
        }
        level_ = std::move(merged);
        flags_.push_back(std::move(flags));
    }

    std::vector<std::uint64_t> leaves_, level_;
    std::vector<std::vector<bool>> flags_;
};

// Of a canonical codeword the first bit is the highest; in a lane the first bit is the lowest.
std::uint32_t reverse_bits(std::uint32_t code, int length) {
    std::uint32_t reversed = 0;
    for (int i = 0; i < length; ++i) reversed |= (code >> i & 1u) << (length - 1 - i);
    return reversed;
}

// The list of code lengths in a packet, low nibble first:
//
//   1 .. 15              a symbol's length
//   0 r        r < 15    r + 1 unused symbols
//   0 15 a b             16 + a + 16 b of them, 271 at most; a longer run is several
class NibbleWriter {
public:
    void put(unsigned nibble) {
        if (count_++ % 2 == 0) {
            bytes_.push_back(static_cast<std::uint8_t>(nibble));
        } else {
            bytes_.back() = static_cast<std::uint8_t>(bytes_.back() | nibble << 4);
        }
    }
    // As many runs of 271 as fit, then the rest.
    void put_zero_run(int run) {
        for (; run > 0; run -= std::min(run, 16 + 255)) {
            const int now = std::min(run, 16 + 255);
            put(0);
            put(static_cast<unsigned>(std::min(now - 1, 15)));
            if (now < 16) continue;
            put(static_cast<unsigned>(now - 16) & 15u);
            put(static_cast<unsigned>(now - 16) >> 4);
        }
    }
    std::vector<std::uint8_t> take() {
        bytes_.resize(static_cast<std::size_t>(align4(static_cast<std::int64_t>(bytes_.size()))));
        return std::move(bytes_);
    }

private:
    std::vector<std::uint8_t> bytes_;
    std::size_t count_ = 0;
};

// Reads such a list from bytes that may be anything and end anywhere.
class NibbleReader {
public:
    NibbleReader(const std::uint8_t* data, std::int64_t bytes) : data_(data), end_(2 * bytes) {}
    int get() {  // 0..15, or -1 past the end
        if (at_ >= end_) return -1;
        const int byte = data_[at_ / 2];
        return at_++ % 2 == 0 ? byte & 15 : byte >> 4;
    }
    int get_zero_run() {  // after a zero nibble; -1 past the end
        const int run = get();
        if (run < 15) return run < 0 ? -1 : run + 1;
        const int low = get(), high = get();
        return high < 0 ? -1 : 16 + low + 16 * high;
    }
    std::int64_t bytes_used() const { return align4((at_ + 1) / 2); }

private:
    const std::uint8_t* data_;
    std::int64_t at_ = 0, end_;
};

// The share of the code space that a codeword takes, in units of 2^-15: an integer, so that sums are exact.
std::uint32_t kraft_units(std::uint8_t length) { return length == 0 ? 0u : 1u << (kMaxCodeLength - length); }

// The first caller makes them, and C++ lets other threads wait until they are complete.
const std::vector<StaticCode>& static_codes() {
    static const std::vector<StaticCode> codes = [] {
        std::vector<StaticCode> list;
        for (const StaticTable& table : kStaticTables) {
            const Coding coding = table.pair ? Coding::kPair : Coding::kSingle;
            const int size = alphabet_size(coding, table.num_bits);
            StaticCode code{table.id, coding, table.num_bits, std::vector<std::uint8_t>(static_cast<std::size_t>(size)),
                            {},       {}};
            for (int i = 0; i < size; ++i) {
                const char digit = table.lengths[i];
                code.lengths[static_cast<std::size_t>(i)] =
                    static_cast<std::uint8_t>(digit <= '9' ? digit - '0' : digit - 'a' + 10);
            }
            code.encode = EncodeTable(code.lengths.data(), size);
            code.decode = DecodeTable(code.lengths.data(), size);
            list.push_back(std::move(code));
        }
        return list;
    }();
    return codes;
}

// Codewords in canonical order count up, if each is put on top of 16 bits: those of one length l are 2^(16 - l) apart,
// and those of the next length follow. So a window's rank among the codewords of its length is a shift and an addition,
// with one offset for each length: the rank of the first one, less its window, in units of 2^(16 - l), modulo 2^16.
//
//   symbol  length  codeword   windows            end       offset
//   a       1       0          0x0000 .. 0x7FFF   0x8000     0 - 0
//   b       2       10         0x8000 .. 0xBFFF   0xC000     1 - 2
//   c, d    3       110, 111   0xC000 .. 0xFFFF   0x10000    2 - 6
RankTable make_ranks(const std::uint8_t* lengths, int size) {
    RankTable ranks;
    std::uint32_t window = 0;  // the first of the next length; behind the last one it is 2^16
    for (int length = 1; length <= kMaxCodeLength; ++length) {
        const int spare = kWindowBits - length;
        ranks.offset[length] = static_cast<std::uint16_t>(ranks.symbols.size() - (window >> spare));
        for (int s = 0; s < size; ++s) {
            if (lengths[s] != length) continue;
            ranks.symbols.push_back(static_cast<std::uint16_t>(s));
            ranks.longest = length;
            window += 1u << spare;
        }
        ranks.end[length] = window;
    }
    ranks.count = static_cast<int>(ranks.symbols.size());
    constexpr std::size_t kMultiple = 256;
    ranks.symbols.resize((ranks.symbols.size() + kMultiple - 1) / kMultiple * kMultiple + 1);
    return ranks;
}

// Finds the 256 neighbours with the largest share of the code space, which is how frequent the code takes them to be,
// by moving a window of 256 symbols over the alphabet. Grids put frequent symbols side by side, so few are left out.
NarrowTable make_narrow(const std::uint8_t* lengths, const std::uint16_t* codes, int size) {
    const auto weight = [&](int s) {
        return lengths[s] >= 1 && lengths[s] <= NarrowTable::kBits ? kraft_units(lengths[s]) : 0u;
    };
    NarrowTable narrow;
    std::uint32_t sum = 0, most = 0;
    for (int s = 0; s < size; ++s) {  // the last symbol of a window
        sum += weight(s);
        if (s >= NarrowTable::kSymbols) sum -= weight(s - NarrowTable::kSymbols);
        if (sum <= most) continue;
        most = sum;
        narrow.first = std::max(0, s + 1 - NarrowTable::kSymbols);
    }
    // The whole space belongs to the window: no symbol outside, and none of more than 12 bits, has a codeword.
    narrow.has_all = most == 1u << kMaxCodeLength;
    for (int i = 0; i < NarrowTable::kSymbols && narrow.first + i < size; ++i) {
        const int s = narrow.first + i;
        if (weight(s) > 0) narrow.entries[i] = static_cast<std::uint16_t>(codes[s] | lengths[s] << NarrowTable::kBits);
    }
    return narrow;
}

}  // namespace

// A symbol's length is the number of levels that use it. Levels use the cheapest symbols, so lengths fall as counts
// rise.
void code_lengths(const std::uint64_t* counts, int size, int limit, std::uint8_t* lengths) {
    std::fill_n(lengths, size, std::uint8_t{0});
    std::vector<int> used;
    for (int s = 0; s < size; ++s) {
        if (counts[s] > 0) used.push_back(s);
    }
    if (used.empty()) return;
    if (used.size() == 1) {  // package-merge would give it no bits at all
        lengths[used[0]] = 1;
        return;
    }
    // Stable: symbols of equal counts stay in order, as the format says.
    std::stable_sort(used.begin(), used.end(), [&](int a, int b) { return counts[a] < counts[b]; });
    std::vector<std::uint64_t> weights;
    for (const int s : used) weights.push_back(counts[s]);
    for (const std::size_t symbols : PackageMerge(std::move(weights), limit).symbols_used()) {
        for (std::size_t i = 0; i < symbols; ++i) ++lengths[used[i]];
    }
}

bool is_complete(const std::uint8_t* lengths, int size) {
    std::uint64_t sum = 0;
    for (int s = 0; s < size; ++s) sum += kraft_units(lengths[s]);
    return sum == 1u << kMaxCodeLength;
}

// The next length continues behind the last codeword of this one, with a 0 behind it: so codewords of a complete code,
// read from their first bit on, are in ascending order.
void canonical_codes(const std::uint8_t* lengths, int size, std::uint16_t* codes) {
    std::fill_n(codes, size, std::uint16_t{0});
    std::uint32_t code = 0;
    for (int length = 1; length <= kMaxCodeLength; ++length, code <<= 1) {
        for (int s = 0; s < size; ++s) {
            if (lengths[s] == length) codes[s] = static_cast<std::uint16_t>(reverse_bits(code++, length));
        }
    }
}

// Runs are written when the next used symbol is met, so unused symbols behind the last one cost nothing.
std::vector<std::uint8_t> pack_lengths(const std::uint8_t* lengths, int size) {
    NibbleWriter writer;
    int zeros = 0;
    for (int s = 0; s < size; ++s) {
        if (lengths[s] == 0) {
            ++zeros;
            continue;
        }
        writer.put_zero_run(zeros);
        zeros = 0;
        writer.put(lengths[s]);
    }
    return writer.take();
}

// Lengths are hostile: each is compared with the limit, each run with the rest of the alphabet, and their Kraft sum
// with 1. A sum above it would let codewords overlap; one below it would leave windows without an entry.
Status unpack_lengths(const std::uint8_t* data, std::int64_t bytes, int size, int limit, std::uint8_t* lengths,
                      std::int64_t* used) {
    std::fill_n(lengths, size, std::uint8_t{0});
    NibbleReader reader(data, bytes);
    std::uint32_t sum = 0;
    // The list ends with the symbol that fills the code space. Each turn reads a nibble and moves s on, or refuses: so
    // it ends within `size` turns whatever the bytes are.
    for (int s = 0; sum < 1u << kMaxCodeLength;) {
        if (s >= size) return bad_packet("a list of code lengths leaves part of the code space unused");
        const int nibble = reader.get();
        if (nibble < 0) return bad_packet("a list of code lengths is truncated");
        if (nibble > limit) return bad_packet("a code length exceeds its limit");
        if (nibble > 0) {
            lengths[s++] = static_cast<std::uint8_t>(nibble);
            sum += kraft_units(static_cast<std::uint8_t>(nibble));
            continue;
        }
        const int run = reader.get_zero_run();
        if (run < 0 || run > size - s) return bad_packet("a run of unused symbols leaves the alphabet");
        s += run;
    }
    if (sum > 1u << kMaxCodeLength)
        return bad_packet("code lengths describe no prefix code: their Kraft sum exceeds 1");
    *used = reader.bytes_used();
    return *used <= bytes ? Status{} : bad_packet("a list of code lengths is truncated");
}

// The narrow table is made for every code, since which version of the loops will use it is not known here.
EncodeTable::EncodeTable(const std::uint8_t* lengths, int size) : entries(static_cast<std::size_t>(size)) {
    std::vector<std::uint16_t> codes(static_cast<std::size_t>(size));
    canonical_codes(lengths, size, codes.data());
    for (std::size_t s = 0; s < entries.size(); ++s)
        entries[s] = codes[s] | static_cast<std::uint32_t>(lengths[s]) << 16;
    narrow = make_narrow(lengths, codes.data(), size);
}

// A codeword of l bits stands in all 2^(bits - l) windows that begin with it, so the table has no empty place.
DecodeTable::DecodeTable(const std::uint8_t* lengths, int size) {
    std::vector<std::uint16_t> codes(static_cast<std::size_t>(size));
    canonical_codes(lengths, size, codes.data());
    const int bits = *std::max_element(lengths, lengths + size);
    const std::size_t table_size = std::size_t{1} << bits;
    entries.resize(table_size + 1);  // a vector gather reads 32 bits for an entry of 16
    mask = (1u << bits) - 1u;
    for (int s = 0; s < size; ++s) {
        if (lengths[s] == 0) continue;
        const auto entry = static_cast<std::uint16_t>(s | lengths[s] << 12);
        // All windows whose lowest bits are the codeword; the bits above belong to codewords that follow.
        for (std::size_t i = codes[s]; i < table_size; i += std::size_t{1} << lengths[s]) entries[i] = entry;
    }
    ranks = make_ranks(lengths, size);
}

// A search of 32 numbers, once a segment.
const StaticCode* find_static_code(std::uint8_t id) {
    for (const StaticCode& code : static_codes()) {
        if (code.id == id) return &code;
    }
    return nullptr;
}

const StaticCode* nearest_static_code(Coding coding, int num_bits, double k) {
    // Ratios are compared by their logarithms. The tables are in order of their numbers, so the first of equal ones
    // wins.
    const StaticCode* best = nullptr;
    double best_distance = 0.0;
    for (const StaticTable& table : kStaticTables) {
        if (table.pair != (coding == Coding::kPair) || table.num_bits != num_bits) continue;
        const double distance = std::fabs(std::log2(k / static_cast<double>(table.step)));
        if (best == nullptr || distance < best_distance) {
            best = find_static_code(table.id);
            best_distance = distance;
        }
    }
    return best;
}

}  // namespace qcomm
