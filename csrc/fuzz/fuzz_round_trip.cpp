// Random values on random grids, with and without error feedback, encoded and decoded: each value comes back within its
// grid's bound (exactly, where it is raw), the residual is what was lost, the packet is no larger than promised,
// nothing is written beside the buffers, and every version of the inner loops writes the same packet, with any number
// of threads. Of coding runs each level is known, and a block with a loss that is not finite is NaN as a whole.
#include <array>

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
    std::vector<std::array<double, kSampleNumbers>> samples;  // of parts of coding runs
};

bool same_or_nan(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// Bytes are compared, residuals included, so that even the bits of a NaN must agree; those of sums need not.
bool same_outcome(const Outcome& a, const Outcome& b) {
    bool same = a.accepted == b.accepted && a.packet == b.packet && a.decoded == b.decoded;
    for (std::size_t i = 0; i < a.samples.size(); ++i)
        same &= std::equal(a.samples[i].begin(), a.samples[i].end(), b.samples[i].begin(), same_or_nan);
    for (std::size_t i = 0; i < a.residuals.size(); ++i) {
        same &= same_bytes(a.residuals[i].data(), b.residuals[i].data(), a.residuals[i].size() * sizeof(float));
    }
    return same;
}

// Adding to other values gives what decoding gives, rounded once. Zeros of coding runs leave them as they are, so none
// of them is a negative zero.
template <class Tr>
void check_sums(const PacketView& view, const Guarded& decoded, const typename Tr::Storage* values, int threads) {
    using Storage = typename Tr::Storage;
    Guarded out(decoded.size());
    auto* const sums = reinterpret_cast<Storage*>(out.data());
    const auto count = static_cast<std::int64_t>(view.header.element_count);
    const auto base = [](std::int64_t i) { return static_cast<Storage>(i % 5 - 2); };
    for (std::int64_t i = 0; i < count; ++i) sums[i] = base(i);
    require(decode_packet(view, out.data(), true, threads).ok() && out.intact(), "what decodes can be added");
    bool added = true;
    for (std::int64_t i = 0; i < count; ++i) {
        const Storage expected = base(i) + values[i];
        added &= sums[i] == expected || (expected != expected && sums[i] != sums[i]);
    }
    require(added, "accumulate adds what is stored");
}

// Encodes with a byte too little first, which must be refused without a trace, then with enough, and decodes.
template <class Tr>
Outcome encode_and_decode(const Request<Tr>& request, int threads) {
    Outcome outcome;
    outcome.samples.resize(request.parts.size());
    for (const Part<Tr>& part : request.parts) outcome.residuals.push_back(part.residual);
    std::vector<SegmentInput> inputs;
    for (std::size_t i = 0; i < request.parts.size(); ++i) {  // residuals are updated in place, as error feedback does
        float* residual = request.parts[i].residual.empty() ? nullptr : outcome.residuals[i].data();
        inputs.push_back(
            {request.values(i, residual), request.parts[i].quantizer, residual, outcome.samples[i].data()});
    }
    EncodeOptions options = request.options;
    options.threads = threads;
    const std::int64_t capacity = encode_bound(inputs, options);
    Guarded out(capacity);
    std::int64_t size = 0;
    Status status = encode_packet(inputs, options, out.data(), capacity - 1, &size);
    require(!status.ok() && out.intact() && out.holds_only(Guarded::kCanary), "nothing is written before a refusal");
    for (std::size_t i = 0; i < inputs.size(); ++i)
        require(same_bytes(outcome.residuals[i].data(), request.parts[i].residual.data(),
                           outcome.residuals[i].size() * sizeof(float)),
                "no residual is changed before a refusal");
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
    status = decode_packet(view, back.data(), false, threads);
    require(status.ok() && back.intact(), "what was written can be decoded, and stays in its destination");
    if constexpr (sizeof(typename Tr::Storage) >= 4)
        check_sums<Tr>(view, back, reinterpret_cast<const typename Tr::Storage*>(back.data()), threads);
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
class Bound {
public:
    Bound(const Quantizer& q, DType dtype) : dtype_(dtype) {
        const long double levels = std::ldexp(1.0L, q.num_bits) - (q.grid == Grid::kRangeEndpoint ? 1 : 0);
        step_ = q.grid == Grid::kSigma ? q.p1 : (static_cast<long double>(q.p1) - q.p0) / levels;
        // A little less, because of its own roundings.
        surely_ = static_cast<double>(step_ / 2) * (1 - 0x1p-30);
    }
    bool holds(double u, double back) const {
        // Mostly enough.
        if (std::fabs(u - back) <= surely_) return true;
        const long double magnitude = std::fabs(u), error = std::fabs(static_cast<long double>(u) - back);
        const DType arithmetic = dtype_ == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
        // Beyond half a step it is slack for roundings: of the grid's arithmetic at the value's magnitude, and of the
        // result to the dtype, which may lie farther from 0 than the value.
        return error <=
               step_ / 2 * (1 + 0x1p-20L) + 3 * spacing(arithmetic, magnitude) + spacing(dtype_, magnitude + step_);
    }

private:
    DType dtype_;
    long double step_;
    double surely_;
};

// Compares a segment with its values, by the coding that its record says it has got.
template <class Tr>
void check_part(const Part<Tr>& part, const Values& values, const SegmentRecord& record,
                const typename Tr::Storage* decoded, const std::vector<float>& residual) {
    using T = typename Tr::Arithmetic;
    using Storage = typename Tr::Storage;
    const Reader<Tr> reader(values);
    const Quantizer& q = part.quantizer;
    const Bound bound(q, values.dtype);
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
            require(bound.holds(u, back), "the error is within half a step and rounding");
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

// A segment of coding runs as docs/format.md defines it.
template <class Tr>
struct RunSegment {
    std::size_t part;
    const typename Tr::Storage* decoded;
    std::int64_t first;  // of its values among all of coding runs
    std::vector<int> levels;
    std::vector<float> lost;
};

template <class Tr>
RunSegment<Tr> make_run_segment(const Request<Tr>& request, std::size_t number, const typename Tr::Storage* decoded,
                                std::int64_t first) {
    using T = typename Tr::Arithmetic;
    const Part<Tr>& part = request.parts[number];
    const Reader<Tr> reader(request.values(number, part.residual.data()));
    const T step = static_cast<T>(part.quantizer.p1), inv = T(1) / step;
    RunSegment<Tr> segment{number, decoded, first, {}, {}};
    for (std::size_t i = 0; i < part.values.size(); ++i) {
        const T u = reader[static_cast<std::int64_t>(i)];
        const T level = std::fmax(T(-3), std::fmin(T(3), std::nearbyint(u * inv)));
        segment.levels.push_back(static_cast<int>(level));
        segment.lost.push_back(static_cast<float>(u - level * step));
    }
    return segment;
}

// Compares all segments of coding runs, whose blocks are common to them: whole blocks are NaN, and their residuals left
// alone, where a loss is not finite.
template <class Tr>
void check_runs(const Request<Tr>& request, const PacketView& view, const std::vector<RunSegment<Tr>>& segments,
                const std::vector<std::vector<float>>& residuals) {
    std::int64_t total = 0;
    for (const RunSegment<Tr>& segment : segments) total += static_cast<std::int64_t>(segment.levels.size());
    const std::int64_t units = ceil_div(total, 32), blocks = ceil_div(total, 128 * request.options.steps);
    std::vector<bool> not_finite(static_cast<std::size_t>(blocks) + 1);
    // Calls f(segment, index in it, number of the block) for all values.
    const auto for_values = [&](auto f) {
        std::int64_t block = 0;
        for (const RunSegment<Tr>& segment : segments) {
            for (std::size_t i = 0; i < segment.levels.size(); ++i) {
                const std::int64_t at = segment.first + static_cast<std::int64_t>(i);
                while (at >= std::min(total, 32 * (units * (block + 1) / blocks))) ++block;
                f(segment, i, static_cast<std::size_t>(block));
            }
        }
    };
    for_values([&](const RunSegment<Tr>& segment, std::size_t i, std::size_t block) {
        if (!std::isfinite(segment.lost[i])) not_finite[block] = true;
    });
    std::vector<std::array<std::uint64_t, 8>> counts(request.parts.size());
    for_values([&](const RunSegment<Tr>& segment, std::size_t i, std::size_t block) {
        using T = typename Tr::Arithmetic;
        const Part<Tr>& part = request.parts[segment.part];
        const T back = Tr::widen(segment.decoded[i]), step = static_cast<T>(part.quantizer.p1);
        const float residual = residuals[segment.part][i];
        if (not_finite[block]) {
            const float old = part.adds_residual ? part.residual[i] : 0.0f;
            require(std::isnan(back), "a block with a loss that is not finite is NaN");
            require(same_bytes(&residual, &old, sizeof(old)), "its residuals stay as they were");
        } else {
            require(back == Tr::widen(Tr::narrow(static_cast<T>(segment.levels[i]) * step)), "a level comes back");
            require(residual == segment.lost[i], "the residual is what was lost");
            ++counts[segment.part][static_cast<std::size_t>(segment.levels[i] + 3)];
        }
    });
    static std::vector<std::uint64_t> found(65536);  // static, as all are 0 again afterwards
    for (const RunSegment<Tr>& segment : segments) {
        require(count_symbols(view, segment.part, found.data()).ok(), "levels can be counted");
        require(std::equal(counts[segment.part].begin(), counts[segment.part].end(), found.begin()), "as they occur");
        std::fill_n(found.begin(), 8, std::uint64_t{0});
    }
}

// The values need to be compared for one version only, since all must give the same. A request that is large enough for
// threads compares those instead of versions: it takes a hundred times as long as others.
template <class Tr>
void check_request(const Request<Tr>& request, std::uint64_t choice) {
    Outcome scalar;
    const bool large = request.options.dims.back() >= 2 * kValuesPerThread;
    on_two_versions(choice / 8, [&](int version) {
        if (version == 0)
            scalar = encode_and_decode(request, 1);
        else if (!large)
            require(same_outcome(encode_and_decode(request, 1), scalar), "every version writes and reads the same");
    });
    if (large) require(same_outcome(encode_and_decode(request, 3), scalar), "any number of threads gives the same");
    if (!scalar.accepted) return;
    PacketView view;
    require(parse_packet(scalar.packet.data(), static_cast<std::int64_t>(scalar.packet.size()), &view).ok(), "parses");
    auto* decoded = reinterpret_cast<const typename Tr::Storage*>(scalar.decoded.data());
    std::vector<RunSegment<Tr>> runs;
    std::int64_t run_values = 0;
    for (std::size_t i = 0; i < request.parts.size(); ++i) {
        const Part<Tr>& part = request.parts[i];
        const float* residual = part.residual.empty() ? nullptr : part.residual.data();
        if (view.records[i].coding == Coding::kRuns) {
            runs.push_back(make_run_segment(request, i, decoded, run_values));
            run_values += static_cast<std::int64_t>(part.values.size());
        } else {
            check_part<Tr>(part, request.values(i, residual), view.records[i], decoded, scalar.residuals[i]);
        }
        decoded += part.values.size();
    }
    check_runs(request, view, runs, scalar.residuals);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input input(data, size);
    const int kind = input.below(8);
    const auto dtype = static_cast<DType>(kind % 4);
    dispatch(dtype, [&](auto traits) {
        check_request(make_request<decltype(traits)>(&input, dtype, kind >= 4), input.choice());
    });
    return 0;
}
