// What a mean on a device needs besides packets: own values and residuals, runs, tensors that take no part, sums that
// are added to what is there, accounts.
#include <algorithm>

#include "cases.h"
#include "qcomm/packet.h"
#include "suite.h"

namespace qcomm::test {
namespace {

using Bytes = std::vector<std::uint8_t>;
using Float32 = Traits<DType::kFloat32>;
constexpr double kScale = 1.0 / 64.0;

std::vector<float> numbers(std::int64_t n, std::uint64_t seed) {
    return make_values<Float32>(Kind::kGaussian, n, seed);
}
bool all_nan(const std::vector<float>& values, std::size_t begin, std::size_t end) {
    return std::all_of(values.begin() + static_cast<std::ptrdiff_t>(begin),
                       values.begin() + static_cast<std::ptrdiff_t>(end), [](float x) { return x != x; });
}

// Three tensors: ordinary, zero throughout, with a NaN; one that is not measured.
struct Measured {
    std::vector<std::vector<float>> values{numbers(5000, 1), std::vector<float>(700, 0.0f), numbers(900, 2),
                                           std::vector<float>(33, 0.5f)};
    std::vector<std::vector<float>> residuals{numbers(5000, 3), numbers(700, 4), numbers(900, 5), {}};
    double inv_scale = kScale;
    Bytes out, blob, workspace;
    std::int64_t total = 0;

