// Every version of encode_lanes and decode_lanes against the scalar one: random codes of all shapes, sound words,
// damaged words and noise.
//
//   ./compare_lanes 2000 1        cases, seed; status 1 and a line about the first difference
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "compare.h"
#include "kernels.h"
#include "qcomm/processor.h"

namespace {

using namespace qcomm;

// Lengths of a complete code of at least two symbols: leaves of a tree that grows at random, or mostly on one side.
std::vector<std::uint8_t> random_lengths(int size, int limit) {
    std::vector<std::uint8_t> leaves{0};
    const std::size_t target = 2 + below(static_cast<std::uint32_t>(size) - 1);
    const bool lopsided = below(2) == 0;
    for (int failures = 0; leaves.size() < target && failures < 64;) {
        const std::size_t i = lopsided ? leaves.size() - 1 : below(static_cast<std::uint32_t>(leaves.size()));
        const std::size_t other = below(static_cast<std::uint32_t>(leaves.size()));
        const std::size_t grown = leaves[i] < limit ? i : other;
        if (leaves[grown] >= limit) {
            ++failures;
            continue;
        }
        ++leaves[grown];
        leaves.push_back(leaves[grown]);
    }
    leaves.resize(static_cast<std::size_t>(size));
    if (below(2) == 0) std::shuffle(leaves.begin(), leaves.end(), noise);
    return leaves;
}

struct Case {
    std::vector<std::uint8_t> lengths;
    bool pairs;
    std::vector<std::uint16_t> symbols;
    Quantizer quantizer;
    bool accumulate;
};

Case random_case() {
    Case c;
    const int bits = 1 + static_cast<int>(below(kMaxCodedBits)), size = 1 << bits;
    c.pairs = bits == 2 * kPairBits && below(2) == 0;
    c.lengths = random_lengths(size, length_limit(c.pairs ? Coding::kPair : Coding::kSingle, bits));
    std::vector<std::uint16_t> used;
    for (int s = 0; s < size; ++s) {
        if (c.lengths[static_cast<std::size_t>(s)] > 0) used.push_back(static_cast<std::uint16_t>(s));
    }
    const bool with_unused = below(3) == 0;
    c.symbols.resize(1 + below(3000));
    for (std::uint16_t& symbol : c.symbols) {
        symbol = used[below(static_cast<std::uint32_t>(used.size()))];
        if (with_unused && below(1000) == 0)
            symbol = static_cast<std::uint16_t>(below(static_cast<std::uint32_t>(size)));
        if (c.pairs) symbol &= (1u << kPairBits) - 1u;
    }
    const bool sigma = c.pairs || (bits >= 2 && below(2) == 0);
    c.quantizer = {sigma ? Grid::kSigma : Grid::kRangeEndpoint,
                   static_cast<std::uint8_t>(c.pairs ? kPairBits : bits),
                   Coding::kSingle,
                   kTableOnWire,
                   -1.0,
                   sigma ? 0.25 : 1.0};
    c.accumulate = below(2) == 0;
    return c;
}

struct Encoded {
    std::uint32_t start[kLanes] = {};
    std::vector<std::uint16_t> words;
    bool possible = false;

    bool operator==(const Encoded& other) const {
        return possible == other.possible && words == other.words &&
               (!possible || std::memcmp(start, other.start, sizeof(start)) == 0);
    }
};

Encoded encode(const Case& c) {
    std::vector<std::uint16_t> space(kWordsSlack + c.symbols.size());
    const EncodeTable table(c.lengths.data(), static_cast<int>(c.lengths.size()));
    Encoded out;
    const int words = kernels().encode_lanes(c.symbols.data(), static_cast<int>(c.symbols.size()), c.pairs, table,
                                             Ahead{}, out.start, space.data() + space.size());
    out.possible = words >= 0;
    if (out.possible) out.words.assign(space.end() - words, space.end());
    return out;
}

void damage(Encoded* encoded) {
    const std::uint32_t kind = below(8);
    damage_words(encoded->possible ? kind : 0, &encoded->words, &encoded->start);
}

struct Decoded {
    std::vector<std::uint16_t> symbols;
    std::vector<float> values;
    bool whole;

    bool operator==(const Decoded& other) const {
        return whole == other.whole &&
               (!whole || (symbols == other.symbols &&
                           std::memcmp(values.data(), other.values.data(), sizeof(float) * values.size()) == 0));
    }
};

// The same words as two blocks of different lengths.
std::vector<Decoded> decode(const Case& c, const Encoded& encoded) {
    const DecodeTable table(c.lengths.data(), static_cast<int>(c.lengths.size()));
    std::vector<Decoded> out;
    CodedBlock blocks[2];
    for (const std::size_t count : {c.symbols.size(), c.symbols.size() / 2 + 1})
        out.push_back({std::vector<std::uint16_t>(count + 1), std::vector<float>(count, 1.5f), false});
    for (int i = 0; i < 2; ++i) {
        Decoded& d = out[static_cast<std::size_t>(i)];
        blocks[i] = {reinterpret_cast<const std::uint8_t*>(encoded.start),
                     reinterpret_cast<const std::uint8_t*>(encoded.words.data()),
                     static_cast<std::int64_t>(encoded.words.size()),
                     static_cast<int>(d.values.size()),
                     d.symbols.data(),
                     d.values.data(),
                     false};
    }
    kernels().decode_lanes(blocks, 2, {c.pairs, &table, c.quantizer, DType::kFloat32, c.accumulate});
    for (std::size_t i = 0; i < 2; ++i) {
        out[i].whole = blocks[i].whole;
        out[i].symbols.pop_back();  // written where an odd number of pairs' symbols ends
    }
    return out;
}

}  // namespace

int main(int argc, char** argv) {
    return compare_cases(argc, argv, [](int* whole) {
        const Case c = random_case();
        use_kernel_version("scalar");
        const Encoded expected = encode(c);
        Encoded received = expected;
        damage(&received);
        const std::vector<Decoded> values = decode(c, received);
        *whole += values[0].whole;
        for (const std::string& version : kernel_versions()) {
            use_kernel_version(version.c_str());
            if (encode(c) == expected && decode(c, received) == values) continue;
            std::printf("%s differs\n", version.c_str());
            return false;
        }
        return true;
    });
}
