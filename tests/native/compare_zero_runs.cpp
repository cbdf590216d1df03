// Every version of find_levels, encode_runs and decode_runs against the scalar one: rows of all lengths, special
// values, codes that do not fit the levels, damaged words and noise.
//
//   ./compare_zero_runs 2000 1        cases, seed; status 1 and a line about the first difference
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "compare.h"
#include "kernels.h"
#include "qcomm/processor.h"

namespace {

using namespace qcomm;

// ---- find_levels ---------------------------------------------------------------------------------------------------

// Mostly within half a step, with some that are beyond all levels, tie or are no numbers.
template <class T>
T random_value(double step, std::uint32_t rare) {
    const T special[] = {T(0),
                         -T(0),
                         std::numeric_limits<T>::infinity(),
                         -std::numeric_limits<T>::infinity(),
                         std::numeric_limits<T>::quiet_NaN(),
                         std::numeric_limits<T>::max(),
                         std::numeric_limits<T>::lowest(),
                         std::numeric_limits<T>::denorm_min()};
    if (below(rare) == 0) return special[below(8)];
    if (below(8) == 0) return static_cast<T>(step * (static_cast<double>(below(17)) - 8.0) / 2.0);
    const double of_step = static_cast<double>(below(1u << 24)) / (1 << 24) - 0.5;
    return static_cast<T>(step * of_step * (below(4) == 0 ? 9.0 : 1.2));
}

// All NaN are one.
template <class T>
std::uint64_t bits_of(T x) {
    std::uint64_t bits = ~std::uint64_t{0};
    if (!std::isnan(x)) {
        const auto wide = static_cast<double>(x);
        std::memcpy(&bits, &wide, sizeof(bits));
    }
    return bits;
}

struct Found {
    std::vector<std::uint16_t> positions;
    std::vector<std::int8_t> levels;
    std::vector<std::uint64_t> numbers;  // new residuals, old ones, sample
    bool finite;

    bool operator==(const Found& other) const {
        return positions == other.positions && levels == other.levels && numbers == other.numbers &&
               finite == other.finite;
    }
};

template <class T>
struct Row {
    std::vector<T> data;
    std::vector<float> residual;
    Values values;
    Quantizer quantizer;
    int begin, n, base;
    bool in_place;

    Row() {
        n = static_cast<int>(below(4) == 0 ? below(3000) : below(140));
        begin = static_cast<int>(below(40));
        base = static_cast<int>(below(static_cast<std::uint32_t>(kMaxRunBlockValues - n)));
        in_place = below(4) != 0;
        const double step =
            std::ldexp(1.0 + static_cast<double>(below(1000)) / 1000.0, static_cast<int>(below(40)) - 20);
        const std::uint32_t rare = below(2) == 0 ? 100 : 10000;
        for (int i = 0; i < begin + n; ++i) {
            data.push_back(random_value<T>(step, rare));
            residual.push_back(random_value<float>(step, rare));
        }
        values.data = data.data();
        values.dtype = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;
        values.count = begin + n;
        values.inv_scale = below(2) == 0 ? 1.0 : 0.3;
        quantizer = {Grid::kSigma, 3, Coding::kRuns, 0, 0.0, static_cast<double>(static_cast<float>(step))};
    }
    // Levels mean nothing where a residual is not finite, and no NaN is like another.
    Found find() {
        std::vector<float> kept = residual, fresh(residual.size(), 7.0f), old(static_cast<std::size_t>(n));
        Found found;
        found.positions.resize(static_cast<std::size_t>(n + kRunSlack));
        found.levels.resize(found.positions.size());
        values.residual = kept.data();
        LevelsOut out{};
        std::vector<float>& residuals = in_place ? kept : fresh;
        out.residual = residuals.data() + begin;
        out.old = old.data();
        out.positions = found.positions.data();
        out.levels = found.levels.data();
        kernels().find_levels(values, begin, n, quantizer, base, &out);
        found.positions.resize(out.finite ? static_cast<std::size_t>(out.count) : 0);
        found.levels.resize(found.positions.size());
        found.finite = out.finite;
        for (const std::vector<float>* of : {&residuals, &old}) {
            for (const float x : *of) found.numbers.push_back(bits_of(x));
        }
        for (const double x : {out.sample.values, out.sample.residuals, out.sample.count})
            found.numbers.push_back(bits_of(x));
        return found;
    }
};

// Each case has values of its own, and each version the same.
template <class T>
bool finds_alike() {
    Row<T> row;
    use_kernel_version("scalar");
    const auto expected = row.find();
    for (const std::string& version : kernel_versions()) {
        use_kernel_version(version.c_str());
        if (row.find() == expected) continue;
        std::printf("find_levels of %d values of %zu bytes: %s differs\n", row.n, sizeof(T), version.c_str());
        return false;
    }
    return true;
}

// ---- encode_runs and decode_runs -----------------------------------------------------------------------------------

struct Levels {
    std::vector<std::uint16_t> positions;
    std::vector<std::int8_t> levels;

