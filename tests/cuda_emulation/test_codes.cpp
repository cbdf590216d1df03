// Codes of a segment's own: histograms against csrc/cpu/codeword_counts.h, code lengths, lists of them and codewords
// against csrc/cpu/huffman.cpp.
#include <fstream>

#include "cases.h"
#include "codeword_counts.h"
#include "kernels.cuh"
#include "qcomm/entropy.h"
#include "qcomm/huffman.h"
#include "qcomm/sigma_code.h"
#include "suite.h"

namespace qcomm::test {
namespace {

using cuda::Count;

// A row of symbols as a request to count them: values on a range grid of integers, or on a sigma grid of step 1.
struct Row {
    Quantizer quantizer;
    std::vector<float> values;
    std::vector<std::uint16_t> symbols;
};

Row make_row(Quantizer q, std::int64_t n, double frequent, std::uint64_t seed) {
    Row row{q, {}, {}};
    Random random(seed);
    const bool is_sigma = q.grid == Grid::kSigma;
    const int size = (1 << q.num_bits) - is_sigma;  // no escapes
    row.quantizer.p0 = 0.0;
    row.quantizer.p1 = is_sigma ? 1.0 : size - 1;
    for (std::int64_t i = 0; i < n; ++i) {
        const bool common = random.uniform() < frequent;
        const int symbol = common ? size / 2 : static_cast<int>(random.uniform() * size);
        row.symbols.push_back(static_cast<std::uint16_t>(symbol));
        row.values.push_back(static_cast<float>(is_sigma ? symbol - sigma_radius(q.num_bits) : symbol));
    }
    return row;
}

void count_rows(const std::vector<Row>& rows) {
    std::vector<cuda::TensorTask> tensors(rows.size());
    std::vector<cuda::SegmentTask> segments(rows.size());
    std::vector<Quantizer> quantizers;
    std::int64_t tiles = 0, codewords = 0;
    for (std::size_t r = 0; r < rows.size(); ++r) {
        tensors[r].values = rows[r].values.data();
        tensors[r].count = static_cast<std::int64_t>(rows[r].values.size());
        segments[r].tensor = static_cast<std::int32_t>(r);
        segments[r].count = tensors[r].count;
        segments[r].first_histogram_tile = tiles;
        segments[r].first_codeword = codewords;
        quantizers.push_back(rows[r].quantizer);
        tiles += ceil_div(tensors[r].count, cuda::kHistogramTile);
        codewords += alphabet_size(rows[r].quantizer.coding, rows[r].quantizer.num_bits);
    }
    std::vector<Count> counts(static_cast<std::size_t>(codewords));
    cuda::EncodeTables e{};
    e.tensors = tensors.data();
    e.segments = segments.data();
    e.quantizers = quantizers.data();
    e.segment_count = static_cast<int>(rows.size());
    e.counts = counts.data();
    cuda::launch_histogram(e, false, tiles, nullptr);
    for (std::size_t r = 0; r < rows.size(); ++r) {
        const Quantizer& q = rows[r].quantizer;
        CodewordCounts expected(q);
        std::vector<std::uint16_t> counted = rows[r].symbols;
        const auto count = static_cast<std::int64_t>(counted.size());
        if (samples_own_table(q.grid, q.coding, q.num_bits, count)) {
            counted.clear();
            for (std::int64_t i = 0; i < kTablePairs; ++i) {
                const auto at = static_cast<std::size_t>(2 * sample_index(i, kTablePairs, count / 2, 0));
                counted.insert(counted.end(), {rows[r].symbols[at], rows[r].symbols[at + 1]});
            }
        }
        expected.add(counted.data(), static_cast<int>(counted.size()));
        std::vector<std::uint64_t> want(static_cast<std::size_t>(alphabet_size(q.coding, q.num_bits)));
        expected.add_to(&want);
        for (std::size_t s = 0; s < want.size(); ++s) {
            const Count got = counts[static_cast<std::size_t>(segments[r].first_codeword) + s];
            require(got == want[s], "row " + std::to_string(r) + ", codeword " + std::to_string(s) + " counted " +
                                        std::to_string(got) + " times, not " + std::to_string(want[s]));
        }
    }
}

}  // namespace

void histogram_group() {
    std::vector<Row> rows;
    std::uint64_t seed = emulation::seed;
    for (int bits = 1; bits <= kMaxCodedBits; ++bits)
        rows.push_back(
            make_row(range(Grid::kRangeEndpoint, bits), 3000 + 37 * bits, bits % 2 == 0 ? 0.9 : 0.1, ++seed));
    for (const std::int64_t n : {1, 2, 31, 33, 64, 65, 5001, 32767, 32768, 32769, 70001}) {
        rows.push_back(make_row(sigma(4, Coding::kPair, kTableOnWire), n, 0.9, ++seed));
        rows.push_back(make_row(sigma(7, Coding::kSingle, kTableOnWire), n, 0.5, ++seed));
    }
    rows.push_back(make_row(sigma(4, Coding::kSingle, kTableOnWire), 5000, 1.0, ++seed));
    count_rows(rows);
}

// Histograms in lines of text: coding, num_bits, then counts of the first symbols.
void code_lengths_of_file(const std::string& path) {
    std::ifstream file(path);
    std::vector<std::vector<std::uint64_t>> histograms;
    std::vector<Quantizer> quantizers;
    int coding = 0, bits = 0;
    std::size_t given = 0;
    while (file >> coding >> bits >> given) {
        const bool pairs = coding == static_cast<int>(Coding::kPair);
        quantizers.push_back(pairs ? sigma(4, Coding::kPair, kTableOnWire) : range(Grid::kRangeEndpoint, bits));
        histograms.emplace_back(static_cast<std::size_t>(alphabet_size(quantizers.back().coding, bits)));
        for (std::size_t i = 0; i < given; ++i) file >> histograms.back()[i];
    }
    require(!histograms.empty(), path + ": no histograms");
    std::vector<cuda::SegmentTask> segments(histograms.size());
    std::vector<std::int32_t> own(histograms.size());
    std::vector<Count> counts;
    for (std::size_t h = 0; h < histograms.size(); ++h) {
        own[h] = segments[h].tensor = static_cast<std::int32_t>(h);
        segments[h].first_codeword = static_cast<std::int64_t>(counts.size());
        // So that a table pays; but a sigma segment of that length would have one from a sample.
        segments[h].count = quantizers[h].grid == Grid::kSigma ? 2 * kTablePairs : std::int64_t{1} << 40;
        counts.insert(counts.end(), histograms[h].begin(), histograms[h].end());
        counts.resize((counts.size() + 3) / 4 * 4);
    }
    std::vector<Count> packages(counts.size());
    std::vector<std::uint32_t> entries(counts.size(), 77u);
    std::vector<std::uint32_t> lists(counts.size() / 4);
    std::vector<int> list_bytes(histograms.size(), -1);
    cuda::EncodeTables e{};
    e.segments = segments.data();
    e.quantizers = quantizers.data();
    e.own_segments = own.data();
    e.own_count = static_cast<int>(own.size());
    e.steps = 512;
    e.counts = counts.data();
    e.packages = packages.data();
    e.own_entries = entries.data();
    e.lists = reinterpret_cast<std::uint8_t*>(lists.data());
    e.list_bytes = list_bytes.data();
    cuda::launch_code_lengths(e, nullptr);
    for (std::size_t h = 0; h < histograms.size(); ++h) {
        const std::string name = "histogram " + std::to_string(h);
        const Quantizer& q = quantizers[h];
        const auto size = static_cast<int>(histograms[h].size());
        std::vector<std::uint8_t> lengths(histograms[h].size()), list;
        code_lengths(histograms[h].data(), size, length_limit(q.coding, q.num_bits), lengths.data());
        if (is_complete(lengths.data(), size)) list = pack_lengths(lengths.data(), size);
        if (q.grid == Grid::kSigma) {
            const std::int64_t count = segments[h].count, blocks = ceil_div(count, 512 * kLanes * 2);
            std::uint64_t bits = 0;
            for (std::size_t s = 0; s < lengths.size(); ++s) bits += histograms[h][s] * lengths[s];
            if (!sigma_table_pays(bits, static_cast<std::int64_t>(list.size()), blocks,
                                  packed_bytes(count, q.num_bits)))
                list.clear();
        }
        require(list_bytes[h] == static_cast<int>(list.size()),
                name + ": a list of " + std::to_string(list_bytes[h]) + " bytes, not " + std::to_string(list.size()));
        if (list.empty()) continue;
        require(std::memcmp(e.lists + segments[h].first_codeword, list.data(), list.size()) == 0, name + ": list");
        const EncodeTable table(lengths.data(), size);
        require(std::memcmp(entries.data() + segments[h].first_codeword, table.entries.data(),
                            table.entries.size() * sizeof(std::uint32_t)) == 0,
                name + ": codewords");
    }
}

}  // namespace qcomm::test
