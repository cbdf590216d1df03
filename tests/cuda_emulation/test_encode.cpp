// Encoding: the emulated kernels against the CPU codec. Statistics, quantizers, packets and residuals must be equal,
// byte for byte.
#include <algorithm>

#include "cases.h"
#include "qcomm/cuda.h"
#include "qcomm/entropy.h"
#include "qcomm/packet.h"
#include "suite.h"

namespace qcomm::test {
namespace {

using Bytes = std::vector<std::uint8_t>;

// The specification is qcomm/codec/quantize.py, plan().
template <class Tr>
Quantizer plan(const Values& values, const Statistics& s, const cuda::Tensor& t) {
    if (!s.finite) {
        if (!t.nonfinite_is_constant) return {};
        return {Grid::kNone, 0, Coding::kConstant, kTableOnWire, std::numeric_limits<double>::quiet_NaN(), 0.0};
    }
    if (s.minimum == s.maximum) return {Grid::kNone, 0, Coding::kConstant, kTableOnWire, s.minimum, 0.0};
    Quantizer q = t.quantizer;
    if (q.grid == Grid::kNone) return {};
    const auto usable = [&] { return with_grid<Tr>(q, [](const auto& grid) { return grid.usable(); }); };
    if (q.grid == Grid::kSigma) {
        q.p1 = static_cast<typename Tr::Arithmetic>(t.k * std::sqrt(s.sum_squares / static_cast<double>(t.count)));
        if (!is_usable<Tr>(q)) return {};
        if (t.sample.choose_code) {
            const SigmaCode code = choose_sigma_code(values, q.num_bits, q.p1, t.k, 0);
            q.coding = code.coding;
            q.table = code.table;
        }
        return q;
    }
    q.p0 = s.minimum;
    q.p1 = s.maximum;
    if (!std::isfinite(q.p1 - q.p0)) return {};
    if (q.num_bits == 0) {
        const cuda::SampleRule& rule = t.sample;
        const auto counts = sample_histogram(values, q.p0, q.p1, rule.entropy_bits, rule.fraction, rule.seed);
        const double entropy = static_cast<double>(entropy_fixed(counts.data(), static_cast<int>(counts.size()))) /
                               (1 << kLogFractionBits);
        const double most = std::min(std::floor(rule.c + rule.entropy_bits), static_cast<double>(rule.max_bits));
        q.num_bits = static_cast<std::uint8_t>(std::max(1.0, std::min(std::ceil(entropy + rule.c), most)));
        q.coding = q.num_bits > kMaxCodedBits ? Coding::kFixed : Coding::kSingle;
    }
    return usable() ? q : Quantizer{};
}

void check_statistics(const Statistics& got, const Statistics& want, const std::string& name) {
    require(got.finite == want.finite, name + ": finite");
    if (!want.finite) return;
    require(std::memcmp(&got.minimum, &want.minimum, 8) == 0, name + ": minimum");
    require(std::memcmp(&got.maximum, &want.maximum, 8) == 0, name + ": maximum");
    require(std::memcmp(&got.sum_squares, &want.sum_squares, 8) == 0, name + ": sum of squares");
}

// What a request's tensors are to the kernels. Residuals are read from `residuals`.
template <class Tr>
std::vector<cuda::Tensor> make_tensors(const EncodeCase<Tr>& c, std::vector<std::vector<float>>& residuals) {
    std::vector<cuda::Tensor> tensors;
    for (std::size_t t = 0; t < c.values.size(); ++t) {
        cuda::Tensor tensor;
        tensor.values = c.values[t].data();
        tensor.residual = residuals[t].empty() ? nullptr : residuals[t].data();
        tensor.inv_scale = c.inv_scale == 1.0 ? nullptr : &c.inv_scale;
        tensor.count = static_cast<std::int64_t>(c.values[t].size());
        tensor.quantizer = c.quantizers[t];
        tensor.k = c.k[t];
        if (t < c.rules.size()) tensor.sample = c.rules[t];
        tensor.nonfinite_is_constant = c.nonfinite_is_constant;
        tensors.push_back(tensor);
    }
    return tensors;
}

void check_quantizer(const Quantizer& got, const Quantizer& want, const std::string& name) {
    const auto text = [](const Quantizer& q) {
        return std::to_string(q.num_bits) + " bits, coding " + std::to_string(static_cast<int>(q.coding)) + ", table " +
               std::to_string(q.table);
    };
    require(
        got.grid == want.grid && got.num_bits == want.num_bits && got.coding == want.coding && got.table == want.table,
        name + ": " + text(got) + ", not " + text(want));
    const bool nan = got.p0 != got.p0 && want.p0 != want.p0;
    require((nan || std::memcmp(&got.p0, &want.p0, 8) == 0) && std::memcmp(&got.p1, &want.p1, 8) == 0,
            name + ": parameters of the quantizer");
}

}  // namespace

const cuda::StaticTables* codes() {
    static const auto* tables = [] {
        auto* t = new cuda::StaticTables;
        cuda::fill_static_tables(t);
        return t;
    }();
    return tables;
}

template <class Tr>
Made encode_emulated(const EncodeCase<Tr>& c, std::vector<std::vector<float>>& residuals,
                     const std::vector<std::int64_t>& capacities, const std::string& name) {
    const std::vector<cuda::Tensor> tensors = make_tensors(c, residuals);
    std::vector<cuda::Segment> segments = c.segments;
    for (cuda::Segment& s : segments) {
        const auto t = static_cast<std::size_t>(s.tensor);
        s.residual_out = residuals[t].empty() ? nullptr : residuals[t].data() + s.offset;
    }
    std::vector<cuda::Packet> packets;
    std::size_t next = 0;
    for (const int count : c.packets) {
        std::int64_t elements = 0;
        for (int i = 0; i < count; ++i) elements += segments[next++].count;
        packets.push_back({count, {elements}, nullptr, 0});
    }
    const auto make_plan = [&] {
        return cuda::EncodePlan(dtype_of<Tr>(), c.steps, c.checksums, tensors, segments, packets);
    };
    const cuda::EncodePlan sizes = make_plan();
    require(sizes.status().ok(), name + ": plan: " + sizes.status().what);
    Made made;
    for (std::size_t p = 0; p < packets.size(); ++p) {
        const std::int64_t capacity = capacities.empty() ? sizes.bound(static_cast<int>(p)) : capacities[p];
        made.outputs.emplace_back(static_cast<std::size_t>(capacity), std::uint8_t{0xC5});
    }
    for (std::size_t p = 0; p < packets.size(); ++p) {
        packets[p].out = made.outputs[p].data();
        packets[p].capacity = static_cast<std::int64_t>(made.outputs[p].size());
    }
    const cuda::EncodePlan plan = make_plan();
    const Bytes blob = plan.blob();
    Bytes workspace(static_cast<std::size_t>(plan.workspace_bytes()), std::uint8_t{0xA5});
    made.totals.resize(packets.size());
    require(plan.measure(blob.data(), codes(), workspace.data(), nullptr).ok(), name + ": measure");
    require(plan.encode(blob.data(), codes(), workspace.data(), made.totals.data(), nullptr).ok(), name + ": encode");
    const Statistics* statistics = plan.statistics(workspace.data());
    const Quantizer* quantizers = plan.quantizers(workspace.data());
    const std::int64_t* dropped = plan.dropped_values(workspace.data());
    made.statistics.assign(statistics, statistics + tensors.size());
    made.quantizers.assign(quantizers, quantizers + tensors.size());
    made.dropped.assign(dropped, dropped + packets.size());
    return made;
}

template <class Tr>
std::vector<std::vector<std::uint8_t>> encode_both(const EncodeCase<Tr>& c, const std::string& name) {
    constexpr DType kDType = dtype_of<Tr>();
    std::vector<std::vector<float>> expected_residuals = c.residuals, residuals = c.residuals;

    // What the CPU makes of it.
    std::vector<Statistics> statistics;
    std::vector<Quantizer> quantizers;
    for (const cuda::Tensor& tensor : make_tensors(c, expected_residuals)) {
        const Values v{tensor.values, kDType, tensor.count, tensor.residual, c.inv_scale};
        statistics.push_back(measure(v));
        quantizers.push_back(plan<Tr>(v, statistics.back(), tensor));
    }
    std::vector<Bytes> expected;
    std::size_t next = 0;
    for (const int count : c.packets) {
        std::vector<SegmentInput> inputs;
        std::int64_t elements = 0;
        for (int i = 0; i < count; ++i, ++next) {
            const cuda::Segment& s = c.segments[next];
            const auto t = static_cast<std::size_t>(s.tensor);
            float* residual = c.residuals[t].empty() ? nullptr : expected_residuals[t].data() + s.offset;
            inputs.push_back(
                {{c.values[t].data() + s.offset, kDType, s.count, residual, c.inv_scale}, quantizers[t], residual});
            elements += s.count;
        }
        EncodeOptions options;
        options.dtype = kDType;
        options.dims = {elements};
        options.checksums = c.checksums;
        options.steps = c.steps;
        Bytes out(static_cast<std::size_t>(encode_bound(inputs, options)));
        std::int64_t total = 0;
        const Status status = encode_packet(inputs, options, out.data(), static_cast<std::int64_t>(out.size()), &total);
        require(status.ok(), name + ": CPU: " + status.what);
        out.resize(static_cast<std::size_t>(total));
        expected.push_back(out);
    }

    const Made made = encode_emulated(c, residuals, {}, name);
    for (std::size_t t = 0; t < c.values.size(); ++t) {
        const std::string where = name + ", tensor " + std::to_string(t);
        check_statistics(made.statistics[t], statistics[t], where);
        check_quantizer(made.quantizers[t], quantizers[t], where);
    }
    for (std::size_t p = 0; p < expected.size(); ++p) {
        const std::string where = name + ", packet " + std::to_string(p);
        const Bytes& out = made.outputs[p];
        require(out.size() >= expected[p].size(), where + ": bound");
        const auto total = static_cast<std::int64_t>(expected[p].size());
        require(std::memcmp(out.data(), expected[p].data(), expected[p].size()) == 0,
                where + ": " + difference(out.data(), expected[p].data(), total));
        require(made.totals[p] == total,
                where + ": size " + std::to_string(made.totals[p]) + ", not " + std::to_string(total));
        require(made.dropped[p] == 0, where + ": values dropped");
        for (std::size_t i = expected[p].size(); i < out.size(); ++i)
            require(out[i] == 0xC5, where + ": written behind the end");
    }
    for (std::size_t t = 0; t < residuals.size(); ++t)
        require(same_bytes(residuals[t], expected_residuals[t]), name + ": residual of tensor " + std::to_string(t));
    return expected;
}

template std::vector<std::vector<std::uint8_t>> encode_both(const EncodeCase<Traits<DType::kFloat32>>&,
                                                            const std::string&);
template std::vector<std::vector<std::uint8_t>> encode_both(const EncodeCase<Traits<DType::kFloat16>>&,
                                                            const std::string&);
template std::vector<std::vector<std::uint8_t>> encode_both(const EncodeCase<Traits<DType::kBFloat16>>&,
                                                            const std::string&);
template std::vector<std::vector<std::uint8_t>> encode_both(const EncodeCase<Traits<DType::kFloat64>>&,
                                                            const std::string&);

template Made encode_emulated(const EncodeCase<Traits<DType::kFloat32>>&, std::vector<std::vector<float>>&,
                              const std::vector<std::int64_t>&, const std::string&);

}  // namespace qcomm::test
