// Grids: values to symbols and back. The arithmetic is part of the wire format (docs/format.md, "Grids"); q means the
// level's number.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "qcomm/format.h"
#include "qcomm/values.h"

namespace qcomm {

// The part of a segment record that describes its grid and its code: everything needed to encode a tensor once it has
// been measured. check() below says which combinations are legal. A constant segment's value is p0; a raw one has none.
// qcomm/codec/plans_cuda.py reads it out of a plan's workspace by offsets: the four bytes at 0 to 3, p0 at 8, p1 at 16.
struct Quantizer {
    Grid grid = Grid::kNone;
    std::uint8_t num_bits = 0;
    Coding coding = Coding::kRaw;
    std::uint8_t table = kTableOnWire;
    double p0 = 0.0;
    double p1 = 0.0;
};
constexpr Quantizer quantizer_of(const SegmentRecord& r) { return {r.grid, r.num_bits, r.coding, r.table, r.p0, r.p1}; }

// 2^N levels over [lo, hi] in float64, whatever the dtype. center: bin midpoints (Oland and Raj, ICASSP 2015).
// endpoint: both ends are levels, so that decoding and encoding again changes nothing. |error| <= half a level's
// distance plus half an ulp of the result.
//
// Both are one formula: q = floor((x - lo) * inv + (0.5 - offset)) and value = lo + (q + offset) * step, where center
// has 2^N intervals and offset 0.5, endpoint 2^N - 1 intervals and offset 0.
// Precondition of the constructor: num_bits <= 16. Any lo and hi may be given, and usable() asked.
class RangeQuantizer {
public:
    QCOMM_INLINE RangeQuantizer(Grid grid, int num_bits, double lo, double hi)
        : lo_(lo),
          hi_(hi),
          top_((1u << num_bits) - 1u),
          offset_(grid == Grid::kRangeCenter ? 0.5 : 0.0),
          intervals_(grid == Grid::kRangeCenter ? static_cast<double>(top_) + 1.0 : static_cast<double>(top_)),
          inv_(intervals_ / (hi - lo)),
          step_((hi - lo) / intervals_) {}

    // Tells whether every value of [lo, hi] has a symbol. It is false for a range that overflows or is too small to
    // divide by: its inverse is infinite, and 0 * infinity would be NaN at lo itself.
    QCOMM_INLINE bool usable() const {
        return __builtin_isfinite(lo_) && __builtin_isfinite(hi_) && __builtin_isfinite(hi_ - lo_) && lo_ < hi_ &&
               __builtin_isfinite(inv_);
    }

