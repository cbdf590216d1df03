// Random values on random grids, with and without error feedback, encoded and decoded: each value comes back within its
// grid's bound (exactly, where it is raw), the residual is what was lost, the packet is no larger than promised,
// nothing is written beside the buffers, and every version of the inner loops writes the same packet.
#include "fuzz.h"
#include "fuzz_case.h"

using namespace qcomm;
using namespace qcomm::fuzz;

namespace {

constexpr std::int64_t kAllowance = 128;  // the promise of qcomm.compress on top of the values, up to 6 dimensions

// The results of a request with one version.
struct Outcome {
    bool accepted = false;
    std::vector<std::uint8_t> packet, decoded;
    std::vector<std::vector<float>> residuals;
};

// Bytes are compared, residuals included, so that even the bits of a NaN must agree.
bool same_outcome(const Outcome& a, const Outcome& b) {
    bool same = a.accepted == b.accepted && a.packet == b.packet && a.decoded == b.decoded;
    for (std::size_t i = 0; i < a.residuals.size(); ++i) {
        same &= same_bytes(a.residuals[i].data(), b.residuals[i].data(), a.residuals[i].size() * sizeof(float));
    }
    return same;
}

// Encodes with a byte too little first, which must be refused without a trace, then with enough, and decodes.
template <class Tr>
Outcome encode_and_decode(const Request<Tr>& request) {
    Outcome outcome;
    for (const Part<Tr>& part : request.parts) outcome.residuals.push_back(part.residual);
    std::vector<SegmentInput> inputs;
    for (std::size_t i = 0; i < request.parts.size(); ++i) {  // residuals are updated in place, as error feedback does
        float* residual = request.parts[i].residual.empty() ? nullptr : outcome.residuals[i].data();
        inputs.push_back({request.values(i, residual), request.parts[i].quantizer, residual});
    }
    const EncodeOptions& options = request.options;
    const std::int64_t capacity = encode_bound(inputs, options);
    Guarded out(capacity);
    std::int64_t size = 0;
    Status status = encode_packet(inputs, options, out.data(), capacity - 1, &size);
    require(!status.ok() && out.intact() && out.holds_only(Guarded::kCanary), "nothing is written before a refusal");
    require(status.code == StatusCode::kNoSpace || !request.valid, "a quantizer made for the values is accepted");
    if (status.code != StatusCode::kNoSpace) return outcome;
    status = encode_packet(inputs, options, out.data(), capacity, &size);
    require(status.ok() && out.intact() && size <= capacity, "a packet keeps to encode_bound");
    outcome.accepted = true;
    outcome.packet.assign(out.data(), out.data() + size);

    PacketView view;
    status = parse_packet(outcome.packet.data(), size, &view);
    require(status.ok() && view.dims == options.dims, "what was written can be parsed");
    Guarded back(options.dims.back() * item_bytes(options.dtype));
    // Each segment adds a record, and one with a residual may not fall back to raw: the promise is for neither.
    if (inputs.size() == 1 && outcome.residuals[0].empty())
        require(size <= back.size() + kAllowance, "a packet is hardly larger than its values");
    status = decode_packet(view, back.data(), false);
    require(status.ok() && back.intact(), "what was written can be decoded, and stays in its destination");
    outcome.decoded.assign(back.data(), back.data() + back.size());
    return outcome;
}

// The distance of neighbours of a dtype around `magnitude`.
long double spacing(DType dtype, long double magnitude) {
    const auto at_least = [&](long double relative, long double least) {
        return std::max(relative * magnitude, least);
    };
    if (dtype == DType::kFloat16) return at_least(0x1p-10L, 0x1p-24L);
    if (dtype == DType::kBFloat16) return at_least(0x1p-7L, 0x1p-133L);
    return dtype == DType::kFloat32 ? at_least(0x1p-23L, 0x1p-149L) : at_least(0x1p-52L, 0x1p-1074L);
}

// The farthest that a grid may move a value: half a step, and the rounding of its arithmetic and of the dtype.
// In long double, so that the bound's own rounding does not count beside that of the values.
long double bound(const Quantizer& q, DType dtype, long double magnitude) {
    const long double levels = std::ldexp(1.0L, q.num_bits) - (q.grid == Grid::kRangeEndpoint ? 1 : 0);
    const long double step = q.grid == Grid::kSigma ? q.p1 : (static_cast<long double>(q.p1) - q.p0) / levels;
    const DType arithmetic = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    // Beyond half a step it is slack for roundings: of the grid's arithmetic at the value's magnitude, and of the
    // result to the dtype, which may lie farther from 0 than the value.
    return step / 2 * (1 + 0x1p-20L) + 3 * spacing(arithmetic, magnitude) + spacing(dtype, magnitude + step);
}

// Compares a segment with its values, by the coding that its record says it has got.
template <class Tr>
void check_part(const Part<Tr>& part, const Values& values, const SegmentRecord& record,
                const typename Tr::Storage* decoded, const std::vector<float>& residual) {
    using T = typename Tr::Arithmetic;
    using Storage = typename Tr::Storage;
    const Reader<Tr> reader(values);
    const Quantizer& q = part.quantizer;
    const bool constant = record.coding == Coding::kConstant;
    for (std::size_t i = 0; i < part.values.size(); ++i) {
        const T u = reader[static_cast<std::int64_t>(i)], back = Tr::widen(decoded[i]);
        if (record.coding == Coding::kRaw || constant) {
            // Without a scale and a residual the bits are those of the input: a NaN's, too, which narrow() might
            // change.
            const Storage raw = values.is_adjusted() ? Tr::narrow(u) : part.values[i];
            const Storage exact = constant ? Tr::narrow(static_cast<T>(q.p0)) : raw;
            require(same_bytes(&exact, decoded + i, sizeof(exact)), "raw and constant values come back bit for bit");
        } else {
            const long double error = std::fabs(static_cast<long double>(u) - back);
            require(error <= bound(q, values.dtype, std::fabs(u)), "the error is within half a step and rounding");
        }
        // A residual of a constant that is not finite waits; else it is the loss, and 0 where that is not finite.
        if (residual.empty()) continue;
        const bool untouched = constant && !std::isfinite(q.p0);
        const float lost = std::isfinite(u) ? static_cast<float>(u - back) : 0.0f;
        const float expected = untouched ? part.residual[i] : lost;
        require(residual[i] == expected || (std::isnan(expected) && std::isnan(residual[i])),
                "the residual is what was lost");
    }
}

// The values need to be compared for one version only, since all must give the same.
template <class Tr>
void check_request(const Request<Tr>& request) {
    Outcome scalar;
    on_every_version([&](int version) {
        Outcome outcome = encode_and_decode(request);
        if (version == 0)
            scalar = std::move(outcome);
        else
            require(same_outcome(outcome, scalar), "every version writes and reads the same bytes");
    });
    if (!scalar.accepted) return;
    PacketView view;
    require(parse_packet(scalar.packet.data(), static_cast<std::int64_t>(scalar.packet.size()), &view).ok(), "parses");
    auto* decoded = reinterpret_cast<const typename Tr::Storage*>(scalar.decoded.data());
    for (std::size_t i = 0; i < request.parts.size(); ++i) {
        const Part<Tr>& part = request.parts[i];
        const float* residual = part.residual.empty() ? nullptr : part.residual.data();
        check_part<Tr>(part, request.values(i, residual), view.records[i], decoded, scalar.residuals[i]);
        decoded += part.values.size();
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input input(data, size);
    const auto dtype = static_cast<DType>(input.below(4));
    dispatch(dtype, [&](auto traits) { check_request(make_request<decltype(traits)>(&input, dtype)); });
    return 0;
}
