// Bytes to a request to encode: values of every kind, on a grid that suits them or on a random one.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "fuzz.h"
#include "qcomm/huffman.h"
#include "qcomm/packet.h"
#include "qcomm/parallel.h"
#include "qcomm/statistics.h"

namespace qcomm::fuzz {

// Decisions come from the front of the input and bit patterns of values from its back, so that a mutation of one does
// not change the meaning of the other. Zeros where it is used up.
class Input {
public:
    Input(const std::uint8_t* data, std::size_t size) : at_(data), end_(data + size), choice_(hash(data, size)) {}

    // Decides about what costs time. A mutation of an input has another one.
    std::uint64_t choice() const { return choice_; }
    // The most values of a segment that is not short.
    int most_values() const { return choice_ % 8 == 0 ? 9000 : 900; }

    // A number from the front, and one from the back.
    template <class T>
    T take() {
        return read<T>([&] { return *at_++; });
    }
    template <class T>
    T take_pattern() {
        return read<T>([&] { return *--end_; });
    }
    // 0 .. bound - 1. Small inputs give small numbers, so an input that shrinks becomes a simpler request.
    int below(int bound) { return take<std::uint16_t>() % bound; }

    // Roughly normal, of standard deviation 1: many values from few bytes.
    double bell() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        const std::uint64_t bits = state_ ^ state_ >> 29;
        const std::uint64_t sum = (bits >> 48) + (bits >> 32 & 0xFFFF) + (bits >> 16 & 0xFFFF) + (bits & 0xFFFF);
        return (static_cast<double>(sum) * 0x1p-16 - 2.0) * std::sqrt(3.0);
    }
    // Starts bell() anew, so that one segment's values do not depend on how many the one before had.
    void seed() { state_ = take<std::uint16_t>(); }

private:
    template <class T, class Next>
    T read(Next next) {
        std::array<std::uint8_t, sizeof(T)> bytes{};
        for (std::uint8_t& byte : bytes) byte = at_ == end_ ? std::uint8_t{0} : next();
        return bit_cast<T>(bytes);
    }

    const std::uint8_t *at_, *end_;
    std::uint64_t choice_, state_ = 0;
};

// A segment, with its values and residuals.
template <class Tr>
struct Part {
    std::vector<typename Tr::Storage> values;
    std::vector<float> residual;  // empty: none
    bool adds_residual = true;    // the values have the residual, too, not only the place for a new one
    Quantizer quantizer;
    bool chosen = false;  // the quantizer was chosen for the values, so it must be accepted
};

// A whole packet's worth of segments.
template <class Tr>
struct Request {
    std::vector<Part<Tr>> parts;
    EncodeOptions options;
    double inv_scale = 1.0;
    bool valid = true;  // encoding may not refuse it

    // `residual`: that of the part, or its copy in another place.
    Values values(std::size_t part, const float* residual) const {
        const auto& stored = parts[part].values;
        return {stored.data(), options.dtype, static_cast<std::int64_t>(stored.size()),
                parts[part].adds_residual ? residual : nullptr, inv_scale};
    }
};

// `count` values in one of four styles: bit patterns, a bell with patterns among it, multiples that repeat, a bell. The
// scale is a power of 2 over the range of exponents, so that grids meet subnormals and values near the largest.
template <class Tr>
std::vector<typename Tr::Storage> make_values(Input* in, int count) {
    using Storage = typename Tr::Storage;
    std::vector<Storage> values(static_cast<std::size_t>(count));
    const int style = in->below(4), every = 1 + in->below(64);
    const double scale = std::ldexp(1.0, in->take<std::int8_t>() * (sizeof(Storage) == 8 ? 8 : 1));
    in->seed();
    int i = 0;
    for (Storage& value : values) {
        const double x = in->bell();
        // Bit patterns have their turn in each style: infinities, NaN, subnormals, the largest and equal values.
        if (style == 0 || (style == 1 && i % every == 0))
            value = in->take_pattern<Storage>();
        else if (style == 2)
            value = Tr::narrow(std::floor(x * every / 16) * scale);
        else
            value = Tr::narrow(x * scale);
        ++i;
    }
    return values;
}