    // Returns the symbol of x: the level nearest to it, or its bin. Precondition: usable(), x is not NaN.
    QCOMM_INLINE std::uint32_t operator()(double x) const {
        const double q = (x - lo_) * inv_ + (0.5 - offset_);
        // Below lo there should be nothing; a symbol outside the alphabet would be written out of bounds.
        const double low = q > 0.0 ? q : 0.0, top = static_cast<double>(top_);
        // What is left is not negative, so truncation is the formula's floor.
        // By way of a signed integer, for which all processors have an instruction.
        return static_cast<std::uint32_t>(static_cast<std::int32_t>(low < top ? low : top));
    }
    // Returns the value of a symbol. The fused multiply-add is part of the format. It rounds once, but the last
    // endpoint level would still miss hi by that rounding, so it is hi by definition.
    QCOMM_INLINE double decode(std::uint32_t symbol) const {
        return offset_ == 0.0 && symbol == top_ ? hi_
                                                : __builtin_fma(static_cast<double>(symbol) + offset_, step_, lo_);
    }
    // The interface that SigmaQuantizer shares: here all levels have symbols.
    QCOMM_INLINE bool has_all_levels() const { return true; }
    QCOMM_INLINE std::uint32_t symbol_of_all(double x) const { return (*this)(x); }
    // For vector versions of decode().
    QCOMM_INLINE double lo() const { return lo_; }
    QCOMM_INLINE double hi() const { return hi_; }
    QCOMM_INLINE std::uint32_t top() const { return top_; }
    QCOMM_INLINE double offset() const { return offset_; }
    QCOMM_INLINE double step() const { return step_; }

private:
    // In the order in which the constructor computes them, each from those before it.
    double lo_, hi_;
    std::uint32_t top_;
    double offset_, intervals_, inv_, step_;
};

// Levels at multiples of `step`, zero among them (mid-tread), rounded to nearest even, computed in T. A value outside
// the levels gets the escape symbol and keeps its value, so nothing is clipped. |error| <= step / 2 plus rounding.
//
//   symbol  0 .. R-1     R    R+1 .. 2R     2^N - 1       R = 2^(N-1) - 1 levels each side of zero
//   level   -R .. -1     0    1 .. R        escape
//
// Where R * step exceeds the largest finite value, only `limit` < R levels each side are used.
//
// Precondition of the constructor: 2 <= num_bits <= 16. Any step may be given, and usable() asked.
template <class T>
class SigmaQuantizer {
public:
    QCOMM_INLINE SigmaQuantizer(int num_bits, double step, double max_value)
        : step_(static_cast<T>(step)),
          inv_(T(1) / step_),
          radius_(sigma_radius(num_bits)),
          escape_(static_cast<std::uint32_t>(escape_symbol(num_bits))),
          // The conversion is defined for every step: fmin and fmax ignore the quotient of a step that is NaN, and cut
          // off one that is infinite or negative.
          limit_(static_cast<std::int32_t>(
              __builtin_fmax(0.0, __builtin_fmin(radius_, __builtin_floor(max_value / static_cast<double>(step_)))))),
          lowest_(bit_cast<Bits>(kMagic) - static_cast<Bits>(limit_)),
          shift_(static_cast<std::uint32_t>(radius_ - limit_)) {}

    // Tells whether step and inverse are positive normal numbers, which no processor flushes to zero.
    QCOMM_INLINE bool usable() const {
        // A NaN fails each comparison, so it needs no test of its own.
        return step_ >= kSmallest && step_ <= kLargest && inv_ >= kSmallest && inv_ <= kLargest;
    }

    // Returns the symbol of any x, NaN and infinities included, without a branch. Precondition: usable().
    QCOMM_INLINE std::uint32_t operator()(T x) const {
        // Adding 1.5 * 2^(mantissa bits) rounds to the nearest even integer, which the sum's bits count from those of
        // the constant. A value that is too large for that, or not finite, has bits far outside the levels.
        const Bits above = bit_cast<Bits>(x * inv_ + kMagic) - lowest_;
        return above <= 2u * static_cast<Bits>(limit_) ? static_cast<std::uint32_t>(above) + shift_ : escape_;
    }
    // Returns the value of a level's symbol; of the escape symbol, a number that means nothing.
    QCOMM_INLINE T decode(std::uint32_t symbol) const {
        // The product is the only rounding: a level's number has at most 16 bits, which every T holds.
        return static_cast<T>(static_cast<std::int32_t>(symbol) - radius_) * step_;
    }
    // Tells whether every level is a value of the packet's dtype, as always but for steps near its largest value. Then
    // no symbol lies between the highest level's and the escape, and a minimum finds it.
    QCOMM_INLINE bool has_all_levels() const { return limit_ == radius_; }
    QCOMM_INLINE std::uint32_t symbol_of_all(T x) const {
        const Bits above = bit_cast<Bits>(x * inv_ + kMagic) - lowest_, escape = escape_;
        return static_cast<std::uint32_t>(above < escape ? above : escape);
    }
    // Returns the number of levels each side of zero that have symbols of their own.
    QCOMM_INLINE std::uint32_t limit() const { return static_cast<std::uint32_t>(limit_); }
    // For vector versions of decode().
    QCOMM_INLINE T step() const { return step_; }
    QCOMM_INLINE std::int32_t radius() const { return radius_; }
    QCOMM_INLINE std::uint32_t escape() const { return escape_; }

private:
    static constexpr T kSmallest = std::numeric_limits<T>::min(), kLargest = std::numeric_limits<T>::max();
    using Bits = std::conditional_t<sizeof(T) == sizeof(std::uint32_t), std::uint32_t, std::uint64_t>;
    // The constant 1.5 * 2^(digits - 1): between 2^(digits - 1) and 2^digits the spacing of T is 1. The half keeps a
    // negative addend in that range, so sums of both signs count up by one for each integer.
    // Inside the class the name hides that of the packet's magic number in format.h.
    static constexpr T kMagic = T(1.5) * static_cast<T>(std::int64_t{1} << (std::numeric_limits<T>::digits - 1));