    cuda::EncodePlan plan(bool keeps_zero, std::int64_t capacity) {
        std::vector<cuda::Tensor> tensors;
        std::vector<cuda::Segment> segments;
        std::int64_t elements = 0;
        for (std::size_t t = 0; t < values.size(); ++t) {
            cuda::Tensor tensor;
            tensor.values = values[t].data();
            tensor.residual = residuals[t].empty() ? nullptr : residuals[t].data();
            tensor.inv_scale = &inv_scale;
            tensor.count = static_cast<std::int64_t>(values[t].size());
            tensor.quantizer = t == 3 ? Quantizer{} : sigma(4, Coding::kPair, 65);
            tensor.nonfinite_is_constant = true;
            tensor.as_it_is = t == 3;
            tensor.zero_keeps_residual = keeps_zero;
            tensors.push_back(tensor);
            segments.push_back(
                {static_cast<std::int32_t>(t), 0, tensor.count, residuals[t].empty() ? nullptr : residuals[t].data()});
            elements += tensor.count;
        }
        return {DType::kFloat32, 64, true, tensors, segments, {{4, {elements}, out.data(), capacity}}};
    }
    // Measures and encodes, into a part of the bound.
    cuda::EncodePlan run(bool keeps_zero, std::int64_t capacity) {
        values[2][450] = std::numeric_limits<float>::quiet_NaN();
        const std::int64_t bound = plan(keeps_zero, 0).bound(0);
        out.assign(static_cast<std::size_t>(bound), std::uint8_t{0xC5});
        const cuda::EncodePlan made = plan(keeps_zero, capacity > 0 ? capacity : bound);
        require(made.status().ok(), std::string("mean: plan: ") + made.status().what);
        blob = made.blob();
        workspace.assign(static_cast<std::size_t>(made.workspace_bytes()), std::uint8_t{0xA5});
        require(made.measure(blob.data(), codes(), workspace.data(), nullptr).ok(), "mean: measure");
        require(made.encode(blob.data(), codes(), workspace.data(), &total, nullptr).ok(), "mean: encode");
        return made;
    }
};

void zero_tensors() {
    for (const bool keeps : {true, false}) {
        Measured m;
        const std::vector<float> before = m.residuals[1];
        const cuda::EncodePlan plan = m.run(keeps, 0);
        const Quantizer* q = plan.quantizers(m.workspace.data());
        const std::string name = keeps ? "zeros keep their residual" : "zeros do not keep their residual";
        require((plan.absent(m.workspace.data())[1] != 0) == keeps && plan.absent(m.workspace.data())[0] == 0, name);
        require((m.residuals[1] == before) == keeps, name + ": residual");
        require((q[1].coding == Coding::kConstant && q[1].p0 == 0.0) == keeps, name + ": quantizer");
        require(q[2].coding == Coding::kConstant && q[2].p0 != q[2].p0, name + ": NaN");
        require(q[3].coding == Coding::kRaw, name + ": a tensor that is not measured is raw, also a constant one");
        PacketView view;
        std::vector<float> decoded(6633);
        Status status = parse_packet(m.out.data(), m.total, &view);
        if (status.ok()) status = decode_packet(view, decoded.data(), false);
        require(status.ok(), name + ": " + status.what);
        require(decoded[6632] == static_cast<float>(0.5 * kScale), name + ": raw values are scaled");
    }
}

void accounts() {
    Measured m;
    const std::int64_t whole = [&] {
        Measured other;
        other.run(true, 0);
        return other.total;
    }();
    const cuda::EncodePlan plan = m.run(true, whole / 8 * 4);
    cuda::Account account;
    account.packet_bytes = 100;
    for (int times = 0; times < 2; ++times)
        require(plan.count(m.blob.data(), m.workspace.data(), &m.total, &account, nullptr).ok(), "account");
    require(m.total > 0 && account.packet_bytes == 100 + 2 * m.total, "account: bytes");
    require(account.largest_packet == whole, "account: what the packet would have needed");
    require(account.dropped_values == 2 * plan.dropped_values(m.workspace.data())[0], "account: dropped");
    require(account.dropped_values > 0 && account.unsent_packets == 0, "account: unsent");
    require(account.nonfinite_tensors == 2, "account: tensors with NaN");
    m.run(true, 48);
    require(plan.count(m.blob.data(), m.workspace.data(), &m.total, &account, nullptr).ok(), "account");
    require(m.total < 0 && account.unsent_packets == 1, "account: a packet that does not fit");
}

void own_values() {
    for (const bool add : {false, true}) {
        Measured m;
        const std::vector<std::vector<float>> before = m.residuals;
        const cuda::EncodePlan plan = m.run(true, 0);
        m.residuals = before;
        std::vector<float> to = numbers(6633, 9);
        const std::vector<float> there = to;
        std::vector<cuda::Run> runs;
        std::size_t at = 0;
        for (std::size_t t = 0; t < m.values.size(); ++t) {
            const auto n = static_cast<std::int64_t>(m.values[t].size());
            float* residual = m.residuals[t].empty() ? nullptr : m.residuals[t].data();
            runs.push_back({m.values[t].data(), to.data() + at, n, 0, 0, t == 3 ? -1 : static_cast<int>(t), residual});
            at += m.values[t].size();
        }
        const cuda::RunPlan own(DType::kFloat32, runs);
        const Bytes blob = own.blob();
        require(own.add_own(blob.data(), plan, m.workspace.data(), &m.inv_scale, add, nullptr).ok(), "own values");
        at = 0;
        for (std::size_t t = 0; t < m.values.size(); ++t) {
            const std::string name = "own values of tensor " + std::to_string(t);
            for (std::size_t i = 0; i < m.values[t].size(); ++i, ++at) {
                float want = m.values[t][i] * static_cast<float>(kScale);
                if (add) want = there[at] + want;
                if (t == 0) want += before[t][i];  // the others are absent, NaN, and without a residual
                require(t == 2 ? to[at] != to[at] : to[at] == want, name);
            }
            const bool spent = t == 0;
            require(spent ? std::all_of(m.residuals[t].begin(), m.residuals[t].end(), [](float r) { return r == 0.0f; })
                          : m.residuals[t] == before[t],
                    name + ": residual");
        }
    }
}

template <class Tr>
void copies() {
    const std::string name = std::string("copy to ") + name_of(dtype_of<Tr>());
    using T = typename Tr::Arithmetic;
    const std::vector<float> seeds = numbers(9001, 6);
    std::vector<T> from(seeds.begin(), seeds.end());
    std::vector<typename Tr::Storage> to(9001, Tr::narrow(T(7)));
    const unsigned faults[] = {0, 0, 5};
    const double factor = 3.0;
    const cuda::RunPlan plan(dtype_of<Tr>(), {{from.data() + 1, to.data(), 4097, 0, 2, -1, nullptr},
                                              {from.data() + 5000, to.data() + 4097, 0, 0, 0, -1, nullptr},
                                              {from.data() + 5000, to.data() + 5000, 100, 1, 2, -1, nullptr},
                                              {from.data() + 6000, to.data() + 6000, 3001, 0, 0, -1, nullptr}});
    const Bytes blob = plan.blob();
    require(plan.copy(blob.data(), 7.0, &factor, faults, nullptr).ok(), name);
    for (std::size_t i = 0; i < to.size(); ++i) {
        const T got = Tr::widen(to[i]);
        if (i >= 5000 && i < 5100) {
            require(got != got, name + ": a damaged packet's values");
            continue;
        }
        const bool copied = i < 4097 || i >= 6000;
        const T value = copied ? from[i < 4097 ? i + 1 : i] / T(7) * T(3) : T(7);
        require(got == Tr::widen(Tr::narrow(value)), name + ": value " + std::to_string(i));
    }
}

void copies_in_place() {
    std::vector<float> values = numbers(100, 8);
    const std::vector<float> before = values;
    const unsigned faults[] = {0, 1};
    const cuda::RunPlan plan(DType::kFloat32, {{values.data(), values.data(), 60, 0, 1, -1, nullptr},
                                               {values.data() + 60, values.data() + 60, 40, 1, 1, -1, nullptr}});
    const Bytes blob = plan.blob();
    require(plan.copy(blob.data(), 1.0, nullptr, faults, nullptr).ok(), "copy in place");
    require(std::equal(values.begin(), values.begin() + 60, before.begin()), "copy in place: values");
    require(all_nan(values, 60, 100), "copy in place: a damaged packet's values");
    require(!cuda::RunPlan(DType::kFloat32, {{nullptr, nullptr, -1, 0, 0, -1, nullptr}}).status().ok(),
            "a negative count");
}

void sums_added() {
    Measured m;
    m.run(true, 0);
    PacketView view;
    std::vector<float> once(6633);
    Status status = parse_packet(m.out.data(), m.total, &view);
    if (status.ok()) status = decode_packet(view, once.data(), false);
    require(status.ok(), std::string("sum: ") + status.what);
    std::vector<float> sum = numbers(6633, 10);
    const std::vector<float> there = sum;
    const cuda::DecodeTask task{m.out.data(), static_cast<std::int64_t>(m.out.size()), sum.data(), 6633, false};
    const cuda::DecodePlan plan(DType::kFloat32, 64, 4, {task, task});
    const Bytes blob = plan.blob();
    Bytes workspace(static_cast<std::size_t>(plan.workspace_bytes()), std::uint8_t{0xA5});
    std::vector<unsigned> faults(2, 9u);
    status = plan.decode_sum(blob.data(), codes(), workspace.data(), faults.data(), nullptr, true);
    require(status.ok() && faults[0] == 0 && faults[1] == 0, "sum added");
    for (std::size_t i = 0; i < sum.size(); ++i) {
        const float want = there[i] + once[i] + once[i];
        require(sum[i] == want || (sum[i] != sum[i] && want != want), "sum added: value " + std::to_string(i));
    }
}

void no_packets() {
    const std::vector<float> values = numbers(40000, 11);
    cuda::Tensor tensor;
    tensor.values = values.data();
    tensor.count = static_cast<std::int64_t>(values.size());
    const cuda::EncodePlan plan(DType::kFloat32, 64, true, {tensor}, {}, {});
    const Bytes blob = plan.blob();
    Bytes workspace(static_cast<std::size_t>(plan.workspace_bytes()), std::uint8_t{0xA5});
    require(plan.measure(blob.data(), codes(), workspace.data(), nullptr).ok(), "no packets: measure");
    require(plan.encode(blob.data(), codes(), workspace.data(), nullptr, nullptr).ok(), "no packets: encode");
    require(plan.statistics(workspace.data())[0].finite, "no packets: statistics");
}

}  // namespace

void mean_group() {
    zero_tensors();
    accounts();
    own_values();
    copies<Float32>();
    copies<Traits<DType::kBFloat16>>();
    copies<Traits<DType::kFloat16>>();
    copies<Traits<DType::kFloat64>>();
    copies_in_place();
    sums_added();
    no_packets();
}

}  // namespace qcomm::test