// Any fields at all: an encoder must refuse such a quantizer, or keep its promises with it.
inline Quantizer random_quantizer(Input* in, const Statistics& s) {
    Quantizer q;
    q.grid = static_cast<Grid>(in->below(4));
    // 0 and 17 are no numbers of bits, and must be refused where there are symbols.
    q.num_bits = static_cast<std::uint8_t>(in->below(18));
    q.coding = static_cast<Coding>(in->below(6));
    q.table = static_cast<std::uint8_t>(in->below(3) > 0 ? in->take<std::uint8_t>() : in->below(2) * kNoTable);
    // On a range grid the true extremes: values beyond p0 and p1 would be clipped, and no bound of their error would
    // hold.
    q.p0 = is_range(q.grid) ? s.minimum : in->take<double>();
    q.p1 = is_range(q.grid) ? s.maximum : in->take<double>();
    return q;
}

// As qcomm/codec/quantize.py plans: a grid that can hold the values, or raw, or constant.
inline Quantizer choose_quantizer(Input* in, const Values& values, const Statistics& s) {
    if (!s.finite) return {Grid::kNone, 0, in->below(2) ? Coding::kConstant : Coding::kRaw, kTableOnWire, NAN, 0.0};
    if (s.minimum == s.maximum) return {Grid::kNone, 0, Coding::kConstant, kTableOnWire, s.minimum, 0.0};
    Quantizer q;
    if (in->below(2)) {
        q = {Grid::kRangeCenter, static_cast<std::uint8_t>(1 + in->below(16)), Coding::kSingle, kTableOnWire, 0.0, 0.0};
        if (in->below(2)) q.grid = Grid::kRangeEndpoint;
        if (q.num_bits > kMaxCodedBits) q.coding = Coding::kFixed;
        q.p0 = s.minimum;
        q.p1 = s.maximum;
    } else {
        // On both sides of the steps that static tables were made for, which are 2^(-13/4) to 4.
        const double k = std::exp2(in->below(29) / 2.0 - 10.0);  // 2^-10 .. 2^4
        const int bits = in->below(3) ? 4 : 2 + in->below(15);
        const double step = k * std::sqrt(s.sum_squares / static_cast<double>(values.count));
        q = {Grid::kSigma, static_cast<std::uint8_t>(bits), Coding::kSingle, kNoTable, 0.0, step};
        // choose_sigma_code() must not be asked for a step that is not usable.
        if (!is_usable(q, values.dtype)) return {};
        const int way = in->below(3);
        if (way == 0) {
            const SigmaCode code = choose_sigma_code(values, bits, step, k, 0);
            q.coding = code.coding;
            q.table = code.table;
        } else {
            if (bits == kPairBits && way == 1) q.coding = Coding::kPair;
            const StaticCode* code = nearest_static_code(q.coding, bits, k);
            if (code != nullptr && in->below(2))
                q.table = code->id;
            else if (bits <= kMaxCodedBits)
                q.table = kTableOnWire;
        }
    }
    return is_usable(q, values.dtype) ? q : Quantizer{};
}

// Most segments are short; some are longer than a block. Three in four get a quantizer that suits them.
template <class Tr>
Part<Tr> make_part(Input* in, DType dtype, double inv_scale, bool with_residual) {
    Part<Tr> part;
    const int count = in->below(16) ? in->below(300) : in->below(in->most_values());
    part.values = make_values<Tr>(in, count);
    if (with_residual) part.residual = make_values<Traits<DType::kFloat32>>(in, count);
    const Values values{part.values.data(), dtype, count, with_residual ? part.residual.data() : nullptr, inv_scale};
    const Statistics s = measure(values);
    // Values that are not finite are never given a random grid: there a range's extremes mean nothing.
    part.chosen = in->below(4) > 0 || !s.finite;
    part.quantizer = part.chosen ? choose_quantizer(in, values, s) : random_quantizer(in, s);
    return part;
}