    // In the order of the constructor's computations, as above.
    T step_, inv_;
    std::int32_t radius_;
    std::uint32_t escape_;
    std::int32_t limit_;
    Bits lowest_;          // of the sum for the lowest level
    std::uint32_t shift_;  // the lowest level's symbol
};

// The grid of a quantizer, for values of the dtype of `Tr`. Precondition: the quantizer has a grid of this kind.
template <class Tr>
QCOMM_INLINE SigmaQuantizer<typename Tr::Arithmetic> sigma_quantizer(const Quantizer& q) {
    return SigmaQuantizer<typename Tr::Arithmetic>(q.num_bits, q.p1, Tr::kMax);
}
QCOMM_INLINE RangeQuantizer range_quantizer(const Quantizer& q) {
    return RangeQuantizer(q.grid, q.num_bits, q.p0, q.p1);
}

// Calls f(grid) with the RangeQuantizer or SigmaQuantizer<T> of a quantizer whose grid is not kNone: a loop inside f is
// compiled for each grid and asks for its kind only once.
// Without a grid the quantizer would be taken for one on a range.
template <class Tr, class F>
QCOMM_INLINE decltype(auto) with_grid(const Quantizer& q, F&& f) {
    if (q.grid == Grid::kSigma) return f(sigma_quantizer<Tr>(q));
    return f(range_quantizer(q));
}

// Tells whether the grid can represent values of the dtype of `Tr` at all; if not, a segment travels raw. Precondition:
// the quantizer has a grid.
template <class Tr>
QCOMM_HOST_DEVICE inline bool is_usable(const Quantizer& q) {
    // A record has the extremes of a range in T. Those of values are exact there, others might not be.
    using T = typename Tr::Arithmetic;
    if (is_range(q.grid) &&
        (static_cast<double>(static_cast<T>(q.p0)) != q.p0 || static_cast<double>(static_cast<T>(q.p1)) != q.p1))
        return false;
    // Zero runs have no escapes, so all of their levels must be values of the dtype.
    if (q.coding == Coding::kRuns && 3.0 * q.p1 > static_cast<double>(Tr::kMax)) return false;
    return with_grid<Tr>(q, [](const auto& grid) { return grid.usable(); });
}
// The same on the host.
// Precondition: a num_bits that check_levels() accepts, or a raw quantizer, whose p0 = p1 = 0 are never usable.
bool is_usable(const Quantizer& quantizer, DType dtype);

// Why no segment of a packet may have a quantizer, in the order in which the reasons are looked for. This is the one
// place that knows which grid, number of bits, coding and table go together: encoders refuse a request by it, decoders
// a record.
// A new reason needs its texts: in refusal_of() for callers, and in damage_of() of csrc/cpu/packet_parse.cpp for
// packets.
enum class QuantizerFault : std::uint8_t {
    kNone,
    kNumBits,       // a coding of symbols needs a grid, of 1..16 bits
    kSigmaNumBits,  // ... and a sigma grid 2: zero, and the escape
    kUnusable,      // see is_usable
    kFixedOnSigma,  // a fixed segment has no place for escapes
    kPair,          // the two symbols of a pair are nibbles, on a sigma grid
    kRuns,          // levels of zero runs are within 3, on a sigma grid, with the built-in codes
    kOwnCode,       // too many symbols for a code
    kStaticCode,    // the table does not exist, or is for another coding or number of bits
    kStaticOnRange  // static tables are made for sigma grids: encoders refuse it, a decoder can read it
};
// Tells whether a decoder accepts such a quantizer in a packet.
constexpr bool is_readable(QuantizerFault fault) {
    return fault == QuantizerFault::kNone || fault == QuantizerFault::kStaticOnRange;
}

// Coding and number of bits of the alphabet that a static table codes; num_bits 0: there is no such table.
struct StaticAlphabet {
    Coding coding = Coding::kSingle;
    int num_bits = 0;
};
// Tells whether the quantizer's `table` is the number of a static one, whose alphabet check_coding() then asks for.
constexpr bool has_static_table(const Quantizer& q) {
    return is_block_coded(q.coding) && q.table != kTableOnWire && q.table != kNoTable;
}

// The parts of check(), for codings that have symbols. This one looks at the number of levels, ...
QCOMM_HOST_DEVICE inline QuantizerFault check_levels(const Quantizer& q) {
    if (q.grid == Grid::kNone || q.num_bits < 1 || q.num_bits > 16) return QuantizerFault::kNumBits;
    return q.grid == Grid::kSigma && q.num_bits < 2 ? QuantizerFault::kSigmaNumBits : QuantizerFault::kNone;
}
// ... and this one at whether coding and table suit them, while p0 and p1 may still be unknown. `alphabet` is that of
// the static table, looked at if has_static_table().
QCOMM_HOST_DEVICE inline QuantizerFault check_coding(const Quantizer& q, const StaticAlphabet& alphabet) {
    if (q.coding == Coding::kFixed) return is_range(q.grid) ? QuantizerFault::kNone : QuantizerFault::kFixedOnSigma;
    if (q.coding == Coding::kRuns) {
        const bool fits = q.grid == Grid::kSigma && q.num_bits == kRunsBits && q.table == kTableOnWire;
        return fits ? QuantizerFault::kNone : QuantizerFault::kRuns;
    }
    if (q.coding == Coding::kPair && (q.grid != Grid::kSigma || q.num_bits != kPairBits)) return QuantizerFault::kPair;
    // Without a code any number of bits will do: blocks are constant, fixed or raw.
    if (q.table == kNoTable) return QuantizerFault::kNone;
    if (q.table == kTableOnWire) return q.num_bits <= kMaxCodedBits ? QuantizerFault::kNone : QuantizerFault::kOwnCode;
    if (alphabet.coding != q.coding || alphabet.num_bits != q.num_bits) return QuantizerFault::kStaticCode;
    return q.grid == Grid::kSigma ? QuantizerFault::kNone : QuantizerFault::kStaticOnRange;
}

// The whole rule, for values of the dtype of `Tr`. It looks at no field that has no meaning for the coding.
template <class Tr>
QCOMM_HOST_DEVICE inline QuantizerFault check(const Quantizer& q, const StaticAlphabet& alphabet) {
    if (!has_symbols(q.coding)) return QuantizerFault::kNone;
    // Before a grid is made, whose constructor shifts by num_bits: in a hostile record that may be any byte.
    const QuantizerFault levels = check_levels(q);
    if (levels != QuantizerFault::kNone) return levels;
    if (!is_usable<Tr>(q)) return QuantizerFault::kUnusable;
    return check_coding(q, alphabet);
}

// The same on the host, which finds the static table itself.
QuantizerFault check(const Quantizer& quantizer, DType dtype);
StaticAlphabet static_alphabet(const Quantizer& quantizer);
// Returns the text for a caller whose quantizer is refused: a static string, "" for kNone.
const char* refusal_of(QuantizerFault fault);

// The code of a sigma segment: single or pair, with a static table or one on the wire.
struct SigmaCode {
    Coding coding;
    std::uint8_t table;
};
// Returns the cheapest code by the counts of a sample; `k` is the step in units of the RMS, for which static tables
// were made. An encoder may use any legal code, so a choice can be kept for later tensors of the same kind. See
// sigma_code.h.
// Preconditions: the step is usable, and k > 0. Fewer than two values, or more than 12 bits, get kNoTable.
SigmaCode choose_sigma_code(const Values& values, int num_bits, double step, double k, std::uint32_t seed,
                            int threads = 1);

}  // namespace qcomm