    bool operator==(const Levels& other) const { return positions == other.positions && levels == other.levels; }
};

// At least one level, at random distances.
Levels random_levels() {
    Levels out;
    const std::uint32_t farthest = std::uint32_t{1} << below(12), most = 1 + below(below(3) == 0 ? 5000 : 200);
    std::uint32_t at = below(farthest);
    do {
        out.positions.push_back(static_cast<std::uint16_t>(at));
        out.levels.push_back(static_cast<std::int8_t>(level_at(static_cast<int>(below(kTokenLevels)))));
        at += 1 + below(farthest);
    } while (out.positions.size() < most && at < static_cast<std::uint32_t>(kMaxRunBlockValues));
    return out;
}

struct Encoded {
    std::vector<std::uint32_t> start;
    std::vector<std::uint16_t> words;
    int tokens;

    bool operator==(const Encoded& other) const {
        return start == other.start && words == other.words && tokens == other.tokens;
    }
};

Encoded encode(const Levels& of, int table) {
    Encoded out{std::vector<std::uint32_t>(kLanes), {}, 0};
    std::vector<std::uint32_t> scratch(kMaxRunBlockTokens + kRunSlack);
    std::vector<std::uint16_t> space(kWordsSlack + kMaxRunBlockTokens);
    const int words = kernels().encode_runs(of.positions.data(), of.levels.data(),
                                            static_cast<int>(of.positions.size()), run_code(table), scratch.data(),
                                            &out.tokens, out.start.data(), space.data() + space.size());
    out.words.assign(space.end() - words, space.end());
    return out;
}

// Of one case in two; `values` is the size of the block.
void damage(Encoded* encoded, int* values) {
    const std::uint32_t kind = below(16);
    damage_words(kind, &encoded->words, &encoded->start);
    if (kind == 3) {
        encoded->words.push_back(static_cast<std::uint16_t>(below(2)));
    } else if (kind == 4) {
        *values = 1 + static_cast<int>(below(static_cast<std::uint32_t>(*values)));
    } else if (kind == 5) {
        encoded->tokens += 1 + static_cast<int>(below(40));
    } else if (kind == 6 && encoded->tokens > 1) {
        encoded->tokens -= 1;
    } else if (kind == 7) {
        encoded->start[below(kLanes)] ^= 1u << below(32);
    }
}

struct Decoded {
    Levels levels;
    bool whole;

    bool operator==(const Decoded& other) const { return whole == other.whole && (!whole || levels == other.levels); }
};

Decoded decode(const Encoded& encoded, int table, int values) {
    const auto room = static_cast<std::size_t>(encoded.tokens + kRunSlack);
    Decoded out{{std::vector<std::uint16_t>(room), std::vector<std::int8_t>(room)}, false};
    RunBlock block{};
    block.start = reinterpret_cast<const std::uint8_t*>(encoded.start.data());
    block.words = reinterpret_cast<const std::uint8_t*>(encoded.words.data());
    block.word_count = static_cast<std::int64_t>(encoded.words.size());
    block.tokens = encoded.tokens;
    block.values = values;
    block.code = &run_code(table);
    block.positions = out.levels.positions.data();
    block.levels = out.levels.levels.data();
    kernels().decode_runs(block);
    out.whole = block.whole;
    if (!out.whole) return out;
    out.levels.positions.resize(static_cast<std::size_t>(block.count));
    out.levels.levels.resize(static_cast<std::size_t>(block.count));
    return out;
}

// *whole counts the blocks that were decoded to their end.
bool codes_alike(int* whole) {
    const Levels levels = random_levels();
    const int table = static_cast<int>(below(kRunTableCount));
    const int beyond = static_cast<int>(below(600));
    int values = levels.positions.back() + 1 + beyond;
    if (values > kMaxRunBlockValues) values = kMaxRunBlockValues;
    use_kernel_version("scalar");
    const Encoded expected = encode(levels, table);
    if (!(decode(expected, table, values).levels == levels)) {
        std::printf("scalar does not decode %zu levels\n", levels.positions.size());
        return false;
    }
    Encoded received = expected;
    damage(&received, &values);
    const Decoded found = decode(received, table, values);
    *whole += found.whole;
    for (const std::string& version : kernel_versions()) {
        use_kernel_version(version.c_str());
        if (encode(levels, table) == expected && decode(received, table, values) == found) continue;
        std::printf("runs of %zu levels, %d tokens: %s differs\n", levels.positions.size(), expected.tokens,
                    version.c_str());
        return false;
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    return compare_cases(
        argc, argv, [](int* whole) { return finds_alike<float>() && finds_alike<double>() && codes_alike(whole); });
}