// Values of coding runs, whose levels are mostly 0: those with a level are up to `span` apart, so some runs need a
// skip. Every third part has values that do not suit the step at all.
template <class Tr>
std::vector<typename Tr::Storage> make_run_values(Input* in, int count, double step) {
    using T = typename Tr::Arithmetic;
    if (in->below(3) == 0) return make_values<Tr>(in, count);
    std::vector<typename Tr::Storage> values(static_cast<std::size_t>(count));
    const int span = 1 << in->below(12);
    const double spread = std::ldexp(step, in->below(5) - 2);
    in->seed();
    for (int i = 0; i < count; i += 1 + std::abs(static_cast<int>(in->bell() * span / 2)))
        values[static_cast<std::size_t>(i)] = Tr::narrow(static_cast<T>(in->bell() * spread));
    return values;
}

// A segment of coding runs of `least` values or more, which always has a residual. Many are empty or short, so that
// blocks hold several.
template <class Tr>
Part<Tr> make_run_part(Input* in, DType dtype, double inv_scale, int least) {
    Part<Tr> part;
    const int bounds[] = {3, 300, 300, in->most_values()};
    const int count = least + in->below(bounds[in->below(4)]);
    double step =
        std::ldexp(1.0 + in->below(256) / 256.0, in->take<std::int8_t>() * (dtype == DType::kFloat64 ? 8 : 1));
    part.values = make_run_values<Tr>(in, count, step);
    // Also in units of the values' RMS: from far too fine, where nearly all levels are 3, to so coarse that all are 0.
    const Statistics s = measure({part.values.data(), dtype, count, nullptr, inv_scale});
    if (s.finite && count > 0 && in->below(2))
        step = std::exp2(in->below(24) - 10.0) * std::sqrt(s.sum_squares / static_cast<double>(count));
    part.quantizer = {Grid::kSigma, kRunsBits, Coding::kRuns, kTableOnWire, 0.0, step};
    part.chosen = is_usable(part.quantizer, dtype);
    part.adds_residual = sizeof(typename Tr::Storage) >= 4 && in->below(4) > 0;
    if (in->below(4) == 0) {
        part.residual = make_values<Traits<DType::kFloat32>>(in, count);
    } else {
        in->seed();
        for (int i = 0; i < count; ++i) part.residual.push_back(static_cast<float>(in->bell() * step / 4));
    }
    return part;
}

// Mostly one segment, and with `runs` several, most of which are of that coding. 16-bit values have neither a scale nor
// residuals, which encoders refuse.
template <class Tr>
Request<Tr> make_request(Input* in, DType dtype, bool runs) {
    Request<Tr> request;
    const int parts = in->below(4) && !runs ? 1 : 1 + in->below(runs ? 8 : 4);
    request.options.dtype = dtype;
    request.options.checksums = in->below(4) > 0;
    request.options.steps = in->below(2) ? 256 : 1 + in->below(kMaxSteps);
    const bool adjusted = item_bytes(dtype) >= 4 && in->below(2);
    if (adjusted) request.inv_scale = in->below(2) ? std::ldexp(1.0, in->below(64) - 32) : 1.0 / (1 + in->below(1000));
    std::int64_t total = 0;
    // Seldom one is long enough for a second thread. An input that always had one would slow down all that grow from
    // it.
    const int picked = runs ? in->below(1000) % parts : 0;
    const int longest = runs && in->choice() % 4096 == 0 ? picked : -1;
    for (int i = 0; i < parts; ++i) {
        const int least = i == longest ? 2 * static_cast<int>(kValuesPerThread) : 0;
        if (runs && in->below(4) > 0)
            request.parts.push_back(make_run_part<Tr>(in, dtype, request.inv_scale, least));
        else
            request.parts.push_back(make_part<Tr>(in, dtype, request.inv_scale, adjusted && in->below(4) > 0));
        request.valid &= request.parts.back().chosen;
        total += static_cast<std::int64_t>(request.parts.back().values.size());
    }
    // Leading dimensions of 1 keep the product equal to the number of values, as EncodeOptions requires.
    request.options.dims.assign(static_cast<std::size_t>(in->below(6)), 1);
    request.options.dims.push_back(total);
    return request;
}

}  // namespace qcomm::fuzz
