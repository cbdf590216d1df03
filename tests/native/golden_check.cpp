// Does this processor write and read the bytes that every other does? Without Python, for processors that are emulated
// or have none: CONTRIBUTING.md, "Other processors".
//
//   golden_check tests/golden
//
// 1. Each committed packet decodes to the values whose CRC-32 is in decoded.json, and these values, encoded again with
//    the packet's own quantizers, are the packet again.
// 2. What the committed packets do not hold, the choices before a packet and the residual after it, has the digests
//    below, which were written on x86-64. They change when the wire format or this program does.
//
// On every version of the inner loops that the processor has, with one thread and with two.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "qcomm/entropy.h"
#include "qcomm/packet.h"
#include "qcomm/parallel.h"
#include "qcomm/processor.h"
#include "qcomm/statistics.h"

namespace {

using namespace qcomm;
using Bytes = std::vector<std::uint8_t>;

constexpr std::int64_t kValues = 2 * kValuesPerThread + 1001;  // enough for a second thread, and a short last block

// In the order in which `digest` makes them: for each dtype sigma k = 0.5, 1 and 2, range center and endpoint, zero
// runs.
// clang-format off
constexpr std::array<std::uint32_t, 24> kDigests = {
    0x2D1C8EF1, 0xE93B789B, 0x01C1D1B3, 0x76F770A7, 0x6EB1FEAD, 0xCF7B01D9,
    0xC0CE0DC4, 0x9720E169, 0x2066FB77, 0xCF960B3C, 0x5D05C672, 0x2DC63FCA,
    0xD8A6F5E5, 0x8C99D2A7, 0x0D679024, 0xBE43B279, 0xC4E4FD55, 0x8B53C5B5,
    0xD092C4E3, 0xA09CC168, 0x64821E03, 0x8EB8E4F5, 0xE9D8CDC3, 0xC6E52032,
};
// clang-format on

int failures = 0;

void expect(bool holds, const std::string& what) {
    if (holds) return;
    ++failures;
    std::printf("wrong on %s: %s\n", kernel_version().c_str(), what.c_str());
}

void expect_ok(const Status& status, const std::string& what) {
    const std::string where = status.where == kNowhere ? "" : " " + std::to_string(status.where);
    expect(status.ok(), what + ": " + status.what + where);
}

// zlib's.
class Crc {
public:
    void add(const void* data, std::size_t bytes) {
        for (std::size_t i = 0; i < bytes; ++i) {
            state_ ^= static_cast<const std::uint8_t*>(data)[i];
            for (int bit = 0; bit < 8; ++bit) state_ = state_ >> 1 ^ (state_ & 1u ? 0xEDB88320u : 0u);
        }
    }
    template <class T>
    void add(const std::vector<T>& values) {
        add(values.data(), sizeof(T) * values.size());
    }
    template <class T>
    void add_value(T value) {
        add(&value, sizeof(value));
    }
    std::uint32_t value() const { return ~state_; }

private:
    std::uint32_t state_ = 0xFFFFFFFFu;
};

Bytes read(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    expect(file.good(), "cannot read " + path.string());
    return {std::istreambuf_iterator<char>(file), {}};
}

Bytes encode(const std::vector<SegmentInput>& segments, const EncodeOptions& options, const std::string& what) {
    Bytes packet(static_cast<std::size_t>(encode_bound(segments, options)));
    std::int64_t bytes = 0;
    expect_ok(encode_packet(segments, options, packet.data(), static_cast<std::int64_t>(packet.size()), &bytes), what);
    packet.resize(static_cast<std::size_t>(bytes));
    return packet;
}

void check_packet(const std::filesystem::path& path, const std::string& decoded_json, int threads) {
    const std::string name = path.stem().string();
    const Bytes packet = read(path);
    PacketView view;
    expect_ok(parse_packet(packet.data(), static_cast<std::int64_t>(packet.size()), &view), name);
    const std::int64_t item = item_bytes(view.header.dtype);
    Bytes values(static_cast<std::size_t>(item) * view.header.element_count);
    expect_ok(decode_packet(view, values.data(), false, threads), name);

    const std::size_t at = decoded_json.find('"' + name + "\": ");
    expect(at != std::string::npos, name + " is not in decoded.json");
    if (at == std::string::npos) return;
    Crc crc;
    crc.add(values);
    const std::uint32_t digest = values.empty() ? 0 : crc.value();
    expect(digest == std::strtoul(decoded_json.c_str() + at + name.size() + 4, nullptr, 10), name + " decodes wrong");

    EncodeOptions options;
    options.dtype = view.header.dtype;
    options.dims = view.dims;
    options.checksums = (view.header.flags & kFlagChecksums) != 0;
    options.steps = view.header.steps;
    options.threads = threads;
    std::vector<SegmentInput> segments;
    std::int64_t begin = 0;
    std::vector<float> residual(view.header.element_count);
    for (const SegmentRecord& r : view.records) {
        SegmentInput segment;
        segment.values.data = values.data() + item * begin;
        segment.values.dtype = options.dtype;
        segment.values.count = static_cast<std::int64_t>(r.count);
        segment.quantizer = {r.grid, r.num_bits, r.coding, r.table, r.p0, r.p1};
        if (r.coding == Coding::kRuns) segment.values.residual = segment.residual_out = residual.data() + begin;
        segments.push_back(segment);
        begin += segment.values.count;
    }
    expect(encode(segments, options, name) == packet, name + " is encoded to other bytes");
    expect(residual == std::vector<float>(residual.size()), name + " leaves a residual");
}

// Bell-shaped, made of integers, with some values far outside, zeros, negative zeros and subnormal ones.
template <class Tr>
std::vector<typename Tr::Storage> make_values(std::uint32_t state) {
    std::vector<typename Tr::Storage> values;
    for (std::int64_t i = 0; i < kValues; ++i) {
        std::uint32_t sum = 0;
        for (int j = 0; j < 6; ++j) {
            state = state * 1664525u + 1013904223u;
            sum += state >> 16;
        }
        float value = (static_cast<float>(sum) - 6 * 32768) / 4096.0f;
        if (i % 997 == 0) value *= 40.0f;
        if (i % 1009 == 0) value = i % 2 == 0 ? -0.0f : 1e-40f;
        if (i / 20000 == 5) value = 0.0f;
        values.push_back(Tr::narrow(value));
    }
    return values;
}

struct Case {
    Grid grid;
    int num_bits;
    double k;
};
constexpr Case kCases[] = {{Grid::kSigma, 5, 0.5},          {Grid::kSigma, 4, 1.0},
                           {Grid::kSigma, 4, 2.0},          {Grid::kRangeCenter, 6, 0.0},
                           {Grid::kRangeEndpoint, 10, 0.0}, {Grid::kSigma, kRunsBits, 4.0}};

// Of the statistics, the entropy's histogram, the code that is chosen, the packet, the new residual, the sum of the
// decoded values and ones, and the sample that zero runs take. The values have a residual where the dtype can have one.
template <class Tr>
std::uint32_t digest(const Case& c, DType dtype, int threads) {
    const auto stored = make_values<Tr>(1);
    std::vector<float> residual;
    SegmentInput in;
    in.values.data = stored.data();
    in.values.dtype = dtype;
    in.values.count = kValues;
    const bool adjusted = item_bytes(dtype) >= 4;
    if (adjusted) {
        residual = make_values<Traits<DType::kFloat32>>(2);
        in.values.residual = in.residual_out = residual.data();
        in.values.inv_scale = 1.0 / 3.0;
    }
    const bool runs = c.num_bits == kRunsBits;
    std::array<double, kSampleNumbers> sample_numbers{};
    if (runs) {
        residual.resize(static_cast<std::size_t>(kValues));
        in.residual_out = residual.data();
        in.sample_out = sample_numbers.data();
    }
    const Statistics s = measure(in.values, threads);
    const std::vector<std::uint32_t> sample = sample_histogram(in.values, s.minimum, s.maximum, 8, 0.03, 7);
    const std::uint64_t entropy = entropy_fixed(sample.data(), static_cast<int>(sample.size()));
    using T = typename Tr::Arithmetic;
    const T step = static_cast<T>(c.k * std::sqrt(s.sum_squares / static_cast<double>(kValues)));
    in.quantizer = {c.grid, static_cast<std::uint8_t>(c.num_bits), Coding::kSingle, kTableOnWire, s.minimum, s.maximum};
    if (runs) {
        in.quantizer = {c.grid, kRunsBits, Coding::kRuns, kTableOnWire, 0.0, static_cast<double>(step)};
    } else if (c.grid == Grid::kSigma) {
        const SigmaCode code = choose_sigma_code(in.values, c.num_bits, static_cast<double>(step), c.k, 0);
        in.quantizer = {c.grid, in.quantizer.num_bits, code.coding, code.table, 0.0, static_cast<double>(step)};
    }
    EncodeOptions options;
    options.dtype = dtype;
    options.dims = {kValues};
    options.threads = threads;
    const Bytes packet = encode({in}, options, "digest");
    PacketView view;
    expect_ok(parse_packet(packet.data(), static_cast<std::int64_t>(packet.size()), &view), "digest");
    std::vector<typename Tr::Storage> decoded(static_cast<std::size_t>(kValues), Tr::narrow(1.0f));
    expect_ok(decode_packet(view, decoded.data(), adjusted, threads), "digest");

    Crc crc;
    for (const double value : {s.minimum, s.maximum, s.sum_squares}) crc.add_value(value);
    crc.add(sample);
    crc.add_value(entropy);
    crc.add(packet);
    crc.add(residual);
    crc.add(decoded);
    if (runs) crc.add(sample_numbers.data(), sizeof(sample_numbers));
    return crc.value();
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: golden_check FOLDER, where *.qcm and decoded.json are\n");
        return 2;
    }
    const std::filesystem::path folder = argv[1];
    const Bytes text = read(folder / "decoded.json");
    const std::string decoded_json(text.begin(), text.end());
    int packets = 0;
    for (const std::string& version : kernel_versions()) {
        expect(use_kernel_version(version.c_str()), "a listed version can be used");
        for (const int threads : {1, 2}) {
            for (const auto& entry : std::filesystem::directory_iterator(folder)) {
                if (entry.path().extension() != ".qcm") continue;
                ++packets;
                check_packet(entry.path(), decoded_json, threads);
            }
            std::size_t i = 0;
            for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64}) {
                for (const Case& c : kCases) {
                    const std::uint32_t found =
                        dispatch(dtype, [&](auto traits) { return digest<decltype(traits)>(c, dtype, threads); });
                    char line[80];
                    std::snprintf(line, sizeof(line), "digest %zu is 0x%08X with %d threads", i, found, threads);
                    expect(found == kDigests[i++], line);
                }
            }
        }
        std::printf("%s: checked\n", version.c_str());
    }
    expect(packets > 0, "no packet in " + folder.string());
    std::printf("golden_check: %d packets, %zu digests, %d failures\n", packets, kDigests.size(), failures);
    return failures == 0 ? 0 : 1;
}
